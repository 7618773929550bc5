"""`koff prepare`: tokenise a run's text once, store its teacher, or fetch what it needs where there is no network."""

import shutil
from collections import deque
from typing import Any

import torch
from transformers import PreTrainedModel

from koff_lightning.artifact.decomposed import default_device
from koff_lightning.backbone import hidden_states, inputs_of
from koff_lightning.commands.baseline import KoffTrainer
from koff_lightning.commands.needs import fetch_all, needs_of, tokenizer_of
from koff_lightning.data import DomainDataModule, check_vocabulary
from koff_lightning.data.packing import PackedRows
from koff_lightning.data.teacher import stored_bytes
from koff_lightning.loading import fingerprint, load_backbone
from koff_lightning.losses import TopK, check_top_k, chunk_size, is_slow, top_k_of
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import has_locks
from koff_lightning.support.launched import count, device_of, first_speaks, rank
from koff_lightning.support.offline import is_asked


class VerbTrainer(KoffTrainer):
    """The trainer whose methods are all verbs of training."""

    @staticmethod
    def prepare(
        config: Any,
        out: str | None = None,
        prefetch_only: bool = False,
        prefetch_bytes: int | None = None,
        teacher: bool = False,
    ) -> None:
        """Tokenise the text of a run into a cache that it then uses; neither model nor trainer is built for it.

        Args:
            config: Options of the run, in the sections of `koff fit`.
            out: Folder for the tokenised text, to be given to runs as data.cache; by default where they look anyway.
            prefetch_only: Do not tokenise; fetch the model, hub datasets and the data of evaluation tasks, for a
                machine without network.
            prefetch_bytes: UTF-8 bytes of text to copy of each hub dataset that is streamed, from its head.
            teacher: Store what the dense model says of every training row too, its loss.top_k likeliest tokens, for
                runs with loss.teacher `stored`. Says how much that is before it starts; goes on after a kill.

        Raises:
            KoffError: Text, tokenizer or network that are not there, or no room.
        """
        if teacher:
            _check_teacher(config, prefetch_only)
        if prefetch_only:
            if is_asked():
                raise KoffError("--prefetch-only fetches, --offline forbids it: give one of them")
            fetch_all(needs_of(config))
            return
        if prefetch_bytes is not None:
            raise KoffError("--prefetch_bytes is the size of what --prefetch-only copies: give both, or neither")
        data = DomainDataModule(**config.data.as_dict() | ({"cache": out} if out else {}))
        with first_speaks():
            prepared = data.prepare(tokenizer_of(config))
        for name, made in prepared.items():
            if made or not rank():
                print(f"{name}: {'tokenised' if made else 'is there already'}", flush=True)
        if teacher:
            store_teacher(config, data)
        if not rank():
            print(f"in {data.cache.folder}" + (f"; give it to runs: --data.cache {out}" if out else ""))


def _check_teacher(config: Any, prefetch_only: bool) -> None:
    """Raise KoffError for options under which there is no teacher to store."""
    if prefetch_only:
        raise KoffError("--prefetch-only fetches, --teacher computes: give one after the other")
    if config.model.artifact:
        raise KoffError("an artifact holds no dense model to learn from, so --teacher has nothing to store")
    if config.model.loss.top_k is None:
        raise KoffError(
            "--teacher stores the dense model's likeliest tokens: set --model.loss.top_k (100 in the paper)"
        )


@first_speaks()
def store_teacher(config: Any, data: DomainDataModule) -> None:
    """Store the teacher of all training rows beside the tokenised text; prints the size first, then what was done.

    Processes that work at one time, by torchrun or each started by hand, store different domains.

    Args:
        config: Options of the run, in the sections of `koff fit`.
        data: Prepared.

    Raises:
        KoffError: No backbone, a vocabulary that is smaller than loss.top_k, or no room on the disk.
    """
    model, k = config.model, config.model.loss.top_k
    backbone = load_backbone(
        model.backbone, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
    )
    head, backbone_hash = backbone.get_output_embeddings().weight, fingerprint(backbone)
    check_top_k(k, len(head))
    check_vocabulary(data.tokenizer, backbone.get_input_embeddings().num_embeddings)
    texts = {"": data} | ({"retention ": data.general} if model.retention and data.general is not None else {})
    rows = {(kind, name): rows for kind, text in texts.items() for name, rows in text.training_rows().items()}
    if not rank():
        _say_size(data, list(rows.values()), k, len(head))
    backbone = backbone.to(default_device(device_of("cpu" if config.trainer.accelerator == "cpu" else None)))

    def ask(batch: dict[str, Any]) -> TopK:
        return _likeliest(backbone, batch, k, model.loss.chunk)

    due = deque(rows)
    due.rotate(-rank())  # each process begins with another domain
    if count() > 1 and not has_locks(data.cache.folder):  # nothing would say who is at which
        due = deque([*rows][rank() :: count()])
    passed: set[tuple[str, str]] = set()  # since another process stores them
    while due:
        kind, name = due.popleft()
        packed = rows[kind, name]
        belongs, wait = texts[kind].belongs(packed, backbone_hash), (kind, name) in passed
        made = data.teachers.build(name, belongs, packed, ask, k, len(head), data.batch_size, wait)
        if made is None:
            due.append((kind, name))
            passed.add((kind, name))
        elif made or not (wait or rank()):
            print(f"teacher of {kind}{name}: {'stored' if made else 'is there already'}", flush=True)


def _say_size(data: DomainDataModule, rows: list[PackedRows], k: int, vocabulary: int) -> None:
    number, places = sum(map(len, rows)), data.seq_len - 1
    size = sum(stored_bytes(packed, k, vocabulary) for packed in rows)
    free = shutil.disk_usage(data.cache.folder).free  # it is there: the rows lie in it
    print(
        f"teacher: {number:,} rows x {places:,} tokens x {k} likeliest x {size // (number * places * k)} bytes -> "
        f"{size / 1e9:.3g} GB in {data.teachers.folder}, where {free / 1e9:.3g} GB are free",
        flush=True,
    )


def _likeliest(backbone: PreTrainedModel, batch: dict[str, Any], k: int, chunk: int) -> TopK:
    """The dense model's likeliest tokens at all places of a batch but each row's last, [B (T - 1)]."""
    with torch.no_grad():
        hidden = hidden_states(backbone, **inputs_of(batch, backbone.device))[:, :-1].flatten(0, 1)  # [B (T - 1), d]
        head = backbone.get_output_embeddings().weight
        if is_slow(head):
            hidden, head = hidden.float(), head.float()
        seen = [top_k_of(part, head, k) for part in hidden.split(chunk_size(head, chunk))]
    return TopK(torch.cat([part.index for part in seen]), torch.cat([part.log_q for part in seen]))
