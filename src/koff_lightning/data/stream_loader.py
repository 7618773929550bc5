"""StreamLoader: training batches made while text is read, for corpora larger than memory; resumable to the row.

The batches of a rank come from its lanes in turn. A lane is a reader with a part of every domain's text of its own, and
a place in each. Worker processes run the lanes. Every batch comes with the lane's places after it, so the loader knows
at any time where each lane has to continue, however far ahead the workers have read.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.loader import Batch, whole_batches
from koff_lightning.data.mixture import DomainBatches
from koff_lightning.data.packing import collate
from koff_lightning.data.shards import deal
from koff_lightning.data.stream import Place, RowStream, Text
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError

Places = dict[str, list[int]]  # by domain
HARMLESS = ("batch_size", "window", "shares")  # may change in a resumed run: the places keep their meaning


@dataclass(frozen=True)
class Reading:
    """What all readers read, and how rows are made of it.

    Args:
        texts: By domain.
        tokenizer: Tokenizer of the backbone.
        seq_len: Tokens per row.
        identity: All that a place in the texts depends on, in plain values.
    """

    texts: Mapping[str, Text]
    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    identity: Mapping[str, Any]

    def streams(self, seed: int, reader: int, readers: int, places: Places) -> dict[str, RowStream]:
        """One reader's stream of each domain."""
        return {
            domain: RowStream(
                text,
                deal([shard.size for shard in text.shards], readers)[reader],
                self.tokenizer,
                self.seq_len,
                seed,
                reader,
                Place(*places[domain]) if domain in places else None,
            )
            for domain, text in self.texts.items()
        }


class _Lanes(IterableDataset[Any]):
    """Batches number `first` to `first` + `length` - 1, each as (lane, its places after the batch, the batch)."""

    def __init__(self, reading: Reading, batches: DomainBatches, places: list[Places], first: int, length: int) -> None:
        self.reading, self.batches, self.places, self.first, self.length = reading, batches, places, first, length

    def __iter__(self) -> Iterator[tuple[int, Places, Batch] | KoffError]:
        worker = get_worker_info()
        if worker:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism; threads do not outlive a fork
        try:
            yield from self._batches_of(*((worker.id, worker.num_workers) if worker else (0, 1)))
        except KoffError as error:  # torch would wrap its one line in a traceback
            yield KoffError(str(error))

    def _batches_of(self, worker: int, workers: int) -> Iterator[tuple[int, Places, Batch]]:
        lanes, rank, world = len(self.places), self.batches.rank, self.batches.world_size
        streams: dict[int, dict[str, RowStream]] = {}
        numbers = range(self.first + worker, self.first + self.length, workers)
        refs = islice(self.batches.start_at(self.first), worker, None, workers)
        for number, batch in zip(numbers, refs, strict=False):
            lane = number % lanes
            if lane not in streams:
                reader, readers = rank * lanes + lane, world * lanes
                streams[lane] = self.reading.streams(self.batches.seed, reader, readers, self.places[lane])
            rows = [(domain, *next(streams[lane][domain])) for domain, _ in batch]
            yield lane, {domain: stream.state() for domain, stream in streams[lane].items()}, collate(rows)


class StreamLoader:
    """Training batches from streams of rows; resumes exactly, also with fewer workers.

    Like `TrainLoader` it has a length, and an iteration hands out up to `length` batches from where the last stopped.

    Args:
        reading: The text of all domains.
        batches: Domains of the rows of batch number n, and this rank's place among the ranks.
        length: Batches in a run or epoch.
        num_workers: Worker processes; 0 builds batches in this one.
    """

    def __init__(self, reading: Reading, batches: DomainBatches, length: int, num_workers: int = 0) -> None:
        self._reading, self._batches, self._length, self._num_workers = reading, batches, length, num_workers
        self._places: list[Places] = [{} for _ in range(max(1, num_workers))]  # by lane
        self._handed_out = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        lanes = _Lanes(self._reading, self._batches, list(self._places), self._handed_out, self._length)
        for item in whole_batches(lanes, self._workers()):
            if isinstance(item, KoffError):
                raise item
            lane, self._places[lane], batch = item
            self._handed_out += 1
            yield batch

    def _workers(self) -> int:
        """The largest number of workers, up to the wanted one, among which the lanes divide evenly."""
        lanes = len(self._places)
        return max((n for n in range(1, self._num_workers + 1) if lanes % n == 0), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Number of batches handed out, the places of all lanes of all ranks, and all that these depend on.

        A collective call: all ranks make it, and all get the same.
        """
        places = dict(ranks.gather((self._batches.rank, self._places)))
        return {"batches": self._handed_out, "places": places, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` counts, with its number of lanes.

        Raises:
            KoffError: The text, the tokenizer, the rows or the number of ranks differ from that run's.
        """
        mine, theirs = self._order(), state.get("order", {})
        changed = [key for key in mine if mine[key] != theirs.get(key)]
        if "places" not in state or set(changed) - set(HARMLESS):
            odd = [f"{key} (there {theirs.get(key)}, here {mine[key]})" for key in changed if key not in HARMLESS]
            raise KoffError(
                f"the streamed data of this run differs from the checkpoint's in {', '.join(odd) or 'data.streaming'}, "
                "so it cannot go on where that run stopped: set it back (a dataset of the hub by hub:name@commit), "
                "with data.open_with_start=false for a run of an earlier release, or start a new run"
            )
        if changed:
            rank_zero_warn(
                f"the data of this run differs from the checkpoint's in {', '.join(changed)}: it goes on where that "
                "run stopped, but the batches are not those of an uninterrupted run."
            )
        self._places = list(state["places"][self._batches.rank])
        self._handed_out = state["batches"]
        if self._num_workers not in (self._workers(), 0):
            rank_zero_warn(
                f"data.num_workers is {self._num_workers}, the run began with {len(self._places)}: it goes on with "
                f"{self._workers()}, so that every row comes in its place."
            )

    def _order(self) -> dict[str, Any]:
        return {key: value for key, value in self._batches.identity().items() if key != "rows"} | dict(
            self._reading.identity
        )
