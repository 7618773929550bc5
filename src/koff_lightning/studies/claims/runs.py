"""Run arms as commands, each in a folder and a process of its own: side by side, resumable, with the time left.

A run that was cut short goes on from its newest checkpoint, if the command that began it was the same.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from koff_lightning.studies.claims.arms import Run
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically

PROGRAM = [sys.executable, "-m", "koff_lightning"]
DONE = "options.json"  # written when a run has ended well: what made it
LOGS = "logs"  # folder of what the runs said, beside theirs; and of the commands that began them
TAIL = 15  # lines of a failed run's log that the report keeps


@dataclass(frozen=True)
class Failure:
    """A run that came to nothing."""

    run: Run
    tail: str
    log: Path

    @property
    def last(self) -> str:
        """The last thing it said."""
        return (self.tail.strip().splitlines() or ["it said nothing"])[-1].removeprefix("koff: ")


def is_done(out: Path, run: Run, words: Sequence[str]) -> bool:
    """Whether the finished run of a command is there.

    Raises:
        KoffError: Its folder holds another one's, or something that is no run at all.
    """
    folder = out / run.name
    if (folder / DONE).is_file():
        given, wanted = json.loads((folder / DONE).read_text(encoding="utf-8")), _made_by(words, out)
        if given not in (wanted, wanted[:-1]):  # earlier releases wrote the words alone
            words = (word for word in [*given, *wanted] if word not in given or word not in wanted)
            odd = next(words, "their order")
            raise KoffError(f"{folder} holds a run with other options (first: {odd}): give another --out")
        return True
    if folder.exists() and any(folder.iterdir()) and not _log(out, run).is_file():
        raise KoffError(f"{folder} holds something that is no run of koff claims: give another --out")
    return False


def _made_by(words: Sequence[str], out: Path) -> list[str]:
    """The words of a command wherever the folder of all runs lies, then which config they name."""
    config = hashlib.sha256((out / "config.yaml").read_bytes()).hexdigest()
    return [*(word.replace(str(out), "OUT") for word in words), f"config.yaml of sha256 {config[:16]}"]


def _log(out: Path, run: Run) -> Path:
    return out / LOGS / f"{run.name}.txt"


def _goes_on(out: Path, run: Run, words: Sequence[str]) -> bool:
    """Whether the same command left a checkpoint of this run before it was cut short; one-shot masks write none."""
    begun = _log(out, run).with_suffix(".json")
    same = begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == _made_by(words, out)
    return same and words[0] == "fit" and any((out / run.name).rglob("*.ckpt"))


def run_all(commands: Mapping[Run, Sequence[str]], out: Path, jobs: int) -> list[Failure]:
    """Make every run that is not done; one that fails does not stop the others.

    Args:
        commands: Words after `koff` of each run; a run stands after the one that it needs.
        out: Their folders' folder.
        jobs: Processes at one time; each gets its share of the GPUs, and of the cores unless OMP_NUM_THREADS is set.

    Raises:
        KoffError: A folder that holds something else (nothing has run then), or a disk that does not take a log.
        KeyboardInterrupt: Stopped by hand; the running processes are ended.
    """
    due = [run for run, words in commands.items() if not is_done(out, run, words)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for gpus in gpu_shares(jobs):
        places.put(environment | gpus)
    board, failures = _Board(due, len(commands), jobs), []
    running: set[subprocess.Popen] = set()
    futures: dict[Run, Future[Failure | None]] = {}

    def make(run: Run) -> Failure | None:
        # The pool starts runs in their order, so the one waited for has begun: no two can wait for each other.
        before = futures[run.needs].result() if run.needs in futures else None
        if before is not None:
            return Failure(run, f"{before.run.name}, whose mask it needs, failed: {before.last}", before.log)
        place = places.get()  # there are as many as threads of the pool
        try:
            return _make(run, out, commands[run], place, running)
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool, board.shown():
        try:
            for run in due:  # one by one: a run looks up the one that it needs
                futures[run] = pool.submit(board.timed, make, run)
            names = {future: run for run, future in futures.items()}
            for future in as_completed(names):
                failure = future.result()
                failures += [failure] if failure else []
                board.tell(names[future], failure)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("interrupted; the same command goes on with what is not done") from None
            if isinstance(error, OSError):
                raise KoffError(f"cannot write to {out}: {error.strerror or error}") from error
            raise
    return failures


def gpu_shares(jobs: int) -> list[dict[str, str]]:
    """What tells each of the processes that run at one time which GPUs are its own.

    Args:
        jobs: How many there are. One has all GPUs; where there are fewer GPUs than processes, some share one.

    Returns:
        For each process variables of its environment; nothing where there is no GPU.
    """
    from torch.cuda import device_count

    count = device_count() if jobs > 1 else 0
    if not count:
        return [{}] * jobs
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")  # numbers, or names such as GPU-8932f937
    gpus = [*filter(None, given.split(","))] or [str(gpu) for gpu in range(count)]
    if not given.startswith("MIG-"):  # parts of a GPU, of which torch counts one however many are named
        gpus = gpus[:count]
    count = len(gpus)
    each = max(1, count // jobs)
    shares = [gpus[start : start + each] for start in range(0, each * min(jobs, count), each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(shares[job % len(shares)])} for job in range(jobs)]


def _make(
    run: Run, out: Path, words: Sequence[str], environment: Mapping[str, str], running: set[subprocess.Popen]
) -> Failure | None:
    """One run, from its newest checkpoint if it had begun; else what is there is removed."""
    folder, log, made_by = out / run.name, _log(out, run), _made_by(words, out)
    if goes_on := _goes_on(out, run, words):
        words = [*words, "--ckpt_path=last"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(log.with_suffix(".json"), json.dumps(made_by, indent=1) + "\n")
    with log.open("a" if goes_on else "w", encoding="utf-8") as said:
        process = subprocess.Popen([*PROGRAM, *words], stdout=said, stderr=said, env=environment)
        running.add(process)
        status = process.wait()
        running.discard(process)
    if status == 0 and (folder / "results.json").is_file():
        write_atomically(folder / DONE, json.dumps(made_by, indent=1) + "\n")
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it said nothing"]
    if goes_on:
        lines[-1] += f" (it went on from its newest checkpoint: remove {folder} to begin it anew)"
    return Failure(run, "\n".join(lines[-TAIL:]), log)


def failed(run: Run, out: Path, stage: str, said: str) -> Failure:
    """A finished run of which something more was asked in vain; what was said is logged.

    Args:
        run: Which one.
        out: Folder of all runs.
        stage: What it was; part of the log's name.
        said: The error.
    """
    log = _log(out, run).with_name(f"{run.name}-{stage}.txt")
    write_atomically(log, said.rstrip() + "\n")
    return Failure(run, "\n".join(said.splitlines()[-TAIL:]), log)


class _Board:
    """How far all runs are: a bar on a terminal, else a line for each."""

    def __init__(self, due: Sequence[Run], total: int, jobs: int) -> None:
        from rich import get_console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._left, self._total, self._jobs = list(due), total, jobs
        self._seconds: dict[Run, float] = {}
        self._live = sys.stdout.isatty() and not get_console().is_dumb_terminal
        self._bar = Progress(
            TextColumn("arms"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=total, completed=total - len(due))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar."""
        done = self._total - len(self._left)
        if done and not self._live:
            print(f"{done} of {self._total} runs were done before", flush=True)
        with self._bar:
            yield

    def timed(self, make: Callable[[Run], Failure | None], run: Run) -> Failure | None:
        """Make a run and remember how long it took."""
        since = time.perf_counter()
        try:
            return make(run)
        finally:
            self._seconds[run] = time.perf_counter() - since

    def tell(self, run: Run, failure: Failure | None) -> None:
        """Say that a run has ended."""
        self._left.remove(run)
        done = self._total - len(self._left)
        words = f"{run.name} {'FAILED' if failure else 'done'} in {self._seconds[run]:.0f} s, {self._time_left()} left"
        self._bar.update(self._task, completed=done, description=words)
        lines = [] if self._live else [f"{done}/{self._total}  {words}"]
        lines += [f"{run.name} failed: {failure.last} (log: {failure.log})"] if failure else []
        for line in lines:
            self._bar.console.print(line, highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        """From the mean time of the same arm's other runs, or else of all runs."""
        known: dict[str, list[float]] = {}
        for run, seconds in dict(self._seconds).items():  # a copy: other threads add to it meanwhile
            known.setdefault(run.arm, []).append(seconds)
        usual = [seconds for of_arm in known.values() for seconds in of_arm]
        left = sum(statistics.fmean(known.get(run.arm, usual)) for run in self._left)
        seconds = round(left / self._jobs)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
