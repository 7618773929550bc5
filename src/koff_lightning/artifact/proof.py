"""Proof of an export: loaded by a fresh process, it computes what the gated model computes.

The exporting process writes down logits and greedy continuations of the gated model (`write_reference`); a process that
has never seen that model loads the artifact and compares (`PROGRAM`, with their two paths).
A run starts that process before its end is scored (`begin`), so that its imports are done when the artifact is there;
it reads the two paths from its standard input then.

Shapes: A arms (no memory, then each memory), R probe rows of T tokens, M rows of the mixed batch, V vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.folder import REPORT
from koff_lightning.data.encoding import left_padded
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:  # the process that compares starts without Lightning
    from koff_lightning.decomposition import Decomposition

LAST = 4  # positions of every row whose logits are compared; all rows end with text
NEW = 8  # tokens of a greedy continuation
# Largest difference of two logits over the largest logit. A sum over the kept units and one over all of them, the
# removed ones being zero, round differently: fp32 leaves 1e-6 or so, and a unit that is wrong shows far above 1e-4.
# Half precision rounds every activation to 3 (bfloat16: 2) digits, and layers add that up.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

SENTENCES = (
    "The committee will publish its report on the first of March, together with all figures.",
    "Während die größeren Füchse schlafen, prüft der Ingenieur die Übertragung der Messwerte.",
    "Учёные опубликовали новую работу о том, как устроена память человека.",
    "今天天气很好，我们去公园散步，然后在图书馆里看书。",
    "def add(first: int, second: int) -> int:\n    return first + second  # no overflow\n",
)

# Its imports are as in quick_imports.py, which cannot be had before them where the program is no `koff`.
PROGRAM = """
import gc
gc.disable()
from koff_lightning.artifact import proof
gc.freeze()
gc.enable()
proof.run()
"""

Report = dict[str, Any]


def begin() -> subprocess.Popen[str]:
    """Start the process that will compare; it imports what it needs and waits. Whoever leaves it unused kills it."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(_command(), env=_environment(), text=True, **pipes)


