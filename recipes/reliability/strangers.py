"""Spoil checkpoints, artifacts and backbone folders at random, give them to the commands, and judge what came of it.

    python recipes/reliability/strangers.py --cases 200 --seed 0

Every case is one of
    refused   a KoffError of one line, as `koff` prints it with exit status 2
    sound     taken, and what was computed from it is what the unspoilt one gives, to the bit
    other     taken, and it is another model, as it says itself: its hashes were written anew over what was spoilt
and anything else is a fault: another exception, a message of several lines, other values without a word. What is spoilt
is the form of the files: kinds, names, shapes, dtypes, places, bytes; a tensor of other plausible numbers is another
model to anybody.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from koff_lightning import KoffError, load_decomposed
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.folder import describe_file
from koff_lightning.cli import main
from koff_lightning.listed_files import CARD

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

RUN = ("de", "fr")  # domains of the checkpoint's run
NO_MASK = "--model.sparsity.target=0"
VERBS = {
    "checkpoint": ("export", "fit --ckpt_path", "fit --model.mask", "lm-eval"),
    "artifact": ("inspect", "memory list", "memory remove", "generate", "lm-eval", "fit --model.backbone"),
}
VERBS["artifact"] += ("fit --model.artifact",)
OTHER: list[Any] = [None, True, 0, -1, 3.5, "", "x", "../x", [], {}, [1, "a"], {"a": {"b": []}}, 10**30, float("nan")]
OTHER += [float("inf"), [[[]]], b"x", "\x00", 2**40, 1e-300]
IDS = torch.arange(3, 27).view(2, 12)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested values, but for those inside tensors."""
    found = [path] if path else []
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


