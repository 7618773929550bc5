"""Log-likelihood of whole texts, window by window as HFLM scores them, at less cost.

Windows and arithmetic are HFLM's, so the scores are too, but for the start token with which all windows of an artifact
or a checkpoint begin where its run's rows do. Left out is what a sum needs not: logits of what is context
alone or padding, of all rows at once, and whether the likeliest token is the right one.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from koff_lightning.data.cache import MOSTLY, NOTABLE
from koff_lightning.support.errors import KoffError

TOKENS = 256  # whose logits stand in memory at a time: [256, V]
# Padding included, in a batch on a CPU: koff-tiny takes 5 to 10 % longer for a token where there are 2,048.
ON_CPU = 1024
Window = tuple[list[int], list[int]]  # what is read first, and what is predicted
Part = tuple[int, list[int], list[int]]  # of a text: its number, and a window


def windows_of(ids: list[int], prefix: int, length: int, opening: int | None = None) -> list[Window]:
    """The windows of a text's ids, at most `length` tokens long; the last one is as long as the text allows.

    Args:
        ids: Of the text, without a start token.
        prefix: What stands before the first.
        length: The longest that the model reads.
        opening: What stands before the others too, as in a run's rows (data/packing.py); None for nothing, as in HFLM.
    """
    fits = length if opening is None else max(1, length - 1)
    windows = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, prefix, fits, context_len=1)]
    if opening is None:
        return windows
    return windows[:1] + [([opening, *context], predicted) for context, predicted in windows[1:]]


class TextLikelihood(float):
    """Log-likelihood of a text in nats, and `num_bytes`: of the text, less those that the tokenizer does not know."""

    num_bytes: int

    @classmethod
    def of(cls, value: float, num_bytes: int) -> "TextLikelihood":
        """That of a text of which the tokenizer knows so many bytes."""
        made = cls(value)
        made.num_bytes = num_bytes
        return made


def known_bytes(texts: Sequence[str], unknown: Sequence[int], tasks: Sequence[str | None]) -> list[int]:
    """UTF-8 bytes of each text that the tokenizer knows. Where it cannot read a part of a task's text, that is said.

    Args:
        texts: The texts.
        unknown: Of each, the bytes in whose place the tokenizer puts its unknown token.
        tasks: Of each, the name of its task.

    Raises:
        KoffError: More than `MOSTLY` of a task's bytes are unknown.
    """
    sizes = [len(text.encode()) for text in texts]
    for name in dict.fromkeys(tasks):
        of_task = [place for place, task in enumerate(tasks) if task == name]
        _check(name or "text", sum(unknown[place] for place in of_task), sum(sizes[place] for place in of_task))
    return [size - less for size, less in zip(sizes, unknown, strict=True)]


def _check(task: str, unknown: int, size: int) -> None:
    """Say or refuse a task of whose bytes so many are unknown, by the shares that a run's domains have."""
    share = unknown / max(1, size)
    if share > MOSTLY:
        raise KoffError(
            f"{task}: the tokenizer does not know {share:.0%} of the text (by bytes), so there is little to score: "
            "leave this task out, or take a model whose tokenizer reads this text"
        )
    if share > NOTABLE:
        rank_zero_warn(
            f"{task}: the tokenizer does not know {share:.1%} of the text (by bytes): its unknown token stands there, "
            "or nothing. koff_bpb does not count these bytes, as a run does not, but counts what the tokens cost; "
            "other tasks divide by these bytes too, so their bits per byte and perplexities are too low"
        )


@torch.no_grad()
def log_likelihoods(
    texts: Sequence[Sequence[Window]],
    hidden: Callable[[Tensor], Tensor],
    head: nn.Module,
    rows: int,
    dtype: torch.dtype | None = None,
    silent: bool = False,
) -> list[float]:
    """Of the predicted tokens of each text, in nats, summed.

    Args:
        texts: The windows of each; all are read longest first, so that rows of a batch hold little padding, and too
            large a batch fails at once.
        hidden: Last hidden states [B, T, d] of ids [B, T] that are padded on the right.
        head: What makes logits of them.
        rows: Windows at a time; on a CPU fewer where they are long, since more at a time is no faster there.
        dtype: Of the softmax; None for that of the logits.
        silent: Show no progress.
    """
    device, sums = head.weight.device, [0.0] * len(texts)
    windows = [(text, *window) for text, parts in enumerate(texts) for window in parts]
    windows.sort(key=lambda window: -len(window[1]) - len(window[2]))
    with tqdm(total=len(windows), desc="windows of text", disable=silent, leave=False) as bar:
        for batch in _batches(windows, rows, ON_CPU if device.type == "cpu" else None):
            read = [torch.tensor(context + predicted[:-1]) for _, context, predicted in batch]
            states = hidden(pad_sequence(read, batch_first=True).to(device))  # [B, T, d]
            for (text, _, predicted), ids, row in zip(batch, read, states, strict=True):
                last = row[len(ids) - len(predicted) : len(ids)]  # [N, d]
                sums[text] += _log_likelihood(last, torch.tensor(predicted, device=device), head, dtype)
            bar.update(len(batch))
    return sums


def _batches(windows: Sequence[Part], rows: int, tokens: int | None) -> Iterator[Sequence[Part]]:
    """Windows, the longest first, by so many at a time, and no more than make so many tokens with their padding."""
    first = 0
    while first < len(windows):
        longest = len(windows[first][1]) + len(windows[first][2]) - 1
        fit = rows if tokens is None else max(1, min(rows, tokens // longest))
        yield windows[first : first + fit]
        first += fit


def _log_likelihood(states: Tensor, labels: Tensor, head: nn.Module, dtype: torch.dtype | None) -> float:
    """Of labels [N] given states [N, d]."""
    parts = [
        torch.log_softmax(head(state), -1, dtype=dtype).gather(1, label[:, None])
        for state, label in zip(states.split(TOKENS), labels.split(TOKENS), strict=True)
    ]
    return float(torch.cat(parts).sum())