def _command(*paths: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, paths)]


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def prove(
    module: "Decomposition",
    folder: Path,
    arms: Mapping[str | None, str | None],
    tokenizer: PreTrainedTokenizerBase,
    begun: subprocess.Popen[str] | None = None,
) -> Report:
    """Compare an artifact, in a fresh process, with the gated model that it was made from.

    Args:
        module: The model; it is as before afterwards.
        folder: The artifact; its `export_report.json` is written.
        arms: What to compare: name of a memory in the artifact -> domain of the module that reads it, and None for the
            bare pruned backbone.
        tokenizer: Tokenizer of the backbone.
        begun: The process, if it was started already; where it has ended meanwhile another is started.

    Returns:
        The report; `passed` says whether the artifact may be used, `error` what kept it from being compared.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.proof.") as work:
        reference = Path(work) / "reference.safetensors"
        write_reference(module, arms, tokenizer, reference)
        if module.device.type == "cuda":  # what this process keeps for later, the other may need
            torch.cuda.empty_cache()
        if begun is not None and begun.poll() is not None:  # as it waited, for want of memory, say: no fault of this
            begun.communicate()  # closes its pipes
            begun = None
        if begun is None:
            command = _command(folder, reference)
            done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
            status, said = done.returncode, done.stderr
        else:
            said = begun.communicate(json.dumps([str(folder), str(reference)]))[1]
            status = begun.returncode
    if (folder / REPORT).is_file():
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    return write_report(folder, {"passed": False, "error": f"the process ended with status {status}: {last}"})


def write_report(folder: Path, report: Report) -> Report:
    """Write `export_report.json`, and return it."""
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def fault(report: Report) -> str:
    """Why a proof failed, from its report, in the words of an error message."""
    if report["error"]:
        return f"a fresh process could not use it ({report['error']})"
    if odd := [str(case["memory"]) for case in report["memories"] if not case["finite"]]:
        return f"the model itself computes nan or inf (memory {', '.join(odd)}): there is nothing to compare with"
    if report["relative_diff"] > report["tolerance"]:
        return (
            f"a fresh process computes other logits from it (off by {report['relative_diff']:.1e} of the largest one, "
            f"allowed are {report['tolerance']:.0e})"
        )
    if not report["tokenizer_equal"]:
        return "a fresh process gets other token ids from its tokenizer"
    wrong = [str(case["memory"]) for case in report["memories"] if case["greedy"] == "different"]
    return f"a fresh process generates other tokens from it (memory {', '.join(wrong)})"


# ---------------------------------------------------------------------------------------------- the gated model


@torch.no_grad()
def write_reference(
    module: "Decomposition", arms: Mapping[str | None, str | None], tokenizer: PreTrainedTokenizerBase, path: Path
) -> None:
    """What the gated model says to the probes, as a safetensors file.

    Every arm reads all probes; then one batch holds a row or more of every arm and is continued greedily, by whole
    forwards without a token cache.
    """
    backbone = module.backbone
    ids, mask = probes(tokenizer, min(len(tokenizer), backbone.get_input_embeddings().num_embeddings))
    names = list(arms)
    rows = [names[i % len(names)] for i in range(max(len(names), len(ids)))]
    domains = [arms[name] for name in rows]
    tensors = {"ids": ids, "mask": mask}
    places = torch.arange(len(rows)) % len(ids)  # probe of each mixed row
    with module.under(mask=module.hard_gates()):
        for index, domain in enumerate(arms.values()):
            tensors[f"logits.{index}"] = _gated(module, ids, mask, [domain] * len(ids))
        ids, mask = ids[places], mask[places]
        tensors |= {"mixed.ids": ids, "mixed.mask": mask}
        best = []
        for _ in range(NEW):
            logits = _gated(module, ids, mask, domains)
            tensors.setdefault("mixed.logits", logits)  # those of the first step
            best.append(logits[:, -1].topk(2))
            ids, mask = torch.cat([ids, best[-1].indices[:, :1]], 1), torch.cat([mask, mask[:, -1:]], 1)
    tensors["mixed.new"] = torch.stack([top.indices[:, 0] for top in best], 1)  # [M, NEW]
    tensors["mixed.margin"] = torch.stack([top.values[:, 0] - top.values[:, 1] for top in best], 1)  # [M, NEW]
    about = {
        "arms": names,
        "rows": rows,
        "texts": [tokenizer(text)["input_ids"] for text in SENTENCES],
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"about": json.dumps(about)})


def probes(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [R, T]: sentences in several scripts and a row of random ids, padded on the left."""
    texts = [[token % size for token in tokenizer(text)["input_ids"]] for text in SENTENCES]
    rows = [(text * LAST)[: 24 - 3 * i] for i, text in enumerate(texts)]
    rows.append(torch.randint(size, (32,), generator=torch.Generator().manual_seed(0)).tolist())
    return left_padded(rows)


def _gated(module: "Decomposition", ids: Tensor, mask: Tensor, rows: Sequence[str | None]) -> Tensor:
    """Logits of the last positions, [R, LAST, V] fp32 on the CPU."""
    module.memories.activate(rows)
    backbone, positions = module.backbone, (mask.cumsum(1) - 1).clamp(min=0)  # [R, T]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {name: tensor.to(backbone.device) for name, tensor in inputs.items()}
    return backbone(**inputs, use_cache=False, logits_to_keep=LAST).logits.float().cpu()


# ------------------------------------------------------------------------------------------------- the artifact


def compare(folder: Path, reference: Path) -> Report:
    """Compare an artifact with what `write_reference` wrote: where the gated model was, else on the CPU.

    A GPU may have no room beside the model, or be for one process alone. The report names the device.
    """
    with safe_open(reference, "pt") as file:
        device = json.loads(file.metadata()["about"])["device"]
    try:
        return compare_on(device, folder, reference)
    except (RuntimeError, KoffError):
        if device == "cpu":
            raise
        return compare_on("cpu", folder, reference)


def compare_on(device: str, folder: Path, reference: Path) -> Report:
    """Load an artifact on a device and compare it with what `write_reference` wrote.

    Passed: the tokenizer gives the same ids, every logit of both is finite (`finite` says it of the reference) and
    within `TOLERANCE`, and greedy decoding with a token cache gives the tokens of whole forwards (`equal`), or parts
    from them only where the reference was so close to a tie that a difference within the tolerance decides (`tie`).
    """
    with safe_open(reference, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    model = load_decomposed(folder, device=device)
    # The model's own settings may stop early, forbid tokens or punish repetition; the reference does none of it.
    model.backbone.generation_config = GenerationConfig(use_cache=True, pad_token_id=0)
    cases, names = [], about["arms"]
    for index, arm in enumerate(names):
        logits = _written(model, tensors["ids"], tensors["mask"], [arm] * len(tensors["ids"]))
        cases.append({"memory": arm} | _difference(logits, tensors[f"logits.{index}"]))
    rows, allowed = about["rows"], TOLERANCE[about["dtype"]]
    mixed = _difference(_written(model, tensors["mixed.ids"], tensors["mixed.mask"], rows), tensors["mixed.logits"])
    counted = tensors["mixed.logits"].flatten(1).isfinite().all(1) & tensors["mixed.margin"].isfinite().all(1)  # [M]
    worst = max([*cases, mixed], key=lambda case: case["relative_diff"])
    greedy = _greedy(model, tensors, rows, 2 * allowed * worst["largest_logit"])
    for case in cases:
        own = [place for place, row in enumerate(rows) if row == case["memory"]]
        case["greedy"] = _worst(greedy[place] for place in own)
        case["finite"] = bool(tensors[f"logits.{names.index(case['memory'])}"].isfinite().all() and counted[own].all())
    tokenised = [model.tokenizer(text)["input_ids"] for text in SENTENCES] == about["texts"]
    return {
        "passed": all(
            [
                all(case["finite"] for case in cases),
                worst["relative_diff"] <= allowed,
                "different" not in greedy,
                tokenised,
            ]
        ),
        "error": None,
        "dtype": about["dtype"],
        "device": str(model.backbone.device),
        "tolerance": allowed,
        **{name: worst[name] for name in ("max_abs_diff", "largest_logit", "relative_diff")},
        "argmax_agreement": min(case["argmax_agreement"] for case in [*cases, mixed]),
        "greedy": _worst(greedy),
        "greedy_tokens": NEW,
        "tokenizer_equal": tokenised,
        "memories": cases,
        "mixed_batch": mixed,
    }


@torch.no_grad()
def _written(model: DecomposedModel, ids: Tensor, mask: Tensor, rows: Sequence[str | None]) -> Tensor:
    """Logits of the artifact at the last positions, [R, LAST, V] fp32 on the CPU."""
    place = model.backbone.device
    return model(ids.to(place), mask.to(place), rows, logits_to_keep=LAST).logits.float().cpu()


def _difference(logits: Tensor, expected: Tensor) -> Report:
    """How far apart two sets of logits are: as far as can be where one of them holds what is no finite number."""
    most = torch.finfo(torch.float32).max  # not inf, which JSON cannot say
    gap, scale = (logits - expected).abs().max(), expected.abs().max()
    relative = gap / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    agreement = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    figures = {"max_abs_diff": gap, "largest_logit": scale, "relative_diff": relative}
    sound = bool(logits.isfinite().all() and expected.isfinite().all())  # nan is neither more nor less than allowed
    return {name: min(float(value), most) if sound else most for name, value in figures.items()} | {
        "argmax_agreement": float(agreement) if sound else 0.0
    }


def _greedy(model: DecomposedModel, tensors: dict[str, Tensor], rows: Sequence[str | None], tie: float) -> list[str]:
    """For each mixed row, how generation with a cache compares with the reference: `equal`, `tie` or `different`."""
    ids, mask, expected = (tensors[f"mixed.{name}"].to(model.backbone.device) for name in ("ids", "mask", "new"))
    new = model.generate(ids, mask, rows, max_new_tokens=NEW, do_sample=False)[:, ids.shape[1] :]  # [M, NEW]
    wrong = (new != expected).cpu()
    first = wrong.int().argmax(1, keepdim=True)  # [M, 1] where the continuations part
    close = tensors["mixed.margin"].gather(1, first)[:, 0] <= tie  # [M]; a margin that is nan is no tie
    return [
        "equal" if not parts else "tie" if at_tie else "different"
        for parts, at_tie in zip(wrong.any(1).tolist(), close.tolist(), strict=True)
    ]


def _worst(found: Iterable[str]) -> str:
    return max(found, key=("equal", "tie", "different").index)


def main(folder: str, reference: str) -> int:
    """Compare, write the report, and return the exit status."""
    try:
        report = compare(Path(folder), Path(reference))
    except Exception as error:  # whatever keeps it from being used has to stand in the report
        traceback.print_exc()
        report = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    write_report(Path(folder), report)
    return 0 if report["passed"] else 1


def run() -> None:
    """The process that compares: with the paths that it is given, or that come by its standard input."""
    if words := sys.argv[1:] or json.loads(sys.stdin.read() or "[]"):  # nothing: whoever began it has gone
        sys.exit(main(*words))
