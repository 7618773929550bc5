"""How often and how strongly every FFN neuron of the dense model is active, by domain: one pass over text.

A neuron is active at a token when its gate pre-activation is positive (LAPE, Tang et al. 2024). What it contributes is
what the down projection reads, act(gate) * up; its mean and variance are noted too. Only tokens with a label count:
neither padding nor the first token of a document (BOS). Documents are dealt to two halves in turn, so that whatever is
found can be looked for in either half alone.

Letters: N neurons, layer after layer; D domains; B rows, T tokens, n counted tokens of a batch, I neurons of a layer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.artifact.folder import FORMAT, read_versioned
from koff_lightning.backbone import hidden_states, inputs_of, neuron_linears
from koff_lightning.loading import fingerprint
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import replacing

if TYPE_CHECKING:
    import pandas as pd

    from koff_lightning.decomposition import Decomposition

TENSORS, ABOUT = "activations.safetensors", "activations.json"
Floats = NDArray[np.float64]


@dataclass
class Activations:
    """Sums over the tokens read so far; the first axis is the half of the documents that they belong to.

    Attributes:
        domains: Names of the domains.
        base_hash: Hash of the dense model's weights (`loading.fingerprint`).
        layer: Layer of each neuron, int64 [N].
        down_norm: L2 norm of each neuron's column of the down projection, fp64 [N].
        tokens: Tokens counted, int64 [2, D].
        positive: How many of these tokens come with a positive gate pre-activation, int64 [2, D, N].
        total: Sum of act(gate) * up, act the model's activation function, fp64 [2, D, N].
        square: Sum of its square, fp64 [2, D, N].
        batches: Batches read.
        digest: SHA-256 over the text of these batches, uint8 [32].
    """

    domains: list[str]
    base_hash: str
    layer: Tensor
    down_norm: Tensor
    tokens: Tensor
    positive: Tensor
    total: Tensor
    square: Tensor
    batches: int = 0
    digest: bytes = bytes(32)

    def rates(self, half: int | None = None) -> Floats:
        """Share of tokens at which each neuron is active, [N, D], of all documents or of one half of them.

        Raises:
            KoffError: The half holds no text of a domain.
        """
        tokens = self._sum(self.tokens, half)  # [D]
        if not tokens.all():
            name = self.domains[int(tokens.argmin())]
            raise KoffError(f"one half of the documents holds no text of domain {name!r}: give more than one document")
        return (self._sum(self.positive, half) / tokens[:, None]).T.numpy()

    def mean(self) -> Floats:
        """Mean contribution, [N, D]."""
        return (self._sum(self.total) / self._sum(self.tokens)[:, None]).T.numpy()

    def variance(self) -> Floats:
        """Variance of the contribution over tokens, [N, D]."""
        second = (self._sum(self.square) / self._sum(self.tokens)[:, None]).T.numpy()
        return np.maximum(second - self.mean() ** 2, 0.0)

    def importance(self) -> Floats:
        """Norm of a neuron's column times the root mean square of what it is fed, [N] (Wanda, Sun et al. 2024).

        Domains count alike, however much text they have.
        """
        second = (self._sum(self.square) / self._sum(self.tokens)[:, None]).mean(0)  # [N]
        return (self.down_norm * second.sqrt()).numpy()

    @staticmethod
    def _sum(values: Tensor, half: int | None = None) -> Tensor:
        return (values.sum(0) if half is None else values[half]).double()

    def table(self) -> "pd.DataFrame":
        """One line per neuron: layer, neuron (within it), rate, mean and variance by domain, importance."""
        import pandas as pd

        layer = self.layer.numpy()
        first = np.searchsorted(layer, layer)  # neurons lie layer after layer
        columns: dict[str, Any] = {"layer": layer, "neuron": np.arange(len(layer)) - first}
        for word, values in (("rate", self.rates()), ("mean", self.mean()), ("var", self.variance())):
            columns |= {f"{word}_{domain}": values[:, place] for place, domain in enumerate(self.domains)}
        return pd.DataFrame(columns | {"importance": self.importance()})

    def save(self, folder: str | Path) -> None:
        """Write `activations.safetensors` (all sums) and `activations.json` (what they are); whole or not at all."""
        folder = Path(folder).expanduser()
        names = ("layer", "down_norm", "tokens", "positive", "total", "square")
        tensors = {name: getattr(self, name).contiguous() for name in names}
        tensors["batches"] = torch.tensor(self.batches)
        tensors["digest"] = torch.tensor(list(self.digest), dtype=torch.uint8)
        about = {"format_version": FORMAT, "base_hash": self.base_hash, "domains": self.domains}
        about |= {"tokens": dict(zip(self.domains, self.tokens.sum(0).tolist(), strict=True)), "batches": self.batches}
        about["neurons_by_layer"] = torch.bincount(self.layer).tolist()
        try:
            with replacing(folder / ABOUT) as said, replacing(folder / TENSORS) as sums:
                save_file(tensors, sums)
                said.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise KoffError(f"cannot write {folder / TENSORS}: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read what `save` wrote.

        Raises:
            KoffError: It is missing or damaged.
        """
        folder = Path(folder).expanduser()
        about = read_versioned(folder / ABOUT)
        try:
            tensors = load_file(folder / TENSORS)
            batches, digest = int(tensors.pop("batches")), bytes(tensors.pop("digest").tolist())
            return cls(about["domains"], about["base_hash"], batches=batches, digest=digest, **tensors)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise KoffError(f"{folder / TENSORS} cannot be used ({error}): remove it and measure again") from error


