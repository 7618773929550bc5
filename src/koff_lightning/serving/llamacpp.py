"""llama.cpp as an engine: fast on CPUs, the backbone as f16 or q8_0, each text with its LoRA and its slots.

Texts come and go, and memories too, as under the own engine, whose thread and queues it has; only what reads the tokens
is another. Texts of one memory are read together, memory after memory.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from koff_lightning.serving.batch import Row, failing
from koff_lightning.serving.engine import Held, Token
from koff_lightning.serving.llama_model import LlamaModel, Text
from koff_lightning.serving.own import OwnEngine
from koff_lightning.serving.sampling import check_finite, described

_PART = 256  # tokens of a prompt whose logits are held at a time, where they are wanted


class LlamaCppEngine(OwnEngine):
    """An engine over `LlamaModel`.

    Args:
        folder: The artifact.
        rows: Most texts that are continued together. Each has its cache from the start.
        gguf: What `koff convert gguf` made of the artifact; by default it is made now.
        kind: Type of the weights where they are converted now: `f32`, `f16` or `q8_0`.
        cache: Type of the token cache, `f32` or `f16`.

    Raises:
        KoffError: As `LlamaModel`.
    """

    def __init__(
        self,
        folder: Path,
        rows: int = 4,
        gguf: str | Path | None = None,
        kind: str = "f16",
        cache: str = "f16",
    ) -> None:
        self._llama = LlamaModel(folder, gguf, kind=kind, rows=rows, cache=cache)
        self._start(self._llama.model, folder, rows, self._llama)
        self._context = self._llama.room

    def _empty(self) -> "LlamaBatch":
        self._llama.clear()
        return LlamaBatch(self._llama, self._ends)

    def _known(self, name: str, sha256: str) -> Held:
        """With the places that its slots take of a text's context."""
        return Held(name, sha256, self._llama.slots(name))

    async def close(self) -> None:
        """End what is under way, and free what the library holds."""
        await super().close()
        self._llama.close()


class LlamaBatch:
    """Rows under way, as `batch.Batch`."""

    def __init__(self, model: LlamaModel, ends: frozenset[int]) -> None:
        self.model, self.ends = model, ends
        self.rows: list[Row] = []
        self.reading: list[Row] = []  # none: a prompt is read whole
        self._texts: dict[Row, Text] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows that come, each by itself, and tell their first tokens."""
        self.put_back()
        for row in rows:
            with failing([row]):
                self._texts[row] = self.model.begin(row.memory)
                self.rows.append(row)
                self._scored(row) if row.echoes else self._plain(row)

    def step(self) -> None:
        """Read every row's last token and choose its next; rows that are done or gone leave."""
        self.put_back()
        logits = self.model.read([(self._texts[row], row.ids[-1:]) for row in self.rows])
        for row, scores in zip(self.rows, logits, strict=True):
            with failing([row]):
                row.take(scores[-1], self.ends)

    def put_back(self, rows: Sequence[Row] = ()) -> None:
        """Free what is held for rows that wait again, are done or gone."""
        for row in self.rows:
            if row in rows or not row.lives:
                self.model.end(self._texts.pop(row))
        self.rows = [row for row in self.rows if row in self._texts]

    def rereads(self, row: Row) -> bool:
        """Whether a row that steps back would go on as it went."""
        return True

    def _plain(self, row: Row) -> None:
        """Read a prompt."""
        row.take(self.model.read([(self._texts[row], row.ids)])[0][-1], self.ends)

    def _scored(self, row: Row) -> None:
        """Read a prompt, and tell its tokens with their log-probabilities."""
        tokens, before = [Token(row.ids[0])], torch.empty(0)
        for start in range(0, len(row.ids), _PART):
            ids = row.ids[start : start + _PART]
            logits = self.model.read([(self._texts[row], ids)], everywhere=True)[0]  # [T, V]
            shown = torch.cat([before, logits[:-1]]) if start else logits[:-1]
            check_finite(shown)
            tokens += described(ids if start else ids[1:], shown, row.options)
            before = logits[-1:]
        row.take(before[-1], self.ends, tuple(tokens))
