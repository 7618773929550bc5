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
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from koff_lightning import KoffError, load_decomposed
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.folder import CARD, describe_file
from koff_lightning.cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

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
        folder: To work in.
    """

    def __init__(self, folder: Path) -> None:
        from tiny_artifact import tiny_artifact
        from tiny_run import RandomText, tiny_module, tiny_trainer

        from koff_lightning.callbacks import RunReport

        self.folder = folder
        trainer = tiny_trainer(folder, [RunReport()])
        trainer.fit(tiny_module(folder), RandomText(8))
        self.checkpoint = folder / "run.ckpt"
        trainer.save_checkpoint(self.checkpoint)
        self.artifact = tiny_artifact(folder / "made").folder
        self.sound = {"checkpoint": self.of_checkpoint(self.checkpoint), "artifact": self.of_artifact(self.artifact)}

    @staticmethod
    @torch.no_grad()
    def of_checkpoint(path: Path) -> list[torch.Tensor]:
        """Logits under every memory and the mask."""
        model, found = from_checkpoint(path).eval(), []
        for domain in ("en", "law"):
            with model.under([domain] * 2, model.hard_gates()):
                found.append(model.backbone(IDS % 97, use_cache=False).logits)
        return found

    @staticmethod
    @torch.no_grad()
    def of_artifact(path: Path) -> list[torch.Tensor]:
        """Logits under every memory and none, and ids of a text."""
        model = load_decomposed(path)
        found = [model(IDS, domains=domain).logits for domain in (None, "de", "fr", "law")]
        return [*found, torch.tensor(model.tokenizer("the quick brown fox")["input_ids"])]

    def commands(self, path: Path, rng: random.Random) -> None:
        """One more verb on a spoilt artifact or checkpoint."""
        text = str(path)
        if path.suffix == ".ckpt":
            words = ["export", "--ckpt", text, "--out", str(path.with_suffix(".out")), "--device=none"]
        else:
            verbs = (["inspect", text], ["memory", "list", text], ["memory", "remove", text, "fr"])
            verbs += (["generate", text, "--prompt", "fox", "--domain", "de", "--max_new_tokens", "2"],)
            words = rng.choice(verbs)
        if (status := main(list(words))) not in (0, 2):
            raise RuntimeError(f"koff {words[0]} ended with {status}")

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

    def case(self, kind: str, seed: int, number: int) -> tuple[str, str]:
        """Verdict and what was done."""
        rng = random.Random(f"{seed} {number} {kind}")
        at = self.folder / (f"{kind}{number}.ckpt" if kind == "checkpoint" else f"{kind}{number}")
        spoil = self.spoil_checkpoint if kind == "checkpoint" else self.spoil_artifact
        done, other = spoil(rng, at)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = self._judge(kind, at, other, rng)
        if verdict in ("refused", "sound", "other"):
            for path in self.folder.glob(f"{at.stem}*"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return verdict, done

    def _judge(self, kind: str, at: Path, other: bool, rng: random.Random) -> str:
        try:
            found = self.of_checkpoint(at) if kind == "checkpoint" else self.of_artifact(at)
            verdict = "other" if other else "silently wrong"
            if len(found) == len(self.sound[kind]) and all(map(torch.equal, found, self.sound[kind])):
                verdict = "sound"
            elif other and not all(part.isfinite().all() for part in found):
                verdict = "silently not finite"
        except KoffError as error:
            verdict = "refused" if "\n" not in str(error) else f"several lines: {error}"
        except BaseException:  # a panic of a library in Rust is no Exception
            return traceback.format_exc()
        try:
            self.commands(at, rng)
        except BaseException:
            return traceback.format_exc()
        return verdict


def run(cases: int, seed: int, first: int = 0) -> Counter[tuple[str, str]]:
    """Run cases of both kinds and print the faults."""
    found: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            bench = Bench(Path(folder))
        for number in range(first, first + cases):
            for kind in ("checkpoint", "artifact"):
                verdict, done = bench.case(kind, seed, number)
                short = verdict if verdict in ("refused", "sound", "other") else "fault"
                found[kind, short] += 1
                if short == "fault":
                    print(f"--- {kind} {number}: {done}\n{verdict}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    for (kind, verdict), count in sorted(run(options.cases, options.seed, options.first).items()):
        print(f"{kind:12}{verdict:10}{count}")
    print(f"{time.monotonic() - began:.0f} s")
