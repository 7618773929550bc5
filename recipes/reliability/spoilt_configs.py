"""The demo config, spoilt: keys deleted, renamed, moved, given twice, of another type or out of range; broken text.

A run on a spoilt config is correct if it did what the config says: every value in it that the run could take is found
in the resolved config of its results, domains, steps and sparsity are those asked for and all figures are finite; and
if all that matters is as in the demo, so are the figures, to the bit.
"""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from fuzz import Case, Outcome

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
SMALL = {  # what makes the demo a run of a second
    "model": {"sparsity": {"min_channels": 8}, "kv": {"slots": 4}, "lora": {"rank": 2}},
    "data": {
        "domains": {"de": "bundled:de", "python": "bundled:python"},
        "seq_len": 32,
        "batch_size": 4,
        "max_train_bytes": 20_000,
        "max_heldout_bytes": 1_500,
    },
    "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False},
    "export": {"enabled": True, "prove": False},
}
OTHER = [  # values of any type
    None,
    True,
    False,
    0,
    -1,
    3.5,
    "",
    "much",
    "1e3",
    "null",
    [],
    {},
    [1, 2],
    ["a", None],
    {"a": {"b": 1}},
    [[[]]],
    "bundled:de",
    "../..",
    "\x00",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    10**30,
    -(10**12),
    float("nan"),
    float("inf"),
    float("-inf"),
    5e-324,
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}},
    {"class_path": "os.system", "init_args": {"command": "exit"}},
]
FACTORS = (-1, 0, 1e-9, 0.1, 1.0001, 2, 10, 1e3, 1e9)


def maker(backbone: str) -> Callable[[int, int], Case]:
    """What makes case number n of a seed."""
    base = _merged(yaml.safe_load(CONFIG.read_text()), SMALL)
    base["model"]["backbone"] = backbone
    base["data"]["domains"] = dict(SMALL["data"]["domains"])

    def make(seed: int, number: int) -> Case:
        rng = random.Random(f"{seed} {number} configs")
        config, done = copy.deepcopy(base), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            done.append(rng.choice(MUTATIONS)(config, rng))
        text = _text(config)
        if rng.random() < 0.15:
            text, what = _broken(text, rng)
            done.append(what)
        return Case(number, "; ".join(done), {"run.yaml": text}, {"config": _read(text), "base": base})

    return make


def unending(case: Case) -> bool:
    """Whether the config sets no limit of steps, or one that takes longer than a case may."""
    trainer = case.truth["config"].get("trainer") or {}
    return "max_steps" not in trainer or trainer["max_steps"] not in range(50)


def unjust(case: Case, outcome: Outcome) -> str:
    """A config that is the demo's, in other words, must run."""
    same = repr(case.truth["config"]) == repr(case.truth["base"])
    return "the config is the demo's" if same else ""


def wrong(case: Case, outcome: Outcome) -> str:
    """What is wrong with a run that ended well."""
    config, results = case.truth["config"], outcome.results
    if config is None:
        return "ran on what is no config"
    if results is None:
        return "" if "the run ended before its first step" in outcome.said else "no results"
    if lost := [key for key, value in _leaves(config) if not _took(results["config"], key, value)]:
        return f"did not take {', '.join('.'.join(key) for key in lost)}"
    domains, trainer = config["data"]["domains"], results["config"]["trainer"]
    if results["domains"].keys() != domains.keys():
        return f"domains {list(results['domains'])} for {list(domains)}"
    if not 0 < results["steps"] <= trainer["max_steps"] or not results["tokens"]:
        return f"{results['steps']} steps, {results['tokens']} tokens"
    figures = [v for row in results["domains"].values() for k, v in row.items() if k != "swapped_bpb"]
    if any(v is not None and not 0 < v < math.inf for v in figures) or None in figures:
        return f"figures {results['domains']}"
    rates = results["sparsity"]
    fine = results["config"]["model"]["sparsity"]["min_channels"] < 60  # else there are whole kv groups to remove alone
    if fine and rates["hardened"] and rates[rates["denominator"]] < rates["target"] - 0.02:
        return f"removed {rates} of what was asked"
    return ""


# ------------------------------------------------------------------------------------------------ mutations


def _places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all keys."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield (*path, key)
        yield from _places(value, (*path, key))


def _leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(config, dict) and config and path[:2] != ("data", "domains"):
        for key, value in config.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, config


def _took(resolved: Any, path: tuple[str, ...], value: Any) -> bool:
    for key in path:
        if not isinstance(resolved, dict) or key not in resolved:
            return False
        resolved = resolved[key]
    if isinstance(value, int | float) and isinstance(resolved, int | float):
        return math.isclose(value, resolved, rel_tol=1e-12)
    if path[:2] == ("data", "domains") or str(resolved) == str(value) or value == {} or not (value or resolved):
        return True
    read = _read(value) if isinstance(value, str) else value  # text is read as YAML once more
    return str(resolved) == str(read) or (value == "1e3" and resolved == 1000)


