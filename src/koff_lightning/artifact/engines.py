"""Which engine can take which part of one artifact.

"yes" and "no" are what runs gave for every layout, docs/results/engines.json; what is promised of an engine that is
installed here is tried on the artifact itself, too. "not run" is an engine that this project has not run.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_lightning.artifact.cartridge import check_in_sight, to_cartridge
from koff_lightning.artifact.decomposed import load_decomposed
from koff_lightning.artifact.folder import MEMORIES, Manifest, verify
from koff_lightning.artifact.memory_files import KV_FILE
from koff_lightning.backbone import rotary_inv_freqs
from koff_lightning.kv_memory import KVMemory, check_movable, check_one_rope
from koff_lightning.listed_files import BACKBONE
from koff_lightning.loading import no_bars
from koff_lightning.placement import shown
from koff_lightning.support.errors import KoffError
from koff_lightning.support.json_files import read_json_object
from koff_lightning.support.wording import nearest

ENGINES = {"hf": "transformers", "peft": "PEFT", "vllm": "vLLM", "sglang": "SGLang", "gguf": "llama.cpp"}
PARTS = {"backbone": "backbone", "lora": "LoRA of a domain", "kv": "KV memory"}
# How the backbone's config looks -> the layouts that give it.
FORMS = {"ragged": "`ragged`, `merged`", "plain": "`uniform`, `masked`", "deci": "`deci`"}

Answer = tuple[str, str]  # yes, no or not run; and why

VLLM_RANK = 512  # of LoRA, the largest that it takes

_IMPORT = "after `import koff_lightning`"
_NO_DECI = ("no", "no class there reads block configs")
_NO_SLOTS = ("no", "no place for learned keys and values")
_CONVERTED = ("yes", "after `koff convert gguf`")
_CONVERTED_RAGGED = ("yes", "after `koff convert gguf`; no qwen3, whose q/k norms have no place beside unequal widths")
_PLUGIN = ("yes", "with this package beside it: docs/vllm.md")
_NOT_RUN = ("not run", "")
_CARTRIDGE = (
    "yes",
    "as CARTRIDGE (`koff memory cartridge`), if all layers keep equally many kv groups; one at a time, without LoRA",
)

RULES: dict[str, dict[str, dict[str, Answer]]] = {
    "hf": {
        "backbone": {"ragged": ("yes", _IMPORT), "plain": ("yes", ""), "deci": _NO_DECI},
        "lora": {"ragged": ("yes", "by PEFT"), "plain": ("yes", "by PEFT"), "deci": _NO_DECI},
        "kv": dict.fromkeys(FORMS, _NO_SLOTS),
    },
    "peft": {
        "backbone": {"ragged": ("yes", _IMPORT), "plain": ("yes", ""), "deci": _NO_DECI},
        "lora": {"ragged": ("yes", ""), "plain": ("yes", ""), "deci": _NO_DECI},
        "kv": {"ragged": _CARTRIDGE, "plain": _CARTRIDGE, "deci": _NO_DECI},
    },
    "vllm": {part: dict.fromkeys(FORMS, _PLUGIN) for part in PARTS},
    "sglang": {part: dict.fromkeys(FORMS, _NOT_RUN) for part in PARTS},
    "gguf": {
        "backbone": {"ragged": _CONVERTED_RAGGED, "plain": _CONVERTED, "deci": _CONVERTED},
        "lora": {"ragged": _CONVERTED_RAGGED, "plain": _CONVERTED, "deci": _CONVERTED},
        "kv": dict.fromkeys(FORMS, ("yes", "in the same engine, through `koff_lightning.serving.llamacpp`")),
    },
}


def names(words: str) -> list[str]:
    """Engines from a list with commas; all of them from an empty one.

    Raises:
        KoffError: A word is not the name of an engine.
    """
    found = [word.strip() for word in words.split(",") if word.strip()]
    for word in found:
        if word not in ENGINES:
            raise KoffError(f"no engine {word!r} to check.{nearest(word, ENGINES)} Known: {', '.join(ENGINES)}")
    return found or list(ENGINES)


def check(folder: str | Path, engines: Sequence[str] = tuple(ENGINES)) -> dict[str, dict[str, Answer]]:
    """What each engine can take of one artifact.

    What is promised of transformers and PEFT is tried: the artifact is loaded with them and run on a few tokens. Of
    llama.cpp it is tried whether it has an architecture for the model and a pre-tokenizer for its text. vLLM has an
    environment of its own: it is looked whether the artifact has anything that the plugin refuses.

    Returns:
        Engine -> part (`backbone`, `lora`, `kv`) -> answer and reason. Parts that the artifact lacks are left out.

    Raises:
        KoffError: No sound artifact, or an unknown engine.
    """
    folder = Path(folder).expanduser()
    manifest = verify(folder)
    found = {}
    for engine in names(",".join(engines)):
        found[engine] = {part: _answer(engine, part, folder, manifest) for part in _parts(manifest)}
    return found


def text(found: dict[str, dict[str, Answer]]) -> str:
    """The findings for the terminal, a line each."""
    return "\n".join(
        f"{ENGINES[engine]:<13}{PARTS[part]:<18}{answer:<10}{why}".rstrip()
        for engine, answers in found.items()
        for part, (answer, why) in answers.items()
    )


def _parts(manifest: Manifest) -> list[str]:
    held = {"lora": any(about["rank"] for about in manifest.domains.values())}
    held["kv"] = any(about["slots"] for about in manifest.domains.values())
    return [part for part in PARTS if held.get(part, True)]


def _answer(engine: str, part: str, folder: Path, manifest: Manifest) -> Answer:
    config = read_json_object(folder / BACKBONE / "config.json")
    answer, why = RULES[engine][part][_form(manifest, config)]
    trial = _TRIALS.get((engine, part))
    if answer != "yes" or trial is None:
        return answer, why
    try:
        with _unseen():
            trial(folder, manifest)
    except Exception as error:  # whatever theirs raise is the finding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return "no", reason if engine == "vllm" else f"tried, and failed: {reason}"
    return answer, why


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep what theirs say while they load, bars and words to their developers, out of the table."""
    with no_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _form(manifest: Manifest, config: dict[str, Any]) -> str:
    """How the backbone's config looks: a ragged layout that lost nothing is plain."""
    if not manifest.form.in_transformers:
        return "deci"
    return "ragged" if config["model_type"].startswith("koff_") else "plain"


