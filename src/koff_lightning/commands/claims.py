"""`koff claims`: run the arms, then report what they say about the paper's claims (docs/claims.md)."""

import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_lightning.commands.parsing.counts import check_counts
from koff_lightning.data.sources import as_sources
from koff_lightning.studies.claims import arms as all_arms
from koff_lightning.studies.claims.arms import AFTER, EQUAL, METHODS, Run
from koff_lightning.studies.claims.retention import Answers, Suites, answer, figures, load_suites
from koff_lightning.support.errors import KoffError
from koff_lightning.support.launched import refuse_several
from koff_lightning.support.quick_imports import quick_imports
from koff_lightning.support.secrets import without_secrets
from koff_lightning.training.run_folder import alone_in

if TYPE_CHECKING:
    from koff_lightning.studies.claims.runs import Failure

TINYS = "tiny_12pct.yaml"  # config of koff-tiny
CHOSEN = (
    "model.loss.kl",
    "model.optim.kv_lr",
    "model.lora.rank",
    "model.kv.slots",
    "data.seq_len",
    "trainer.max_steps",
)


def claims(
    *,
    config: str = TINYS,
    backbone: str | None = None,
    seeds: int = 3,
    sparsity: str | None = None,
    out: str = "runs/claims",
    jobs: int = 1,
    arms: str | None = None,
    tasks: str | None = None,
    curve: str | None = None,
    further: list[str] | None = None,
) -> None:
    """Measure KOFF against its controls and say which of the paper's claims hold (docs/claims.md).

    Runs that are done already are not repeated. The table, the verdicts and the plots lie in the folder `out`.

    Args:
        config: Config of `koff fit` that all arms share; `koff configs` lists those that ship with the package.
        backbone: Another backbone than the config's.
        seeds: Runs of each arm: with seeds 0, 1, ...
        sparsity: Shares to remove, with commas. All arms run at the first one; KOFF, the mask without memories, mask
            first, and the best one-shot mask at the others. By default the config's target.
        out: Folder of all runs and of the report.
        jobs: Runs at one time, each with its share of the cores and GPUs.
        arms: Arms to run, with commas; by default all of docs/claims.md.
        tasks: Tasks of lm-eval on which to compare KOFF with the dense model too, with commas, `{domain}` for the name
            of each domain: `koff_cloze_{domain},koff_continuation_{domain}`.
        curve: Arms of the further sparsities, with commas, or `all`.
        further: Options of `koff fit` for all arms, as they stand after a lone `--`.
    """
    refuse_several("claims")
    check_counts(seeds=seeds, jobs=jobs)
    chosen = all_arms.chosen(arms)
    if tasks and "koff" not in chosen:
        raise KoffError(
            "tasks are asked of the runs of koff, which arms leaves out: add koff to --arms, or leave out --tasks"
        )
    on_curve = chosen if curve == "all" else all_arms.chosen(curve) if curve else None
    shares = None if sparsity is None else _shares(sparsity)
    if on_curve == ["dense_memory"]:
        raise KoffError("curve: dense_memory removes nothing, whatever the sparsity: name other arms")
    if curve and len(shares or ()) < 2:
        raise KoffError("curve names the arms of the further sparsities: give --sparsity more than one, as 0.12,0.25")
    resolved = resolved_config(config, backbone, further or [])
    as_sources(resolved["data"]["domains"])  # names and weights that no arm would take
    shares = shares or _shares(str(resolved["model"]["sparsity"]["target"]))
    equal = all_arms.equal_memories(resolved["model"]) if set(EQUAL) & {*chosen, *(on_curve or ())} else {}
    suites = load_suites(tasks, list(resolved["data"]["domains"])) if tasks else {}
    folder = Path(out).expanduser().absolute()
    given = {"config": config, "backbone": backbone, "seeds": seeds, "sparsity": sparsity, "arms": arms, "tasks": tasks}
    given |= {"curve": curve}
    about = {"command": the_command("claims", given, further), "equal_memories": equal}
    if config == TINYS:
        _warn_of_settings(resolved)
    with alone_in(folder, "--out"):
        keep_config(folder / "config.yaml", resolved)
        _measure(folder, chosen, on_curve, shares, seeds, jobs, suites, about)


def _measure(
    folder: Path,
    chosen: list[str],
    on_curve: list[str] | None,
    shares: list[float],
    seeds: int,
    jobs: int,
    suites: Suites,
    about: dict[str, Any],
) -> None:
    """Make the runs and write the report, whatever has failed."""
    import yaml

    from koff_lightning.studies.claims import report as claims_report
    from koff_lightning.studies.claims import runs as arm_runs

    def make(runs: list[Run]) -> list[arm_runs.Failure]:
        equal = about["equal_memories"]
        words = {run: all_arms.command(run, folder, equal, shared["model"]["sparsity"]) + trust for run in runs}
        return arm_runs.run_all(words, folder, jobs)

    shared = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    trust = trust_words(shared)
    main = [Run(arm, shares[0], seed) for seed in range(seeds) for arm in _masks_first(chosen)]
    failures = make(main)
    done = claims_report.read(folder, main, failures)
    failures += claims_report.without_scores(folder, done)
    if not done:
        raise KoffError(f"every run failed, first {failures[0].run.name}: {failures[0].last} (log: {failures[0].log})")
    best = claims_report.best_one_shot(done)
    further = _masks_first([arm for arm in on_curve or _usual_curve(chosen, best) if arm != "dense_memory"])
    curve = [Run(arm, share, seed) for seed in range(seeds) for share in shares[1:] for arm in further]
    failures += make(curve)
    done |= claims_report.read(folder, curve, failures)
    failures += claims_report.without_scores(folder, done)
    about = about | {"best_one_shot": best, "retention": []}
    report = claims_report.write(folder, done, failures, about)
    if suites:  # after the report: to score tasks takes long, and may fail
        koff = [run for run in done if (run.arm, run.sparsity) == ("koff", shares[0])]
        answers, without = _answers(folder, koff, suites)
        failures += without
        report = claims_report.write(folder, done, failures, about | {"retention": figures(answers)})
    claims_report.show(folder, report)
    if failures:
        raise KoffError(
            f"{len(failures)} of {len(main) + len(curve)} runs failed, first {failures[0].run.name}: "
            f"{failures[0].last} (log: {failures[0].log}). The same command repeats only what is missing"
        )