def _parent(config: Any, rng: random.Random) -> tuple[dict[Any, Any], Any, str]:
    places = list(_places(config))
    if not places:
        config["model"] = {}
        places = [("model",)]
    path = rng.choice(places)
    for key in path[:-1]:
        config = config[key]
    return config, path[-1], ".".join(map(str, path))


def _delete(config: Any, rng: random.Random) -> str:
    parent, key, name = _parent(config, rng)
    del parent[key]
    return f"deletes {name}"


def _rename(config: Any, rng: random.Random) -> str:
    parent, key, name = _parent(config, rng)
    word = str(key)
    at = rng.randrange(len(word)) if word else 0
    new = rng.choice(
        [word[:at] + word[at + 1 :], word + "s", word.upper(), word[::-1], f"{word}.{word}", " " + word, ""]
    )
    new = rng.choice([new, new, new, 7, None, True, "__class__", "init_args", "class_path"])
    parent[new] = parent.pop(key)
    return f"renames {name} to {new!r}"


def _retype(config: Any, rng: random.Random) -> str:
    parent, key, name = _parent(config, rng)
    parent[key] = copy.deepcopy(rng.choice(OTHER))
    return f"{name} = {parent[key]!r}"


def _rescale(config: Any, rng: random.Random) -> str:
    numbers = [(p, k, n) for p, k, n in (_parent(config, rng) for _ in range(40)) if type(p[k]) in (int, float)]
    if not numbers:
        return _retype(config, rng)
    parent, key, name = rng.choice(numbers)
    value = parent[key] * rng.choice(FACTORS)
    parent[key] = (
        round(value) if isinstance(parent[key], int) and math.isfinite(value) and rng.random() < 0.8 else value
    )
    return f"{name} = {parent[key]!r}"


def _move(config: Any, rng: random.Random) -> str:
    parent, key, name = _parent(config, rng)
    value = parent.pop(key)
    other, place, where = _parent(config, rng)
    target = other[place] if isinstance(other[place], dict) else other
    target[key] = value
    return f"moves {name} to {where}"


def _add(config: Any, rng: random.Random) -> str:
    """One of the options that the demo leaves at their defaults."""
    section, name = rng.choice(MORE)
    place = config.setdefault(section, {})
    if not isinstance(place, dict):
        return _retype(config, rng)
    place[name] = copy.deepcopy(rng.choice(OTHER))
    return f"adds {section}.{name} = {place[name]!r}"


MORE = [
    *(("model", name) for name in ("joint", "shared_memory", "artifact", "warm_start", "mask", "prior", "revision")),
    *(("model", name) for name in ("dtype", "activation_checkpointing", "trust_remote_code", "loss", "lora", "kv")),
    *(("data", name) for name in ("tokenizer", "heldout_fraction", "on_bad_line", "num_workers", "seed", "streaming")),
    *(("data", name) for name in ("temperature", "cache", "max_train_bytes", "domains")),
    *(("anneal", "shape"), ("export", "layout"), ("export", "with_code"), ("checkpoint", "every_n_train_steps")),
    *(("checkpoint", name) for name in ("save_top_k", "dirpath", "filename", "monitor", "save_last", "mode")),
    *(("trainer", name) for name in ("max_epochs", "min_steps", "max_time", "limit_train_batches", "precision")),
    *(("trainer", name) for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches")),
    *(("trainer", name) for name in ("gradient_clip_val", "deterministic", "benchmark", "inference_mode", "profiler")),
    *(("trainer", name) for name in ("limit_val_batches", "limit_test_batches", "logger", "callbacks", "plugins")),
    *(("trainer", name) for name in ("detect_anomaly", "fast_dev_run", "overfit_batches", "strategy", "devices")),
    *(("lm_eval", name) for name in ("tasks", "every_n_steps", "batch_size", "include_path")),
]
MUTATIONS = [_delete, _rename, _retype, _retype, _retype, _rescale, _rescale, _move, _add, _add, _add]


def _broken(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Spoil the file itself."""
    at = rng.randrange(len(text))
    lines = text.splitlines(keepends=True)
    line = rng.randrange(len(lines))
    return rng.choice(
        [
            (text[:at], "cut off"),
            (text[:at] + b"\xff\xfe" + text[at:], "bytes that are no UTF-8"),
            (text[:at] + b"\x00" + text[at:], "a NUL"),
            (text[:at] + b"\t" + text[at:], "a tab"),
            (b"\xef\xbb\xbf" + text, "a byte order mark"),
            (b"".join([*lines[: line + 1], *lines[line:]]), "a line twice"),
            (text.decode().encode("utf-16"), "UTF-16"),
            (b"", "empty"),
            (text + b"---\n" + text, "two documents"),
            (text.replace(b"\n", b"\r\n"), "Windows line ends"),
            (b"- " + text.replace(b"\n", b"\n  "), "a list"),
            (text[:at] + b"{{[[" + text[at:], "brackets"),
            (
                b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 120)),
                "bomb",
            ),
            (json.dumps(yaml.safe_load(text)).encode(), "as JSON"),
        ]
    )


def _text(config: Any) -> bytes:
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def _read(text: bytes | str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception:
        return None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged
