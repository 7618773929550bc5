"""From logits to the next token of each row, and to log-probabilities.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from koff_lightning.serving.engine import Options, Token


class Sampler:
    """Chooses the tokens of one answer. Its random numbers are its own, so rows beside it change nothing.

    Args:
        options: How the answer is continued.
    """

    def __init__(self, options: Options) -> None:
        self._warpers: list[TemperatureLogitsWarper | TopPLogitsWarper] = []
        self._random = torch.Generator()
        if options.temperature:
            self._random.seed() if options.seed is None else self._random.manual_seed(options.seed)
            self._warpers.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_p < 1:
                self._warpers.append(TopPLogitsWarper(options.top_p))

    def pick(self, logits: Tensor) -> int:
        """The next token, by logits [V]."""
        if not self._warpers:
            return int(logits.argmax())
        scores = logits[None].double().cpu()  # [1, V]
        scores -= scores.max()  # so that no temperature makes an infinity of the largest
        for warp in self._warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))


def described(ids: list[int], logits: Tensor, options: Options) -> list[Token]:
    """Tokens with what was asked for about them.

    Args:
        ids: T tokens.
        logits: That each of them was chosen by, [T, V].
        options: How the answer is continued.
    """
    if options.logprobs is None:
        return [Token(token) for token in ids]
    scores = logits.float().log_softmax(-1)  # [T, V]
    own = scores.gather(-1, torch.tensor(ids, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(options.logprobs, scores.shape[-1]))
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Token(token, value, tuple(zip(*top, strict=True))) for token, value, top in zip(ids, own, tops, strict=True)
    ]