def _answers(folder: Path, runs: Sequence[Run], suites: Suites) -> tuple[list[Answers], list["Failure"]]:
    """What runs answer, and those that could not be asked: they are told like runs that came to nothing."""
    from koff_lightning.studies.claims import runs as arm_runs

    answers, failures = [], []
    for run in runs:
        try:
            answers.append(answer(folder / run.name, suites))
        except Exception as error:  # whatever lm-eval, the tasks' data or the memory of the machine do
            said = str(error) if isinstance(error, KoffError) else traceback.format_exc()
            failures.append(arm_runs.failed(run, folder, "tasks", f"tasks: {said}"))
    return answers, failures


def the_command(verb: str, options: dict[str, Any], further: list[str] | None) -> str:
    """The command that gives the same report, whatever its folder and its jobs."""
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return without_secrets(shlex.join(["koff", verb, *words, *(["--", *further] if further else [])]))


def _masks_first(chosen: list[str]) -> list[str]:
    """One-shot masks before the arms that take them."""
    return [*(arm for arm in chosen if arm in METHODS), *(arm for arm in chosen if arm not in METHODS)]


def _usual_curve(chosen: list[str], best: str | None) -> list[str]:
    """Arms of the further sparsities: the best one-shot mask as it is and with memories, and these three."""
    of_best = [arm for arm in chosen if best is not None and best in (arm, AFTER.get(arm))]
    return [*of_best, *(arm for arm in ("koff", "no_memory", "two_stage") if arm in chosen)]


def _shares(text: str) -> list[float]:
    """The list of sparsities."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
        raise KoffError(f"sparsity must be different numbers between 0 and 1 with commas, as 0.12,0.25; got {text!r}")
    return shares


def resolved_config(config: str, backbone: str | None, further: list[str]) -> dict[str, Any]:
    """All options of the runs, as `koff fit --print_config` tells them; without those that each run sets itself."""
    with quick_imports():
        from koff_lightning.commands import training_cli

    words = ["fit", "--config", config, *([f"--model.backbone={backbone}"] if backbone else []), *further]
    resolved = training_cli.resolved(words)
    if resolved["model"].get("artifact"):
        raise KoffError("model.artifact adds domains to a finished artifact; the claims are about learning a mask")
    if resolved.pop("ckpt_path"):
        raise KoffError("koff claims starts every arm anew: leave ckpt_path out")
    del resolved["trainer"]["default_root_dir"], resolved["seed_everything"], resolved["weights_only"]
    return resolved


def _warn_of_settings(resolved: dict[str, Any]) -> None:
    """Say that another backbone is about to run with what was chosen for koff-tiny."""
    from koff_lightning.loading import TINY

    if (backbone := resolved["model"]["backbone"]) == TINY:
        return
    flat = _flat(resolved)
    settings = ", ".join(f"{name} {flat[name]}" for name in CHOSEN if name in flat)
    print(
        f"koff: warning: {backbone} runs with the settings of {TINYS}, which were chosen for {TINY} ({settings}): its "
        "claims may fail for that reason alone. Give --config one for its size; `koff configs` lists those that ship",
        file=sys.stderr,
    )


def trust_words(resolved: dict[str, Any]) -> list[str]:
    """The word without which a config may not let remote code run; whoever asked for these runs has said it."""
    return ["--model.trust_remote_code=true"] if resolved["model"]["trust_remote_code"] else []


def keep_config(path: Path, resolved: dict[str, Any]) -> None:
    """Write the resolved config, or make sure that it is the one that is there.

    What is there is resolved anew: an option that has come since then stands at its default, as those runs had it.
    """
    import yaml

    from koff_lightning.support.files import write_atomically

    if not path.exists():
        write_atomically(path, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        return
    try:
        there, here = _flat(resolved_config(str(path), None, trust_words(resolved))), _flat(resolved)
    except KoffError as error:
        raise KoffError(
            f"{path} was written by another release of koff-lightning ({error}): give another --out"
        ) from error
    odd = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if odd:
        name = odd[0]
        raise KoffError(
            f"{path.parent} holds runs with other options ({name} is {there.get(name)!r} there, {here.get(name)!r} "
            f"here{f'; {len(odd) - 1} more' if odd[1:] else ''}): give another --out"
        )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
