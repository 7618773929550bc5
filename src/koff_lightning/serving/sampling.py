"""From logits to the next token of each row, and to log-probabilities.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from koff_lightning.serving.engine import Failed, Options, Token


class Sampler:
    """Chooses the tokens of one answer. Its random numbers are its own, so rows beside it change nothing.

    Args:
        options: How the answer is continued.
    """

    def __init__(self, options: Options) -> None:
        self._temperature, self._top_p, self._random = options.temperature, options.top_p, torch.Generator()
        if self._temperature:
            self._random.seed() if options.seed is None else self._random.manual_seed(options.seed)

    def pick(self, logits: Tensor) -> int:
        """The next token, by logits [V]."""
        if not self._temperature:
            return int(logits.argmax())
        scores = (logits.double() - logits.max()) / self._temperature  # none makes an infinity of the largest, [V]
        shares, places = nucleus(scores.float().softmax(-1), self._top_p)
        # One random number, whatever V is: multinomial draws V of them, which takes longer than a small model.
        sums = shares.double().cumsum(-1)
        drawn = torch.rand((), generator=self._random, dtype=torch.double).to(sums.device) * sums[-1]
        place = torch.searchsorted(sums, drawn, right=True).clamp(max=len(sums) - 1)
        return int(place if places is None else places[place])


def nucleus(shares: Tensor, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The fewest likeliest tokens that have `top_p` of the probability together (Holtzman et al., ICLR 2020).

    Args:
        shares: Probabilities, [V].
        top_p: 1 for all of them.

    Returns:
        Their probabilities, [K], and which tokens they are, [K]; None for all of them in their order.
    """
    if top_p >= 1:
        return shares, None
    count = 64  # mostly enough: to sort all V takes far longer
    while True:
        best = shares.topk(min(count, len(shares)))
        if count >= len(shares) or best.values.sum() >= top_p:
            break
        count *= 16
    keep = best.values.double().cumsum(-1) - best.values < top_p
    return best.values[keep], best.indices[keep]


def check_finite(logits: Tensor) -> None:
    """Refuse logits that nothing can be chosen or scored by; minus infinity is a probability of 0.

    Args:
        logits: [..., V].

    Raises:
        Failed: The largest of some V is not finite, as with a NaN among them.
    """
    if not logits.amax(-1).isfinite().all():
        raise Failed("the model's numbers are not finite")


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