def collect(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    domains: Sequence[str],
    *,
    base_hash: str | None = None,
    folder: str | Path | None = None,
    every: int = 50,
    progress: Callable[[int], None] | None = None,
) -> Activations:
    """Read text with the dense model, once.

    Args:
        model: The dense model, on any device; a Decomposition's is read by `collect_dense`.
        batches: Text as the data module gives it: `input_ids` and `labels` [B, T] (-100 = not counted), `domains`,
            and `position_ids`, `attention_mask` or `documents` [B, T] where it has them.
        domains: Names of the domains.
        base_hash: Hash of the model's weights; by default computed here.
        folder: Where the sums are kept. A pass that was cut short goes on there, with the same text.
        every: Batches between two saves.
        progress: Called with the number of batches done.

    Raises:
        KoffError: A domain without text, a row of an unknown one, or a folder that holds the sums of another model or
            of other text.
    """
    sums = _start(model, list(domains), base_hash or fingerprint(model), folder)
    before, text = sums.batches, bytes(32)
    number = 0
    for number, batch in enumerate(batches, 1):
        text = _chained(text, batch)
        if number <= before:  # done in an earlier pass
            if number == before and text != sums.digest:
                raise KoffError(f"{folder} holds the sums of other text: give the same text, or another folder")
            continue
        _add(sums, model, batch)
        sums.batches, sums.digest = number, text
        if folder is not None and number % every == 0:
            sums.save(folder)
        if progress is not None:
            progress(number)
    if number < before:
        raise KoffError(f"{folder} holds the sums of more text: give the same text, or another folder")
    if missing := [name for name, count in zip(sums.domains, sums.tokens.sum(0).tolist(), strict=True) if not count]:
        raise KoffError(f"domain {missing[0]!r} has no text to count: give some, or leave the domain out")
    if folder is not None and number > before:
        sums.save(folder)
    return sums


def collect_dense(
    module: "Decomposition", batches: Iterable[Mapping[str, Any]], domains: Sequence[str], **options: Any
) -> Activations:
    """`collect` for the dense model inside a decomposition: gates and memories off."""
    with module.under():
        return collect(module.backbone, batches, domains, base_hash=module.backbone_hash, **options)


def _start(model: PreTrainedModel, domains: list[str], base_hash: str, folder: str | Path | None) -> Activations:
    """The sums of an earlier pass, or zeros."""
    if folder is not None and (Path(folder).expanduser() / ABOUT).is_file():
        sums = Activations.load(folder)
        if (sums.base_hash, sums.domains) != (base_hash, domains):
            raise KoffError(
                f"{folder} holds the sums of model {sums.base_hash[:12]} over {', '.join(sums.domains)}; this is model "
                f"{base_hash[:12]} over {', '.join(domains)}: give another folder"
            )
        return sums
    downs = [getattr(down, "base_layer", down).weight for _, down in neuron_linears(model)]  # each [d, I]
    widths = torch.tensor([down.shape[1] for down in downs])
    sums = [torch.zeros(2, len(domains), int(widths.sum()), dtype=t) for t in (torch.int64, *[torch.float64] * 2)]
    norms = torch.cat([down.detach().float().norm(dim=0).double().cpu() for down in downs])
    layer = torch.arange(len(downs)).repeat_interleave(widths)
    return Activations(domains, base_hash, layer, norms, torch.zeros(2, len(domains), dtype=torch.int64), *sums)


def _chained(before: bytes, batch: Mapping[str, Any]) -> bytes:
    parts = [batch["input_ids"].cpu().numpy().tobytes(), repr(list(batch["domains"])).encode()]
    return hashlib.sha256(b"".join([before, *parts])).digest()


@torch.no_grad()
def _add(sums: Activations, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Run one batch and add what its counted tokens show."""
    counted = (batch["labels"] != -100).to(model.device)  # bool [B, T]
    places = {name: place for place, name in enumerate(sums.domains)}
    if unknown := sorted({str(name) for name in batch["domains"] if name not in places}):
        raise KoffError(f"the text has a row of domain {unknown[0]!r}; the domains are {', '.join(sums.domains)}")
    domain = torch.tensor([places[name] for name in batch["domains"]], device=model.device)  # [B]
    documents = batch.get("documents")
    half = torch.arange(len(domain))[:, None] % 2 if documents is None else documents % 2  # [B, T|1]
    owner = (half.to(model.device) * len(places) + domain[:, None]).expand_as(counted)[counted]  # [n] in 0..2D-1
    member = nn.functional.one_hot(owner, 2 * len(places)).T.float()  # [2D, n]
    inputs = inputs_of(batch, model.device)
    with _watched(model, sums, counted, member):
        hidden_states(model, **inputs)
    sums.tokens += member.sum(1).long().cpu().view(2, -1)


@contextmanager
def _watched(model: PreTrainedModel, sums: Activations, counted: Tensor, member: Tensor) -> Iterator[None]:
    """Inside the block every forward adds the counted tokens [n] to the sums, each to its row of `member` [2D, n]."""

    def note(start: int, of_gate: bool) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            seen = (output if of_gate else inputs[0])[counted].float()  # [n, I]
            parts = {"positive": seen > 0} if of_gate else {"total": seen, "square": seen.square()}
            for name, part in parts.items():
                to = getattr(sums, name)[..., start : start + seen.shape[1]]
                to += (member @ part.float()).cpu().to(to.dtype).view(2, -1, seen.shape[1])  # exact up to 2^24 tokens

        return add

    start, hooks = 0, []
    for gate, down in neuron_linears(model):
        hooks.append(gate.register_forward_hook(note(start, True)))
        hooks.append(down.register_forward_pre_hook(note(start, False)))
        start += down.in_features
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
