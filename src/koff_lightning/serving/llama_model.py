"""A decomposed model in llama.cpp: texts as sequences of its token cache, each with the memory that it reads.

A LoRA is llama.cpp's own adapter. A KV memory becomes the beginning of a sequence: keys moved from the positions
-P..-1 to 0..P-1, text from P on, which to rotary attention is the same. What a sequence holds is compared with the
memory before its text is read, and after every step that nothing of it was lost.

Shapes: P slots, T tokens, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.to_gguf import LORA, MODEL, Form, check_same, form_of, to_gguf, write_lora
from koff_lightning.backbone import rotary_inv_freqs
from koff_lightning.kv_memory import KVMemory, rotate_keys
from koff_lightning.serving.llama_library import complaint, library
from koff_lightning.serving.llama_state import data_of, with_slots
from koff_lightning.support.errors import KoffError

CACHES = {"f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16"}
PART = 512  # tokens that are decoded at a time
_CONTEXT = 4096  # of one text, where the model has more and nothing is said


@dataclass
class _Loaded:
    """A memory in the engine."""

    adapter: Any = None  # llama_adapter_lora *
    slots: int = 0
    state: bytes = b""


@dataclass(eq=False)
class Text:
    """A sequence.

    Args:
        number: In the cache.
        memory: What it reads; None for nothing.
        length: Its cells, slots included.
    """

    number: int
    memory: str | None
    length: int = 0


class LlamaModel:
    """An artifact in llama.cpp. One thread at a time may call it.

    Args:
        folder: The artifact.
        gguf: What `koff convert gguf` made of it; by default it is made now, in a temporary folder.
        kind: Type of the weights where they are converted now: `f32`, `f16` or `q8_0`.
        rows: Most texts at a time.
        context: Tokens of one text, slots included; by default the model's own, at most 4096.
        cache: Type of the token cache, `f32` or `f16`.
        threads: By default as many as torch uses.

    Attributes:
        model: What is known of the artifact: tokenizer, manifest, memories. Its weights are gone.
        room: Tokens that one text can have, slots included.

    Raises:
        KoffError: llama.cpp is not there, cannot hold the model, or the files are those of another one.
    """

    def __init__(
        self,
        folder: str | Path,
        gguf: str | Path | None = None,
        *,
        kind: str = "f16",
        rows: int = 4,
        context: int | None = None,
        cache: str = "f16",
        threads: int | None = None,
    ) -> None:
        if cache not in CACHES:
            raise KoffError(f"the token cache's type must be one of {', '.join(CACHES)}; got {cache!r}")
        self._ffi, self._lib = library()
        self.model: DecomposedModel = load_decomposed(folder)
        self._form: Form = form_of(self.model)
        self._model = self._context = None
        self._load(Path(folder), None if gguf is None else Path(gguf).expanduser(), kind)
        _hollow_(self.model)
        largest = max([self.model.memories.slots(name).slots for name in self._with_slots()], default=0)
        trained = self._lib.llama_model_n_ctx_train(self._model)
        self._open(rows + 1, context or min(trained, _CONTEXT + largest), cache, threads or torch.get_num_threads())
        self._rows, self._free = rows + 1, list(range(rows + 1))  # one for templates
        self._loaded: dict[str | None, _Loaded] = {None: _Loaded()}
        self._templates: dict[int, bytes] = {}  # slots -> the state of as many placeholders
        for name in self.model.domains:
            self._take_up(name)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the backbone."""
        return self.model.tokenizer

    # ------------------------------------------------------------------------------------------ memories

    @property
    def domains(self) -> list[str]:
        """The memories that texts can read."""
        return [name for name in self._loaded if name is not None]

    def slots(self, memory: str | None) -> int:
        """Places that a memory takes of a text's room."""
        return self._of(memory).slots

    def add_memory(self, path: str | Path, name: str | None = None) -> str:
        """Load one more memory from its folder; see `DecomposedModel.add_memory`."""
        domain = self.model.add_memory(path, name)
        try:
            self._take_up(domain)
        except Exception:
            self.model.remove_memory(domain)
            raise
        return domain

    def remove_memory(self, name: str) -> None:
        """Drop a memory that no text reads."""
        self.model.remove_memory(name)
        loaded = self._loaded.pop(name)
        if loaded.adapter is not None:
            self._adapt(None)  # the library would take a new adapter at the same address for the freed one
            self._lib.llama_adapter_lora_free(loaded.adapter)

    def _with_slots(self) -> list[str]:
        return [name for name in self.model.domains if self.model.memories.slots(name) is not None]

    def _of(self, memory: str | None) -> _Loaded:
        if memory not in self._loaded:
            raise KoffError(f"there is no memory {memory!r}; loaded: {', '.join(self.domains) or 'none'}")
        return self._loaded[memory]

    def _take_up(self, name: str) -> None:
        loaded, slots = _Loaded(), self.model.memories.slots(name)
        if slots is not None:
            loaded.slots, loaded.state = slots.slots, self._state(name, slots)
        with TemporaryDirectory() as work:
            path = Path(work) / LORA.format("memory")
            if write_lora(self.model, self._form, name, path):
                loaded.adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
                if loaded.adapter == self._ffi.NULL:
                    raise KoffError(f"llama.cpp cannot load the LoRA of {name}: {complaint()}")
        self._loaded[name] = loaded

    def _state(self, name: str, memory: KVMemory) -> bytes:
        """A sequence that has read a memory's slots, as llama.cpp saves one."""
        slots = memory.slots
        if len(memory.layers) < memory.depth:
            raise KoffError(
                f"llama.cpp has one row of places for all layers, and the memory {name} has slots in "
                f"{len(memory.layers)} of {memory.depth} only: serve it with --engine own"
            )
        if slots >= self.room:
            raise KoffError(
                f"the {slots} slots of the memory {name} leave no place in a context of {self.room} tokens: give a "
                "larger one if the model has it, or serve it with --engine own, where slots take none"
            )
        if slots not in self._templates:
            text = self._open_text(None)
            try:
                self._decode([(text, [0] * slots)], None, everywhere=False)
                self._templates[slots] = self._saved(text)
            finally:
                self.end(text)
        return with_slots(self._templates[slots], self._pairs(memory))

    def _pairs(self, memory: KVMemory) -> list[tuple[np.ndarray, np.ndarray]]:
        freqs = rotary_inv_freqs(self.model.backbone)
        found = []
        for index in range(memory.depth):
            key, value = (part.detach().float() for part in memory.layer(index))  # [K, P, dh]
            key = self._form.rotated(rotate_keys(key, freqs[index], memory.slots))
            found.append(tuple(part.transpose(0, 1).flatten(1).numpy() for part in (key, value)))
        return found

    # --------------------------------------------------------------------------------------------- texts

    def begin(self, memory: str | None) -> Text:
        """A new text, with the slots of its memory read.

        Raises:
            KoffError: No such memory, no place for one more text, or the engine does not hold what it was given.
        """
        loaded = self._of(memory)
        text = self._open_text(memory)
        if loaded.slots:
            state, text.length = loaded.state, loaded.slots
            took = self._lib.llama_state_seq_set_data(self._context, state, len(state), text.number)
            try:
                if took != len(state) or not self._holds(text, loaded):
                    raise KoffError(f"llama.cpp did not take the slots of {memory} ({complaint()})")
            except KoffError:
                self.end(text)
                raise
        return text

    def read(self, parts: Sequence[tuple[Text, Sequence[int]]], everywhere: bool = False) -> list[Tensor]:
        """Read more tokens of texts; those of one memory in one pass.

        Args:
            parts: Texts and their next tokens, one or more each.
            everywhere: Give the logits at all the tokens; else at the last.

        Returns:
            Logits [T, V] or [1, V] of each text.

        Raises:
            KoffError: A text has no room left, or the engine failed.
        """
        for text, ids in parts:
            if not ids or text.length + len(ids) > self.room:
                raise KoffError(f"a text of {text.length} and {len(ids)} tokens does not fit in {self.room}")
        found: dict[int, Tensor] = {}
        for memory in dict.fromkeys(text.memory for text, _ in parts):
            places = [place for place, (text, _) in enumerate(parts) if text.memory == memory]
            logits = self._decode([parts[place] for place in places], self._of(memory).adapter, everywhere)
            found |= dict(zip(places, logits, strict=True))
        return [found[place] for place in range(len(parts))]

    def end(self, text: Text) -> None:
        """Free a text's place."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), text.number, -1, -1)
        self._free.append(text.number)

    def clear(self) -> None:
        """Free all places."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._free = list(range(self._rows))

    def close(self) -> None:
        """Free all that the engine holds."""
        for loaded in self._loaded.values():
            if loaded.adapter is not None:
                self._lib.llama_adapter_lora_free(loaded.adapter)
        self._loaded = {}
        if self._context is not None:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _open_text(self, memory: str | None) -> Text:
        if not self._free:
            raise KoffError("no place is free for one more text")
        text = Text(self._free.pop(0), memory)
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), text.number, -1, -1)
        return text

    def _saved(self, text: Text) -> bytes:
        size = self._lib.llama_state_seq_get_size(self._context, text.number)
        room = self._ffi.new("uint8_t[]", size)
        if self._lib.llama_state_seq_get_data(self._context, room, size, text.number) != size:
            raise KoffError(f"llama.cpp cannot save a text's state: {complaint()}")
        return bytes(self._ffi.buffer(room, size))

    def _holds(self, text: Text, loaded: _Loaded) -> bool:
        """Whether a text's cells are the memory's, to the bit."""
        held, due = data_of(self._saved(text), loaded.slots), data_of(loaded.state, loaded.slots)
        return held.rstrip(b"\0") == due.rstrip(b"\0")  # behind them: how many cells the other sequences have, 0

    # --------------------------------------------------------------------------------------- the library

    def _load(self, folder: Path, gguf: Path | None, kind: str) -> None:
        parameters = self._lib.llama_model_default_params()
        parameters.use_extra_bufts = False  # repacked weights are summed in another order
        with TemporaryDirectory() as work:
            if gguf is None:
                gguf = Path(work) / "gguf"
                to_gguf(folder, gguf, kind)
            check_same(gguf, self.model)
            self._model = self._lib.llama_model_load_from_file(os.fsencode(gguf / MODEL), parameters)
        if self._model == self._ffi.NULL:
            self._model = None
            raise KoffError(f"llama.cpp cannot load {gguf / MODEL}: {complaint()}")

    def _open(self, rows: int, context: int, cache: str, threads: int) -> None:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = rows * context, rows
        parameters.n_batch = parameters.n_ubatch = PART
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = getattr(self._lib, CACHES[cache])
        if cache == "f32":  # exact: flash attention computes in f16
            parameters.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if self._context == self._ffi.NULL:
            self._context = None
            raise KoffError(f"llama.cpp cannot hold {rows} texts of {context} tokens: {complaint()}")
        self.room = min(context, self._lib.llama_n_ctx_seq(self._context))  # that is rounded up
        self._size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._batch = self._lib.llama_batch_init(PART, 0, 1)

    def _decode(self, parts: Sequence[tuple[Text, Sequence[int]]], adapter: Any, everywhere: bool) -> list[Tensor]:
        """Read tokens of texts that have one adapter, as many at a time as a batch takes."""
        self._adapt(adapter)
        found: list[list[Tensor]] = [[] for _ in parts]
        todo = [
            (place, token, text, text.length + i, everywhere or i == len(ids) - 1)
            for place, (text, ids) in enumerate(parts)
            for i, token in enumerate(ids)
        ]
        for start in range(0, len(todo), PART):
            part = todo[start : start + PART]
            self._run(part)
            for index, (place, _, _, _, wanted) in enumerate(part):
                if wanted:
                    pointer = self._lib.llama_get_logits_ith(self._context, index)
                    row = np.frombuffer(self._ffi.buffer(pointer, 4 * self._size), np.float32)
                    found[place].append(torch.from_numpy(row.copy()))
        for text, ids in parts:
            text.length += len(ids)
            self._check(text)
        return [torch.stack(rows) for rows in found]

    def _adapt(self, adapter: Any) -> None:
        """Let what is decoded next go through an adapter, or through none."""
        adapters = self._ffi.new("struct llama_adapter_lora *[]", [adapter] if adapter is not None else 1)
        scales = self._ffi.new("float[]", [1.0])
        if self._lib.llama_set_adapters_lora(self._context, adapters, int(adapter is not None), scales):
            raise KoffError(f"llama.cpp did not take an adapter: {complaint()}")

    def _check(self, text: Text) -> None:
        """Raise KoffError unless a text is what it was given, from its memory's first slot to its last token."""
        memory = self._lib.llama_get_memory(self._context)
        first = self._lib.llama_memory_seq_pos_min(memory, text.number)
        last = self._lib.llama_memory_seq_pos_max(memory, text.number)
        if (first, last) != (0, text.length - 1):
            raise KoffError(f"llama.cpp lost a part of a text with memory {text.memory!r}: it holds {first} to {last}")

    def _run(self, part: Sequence[tuple[int, int, Text, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(part)
        for index, (_, token, text, position, wanted) in enumerate(part):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = text.number
        if self._lib.llama_decode(self._context, batch):
            raise KoffError(f"llama.cpp failed at a step: {complaint()}")


def _hollow_(model: DecomposedModel) -> None:
    """Leave the shapes of a backbone's weights, and none of their numbers: every number is the same one."""
    for name, parameter in model.backbone.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)
