"""The whole analysis of one or several runs: every question asked in order, the answers kept as tables.

A question that cannot be asked of these runs (one domain only, no neuron removed, no KV memory) is left out and the
reason kept, so that the rest is answered all the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koff_lightning.data import DomainDataModule
from koff_lightning.data.calibration import CalibrationText
from koff_lightning.decomposition import Decomposition
from koff_lightning.reports.results import kept_units
from koff_lightning.studies.analysis import neurons, paper
from koff_lightning.studies.analysis.activations import Activations, collect_dense
from koff_lightning.studies.analysis.lape import BAR, RATE, Specialists, identify
from koff_lightning.studies.analysis.masks import Mask, NothingRemoved, read_mask
from koff_lightning.studies.analysis.memories import questions
from koff_lightning.studies.analysis.opening import open_run
from koff_lightning.studies.analysis.runs import one_dense_model
from koff_lightning.studies.analysis.text import identity
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

QUESTIONS = (
    "removal",
    "ranking",
    "overlap",
    "similarity",
    "transfer",
    "knockout",
    "causal",
    "attention",
    "adapters",
    "tokens",
)
Tables = Mapping[str, "pd.DataFrame"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a study is done.

    Attributes:
        name: What the studied runs are called in figures.
        rate: Share of neurons that LAPE selects.
        bar: Quantile of all rates that counts as active.
        draws: Permutations.
        resamples: Resamples of the bootstrap over seeds and neurons.
        controls: Random sets of neurons beside each one that is put back.
        seed: Seed of all that is drawn.
        skip: Questions to leave out.
    """

    name: str = "koff"
    rate: float = RATE
    bar: float = BAR
    draws: int = 10_000
    resamples: int = 1000
    controls: int = 2
    seed: int = 0
    skip: tuple[str, ...] = ()


@dataclass
class Study:
    """What was found.

    Attributes:
        settings: How.
        about: What was studied, in which text; plain values.
        tables: By name; docs/analysis.md says what is in each.
        missing: Question, or question and run -> why it was not answered.
    """

    settings: Settings
    about: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, "pd.DataFrame"] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def ask(self, question: str, answer: Callable[[], Tables], run: str = "") -> None:
        """Keep the tables that answer a question, or why there are none."""
        if question in self.settings.skip:
            self.missing[question] = "left out, as --skip says"
            return
        try:
            self.add(answer())
        except KoffError as error:
            self.missing[f"{question} of {run}" if run else question] = str(error)

    def add(self, tables: Tables) -> None:
        """Keep tables; one of a name that is there already goes below it."""
        import pandas as pd

        for name, table in tables.items():
            parts = [part for part in (self.tables.get(name), table) if part is not None and len(part)]
            self.tables[name] = pd.concat(parts, ignore_index=True) if parts else table


def study(
    runs: Mapping[str, Path],
    others: Mapping[str, Mapping[str, Path]],
    data: DomainDataModule,
    text: CalibrationText,
    settings: Settings,
    folder: Path,
    *,
    dense: str | None = None,
    device: str = "cpu",
    say: Say = print,
) -> Study:
    """Ask everything of some runs, which are seeds of one way of pruning.

    Args:
        runs: Checkpoints or artifacts by name.
        others: Runs to compare with, by kind and name; only their masks are read.
        data: Domains, set up; the held-out text is scored.
        text: In which the dense model's neurons are watched.
        settings: How.
        folder: Where the sums of activity are kept, so that a pass that was cut short goes on.
        dense: Where the dense model is, if it has moved.
        device: Torch device.
        say: Is told how far things are.

    Raises:
        KoffError: A run that cannot be opened, masks of several dense models, or text that is no good at all.
    """
    found = Study(settings)
    masks = _masks(found, runs, others, dense)
    heldout = list(data.val_dataloader())
    specialists = None
    for number, (name, path) in enumerate(runs.items()):
        say(f"opening {name}")
        module = open_run(path, dense).to(device)
        if not number:
            one_dense_model({name: module.backbone_hash} | {other.name: other.base_hash for other in masks.values()})
            seen = _watched(module, data, text, folder, say)
            say("comparing neurons")
            specialists = _about_neurons(found, seen, masks)
        asked = questions(name, module, heldout, specialists, data.tokenizer, settings.controls, settings.seed)
        for question, answer in asked.items():
            say(f"{name}: {question}")
            found.ask(question, answer, name)
        found.about.setdefault("runs", {})[name] = _about_run(module, path)
    _add_statements(found)
    found.about |= {"settings": asdict(settings), "text": _about_text(data, seen, heldout)}
    return found


