"""DomainDataModule: text sources of several domains -> training, validation, test and prediction batches."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.bundled_tokens import tokens_of
from koff_lightning.data.cache import DomainRows, TokenCache, domain_rows
from koff_lightning.data.calibration import CalibrationText, most_tokens
from koff_lightning.data.encoding import TokenStream, fingerprint, opening
from koff_lightning.data.loader import Batch, HeldoutLoader, Rows, TrainLoader
from koff_lightning.data.mixture import DomainBatches, least_window
from koff_lightning.data.packing import PackedRows
from koff_lightning.data.sample import sampled_chunks
from koff_lightning.data.sources import DomainSource, as_shares, as_sources, domain_shards, refuse_missing_files
from koff_lightning.data.split import BadLines, Texts, read_domain
from koff_lightning.data.stream import Text
from koff_lightning.data.stream_loader import Reading, StreamLoader
from koff_lightning.data.streamed_split import first_documents, split_streamed
from koff_lightning.data.talks import check_template, template_of
from koff_lightning.data.teacher import FOLDER, Belongs, StoredTeacher, TeacherStore, rows_hash
from koff_lightning.loading import load_config, load_tokenizer
from koff_lightning.specs.text import check_data
from koff_lightning.support.errors import require
from koff_lightning.support.files import own_cache
from koff_lightning.support.names import GENERAL

SAMPLE = 2**18  # bytes of a streamed domain's training text that are read at once, for memories to start from


class DomainDataModule(LightningDataModule):
    """Text of several domains, tokenised, packed into rows and mixed into batches.

    Training rows are mixed by the domains' weights: every batch holds all domains if it has room for them, else every
    optimizer step if it can. Held-out rows come domain by domain, each token predicted exactly once; in a test, general
    text follows as `general/NAME`. Text is kept in memory (5 bytes per token), or streamed in training.

    Batches are dicts: input_ids [B, T], labels [B, T] (aligned with input_ids; -100 = not predicted), position_ids
    [B, T] (restart at each document; absent when no row holds more than one), domains (B names), num_bytes [B] (UTF-8
    bytes of the text predicted in each row), documents [B, T] (number of each token's document in its domain) and
    document_bytes [B, T] (num_bytes by segment, at its first token).

    Args:
        domains: Text of each domain, by name. An entry is ``bundled:<name>`` (text that ships with the package), a
            file or glob, ``hub:<dataset>``, a list of these, or a mapping with the fields of `DomainSource`: files,
            text_field (default text), id_field (default id), weight (default 1), heldout_files (default: split by
            hash), subset and split (of hub datasets), chat (``all`` or ``answers``: documents are talks), max_documents
            (the first so many). Files: jsonl, csv, txt, each also .gz .xz .zst, and parquet.
        tokenizer: Hub id or folder of a tokenizer; by default that of the module's backbone.
        seq_len: Tokens per row.
        batch_size: Rows per batch on each device.
        heldout_fraction: Part of the documents of local files, chosen by hash of their id, kept for validation and
            test. Bundled text and domains with heldout_files come already split.
        max_heldout_bytes: At most this much held-out text per domain (UTF-8 bytes, whole documents), to validate fast.
        max_train_bytes: At most this much training text per domain (UTF-8 bytes, whole documents in file order).
        on_bad_line: What to do with a line that cannot be used: ``fail`` (name file and line) or ``skip`` (leave it
            out, and say how many were).
        num_workers: Processes that build batches. Rows in memory need none; streaming wants one or two per device.
        seed: Seed of the order of rows.
        streaming: Read training text while training, for corpora that do not fit in memory. Held-out text is taken
            from the head of each corpus and kept in memory, hence max_heldout_bytes.
        temperature: Shares of the domains are weight ** (1 / temperature): above 1 they come closer to each other.
        append_eos: Put the tokenizer's end token behind each training document and train it, so that what is generated
            ends where a document would. Held-out text has none: bits per byte are of the text alone.
        cache: Folder with tokenised text; what `koff prepare` has made there is used. By default $KOFF_CACHE/tokens or
            ~/.cache/koff/tokens.
        retention: General text by name, each entry as in `domains`: scored beside the domains at the end, and part of
            the loss by model.retention; kept in memory or prepared, also where the domains are streamed.
        max_retention_bytes: At most this much of each of them (UTF-8 bytes, whole documents in file order).
        one_domain_batches: Each batch is of one domain, in turn, as in the paper (section 3.4); by default of all.
        open_with_start: Begin rows that open inside a document with the start token, where the tokenizer itself puts
            it before text; false for rows as runs of earlier releases have them.
    """

    def __init__(
        self,
        domains: dict[str, DomainSource | str | list[str]],
        tokenizer: str | None = None,
        seq_len: int = 256,
        batch_size: int = 8,
        heldout_fraction: float = 0.05,
        max_heldout_bytes: int | None = None,
        max_train_bytes: int | None = None,
        on_bad_line: Literal["fail", "skip"] = "fail",
        num_workers: int = 0,
        seed: int = 0,
        streaming: bool = False,
        temperature: float = 1.0,
        append_eos: bool = False,
        cache: str | None = None,
        retention: dict[str, DomainSource | str | list[str]] | None = None,
        max_retention_bytes: int | None = None,
        one_domain_batches: bool = False,
        open_with_start: bool = True,
    ) -> None:
        super().__init__()
        check_data(
            seq_len,
            batch_size,
            heldout_fraction,
            max_heldout_bytes,
            max_train_bytes,
            on_bad_line,
            num_workers,
            seed,
            streaming,
            temperature,
            max_retention_bytes,
        )
        self.sources = as_sources(domains)
        self.streaming, self.shares = streaming, as_shares(self.sources, temperature)
        self.seq_len, self.batch_size, self.num_workers, self.seed = seq_len, batch_size, num_workers, seed
        self.one_domain_batches, self.append_eos, self.open_with_start = one_domain_batches, append_eos, open_with_start
        self.tokenizer_source, self.heldout_fraction, self.on_bad_line = tokenizer, heldout_fraction, on_bad_line
        self.max_heldout_bytes, self.max_train_bytes = max_heldout_bytes, max_train_bytes
        self.cache = TokenCache(Path(cache).expanduser() if cache else own_cache() / "tokens")
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._documents: dict[str, TokenStream] = {}  # training text, or a sample of it when streaming
        self._texts: dict[str, Text] = {}  # what is streamed
        self._train: dict[str, PackedRows] = {}
        self._heldout: dict[str, PackedRows] = {}
        self._teachers: dict[str, StoredTeacher] = {}  # of the training rows
        self._numbered: DomainBatches | None = None  # see `batch_number`
        self.general: DomainDataModule | None = None  # the text of `retention`
        if retention:
            alike = {"seq_len": seq_len, "batch_size": batch_size, "heldout_fraction": heldout_fraction, "seed": seed}
            alike |= {"max_heldout_bytes": max_heldout_bytes, "on_bad_line": on_bad_line, "append_eos": append_eos}
            alike |= {"cache": cache, "open_with_start": open_with_start}
            self.general = DomainDataModule(retention, tokenizer, max_train_bytes=max_retention_bytes, **alike)

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, in the order in which they were given."""
        return list(self.sources)

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and pack all text, once: later calls do nothing.

        Raises:
            KoffError: Bad files or lines, a domain without training or held-out text, or no tokenizer.
        """
        if self.general is not None and stage in (None, "fit", "test"):  # also where a validation has read the rest
            self.general.trainer = self.trainer
            self.general.setup()
        if self._heldout.keys() == self.sources.keys():
            return
        refuse_missing_files(self.sources)
        self.tokenizer = self._load_tokenizer()
        self._check_tokenizer()
        for name, source in self.sources.items():
            if (rows := self.stored(source)) is None:
                rank_zero_info(f"reading {'the head of ' * self.streaming}the text of domain '{name}'")
                rows = self._make(name, source)
            self._documents[name], self._train[name], self._heldout[name] = rows.documents, rows.train, rows.heldout

    def texts(self) -> dict[str, Texts]:
        """Training and held-out text of every domain, read again; when streaming, a sample of the training text.

        Raises:
            KoffError: As `setup`, but no tokenizer is needed.
        """
        refuse_missing_files(self.sources)
        read = self._split_streamed if self.streaming else self._read_all
        return {name: read(name, source) for name, source in self.sources.items()}

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
        """Tokenise all text into the cache; returns, by domain, whether this was still to do.

        Raises:
            KoffError: As `setup`; or the text is streamed.
        """
        require(not self.streaming, "data.streaming tokenises while training: there is nothing to prepare")
        refuse_missing_files(self.sources)
        self.tokenizer = tokenizer
        self._check_tokenizer()
        made = {name: self.tokenise(name) for name in self.sources}
        more = self.general.prepare(tokenizer) if self.general is not None else {}
        return made | {f"retention {name}": is_new for name, is_new in more.items()}

    def tokenise(self, name: str) -> bool:
        """Put a domain's rows into the cache; returns whether this was still to do."""
        source = self.sources[name]
        return self.cache.build(self._key(source), partial(self._make, name, source))

    def _check_tokenizer(self) -> None:
        for name in (name for name, source in self.sources.items() if source.chat):
            check_template(self.tokenizer, name)
        has_end = self.tokenizer.eos_token_id is not None
        require(has_end or not self.append_eos, "data.append_eos: the tokenizer has no end token: leave it out")

    def _key(self, source: DomainSource) -> str:
        return self.cache.key(
            source,
            tokenizer=fingerprint(self.tokenizer),
            seq_len=self.seq_len,
            heldout_fraction=self.heldout_fraction,
            max_train_bytes=self.max_train_bytes,
            max_heldout_bytes=self.max_heldout_bytes,
            on_bad_line=self.on_bad_line,
            append_eos=self.append_eos,
            template=template_of(self.tokenizer) if source.chat else None,
            **self._opening,
        )

    @property
    def _opening(self) -> dict[str, int]:
        """The start token of rows that open inside a document (see packing.py), as an argument; none: no argument."""
        start = opening(self.tokenizer) if self.open_with_start and self.tokenizer is not None else None
        return {} if start is None else {"open_with_start": start}

    def stored(self, source: DomainSource) -> DomainRows | None:
        """The domain's rows from the cache, if they are in it."""
        wanted = not self.streaming and self.cache.folder.is_dir()
        return self.cache.load(self._key(source)) if wanted else None

    def _make(self, name: str, source: DomainSource) -> DomainRows:
        texts = self._split_streamed(name, source) if self.streaming else self._read_all(name, source)
        on_bad = BadLines(name, self.on_bad_line)
        how = self.append_eos, source.chat, on_bad, tokens_of(source)
        rows = domain_rows(name, texts, self.tokenizer, self.seq_len, *how, **self._opening)
        on_bad.report()
        return rows

    def _read_all(self, name: str, source: DomainSource) -> Texts:
        return read_domain(
            name,
            source,
            heldout_fraction=self.heldout_fraction,
            max_train_bytes=self.max_train_bytes,
            max_heldout_bytes=self.max_heldout_bytes,
            on_bad_line=self.on_bad_line,
        )

    def _split_streamed(self, name: str, source: DomainSource) -> Texts:
        """Held-out text and a sample of the training text; takes note of what is to be streamed."""
        shards, on_bad = domain_shards(source, streamed=True), BadLines(name, self.on_bad_line)
        if source.max_documents:
            shards = first_documents(shards, source.max_documents, BadLines(name, self.on_bad_line))
        limits = {"max_heldout_bytes": self.max_heldout_bytes, "train_bytes": SAMPLE}
        limits |= {"heldout_fraction": self.heldout_fraction, "bounded": bool(source.max_documents)}
        texts, wanted = split_streamed(name, shards, on_bad=on_bad, **limits)
        on_bad.report()
        streamed = [shard for shard, side in shards if side != "held out"]
        on_bad = BadLines(name, self.on_bad_line, endless=True)
        self._texts[name] = Text(name, streamed, wanted, on_bad, self.append_eos, source.chat, **self._opening)
        return texts

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        module = self.trainer.lightning_module if self.trainer else None
        options = getattr(module, "hparams", {})
        where = {"revision": options.get("revision"), "trust_remote_code": options.get("trust_remote_code", False)}
        source = getattr(module, "source", options.get("backbone"))  # an artifact's, where the run extends one
        if source is not None:
            load_config(source, **where)  # a family that is not supported is refused before text is read
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source)
        require(source is not None, "data.tokenizer is not set and there is no backbone to take it from: set it")
        return load_tokenizer(source, **where)

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Batches for the whole run (or one pass, where the trainer has no step limit), resumable.

        Raises:
            KoffError: Streaming without a step limit.
        """
        require(self._train, "there is no text yet: call setup() before train_dataloader()")
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        max_steps = self.trainer.max_steps if self.trainer else -1
        num_rows = {name: 1 if self.streaming else len(rows) for name, rows in self._train.items()}
        batches = self._mixture(num_rows, self._window(accumulate))
        if self.streaming:
            require(max_steps > 0, "data.streaming needs trainer.max_steps: nobody knows how long one pass will be")
            return StreamLoader(self._reading(), batches, max_steps * accumulate, self.num_workers)
        one_pass = -(-sum(num_rows.values()) // (self.batch_size * batches.world_size))
        length = max_steps * accumulate if max_steps > 0 else one_pass
        return TrainLoader(self._train, batches, length, self.num_workers, self._teachers)

    def batch_number(self, number: int) -> Batch:
        """Training batch `number` (from 0) of this rank, a pure function of the number and of `seed`."""
        if self._numbered is None:
            self._numbered = self._mixture({name: len(rows) for name, rows in self._train.items()})
        return Rows(self._train, self._teachers)[next(self._numbered.start_at(number))]

    # ------------------------------------------------------------------------------------- the stored teacher

    @property
    def teachers(self) -> TeacherStore:
        """Where the teachers that `koff prepare --teacher` stores for this text are."""
        return TeacherStore(self.cache.folder / FOLDER)

    def belongs(self, rows: PackedRows, backbone_hash: str) -> Belongs:
        """What a stored teacher of these rows was made of, and must match."""
        return Belongs(backbone_hash, fingerprint(self.tokenizer), self.seq_len, rows_hash(rows))

    def training_rows(self) -> dict[str, PackedRows]:
        """The training rows of every domain as `prepare` has left them in the cache."""
        return {name: self.cache.load(self._key(source)).train for name, source in self.sources.items()}

    def take_stored_teacher(self, backbone_hash: str, k: int) -> None:
        """Add to training batches the dense model's k likeliest tokens, as `koff prepare --teacher` has stored them.

        Args:
            backbone_hash: Hash of the dense model's weights.
            k: Number of tokens at each place.

        Raises:
            KoffError: They are not stored, or belong to other text or another model; or the text is streamed.
        """
        require(
            not self.streaming,
            "loss.teacher: stored knows the rows of a text in memory or prepared, and data.streaming makes its rows "
            "while training: set loss.teacher to live, or data.streaming to false",
        )
        for name, rows in self._train.items():
            self._teachers[name] = self.teachers.load(name, self.belongs(rows, backbone_hash), k)

    def _reading(self) -> Reading:
        """What is streamed. Its identity is all that a place in the stream depends on: a resumed run compares it."""
        split = [self.heldout_fraction, self.max_heldout_bytes, self.on_bad_line] + ["append_eos"] * self.append_eos
        identity = {"tokenizer": fingerprint(self.tokenizer), "seq_len": self.seq_len, **self._opening}
        for name, text in self._texts.items():
            fields = self.sources[name].fields
            talks = [[text.chat, template_of(self.tokenizer)]] if text.chat else []
            how = split, text.wanted.digest, *talks, *self.sources[name].choice
            identity |= text.identity((fields.text, fields.id), *how)
        return Reading(self._texts, self.tokenizer, self.seq_len, identity)

    def _mixture(self, num_rows: Mapping[str, int], window: int | None = None) -> DomainBatches:
        place = self._place()
        return DomainBatches(
            num_rows, self.shares, self.batch_size, self.seed, window, *place, one_domain=self.one_domain_batches
        )

    def _window(self, accumulate: int) -> int:
        """Number of batches that together hold every domain by its share: 1 if possible, else an optimizer step's."""
        needed = least_window(self.shares.values(), self.batch_size)
        return accumulate if 1 < needed <= accumulate else needed

    def val_dataloader(self) -> HeldoutLoader:
        """Held-out batches, domain by domain."""
        return self._held_out({})

    predict_dataloader = val_dataloader

    def test_dataloader(self) -> HeldoutLoader:
        """The same, then general text by its own names: `general/NAME`."""
        general = {} if self.general is None else self.general._heldout
        return self._held_out({f"{GENERAL}{name}": rows for name, rows in general.items()})

    def _held_out(self, general: dict[str, PackedRows]) -> HeldoutLoader:
        require(self._heldout, "there is no text yet: call setup() before val_dataloader()")
        return HeldoutLoader(self._heldout, self.batch_size, *self._place(), self.num_workers, general)

    def calibration_text(self, num_tokens: int, seed: int = 0) -> CalibrationText:
        """Batches of training text, the same number of tokens from every domain: see `CalibrationText`."""
        return CalibrationText(self._train, num_tokens, self.batch_size, seed)

    def most_calibration_text(self) -> int:
        """Tokens of each domain that `calibration_text` can give at most."""
        return most_tokens(self._train)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: digests of the general text, if steps train on it. All other state is the loader's."""
        trained = getattr(self.trainer and self.trainer.lightning_module, "retention", None) and self.general
        return {"retention": {name: rows.digest for name, rows in trained._train.items()}} if trained else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to resume training with other general text, whose rows would have other numbers."""
        if self.trainer is not None and self.trainer.training and (there := state.get("retention")):
            here = self.state_dict().get("retention")
            require(
                there == here,
                "the general text of this run is not the checkpoint's, so it cannot go on where that run stopped: set "
                "data.retention and its limits back, or start a new run",
            )

    def cut_documents(self) -> dict[str, tuple[int, int]]:
        """By domain: training documents that lie in several rows, and all of them; when streaming, of a sample."""
        return {name: (rows.cut, len(self._documents[name].lengths)) for name, rows in self._train.items()}

    def _place(self) -> tuple[int, int]:
        """Rank and world size among the processes that read different data; tensor-parallel ones read the same."""
        if self.trainer is None or self.trainer.world_size == 1:
            return 0, 1
        place = self.trainer.strategy.distributed_sampler_kwargs
        return place["rank"], place["num_replicas"]

    def sample_ids(self, domain: str, num_tokens: int) -> torch.Tensor:
        """Token ids [num_tokens] of training text, to initialise a memory of `domain`: see `sampled_chunks`."""
        known = ", ".join(self._documents)
        require(domain in self._documents, f"the model has the domain {domain!r}, and the data only {known}: give both")
        start = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return sampled_chunks(domain, self._documents[domain], num_tokens, seed=self.seed, start=start)
