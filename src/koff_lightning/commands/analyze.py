"""`koff analyze`: where did the knowledge go? The whole analysis of a run, as files and a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_lightning.commands.parsing.counts import check_counts, check_seed
from koff_lightning.commands.parsing.text_options import data_section, named_texts
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import own_cache, refuse_unwritable
from koff_lightning.support.quick_imports import quick_imports

if TYPE_CHECKING:
    from koff_lightning.studies.analysis.study import Settings


def analyze(
    *,
    model: list[str] | None = None,
    against: list[str] | None = None,
    dense: str | None = None,
    config: str | None = None,
    data: list[str] | None = None,
    out: str | None = None,
    name: str = "koff",
    tokens: int = 50_000,
    heldout_bytes: int = 20_000,
    rate: float = 0.01,
    bar: float = 0.95,
    draws: int = 10_000,
    resamples: int = 1000,
    controls: int = 2,
    seed: int = 0,
    skip: str | None = None,
    device: str | None = None,
) -> None:
    """Study which neurons a run removed, whom they served, and what the memories hold in their place.

    Args:
        model: Artifact, checkpoint or folder of a run, or a pattern; several are seeds of one way of pruning.
        against: NAME=RUN, another way of pruning to compare with, such as wanda_sp=runs/wanda_sp; may be given several
            times, of one name for several seeds. Only its mask is read.
        dense: Where the dense model is, if it is no longer where the run found it.
        config: Config whose `data` section names the text; by default that of the first run.
        data: NAME=TEXT of a domain, in place of a config: de=bundled:de or law=corpora/law/*.jsonl; several times.
        out: Folder to write; by default `analysis` in the folder of the first run, and ARTIFACT-analysis beside an
            artifact that lies in none.
        name: What the studied runs are called in figures.
        tokens: Training text in which neurons are watched, of each domain; less where a domain has less.
        heldout_bytes: Held-out text to score, of each domain, at most.
        rate: Share of neurons that LAPE calls specific.
        bar: Quantile of all rates of activity above which a neuron counts as active.
        draws: Permutations of each test.
        resamples: Resamples of the bootstrap over seeds and neurons.
        controls: Random sets of neurons put back beside each domain's specialists.
        seed: Seed of all that is drawn.
        skip: Questions to leave out, with commas: removal, ranking, overlap, similarity, transfer, knockout, causal,
            attention, adapters, tokens.
        device: Torch device; by default a GPU if there is one.
    """
    if not model:
        raise KoffError("analyze: give --model, an artifact or a checkpoint; several are seeds of one way of pruning")
    check_counts(tokens=tokens, heldout_bytes=heldout_bytes, draws=draws, resamples=resamples)
    check_seed(seed)
    for option, share in (("rate", rate), ("bar", bar)):
        if not 0 < share < 1:
            raise KoffError(f"{option} must be a share between 0 and 1; got {share}")
    if controls < 0:
        raise KoffError(f"controls must be 0 or more, got {controls}")
    from koff_lightning.studies.analysis.study import QUESTIONS, Settings

    settings = Settings(name, rate, bar, draws, resamples, controls, seed, _skipped(skip, QUESTIONS))
    _run(model, against or [], dense, (config, data), out, (tokens, heldout_bytes), settings, device)


def _run(
    model: list[str],
    against: list[str],
    dense: str | None,
    asked: tuple[str | None, list[str] | None],
    out: str | None,
    sizes: tuple[int, int],
    settings: "Settings",
    device: str | None,
) -> None:
    with quick_imports():
        from koff_lightning.artifact.decomposed import default_device
        from koff_lightning.studies.analysis.report.files import write
        from koff_lightning.studies.analysis.runs import config_of, find_others, find_runs, folder_for, history_of
        from koff_lightning.studies.analysis.study import study
        from koff_lightning.studies.analysis.text import open_text

    runs, others = find_runs(model), find_others(against)
    first = next(iter(runs.values()))
    if out is None and own_cache() in first.parents:
        raise KoffError(f"analyze: {model[0]} is on the hub and has no folder here to write beside: give --out")
    options, origin = _text(*asked, config_of(first), first)
    folder, history = Path(out).expanduser() if out else folder_for(first), history_of(first)
    refuse_unwritable(folder, "analyze: --out")
    data, text = open_text(options, dense or _backbone(first), *sizes)
    found = study(runs, others, data, text, settings, folder, dense=dense, device=default_device(device), say=_say)
    found.about["text"] |= {"origin": origin}
    found.about["history"] = history
    page = write(found, folder)
    for question, reason in found.missing.items():
        _say(f"not answered: {question}: {reason}")
    _say(f"wrote {page}")


def _skipped(skip: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    from koff_lightning.support.wording import nearest

    names = tuple(word.strip() for word in skip.split(",")) if skip else ()
    for word in names:
        if word not in known:
            raise KoffError(f"--skip: no question {word!r}.{nearest(word, known)} There are {', '.join(known)}")
    return names


def _text(
    config: str | None, data: list[str] | None, run_options: dict[str, Any] | None, run: Path
) -> tuple[dict[str, Any], str]:
    """Section `data` of what is asked for, and where it comes from."""
    if config and data:
        raise KoffError("analyze: give either --config or --data")
    if data:
        domains = named_texts(data)
        size = (run_options or {}).get("data", {}).get("seq_len")
        return {"domains": domains} | ({"seq_len": size} if size else {}), "--data"
    if config:
        return data_section(config), config
    if not run_options:
        raise KoffError(f"{run} does not say which text it was made with: give --config or --data NAME=TEXT")
    return dict(run_options["data"]), "the run's own config"


def _backbone(run: Path) -> str:
    """Where a run found the dense model."""
    from koff_lightning.artifact.checkpoint import read_checkpoint
    from koff_lightning.artifact.folder import read_manifest

    if run.is_dir():
        return read_manifest(run).base["id"]
    return read_checkpoint(run, mmap=True)["hyper_parameters"]["backbone"]


def _say(line: str) -> None:
    print(line, flush=True)
