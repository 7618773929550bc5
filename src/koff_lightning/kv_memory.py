"""A domain's KV memory: in each layer that has one, P slots, each a key and a value, that every token can attend to.

The slots have the positions -P..-1, before the first token. Tokens keep the positions that they have without a memory,
so domains with different P can share a batch, and a row without a memory gives what the plain model gives. Every token
sees every slot, also in layers with a sliding window that ends before the slots: a memory is for the whole text, and
training finds keys that work at any distance.

Source: Cartridges (arXiv 2506.06266): initialised from the key-value cache of real text, first slot frozen.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from koff_lightning.attention import LayerMemory
from koff_lightning.backbone import attention_modules, cache_argument, rope_of, rotary_inv_freqs
from koff_lightning.specs.memories import MAX_SLOTS
from koff_lightning.support.errors import KoffError

# Rotary embeddings whose frequencies depend on the length of the text: their keys cannot be moved by a rotation.
MOVING_ROPE = ("dynamic", "longrope")

_KINDS = ("key", "value")


class KVMemory(nn.Module):
    """The memory of one domain: fp32 keys (after the rotary embedding) and values, per layer.

    Slot 0 is frozen: it is the attention sink of the text's first token, and training it makes a model forget
    (Cartridges, section 3). The other slots are parameters.

    Args:
        shapes: Key-value heads K and head size dh of each layer, in order; None for a layer without slots.
        slots: P, at least 1 and at most 8192.
        frozen_first: Whether slot 0 is frozen; else all are parameters.

    Raises:
        KoffError: `slots` is out of range.
    """

    initialised: Tensor
    source: Tensor  # uint8 [32]: SHA-256 of the token ids it was filled from; zeros if unknown

    def __init__(self, shapes: Sequence[tuple[int, int] | None], slots: int, frozen_first: bool = True) -> None:
        super().__init__()
        if not 1 <= slots <= MAX_SLOTS:
            raise KoffError(f"a memory needs 1 to {MAX_SLOTS} slots, got {slots}: set kv.slots in that range")
        self.slots, self.depth, self._frozen = slots, len(shapes), int(frozen_first)
        own = {layer: shape for layer, shape in enumerate(shapes) if shape is not None}
        self.layers = list(own)  # those that have slots

        def zeros(count: int) -> dict[int, Tensor]:
            return {layer: torch.zeros(heads, count, size) for layer, (heads, size) in own.items()}

        self.sink_key, self.sink_value = (_Parts(zeros(self._frozen), False) for _ in range(2))
        self.key, self.value = (_Parts(zeros(slots - self._frozen), True) for _ in range(2))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("source", torch.zeros(32, dtype=torch.uint8))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], source: str | None = None, depth: int | None = None
    ) -> "KVMemory":
        """A memory, not trained, from the tensors that the method `tensors` returned.

        Args:
            tensors: `layers.{i}.key` and `layers.{i}.value`, each fp32 [K_i, P, dh], of the layers that have slots.
            source: Hex digits of the SHA-256 of the token ids that it was filled from.
            depth: Layers of the model, some of which may have no slots; None if all have, from 0 without gaps.

        Raises:
            KoffError: A tensor is missing, not expected, not fp32, or of another shape than the others.
        """
        pairs = _pairs(tensors, depth)
        count = len(pairs) if depth is None else depth
        shapes = [(pairs[i][0].shape[0], pairs[i][0].shape[2]) if i in pairs else None for i in range(count)]
        memory = cls(shapes, next(iter(pairs.values()))[0].shape[1]).requires_grad_(False)
        for index, (key, value) in pairs.items():
            memory._write_(index, key, value)
        memory.initialised.fill_(True)
        if source is not None:
            memory.source.copy_(torch.tensor(list(bytes.fromhex(source)), dtype=torch.uint8))
        return memory

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all slots: `layers.{i}.key` and `layers.{i}.value`, each [K, P, dh]."""
        pairs = {f"layers.{index}": self.layer(index) for index in self.layers}
        return {f"{at}.{kind}": part.detach() for at, p in pairs.items() for kind, part in zip(_KINDS, p, strict=True)}

    @property
    def source_hash(self) -> str | None:
        """`source` in hex digits; None if unknown."""
        return bytes(self.source.tolist()).hex() if self.source.any() else None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of one layer, each [K, P, dh]."""
        key = torch.cat([self.sink_key[index], self.key[index]], dim=1)  # [K, P, dh]
        value = torch.cat([self.sink_value[index], self.value[index]], dim=1)  # [K, P, dh]
        return key, value

    @torch.no_grad()
    def initialise_(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        """Fill the memory with the model's key-value cache of a text, moved to the positions -P..-1.

        The model then continues any tokens as if it had read the text before them; exactly so, if all layers have slots
        and no layer's sliding window ends inside the text.

        Args:
            model: The frozen model, in eval mode, with memories, adapters and gates off.
            input_ids: Long [n] with n >= P; the first P tokens are used.

        Raises:
            KoffError: the text is shorter than P, the layers' shapes are not the model's, the rotary embedding
                cannot be moved, or a memory is active.
        """
        check_movable(model.config)
        freqs = rotary_inv_freqs(model)
        _check_text(input_ids, self.slots)
        _check_memories_off(model)
        cache = DynamicCache()  # made without the config: with it, sliding-window layers would drop the first tokens
        model(
            input_ids=input_ids[None, : self.slots].to(model.device),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): cache},
        )
        pairs = [(layer.keys[0].float(), layer.values[0].float()) for layer in cache.layers]  # each [K, P, dh]
        self.check_shapes([(key.shape[0], key.shape[2]) for key, _ in pairs])
        for index in self.layers:
            key, value = pairs[index]
            self._write_(index, rotate_keys(key, freqs[index], -self.slots), value)
        self.initialised.fill_(True)
        text = input_ids[: self.slots].cpu().numpy().astype("<i8").tobytes()  # the same on every machine
        self.source.copy_(torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8))

    @torch.no_grad()
    def fill_normal_(self, std: float) -> None:
        """Fill all slots, a frozen one too, with normal noise; rotating it would not change its distribution."""
        for part in (self.sink_key, self.sink_value, self.key, self.value):
            for index in self.layers:  # drawn on the CPU, so that one seed gives the same noise on every device
                part[index].copy_(torch.randn(part[index].shape, device="cpu") * std)
        self.initialised.fill_(True)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Delete the slots of all other layers."""
        for part in (self.sink_key, self.sink_value, self.key, self.value):
            for index in set(self.layers) - set(layers):
                delattr(part, str(index))
        self.layers = [index for index in self.layers if index in layers]

    def _write_(self, index: int, key: Tensor, value: Tensor) -> None:
        """Copy keys and values, each [K, P, dh], into one layer."""
        first = self._frozen
        self.sink_key[index].copy_(key[:, :first])
        self.sink_value[index].copy_(value[:, :first])
        self.key[index].copy_(key[:, first:])
        self.value[index].copy_(value[:, first:])

    def check_shapes(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Raise KoffError unless the memory fits layers of these (kv heads K, head size dh)."""
        own = [(self.key[i].shape[0], self.key[i].shape[2]) if i in self.layers else None for i in range(self.depth)]
        if len(own) != len(wanted) or any(mine not in (None, its) for mine, its in zip(own, wanted, strict=True)):
            raise KoffError(
                f"the memory was made for layers with (key-value heads, head size) {own} but the model has "
                f"{list(wanted)}: make the memory from this model"
            )


class _Parts(nn.Module):
    """Parameters or buffers by layer index. torch's `ParameterList` allows neither gaps nor buffers."""

    def __init__(self, tensors: Mapping[int, Tensor], trained: bool) -> None:
        super().__init__()
        for index, tensor in tensors.items():
            if trained:
                self.register_parameter(str(index), nn.Parameter(tensor))
            else:
                self.register_buffer(str(index), tensor)

    def __getitem__(self, index: int) -> Tensor:
        return getattr(self, str(index))


def rotate_keys(key: Tensor, inv_freq: Tensor, shift: int) -> Tensor:
    """Move keys by `shift` positions, exactly: rotary embeddings add up (RoFormer, arXiv 2104.09864, eq. 15).

    Args:
        key: [..., P, dh] after the rotary embedding, in the half-split layout of transformers (`rotate_half`).
        inv_freq: [dh/2] radians per position, with the model's own scaling. A factor on cos and sin (yarn) is in the
            keys already and stays.
        shift: Positions; negative moves towards the start.

    Returns:
        [..., P, dh] in the keys' dtype, computed in fp32 or better.

    Raises:
        KoffError: inv_freq does not cover the head (partial rotary embedding).
    """
    if 2 * len(inv_freq) != key.shape[-1]:
        raise KoffError(
            f"rotary embeddings of {2 * len(inv_freq)} of {key.shape[-1]} head dimensions are not supported: "
            "use a model that rotates the whole head"
        )
    angle = shift * inv_freq.detach().cpu().double()  # [dh/2]; double, as fp32 loses 1e-4 rad at 8192 positions
    dtype = torch.promote_types(key.dtype, torch.float32)
    cos, sin = angle.cos().to(key.device, dtype), angle.sin().to(key.device, dtype)
    first, second = key.to(dtype).chunk(2, dim=-1)  # each [..., P, dh/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(key.dtype)


def read_memories(rows: Sequence[KVMemory | None], layer: int) -> LayerMemory | None:
    """What each row of a batch reads in one layer.

    Args:
        rows: The memory of each of the B rows, None for none.
        layer: Index of the layer.

    Returns:
        None if no row has a memory; a single memory [1, K, P, dh] if all rows read the same one; else one per row
        [B, K, P, dh], padded to the largest P, where `visible` hides the padding.
    """
    present = list(dict.fromkeys(memory for memory in rows if memory is not None))
    if not present:
        return None
    pairs = {memory: memory.layer(layer) for memory in present}  # memory -> [K, P, dh] twice
    if len(set(rows)) == 1:
        key, value = pairs[present[0]]
        return LayerMemory(key[None], value[None])
    slots = max(memory.slots for memory in present)
    padded = {memory: tuple(_pad_slots(part, slots) for part in pair) for memory, pair in pairs.items()}
    filled = [padded[memory or present[0]] for memory in rows]  # a row without a memory: any memory, hidden
    key, value = (torch.stack(parts) for parts in zip(*filled, strict=True))  # each [B, K, P, dh]
    return LayerMemory(key, value, _visible([memory.slots if memory else 0 for memory in rows], slots, key.device))


def _pairs(tensors: Mapping[str, Tensor], depth: int | None) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (key, value) from named tensors, checked; arguments as of `KVMemory.from_tensors`."""
    if depth is None:
        layers = list(range(max(1, (len(tensors) + 1) // 2)))
    else:
        layers = [i for i in range(depth) if any(f"layers.{i}.{kind}" in tensors for kind in _KINDS)] or [depth - 1]
    wanted = [f"layers.{index}.{kind}" for index in layers for kind in _KINDS]
    if odd := sorted(set(wanted) ^ set(tensors)):
        due = "layers.0.key, layers.0.value, layers.1.key and so on, without gaps"
        due = due if depth is None else f"layers.I.key and layers.I.value of some layers I from 0 to {depth - 1}"
        raise KoffError(f"a KV memory holds {due}: {odd[0]} is {'left over' if odd[0] in tensors else 'missing'}")
    first = tensors[wanted[0]]
    for name in wanted:
        part, key = tensors[name], tensors[name.replace("value", "key")]
        if part.dtype != torch.float32 or part.ndim != 3 or part.shape[1] != first.shape[1] or part.shape != key.shape:
            raise KoffError(
                "keys and values of a KV memory are torch.float32 [heads, slots, head size], alike within a layer and "
                f"of equally many slots in all: {name} is {part.dtype} {list(part.shape)}"
            )
        if not part.isfinite().all():
            raise KoffError(f"the KV memory holds nan or inf: {name}; get it again")
    return {index: (tensors[f"layers.{index}.key"], tensors[f"layers.{index}.value"]) for index in layers}


def _pad_slots(part: Tensor, slots: int) -> Tensor:
    """Pad [K, P, dh] to `slots` with zeros, to be hidden."""
    return part if part.shape[1] == slots else F.pad(part, (0, 0, 0, slots - part.shape[1]))


def _visible(counts: list[int], slots: int, device: torch.device) -> Tensor | None:
    """Bool [B, P]: row b sees its first counts[b] slots; None if every row sees all."""
    if min(counts) == slots:
        return None
    return (torch.arange(slots) < torch.tensor(counts)[:, None]).to(device)


def check_movable(config: PreTrainedConfig) -> None:
    """Raise KoffError for a model whose rotary embedding depends on the length of the text."""
    kind = rope_of(config).get("rope_type", "default")
    if kind in MOVING_ROPE:
        raise KoffError(
            f"rope type '{kind}' depends on the text's length, so no memory can be placed: use a model with rope type "
            "default, linear, llama3 or yarn, or set model.kv to null"
        )


def check_one_rope(config: PreTrainedConfig) -> None:
    """Raise KoffError, for vLLM, for a model whose rotary frequencies depend on the layer or the text's length."""
    if rope_of(config) is not config.rope_parameters:
        kind = config.model_type.removeprefix("koff_")
        raise KoffError(
            f"the plugin for vLLM takes layers that have one rotary embedding, those of {kind!r} have two: serve it "
            "with --engine own"
        )
    if (kind := config.rope_parameters.get("rope_type")) in MOVING_ROPE:
        raise KoffError(
            f"vLLM's rotary frequencies do not change with the length of a text, as rope type {kind!r} has them do: "
            "serve it with --engine own"
        )


def _check_text(input_ids: Tensor, slots: int) -> None:
    if input_ids.ndim != 1 or input_ids.is_floating_point():
        raise KoffError(f"a memory starts from one row of token ids [n], got {input_ids.dtype} {list(input_ids.shape)}")
    if len(input_ids) < slots:
        raise KoffError(
            f"a memory of {slots} slots starts from at least {slots} tokens of text, got {len(input_ids)}: "
            "give more text or set kv.slots lower"
        )


def _check_memories_off(model: PreTrainedModel) -> None:
    readers = [getattr(module, "koff_memory", None) for module in attention_modules(model)]
    if any(read is not None and read() is not None for read in readers):
        raise KoffError("a memory is active while another is initialised: turn the memories off first")