def _masks(
    found: Study, runs: Mapping[str, Path], others: Mapping[str, Mapping[str, Path]], dense: str | None
) -> dict[tuple[str, str], Mask]:
    """All masks that remove neurons; why one of the studied runs has none is noted."""
    masks = {}
    for name, path in runs.items():
        try:
            mask = read_mask(path, dense)
            if not mask.removed.any():
                raise NothingRemoved(f"{name} removes no FFN neuron")
            masks[found.settings.name, name] = mask
        except NothingRemoved as error:
            found.missing[f"removal of {name}"] = str(error)
    for kind, of_kind in others.items():
        if kind == found.settings.name:
            raise KoffError(f"--against {kind}=...: so the studied runs are called; give --name or another name")
        for name, path in of_kind.items():
            masks[kind, name] = read_mask(path, dense)
            if not masks[kind, name].removed.any():
                raise KoffError(f"--against {kind}={path} removes no FFN neuron: there is nothing to compare")
    return masks


def _watched(
    module: Decomposition, data: DomainDataModule, text: CalibrationText, folder: Path, say: Say
) -> Activations:
    """Sums of activity of the dense model; a pass over the same text is not made twice."""
    say(f"watching the dense model's neurons over {text.num_tokens:,} tokens")
    step = max(len(text) // 4, 1)

    def progress(done: int) -> None:
        if done % step == 0:
            say(f"  {done} of {len(text)} batches")

    where = folder / "activations" / f"{module.backbone_hash[:12]}-{identity(text)}"
    return collect_dense(module, text, data.domain_names, folder=where, progress=progress)


def _about_neurons(found: Study, seen: Activations, masks: neurons.Masks) -> Specialists | None:
    """Answer what is asked of neurons; returns the specific ones, if any can be told."""
    for mask in masks.values():
        mask.check(seen)
    settings = found.settings
    if masks:
        found.add({"masks": neurons.mask_table(masks)})
        found.ask("ranking", lambda: _ranking(found, seen, masks))
        found.ask("overlap", lambda: {"overlap": neurons.overlaps(masks)})
    try:
        specialists = identify(seen.rates(), seen.domains, settings.rate, settings.bar)
    except KoffError as error:
        found.missing["removal"] = str(error)
        found.add({"neurons": neurons.neuron_table(seen, masks, None, {})})
        return None
    classes = neurons.classes_of(seen, specialists, settings.rate, settings.bar)
    found.add({"neurons": neurons.neuron_table(seen, masks, specialists, classes)})
    found.about["lape"] = {
        "bar": specialists.bar,
        "tied": specialists.tied,
        "neurons": {name: int(members.sum()) for name, members in classes.items()},
    }
    found.ask("stability", lambda: _stability(found, seen))
    if masks:
        found.ask("removal", lambda: _removal(found, seen, masks, classes))
    else:
        found.missing["removal"] = "no run removes FFN neurons"
    return specialists


def _ranking(found: Study, seen: Activations, masks: neurons.Masks) -> Tables:
    said = neurons.ends_of_runs(seen, masks, found.settings.name)
    return {"ranking": neurons.ranking_table(seen, masks)} | ({"statements": said} if len(said) else {})


def _add_statements(found: Study) -> None:
    """What the paper says of figure 4 and of appendix B, beside what the neurons tell of table 3."""
    import pandas as pd

    lines = paper.layer_lines([run["kept"] for run in found.about["runs"].values()])
    if "similarity" in found.tables:
        lines += paper.similarity_lines(found.tables["similarity"], found.tables["similarity_draws"])
    if lines:
        found.add({"statements": pd.DataFrame(lines)})


def _stability(found: Study, seen: Activations) -> Tables:
    table, found.about["stability"] = neurons.stability_table(seen, found.settings.rate, found.settings.bar)
    return {"stability": table}


def _removal(found: Study, seen: Activations, masks: neurons.Masks, classes: Mapping[str, np.ndarray]) -> Tables:
    s = found.settings
    tables = neurons.removal_tables(seen, masks, classes, s.draws, s.seed)
    tables["pooled"] = neurons.pooled_table(seen, masks, classes, s.resamples, s.seed)
    kinds = {kind for kind, _ in masks}
    if s.name in kinds:
        tables["selections"] = neurons.selection_table(seen, masks, s.name, (s.rate, s.bar), s.resamples, s.seed)
    if s.name in kinds and len(kinds) > 1:
        tables["ratios"] = neurons.ratio_table(seen, masks, s.name, classes, s.resamples, s.seed)
    return tables


def _about_run(module: Decomposition, path: Path) -> dict[str, Any]:
    kept = module.hard_mask().cpu()
    about = {"path": str(path), "dense": module.source, "base_hash": module.backbone_hash}
    about["kept"] = kept_units(module, kept)
    about["removed_of_body"] = module.budget.report(kept)["body"]
    return about | {"memories": {d: module.memories.size(d) for d in module.memories.domains}}


def _about_text(data: DomainDataModule, seen: Activations, heldout: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = dict.fromkeys(data.domain_names, 0)
    for batch in heldout:
        for domain, size in zip(batch["domains"], batch["num_bytes"].tolist(), strict=True):
            sizes[domain] += int(size)
    sources = {name: source.files for name, source in data.sources.items()}
    tokens = dict(zip(seen.domains, seen.tokens.sum(0).tolist(), strict=True))
    return {"sources": sources, "watched_tokens": tokens, "heldout_bytes": sizes, "seq_len": data.seq_len}