# ---------------------------------------------------------------------------------------------------- trials


def _transformers(folder: Path, manifest: Manifest) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder / BACKBONE, dtype="auto", output_loading_info=True)
    if lost := [key for keys in info.values() for key in keys]:
        raise KoffError(f"its files and its config do not fit: {lost[0]}")
    _run(model)
    return model


def _adapter_in_transformers(folder: Path, manifest: Manifest) -> None:
    model = _transformers(folder, manifest)
    with _strict():
        model.load_adapter(str(_memory(folder, manifest, "rank")))
    _run(model)


def _adapter_in_peft(folder: Path, manifest: Manifest) -> None:
    with _strict():
        _run(PeftModel.from_pretrained(_transformers(folder, manifest), _memory(folder, manifest, "rank")))


def _slots_in_peft(folder: Path, manifest: Manifest) -> None:
    model, tensors = _transformers(folder, manifest), load_file(_memory(folder, manifest, "slots") / KV_FILE)
    slots = KVMemory.from_tensors(tensors, depth=model.config.num_hidden_layers)
    check_in_sight(model.config)
    check_movable(model.config)
    with TemporaryDirectory() as work, _strict():
        to_cartridge(slots, rotary_inv_freqs(model), Path(work))
        _run(PeftModel.from_pretrained(model, work))


def _run(model: torch.nn.Module) -> None:
    with torch.no_grad():
        tokens = model.generate(input_ids=torch.arange(3, 11)[None], max_new_tokens=2, do_sample=False)
        if not torch.isfinite(model(input_ids=tokens).logits).all():
            raise KoffError("the logits are not finite")


@contextmanager
def _strict() -> Iterator[None]:
    """An adapter that does not fit is an error; to peft it is a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def _memory(folder: Path, manifest: Manifest, part: str) -> Path:
    return folder / MEMORIES / next(name for name, about in manifest.domains.items() if about[part])


def _converted(folder: Path, manifest: Manifest) -> None:
    """Try whether llama.cpp has an architecture and a pre-tokenizer for the backbone."""
    from koff_lightning.artifact.gguf_tokenizer import check_tokenizer  # gguf takes a second
    from koff_lightning.artifact.to_gguf import form_of

    model = load_decomposed(folder, domains=[], verify=False)
    form_of(model)
    check_tokenizer(model.tokenizer)


def _check_all_layers(folder: Path, manifest: Manifest) -> None:
    """Refuse memories that have slots in some layers only, where all layers share one row of places."""
    if layers := [about["kv_layers"] for about in manifest.domains.values() if about.get("kv_layers")]:
        raise KoffError(f"its cache holds slots in all layers, a memory here has some in {shown(layers[0])} alone")


def _layers_in_vllm(folder: Path, manifest: Manifest) -> None:
    config = manifest.form.read_config(folder / BACKBONE, manifest.base["family"])
    if getattr(config, "koff_biases", None):
        raise KoffError("its layers have no place for the biases by which this mask makes up for what it removes")
    check_one_rope(config)


def _rank_in_vllm(folder: Path, manifest: Manifest) -> None:
    if (most := max(about["rank"] or 0 for about in manifest.domains.values())) > VLLM_RANK:
        raise KoffError(f"it takes LoRA up to rank {VLLM_RANK}, a memory here has {most}")


def _each(*trials: Callable[[Path, Manifest], object]) -> Callable[[Path, Manifest], object]:
    return lambda folder, manifest: [trial(folder, manifest) for trial in trials]


_TRIALS: dict[tuple[str, str], Callable[[Path, Manifest], object]] = {
    ("hf", "backbone"): _transformers,
    ("hf", "lora"): _adapter_in_transformers,
    ("peft", "backbone"): _transformers,
    ("peft", "lora"): _adapter_in_peft,
    ("peft", "kv"): _slots_in_peft,
    ("vllm", "backbone"): _layers_in_vllm,
    ("vllm", "lora"): _each(_layers_in_vllm, _rank_in_vllm),
    ("vllm", "kv"): _each(_layers_in_vllm, _check_all_layers),
    ("gguf", "backbone"): _converted,
    ("gguf", "lora"): _converted,
    ("gguf", "kv"): _each(_converted, _check_all_layers),
}
