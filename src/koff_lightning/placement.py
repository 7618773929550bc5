"""In which layers a memory is: an option's value (`all`, `top:18`, `top:64%`, a list), and the layers it stands for."""

import re
from collections.abc import Sequence

from koff_lightning.support.errors import KoffError

ALL = "all"
_TOP = re.compile(r"top:(\d+(?:\.\d+)?)(%?)")

Layers = list[int] | str  # numbers from 0, or `all`, `top:18`, `top:64%`


def check_words(words: Layers, option: str) -> None:
    """Raise KoffError unless `words` have one of the forms that `placed` takes, whatever the model."""
    if isinstance(words, str):
        found = _TOP.fullmatch(words)
        number = float(found[1]) if found else 0
        sound = words == ALL or (found and number > 0 and (number <= 100 if found[2] else number.is_integer()))
    else:
        sound = words and all(type(layer) is int and layer >= 0 for layer in words) and len(set(words)) == len(words)
    if not sound:
        raise KoffError(
            f"{option} must be all, top:18 (so many of the last layers), top:64% (a share of the layers), or a list of "
            f"different layers as [10, 11], the first being 0; got {words!r}"
        )


def placed(words: Layers, depth: int, option: str = "layers") -> list[int]:
    """The layers that `words` stand for, in order.

    Args:
        words: `all`, `top:N`, `top:P%` (rounded to whole layers, at least one), or a list.
        depth: Layers of the model.
        option: Name of the option in messages.

    Raises:
        KoffError: The model has no such layers.
    """
    check_words(words, option)
    if words == ALL:
        return list(range(depth))
    if isinstance(words, str):
        number, percent = _TOP.fullmatch(words).groups()
        count = max(1, int(float(number) / 100 * depth + 0.5)) if percent else int(float(number))
        if count > depth:
            raise KoffError(f"{option} is {words}, but the backbone has only {depth} layers: give top:{depth} or all")
        return list(range(depth - count, depth))
    if beyond := [layer for layer in words if layer >= depth]:
        raise KoffError(f"{option} names layer {beyond[0]}, but the backbone has {depth} layers, 0 to {depth - 1}")
    return sorted(words)


def shortest(layers: Sequence[int], depth: int) -> Layers:
    """Layers as they are saved: `all`, or their list."""
    return ALL if len(layers) == depth else list(layers)


def shown(layers: Sequence[int]) -> str:
    """Layers as they are printed: `10-27`, `0, 2-3`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