def spoil_values(content: dict[str, Any], rng: random.Random, also: Callable[[Any, random.Random], Any]) -> str:
    """Delete, rename, replace or double one value, at any depth alike."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(content):
        by_depth.setdefault(len(path), []).append(path)
    path = rng.choice(by_depth[rng.choice(sorted(by_depth))])
    *names, last = path
    at = content
    for name in names:
        at = at[name]
    way = rng.choice(("delete", "rename", "replace", "replace", "replace", "also"))
    if way == "delete":
        del at[last]
    elif way == "rename" and isinstance(at, dict):
        at[rng.choice([f"{last}x", 3, ""])] = at.pop(last)
    elif way == "also":
        at[last] = also(at[last], rng)
    else:
        at[last] = rng.choice(OTHER)
    return f"{way} {'.'.join(map(str, path))}"


def spoil_tensor(value: Any, rng: random.Random) -> Any:
    """A tensor of another layout, dtype or shape; of other values something that holds itself or is huge."""
    if not isinstance(value, torch.Tensor):
        return rng.choice(([value, [value]], {"a": value}, str(value), [value] * 3))
    ways = [
        lambda x: x.to_sparse(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.int8),
        lambda x: x.half(),
        lambda x: x[None],
        lambda x: x.flatten()[:-1],
        lambda x: x.float() * float("nan"),
        lambda x: torch.zeros(1).expand(10**10),
        lambda x: x.tolist(),
        lambda x: torch.empty(0),
    ]
    return rng.choice(ways)(value)


def spoil_bytes(path: Path, rng: random.Random) -> str:
    """Cut, flip or empty a file."""
    data = bytearray(path.read_bytes())
    way = rng.choice(("cut", "flip", "flip head", "empty", "noise"))
    if way == "cut":
        del data[rng.randrange(len(data)) :]
    elif way == "empty" or not data:
        data = bytearray()
    elif way == "noise":
        data[:64] = rng.randbytes(min(64, len(data)))
    else:
        place = rng.randrange(min(len(data), 200) if way == "flip head" else len(data))
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return way


class Bench:
    """A sound checkpoint and a sound artifact, and what they give.

    Args:
        folder: To work in; what an earlier one has made there is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "run.yaml"
        self.artifact = folder / "made" / "ragged"
        self.dense = f"--model.backbone={folder / 'made' / 'dense'}"
        self.checkpoint = folder / "middle.ckpt"  # its mask is fixed, and two steps are to come
        self.known = folder / "known.pt"
        if not self.known.exists():
            self._make()
            self.sound = {
                "checkpoint": self.of_checkpoint(self.checkpoint),
                "artifact": self.of_artifact(self.artifact),
            }
            torch.save((self.sound, {}), self.known)
        self.sound, self.given = torch.load(self.known, weights_only=True)

    def _make(self) -> None:
        from tiny_artifact import tiny_artifact
        from toy_text import toy_documents, write_jsonl

        tiny_artifact(self.folder / "made")
        texts = {name: toy_documents(30, seed, 20) for seed, name in enumerate(RUN)}
        text = {name: str(write_jsonl(self.folder / f"{name}.jsonl", texts[name])) for name in RUN}
        small = {"accelerator": "cpu", "num_sanity_val_steps": 0, "enable_progress_bar": False, "limit_val_batches": 0}
        config = {
            "model": {"lora": {"rank": 2}, "kv": {"slots": 3}, "sparsity": {"target": 0.2, "min_channels": 4}},
            "data": {"domains": text, "seq_len": 32, "batch_size": 2, "cache": str(self.folder / "cache")},
            "trainer": small | {"max_steps": 8, "limit_test_batches": 2, "log_every_n_steps": 1, "logger": False},
            "checkpoint": {"every_n_train_steps": 2, "save_top_k": -1},
            "anneal": {"warmup": 0.2, "ramp": 0.2, "hold": 0.2},
            "export": {"prove": False},
        }
        self.config.write_text(json.dumps(config), encoding="utf-8")
        self._fit(self.folder / "run", self.dense)
        shutil.copy(self.folder / "run" / "checkpoints" / "epoch=0-step=6.ckpt", self.checkpoint)

    def due(self, kind: str, verb: str) -> list[Any]:
        """What a verb gives for the sound one."""
        if (name := f"{kind} {verb}") not in self.given:
            sound = self.checkpoint if kind == "checkpoint" else self.artifact
            status, found = self.ask(verb, self._copy(sound, self.folder / f"sound{sound.suffix}"))
            self.clear("sound.")
            shutil.rmtree(self.folder / "sound", ignore_errors=True)
            if status:
                raise RuntimeError(f"koff {verb} of the sound {kind} ended with {status}")
            self.given[name] = found
            torch.save((self.sound, self.given), self.known)
        return self.given[name]

    @staticmethod
    def _copy(sound: Path, to: Path) -> Path:
        return Path(shutil.copytree(sound, to) if sound.is_dir() else shutil.copy(sound, to))

    def clear(self, stem: str) -> None:
        """Remove what a case has left."""
        for path in self.folder.glob(f"{stem}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @staticmethod
    @torch.no_grad()
    def of_checkpoint(path: Path) -> list[torch.Tensor]:
        """Logits under every memory and the mask."""
        model, found = from_checkpoint(path).eval(), []
        for domain in RUN:
            with model.under([domain] * 2, model.hard_gates()):
                found.append(model.backbone(IDS, use_cache=False).logits)
        return found

    @staticmethod
    @torch.no_grad()
    def of_artifact(path: Path, domains: Sequence[str | None] = (None, "de", "fr", "law")) -> list[torch.Tensor]:
        """Logits under every memory and none, and ids of a text."""
        model = load_decomposed(path)
        found = [model(IDS, domains=domain).logits for domain in domains]
        return [*found, torch.tensor(model.tokenizer("the quick brown fox")["input_ids"])]

    def _fit(self, root: Path, *words: str) -> tuple[int, Any]:
        """A run of a few steps; its exit status, and what it made: trained tensors, and figures of held-out text."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            status = main(["fit", "--config", str(self.config), f"--trainer.default_root_dir={root}", *words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if status:
            return status, None
        state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        results = json.loads((root / "results.json").read_text(encoding="utf-8"))
        figures = results["domains"], results["steps"], results["sparsity"]
        return 0, [*(state[name] for name in sorted(state)), sorted(state), json.dumps(figures)]

    def ask(self, verb: str, path: Path) -> tuple[int, Any]:
        """Exit status of one verb on a checkpoint or an artifact, and what came of it, to be compared."""
        at, out = str(path), self.folder / f"{path.stem}.out"
        if verb == "fit --ckpt_path":
            return self._fit(out, self.dense, f"--ckpt_path={at}")
        if verb == "fit --model.mask":
            return self._fit(out, self.dense, f"--model.mask={at}", "--trainer.max_steps=2")
        if verb == "fit --model.backbone":
            return self._fit(out, f"--model.backbone={path / 'backbone'}", "--trainer.max_steps=2", NO_MASK)
        if verb == "fit --model.artifact":
            name = f"--data.domains={json.dumps({'new': str(self.folder / 'de.jsonl')})}"
            return self._fit(out, f"--model.artifact={at}", "--trainer.max_steps=2", NO_MASK, "--model.loss.kl=0", name)
        if verb == "export":
            status = main(["export", "--ckpt", at, "--out", str(out)])
            return status, None if status else self.of_artifact(out, (None, *RUN))
        if verb == "memory remove":
            status = main(["memory", "remove", at, "fr"])
            return status, None if status else self.of_artifact(path, (None, "de", "law"))
        words = {
            "lm-eval": ["lm-eval", "--model", at, "--domain", "de", "--tasks", "koff_cloze_de", "--limit", "2"],
            "inspect": ["inspect", at],
            "memory list": ["memory", "list", at],
            "generate": ["generate", "--model", at, "--prompt", "fox", "--domain", "de", "--max_new_tokens", "4"],
        }
        with contextlib.redirect_stdout(said := io.StringIO()):
            status = main(words[verb])
        return status, [said.getvalue().replace(at, "")]

    def spoil_checkpoint(self, rng: random.Random, at: Path) -> tuple[str, bool]:
        """A spoilt copy; what was done, and whether it may be another model by its own word."""
        if rng.random() < 0.15:
            shutil.copy(self.checkpoint, at)
            return spoil_bytes(at, rng), False
        content = torch.load(self.checkpoint, weights_only=True)
        done = spoil_values(content, rng, spoil_tensor)
        torch.save(content, at)
        return done, False

    def spoil_artifact(self, rng: random.Random, at: Path) -> tuple[str, bool]:
        """The same of an artifact; in half of the cases its hashes are written anew."""
        shutil.copytree(self.artifact, at)
        files = sorted(path for path in at.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
        file = rng.choice(files)
        way = rng.random()
        if way < 0.1:
            other = rng.choice(["delete", "link", "swap", "extra"])
            self._move(other, file, rng.choice(files), at)
            done = other
        elif way < 0.35:
            done = spoil_bytes(file, rng)
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            done = spoil_values(content, rng, spoil_tensor)
            file.write_text(json.dumps(content, default=str), encoding="utf-8")
        else:
            tensors = load_file(file)
            name = rng.choice(sorted(tensors))
            changed = spoil_tensor(tensors[name], rng)
            done = f"{name}: {type(changed).__name__} {getattr(changed, 'dtype', '')} {getattr(changed, 'layout', '')}"
            if isinstance(changed, torch.Tensor) and changed.layout == torch.strided and changed.numel() < 10**7:
                save_file(tensors | {name: changed.contiguous()}, file, {"format": "pt"})
            else:
                save_file({k: v for k, v in tensors.items() if k != name} | {f"{name}x": tensors[name]}, file)
        anew = rng.random() < 0.5 and self._hash_anew(at)
        return f"{file.relative_to(at)}: {done}{', hashed anew' if anew else ''}", anew

    @staticmethod
    def _move(way: str, file: Path, other: Path, at: Path) -> None:
        if way == "delete":
            file.unlink()
        elif way == "link":
            file.rename(at.parent / f"{at.name}.away")
            os.symlink(at.parent / f"{at.name}.away", file)
        elif way == "swap":
            content = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            (file.parent / "more.json").write_text("{}", encoding="utf-8")

    @staticmethod
    def _hash_anew(at: Path) -> bool:
        """Write the hashes of the files as they are now into cards and manifest, as whoever spoils them would."""
        try:
            manifest = json.loads((at / "koff.json").read_text(encoding="utf-8"))
            manifest["files"] = {
                path.relative_to(at).as_posix(): describe_file(path)
                for path in sorted((at / "backbone").rglob("*"))
                if path.is_file()
            }
            for name in manifest["domains"]:
                card = at / "memories" / name / CARD
                about = json.loads(card.read_text(encoding="utf-8"))
                about["files"] = {file: describe_file(card.parent / file) for file in about["files"]}
                card.write_text(json.dumps(about), encoding="utf-8")
                manifest["domains"][name]["card_sha256"] = describe_file(card)["sha256"]
            (at / "koff.json").write_text(json.dumps(manifest), encoding="utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return False
        return True

    def case(self, kind: str, seed: int, number: int) -> dict[str, Any]:
        """What was done, the verb it was given to, and the verdict."""
        rng = random.Random(f"{seed} {number} {kind}")
        at = self.folder / (f"{kind}{number}.ckpt" if kind == "checkpoint" else f"{kind}{number}")
        spoil = self.spoil_checkpoint if kind == "checkpoint" else self.spoil_artifact
        done, other = spoil(rng, at)
        verb = VERBS[kind][number % len(VERBS[kind])]
        by_its_word = verb in ("inspect", "memory list") and done.startswith("koff.json")  # they tell what stands there
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = self._judge(lambda: (0, self._read(kind, at)), self.sound[kind], other)
            verdict = self._judge(lambda: self.ask(verb, at), self.due(kind, verb), other or by_its_word)
        self.clear(f"{kind}{number}")
        about = {"kind": kind, "seed": seed, "number": number, "done": done, "verb": verb}
        return about | {"read": read, "given": verdict}

    def _read(self, kind: str, at: Path) -> list[torch.Tensor]:
        return self.of_checkpoint(at) if kind == "checkpoint" else self.of_artifact(at)

    @staticmethod
    def _judge(ask: Callable[[], tuple[int, Any]], sound: Sequence[Any], other: bool) -> str:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                status, found = ask()
        except KoffError as error:
            return "refused" if "\n" not in str(error) else f"several lines: {error}"
        except BaseException:  # a panic of a library in Rust is no Exception
            return traceback.format_exc()
        if "Traceback" in said.getvalue() or status not in (0, 2):
            return f"status {status}\n{said.getvalue()}"
        if status == 2:
            return "refused"
        if len(found) == len(sound) and all(map(same, found, sound)):
            return "sound"
        if other and not all(part.isfinite().all() for part in found if isinstance(part, torch.Tensor)):
            return "silently not finite"
        return "other" if other else "silently wrong"


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, to the bit; of what is told, sizes on the disk may differ, which are as told."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    a, b = (re.sub(r" *[\d.]+ [kM]?B\b", "", part) if isinstance(part, str) else part for part in (a, b))
    return a == b


def sound_verdict(case: dict[str, Any]) -> bool:
    """Whether a case is no fault."""
    return {case["read"], case["given"]} <= {"refused", "sound", "other"}


def run(cases: int, seed: int, first: int = 0, folder: Path | None = None) -> Counter[tuple[str, str, str]]:
    """Run cases of both kinds and print the faults.

    Args:
        cases: Of each kind.
        seed: Of what is spoilt.
        first: Number of the first case.
        folder: To work in, for a run that may be cut: its `cases.jsonl` has an object a case, and what stands there is
            not run again.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    record = folder and folder / "cases.jsonl"
    lines = record.read_text(encoding="utf-8").splitlines() if record and record.exists() else []
    known = {(case["kind"], case["seed"], case["number"]): case for case in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as temporary, in_short():
        with contextlib.redirect_stdout(io.StringIO()):
            bench = Bench(folder or Path(temporary))
        for number in range(first, first + cases):
            for kind in ("checkpoint", "artifact"):
                if (case := known.get((kind, seed, number))) is None:
                    case = bench.case(kind, seed, number)
                    if record:
                        with record.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(case) + "\n")
                    if not sound_verdict(case):
                        print(f"--- {kind} {number}: {case['done']}, {case['verb']}", flush=True)
                        print(f"read: {case['read']}\ngiven: {case['given']}", flush=True)
                found[kind, case["verb"], case["given"] if sound_verdict(case) else "fault"] += 1
    return found


@contextlib.contextmanager
def in_short() -> Iterator[None]:
    """Leave out the plots of runs and the proofs of exports, a process each, which take more time than all the rest."""
    from koff_lightning.artifact import export
    from koff_lightning.reports import plots

    drawn, proven = plots.save, export.export
    plots.save, export.export = lambda *_: None, partial(proven, prove=False)
    try:
        yield
    finally:
        plots.save, export.export = drawn, proven


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to work in; cases whose verdict stands there are not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    for (kind, verb, verdict), count in sorted(run(options.cases, options.seed, options.first, options.folder).items()):
        print(f"{kind:12}{verb:22}{verdict:10}{count}")
    print(f"{time.process_time() - began:.0f} s of processor time")
