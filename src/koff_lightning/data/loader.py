"""Loaders: from references to rows to batches.

On purpose they are not torch DataLoaders: under several processes Lightning replaces the sampler of those, while ours
already shares the rows among ranks (and Lightning's would count some held-out text twice). Inside, a torch DataLoader
does the work and runs the workers.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from threading import Thread
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from koff_lightning.data.mixture import DomainBatches, RowRef
from koff_lightning.data.packing import IGNORED, PackedRows, collate
from koff_lightning.data.teacher import StoredTeacher, teacher_of_rows
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import difference

Batch = dict[str, Any]
Teachers = Mapping[str, StoredTeacher]
NO_TEACHERS: Teachers = {}
MAKE = ("seq_len", "rows", "text")  # may not change in a resumed run: row numbers would mean other rows


class Rows(Dataset[Batch]):
    """Batches by lists of row references, with the predictions of stored teachers if there are any."""

    def __init__(self, packed: Mapping[str, PackedRows], teachers: Teachers = NO_TEACHERS) -> None:
        self.packed, self.teachers = packed, teachers

    def __getitem__(self, refs: list[RowRef]) -> Batch:
        batch = collate([(domain, self.packed[domain], row) for domain, row in refs])
        return batch | (teacher_of_rows(self.teachers, refs) if self.teachers else {})


def whole_batches(
    dataset: Dataset[Any], num_workers: int, sampler: Iterable[list[RowRef]] | None = None
) -> Iterator[Any]:
    """One iteration of a torch DataLoader over a dataset whose items are whole batches.

    Args:
        dataset: The dataset.
        num_workers: Worker processes; 0 for none.
        sampler: Keys of the batches; None for a dataset that is iterated.
    """
    generator = torch.Generator().manual_seed(0)  # without one, opening a loader draws from the global random state
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_same,
        generator=generator,
        worker_init_fn=heed_the_parent_alone,
    )
    return _begin(loader)


def _same(item: Any) -> Any:
    return item


def heed_the_parent_alone(worker: int) -> None:
    """Let a worker ignore SIGTERM and Ctrl-C unless its parent sent them.

    Signals to the whole process group also reach the workers, but the run wants to finish its step and save. Torch ends
    its workers by SIGTERM too, and that must work, also while a worker waits for its source. So the sender decides,
    which Python's signal handlers are not told, but `sigwaitinfo` is. (Without it, on macOS and Windows, all stays as
    torch has it.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid  # not os.getppid(): with a fork server that is the server

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def _begin(loader: DataLoader) -> Iterator[Any]:
    """One iteration of `loader`; signals are blocked while workers start, until `heed_the_parent_alone` has run."""
    if not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:  # a Ctrl-C that has come is raised by the next line
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainLoader:
    """Training batches. Counts the batches that it hands out and continues there, also in a resumed run.

    It has a length because Lightning fetches one batch ahead from loaders without, and loses that batch on resume. An
    iteration hands out up to `length` batches from where the last one stopped.

    Args:
        packed: Packed training rows by domain.
        batches: Which rows make up batch number n.
        length: Batches in a run (or in an epoch where the run has no step limit).
        num_workers: Worker processes; 0 builds batches in this one.
        teachers: Stored teachers of all domains, or none.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedRows],
        batches: DomainBatches,
        length: int,
        num_workers: int = 0,
        teachers: Teachers = NO_TEACHERS,
    ) -> None:
        self._packed, self._batches, self._length, self._num_workers = packed, batches, length, num_workers
        self._teachers = teachers
        self._handed_out = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        refs = islice(self._batches.start_at(self._handed_out), self._length)
        for batch in whole_batches(Rows(self._packed, self._teachers), self._num_workers, refs):
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Number of batches handed out since the run began, and all that their order depends on."""
        return {"batches": self._handed_out, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` counts; warns if the order of batches differs from that run's.

        Raises:
            KoffError: That run streamed its text, or its rows were others.
        """
        if "places" in state:
            raise KoffError(
                "the checkpoint is of a run that streamed its text, and this run is not to: a place in streamed text "
                "says nothing here. Give --data.streaming=true, or start a new run"
            )
        theirs = state["order"]
        mine = {key: value for key, value in self._order().items() if key in theirs}  # older checkpoints say less
        if odd := difference(*({key: made[key] for key in mine if key in MAKE} for made in (theirs, mine))):
            raise KoffError(
                f"the text of this run is not the checkpoint's, so it cannot go on where that run stopped: {odd}. Set "
                "it back (data.domains, data.tokenizer, data.seq_len, data.max_train_bytes; data.open_with_start=false "
                "for a run of an earlier release), or start a new run"
            )
        changed = [key for key in mine if mine[key] != theirs[key]]
        if changed:
            rank_zero_warn(
                f"the data of this run differs from the checkpoint's in {', '.join(changed)}: it goes on from batch "
                f"{state['batches']}, but the rows are not those of an uninterrupted run."
            )
        self._handed_out = state["batches"]

    def _order(self) -> dict[str, Any]:
        length = next(iter(self._packed.values())).tokens.shape[1]
        return self._batches.identity() | {"seq_len": length, "text": dict(self._digests)}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {domain: rows.digest for domain, rows in self._packed.items()}


class HeldoutLoader:
    """Held-out batches of one domain each, domain after domain, every row once; then those of general text.

    Ranks take batches in turn. If their number does not divide evenly, some ranks also get a blank batch (labels -100,
    zero bytes): sharded models need equally many forwards on all ranks, and sums stay exact. Domains and general text
    are evened out separately, since general text is scored in fewer modes.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedRows],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        general: Mapping[str, PackedRows] = MappingProxyType({}),
    ) -> None:
        self._packed, self._num_workers = {**packed, **general}, num_workers
        self._parts: list[tuple[list[list[RowRef]], list[list[RowRef]]]] = []  # batches, and 0 or 1 blank one
        for part in filter(None, (packed, general)):
            batches = [
                [(name, row) for row in range(first, min(first + batch_size, len(rows)))]
                for name, rows in part.items()
                for first in range(0, len(rows), batch_size)
            ]
            own = batches[rank::world_size]
            self._parts.append((own, batches[: -(-len(batches) // world_size) - len(own)]))

    def __len__(self) -> int:
        return sum(len(own) + len(blank) for own, blank in self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for own, blank in self._parts:
            yield from whole_batches(Rows(self._packed), self._num_workers, own)
            for batch in map(Rows(self._packed).__getitem__, blank):
                yield batch | {
                    "labels": torch.full_like(batch["labels"], IGNORED),
                    "num_bytes": torch.zeros_like(batch["num_bytes"]),
                    "document_bytes": torch.zeros_like(batch["document_bytes"]),
                }
