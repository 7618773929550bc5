"""`koff reproduce`: run the rows of the paper's tables, and set ours beside the paper's (docs/reproduce.md)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_lightning.commands.claims import keep_config, resolved_config, the_command, trust_words
from koff_lightning.commands.parsing.counts import check_counts
from koff_lightning.data.sources import as_sources
from koff_lightning.studies.claims.arms import Run
from koff_lightning.support.errors import KoffError
from koff_lightning.support.launched import refuse_several
from koff_lightning.training.run_folder import alone_in

if TYPE_CHECKING:
    from koff_lightning.studies.claims.paper_tables import Table


def reproduce(
    *,
    config: str = "paper/tiny_languages.yaml",
    backbone: str | None = None,
    tables: str | None = None,
    seeds: int = 3,
    out: str = "runs/reproduce",
    jobs: int = 1,
    further: list[str] | None = None,
    arms: str | None = None,
) -> None:
    """Run the rows of the paper's tables, and write them with the paper's figures beside ours (docs/reproduce.md).

    Runs that are done already are not repeated. `reproduce.md` and `reproduce.json` lie in the folder `out`, and
    with `fig 2` its curve in `plots`.

    Args:
        config: Config of `koff fit` that all rows share: one of `configs/paper/`, or one of yours.
        backbone: Another backbone than the config's.
        tables: Which, with commas: `2,10,fig 2`; by default all.
        seeds: Runs of each row: with seeds 0, 1, ...
        out: Folder of all runs and of the report.
        jobs: Runs at one time, each with its share of the cores and GPUs.
        further: Options of `koff fit` for all rows, as they stand after a lone `--`.
        arms: Only their rows, with commas: `koff,ours`; by default all rows of the tables.
    """
    from koff_lightning.studies.claims import paper_tables

    refuse_several("reproduce")
    check_counts(seeds=seeds, jobs=jobs)
    chosen = paper_tables.chosen(tables, arms)
    resolved = resolved_config(config, backbone, further or [])
    as_sources(resolved["data"]["domains"])  # names and weights that no row would take
    steps = resolved["trainer"]["max_steps"]
    if not steps or steps < 1:
        raise KoffError(f"koff reproduce needs trainer.max_steps, of which rows take a share; got {steps}")
    given = {"config": config, "backbone": backbone, "tables": tables, "seeds": seeds, "arms": arms}
    share = resolved["model"]["sparsity"]["target"]
    wanted = [Run(arm, share, seed) for seed in range(seeds) for arm in paper_tables.needed(chosen.values())]
    chosen = {name: table.of(resolved["model"]["backbone"]) for name, table in chosen.items()}
    folder = Path(out).expanduser().absolute()
    about = {"command": the_command("reproduce", given, further), "backbone": resolved["model"]["backbone"]}
    with alone_in(folder, "--out"):
        keep_config(folder / "config.yaml", resolved)
        _run_and_write(folder, chosen, wanted, (steps, trust_words(resolved), jobs), about)


def _run_and_write(
    folder: Path,
    tables: dict[str, "Table"],
    wanted: list[Run],
    how: tuple[int, list[str], int],
    about: dict[str, Any],
) -> None:
    """Make the runs and write the tables, whatever has failed; `how`: the config's steps, words of trust, jobs."""
    from koff_lightning.studies.claims import protocol, runs
    from koff_lightning.studies.claims import report as claims_report

    (steps, trust, jobs), paper = how, protocol.paper()
    words = {run: protocol.command(run, paper.arms[run.arm], folder, steps) + trust for run in wanted}
    failures = runs.run_all(words, folder, jobs)
    done = claims_report.read(folder, wanted, failures)
    failures += claims_report.without_scores(folder, done)
    first = f"first {failures[0].run.name}: {failures[0].last} (log: {failures[0].log})" if failures else ""
    if not done:
        raise KoffError(f"every run failed, {first}")
    about = protocol.report(paper, tables, done) | about
    about |= {"failures": [{"run": failure.run.name, "tail": failure.tail} for failure in failures]}
    protocol.write(folder, about)
    print(protocol.markdown(about))
    print(f"wrote {folder / 'reproduce.md'} and {folder / 'reproduce.json'}")
    if failures:
        raise KoffError(
            f"{len(failures)} of {len(wanted)} runs failed, {first}. The same command repeats only what is missing"
        )
