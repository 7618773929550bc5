"""Attention to memory and tokens: the merge of two flash attentions, one attention with a mask, flex attention."""

from collections.abc import Callable
from functools import partial

import torch
from findings import SHORT, Findings, fresh_memory, gap, largest, most_memory, timed
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from koff_lightning.attention import LayerMemory, attend_merged, attend_reference

Way = Callable[..., Tensor]


def flex_way(made: list[Tensor], bounds: Tensor | None) -> Way:
    """Flex attention: slots [B, K, P, dh] visible to all, tokens causal inside their documents (bounds int32 [D + 1]).

    What of it belongs to a batch, the blocks to be looked at, is made here: all layers share it.
    """
    (rows, _, length, _), slots, device = made[0].shape, made[3].shape[2], made[0].device
    number = torch.zeros(rows, length, dtype=torch.int64, device=device)  # of a token's document, [B, T]
    if bounds is not None:
        number = torch.bucketize(torch.arange(rows * length, device=device), bounds, right=True).view(rows, length)

    def seen(row: Tensor, head: Tensor, at: Tensor, of: Tensor) -> Tensor:
        token = (of - slots).clamp(min=0)
        return (of < slots) | ((at >= token) & (number[row, at] == number[row, token]))

    blocks = create_block_mask(seen, rows, None, length, slots + length, device=device)
    attend = torch.compile(flex_attention) if made[0].is_cuda else flex_attention  # as it is, it makes all scores

    def way(query: Tensor, key: Tensor, value: Tensor, memory: LayerMemory, *_: object) -> Tensor:
        key, value = torch.cat([memory.key, key], dim=2), torch.cat([memory.value, value], dim=2)  # [B, K, P + T, dh]
        return attend(query, key, value, block_mask=blocks, enable_gqa=True)

    return way


WAYS: dict[str, Way | None] = {"reference": attend_reference, "merged": attend_merged, "flex": None}  # see `flex_way`
MAY_FAIL = ("flex",)  # not ours, and of no use to us where it fails


def attend(say: Findings, device: str, tiny: bool) -> None:
    """Each way beside the reference (one attention over memory and tokens, with a mask): values, gradients, time."""
    rows, heads, kv_heads, slots, width = (2, 4, 2, 8, 16) if tiny else (4, 24, 8, 256, 128)
    for length in (64,) if tiny else (512, 2048, 4096):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tokens, memory = (rows, kv_heads, length, width), (rows, kv_heads, slots, width)
        shapes = [(rows, heads, length, width), tokens, tokens, memory, memory]
        made = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        for packed in (False, True):
            about = {"length": length, "packed": packed, "dtype": SHORT[str(dtype)[6:]]}
            _compare(say, device, made, _bounds(rows, length, device) if packed else None, about, 3 if tiny else 20)


def _compare(
    say: Findings, device: str, made: list[Tensor], bounds: Tensor | None, about: dict[str, object], rounds: int
) -> None:
    """A row for each way, with its gaps from the reference: of the output and of the gradients of what was `made`."""
    right: list[Tensor] = []
    mask = None if bounds is None else _mask(made[0], bounds)
    for name, way in WAYS.items():
        with say.trying(name in MAY_FAIL, what=f"attention, {name}", **about):
            documents = bounds if name == "merged" and made[0].is_cuda else None  # on a CPU the merge reads the mask
            run = partial(_attended, way or flex_way(made, bounds), made, mask, documents)
            fresh_memory(device)
            found = run()
            figures: dict[str, object] = {}
            if right:
                gaps = [gap(one, other) for one, other in zip(found, right, strict=False)]
                figures = {"gap": largest(gaps), "gaps": gaps}
            right = right or found
            seconds = timed(run, device, rounds)
            say(what=f"attention, {name}", **about, **figures, seconds=seconds, gib=most_memory(device))


def _bounds(rows: int, length: int, device: str) -> Tensor:
    """Where documents of a half, a quarter and a quarter of each row begin and the last ends, int32 [D + 1]."""
    begins = [row * length + at for row in range(rows) for at in (0, length // 2, 3 * length // 4)]
    return torch.tensor([*begins, rows * length], dtype=torch.int32, device=device)


def _mask(query: Tensor, bounds: Tensor) -> Tensor:
    """Which tokens see which inside their documents, bool [B, 1, T, T]."""
    rows, length = query.shape[0], query.shape[2]
    number = torch.bucketize(torch.arange(rows * length, device=query.device), bounds, right=True)
    number = number.view(rows, 1, length)
    return (number[..., :, None] == number[..., None, :]).tril()


def _attended(way: Way, made: list[Tensor], mask: Tensor | None, documents: Tensor | None) -> list[Tensor]:
    """The output and, where there is a backward, gradients of query, key, value, memory key, memory value."""
    forward_only = made[0].is_cpu and way not in WAYS.values()  # there flex attention has no backward
    query, key, value, *memory = [each.detach() for each in made] if forward_only else made
    more = () if documents is None else (documents,)
    out = way(query, key, value, LayerMemory(*memory), mask, None, mask is None, *more)
    return [out.detach(), *(() if forward_only else torch.autograd.grad(out.float().square().sum(), made))]
