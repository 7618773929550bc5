"""The card of an exported backbone: what it is, what was removed, how to load it, whose licence it is under."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from koff_lightning.artifact.folder import Manifest
from koff_lightning.support.errors import KoffError
from koff_lightning.support.mask_words import KIND_NAMES
from koff_lightning.support.names import HUB_ID
from koff_lightning.support.yaml_files import load_yaml

_LICENCE_FILES = re.compile(r"(licen[cs]e|notice|copying)\b.*", re.IGNORECASE)

_LOAD = """from koff_lightning import load_decomposed
model = load_decomposed("DIR")                     # the folder above this one, with its memories
batch = model.encode(["Some text"])
ids = model.generate(**batch, domains={domains}, max_new_tokens=64)
print(*model.tokenizer.batch_decode(ids, skip_special_tokens=True))
"""
_LOAD_PLAIN = """{importing}from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("DIR/backbone"{trust})
"""


def model_card(manifest: Manifest, own_type: bool, with_code: bool, results: Mapping[str, Any] | None = None) -> str:
    """The text of `backbone/README.md`.

    Args:
        manifest: Manifest of the artifact.
        own_type: Its model type is one of koff-lightning's.
        with_code: The code of that type lies beside it.
        results: `results.json` of the run, where it is of this very model.
    """
    base, rates, size = manifest.base, manifest.sparsity, manifest.parameters
    percent = {name: f"{100 * rates[name]:.2f} %" for name in ("body", "total", "units")}
    lines = [
        "---",
        yaml.safe_dump(_front_matter(manifest), allow_unicode=True).strip(),
        "---",
        "",
        f"# {Path(base['id']).name}, decomposed",
        "",
        f"The shared backbone of {_base(base)} after knowledge offloading (KOFF, arXiv 2605.29075) with "
        f"{manifest.created_by}: the units that the model can best do without were removed, and each domain has a "
        "memory that makes up for them, in `../memories/`. By itself it is worse than the model it was cut from.",
        "",
        f"- removed: {percent['body']} of the body (linears of all layers), {percent['total']} of all parameters, "
        f"{percent['units']} of the prunable units (nominal: closed gates at their price)",
        f"- physically gone from these files: {rates['physical']['parameters']:,} parameters, "
        f"{100 * rates['physical']['body']:.2f} % of the body",
        f"- parameters: {size['backbone']:,} of {size['dense_total']:,}, {manifest.dtype}",
        f"- layout `{manifest.layout}`: {manifest.form.about.format(domain=manifest.domain)}",
        f"- domains when it was exported: {', '.join(manifest.domains) or 'none'}",
        "",
        "## Loading",
        "",
        "With its memories:",
        "",
        "```python",
        _LOAD.format(domains=repr(list(manifest.domains)[:1] or None)).strip(),
        "```",
        "",
        *_plain(manifest, own_type, with_code),
        "A memory fits this backbone only if it was made for the same base model, mask and tokenizer "
        f"(mask hash `{manifest.mask_hash[:12]}`); koff-lightning refuses others.",
        "",
        *(_measured(results, manifest) if results and not manifest.form.folds else []),
        "## What each layer keeps",
        "",
        *_widths(manifest),
        "",
        "## Licence",
        "",
        _licence(manifest.licence),
        "",
    ]
    return "\n".join(lines)


def _front_matter(manifest: Manifest) -> dict[str, object]:
    about: dict[str, object] = {"library_name": "transformers", "tags": ["koff", "knowledge-offloading", "pruned"]}
    if _on_hub(manifest.base["id"]):
        about["base_model"] = manifest.base["id"]
    return about | ({"license": manifest.licence} if manifest.licence else {})


def _on_hub(name: str) -> bool:
    """Whether the dense model has that name on the hub; a folder of two parts looks the same."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()


def _plain(manifest: Manifest, own_type: bool, with_code: bool) -> list[str]:
    if not manifest.form.in_transformers:
        return [
            "The backbone alone is for engines that read this form; it has not been run in them by this project.",
            "",
        ]
    importing = "import koff_lightning  # makes the model type known\n" if own_type and not with_code else ""
    code = _LOAD_PLAIN.format(importing=importing, trust=", trust_remote_code=True" if own_type and with_code else "")
    return ["Without:", "", "```python", code.strip(), "```", ""]


def _measured(results: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """What the run scored at its end, by domain and for text of no domain; without memories only bare."""
    rows = [(name, row, "koff", results["heldout_bytes"][name]) for name, row in results["domains"].items()]
    general = results.get("general", {"texts": {}})
    under = "; under any memory" if manifest.domains else ""
    rows += [
        (f"{name} (no domain{under})", row, "swapped", general["heldout_bytes"][name])
        for name, row in general["texts"].items()
    ]
    arms = {"the dense model": "dense"} | ({"with its memory": None} if manifest.domains else {})
    arms |= {"memories off" if manifest.domains else "this model": "memory_off"}
    return [
        "## Held-out text",
        "",
        f"Bits per byte at the end of the run, after {results['steps']:,} steps; less is better. Only what is scored "
        "on the same text, tokenizer and length of rows can be compared.",
        "",
        f"| text | bytes | {' | '.join(arms)} |",
        "|---" * (2 + len(arms)) + "|",
        *(
            f"| {name} | {size:,} | {' | '.join(_number(row[f'{arm or own}_bpb']) for arm in arms.values())} |"
            for name, row, own, size in rows
        ),
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _base(base: dict[str, str | None]) -> str:
    """The dense model's name; of a path the last part, since the rest means nothing to others."""
    name = base["id"] if _on_hub(base["id"]) else Path(base["id"]).name
    return f"`{name}`" + (f" (revision `{base['revision']}`)" if base["revision"] else "")


def _widths(manifest: Manifest) -> list[str]:
    kinds = list(dict.fromkeys(group["kind"] for group in manifest.kept))
    rows: dict[int, dict[str, str]] = {}
    for group in manifest.kept:
        rows.setdefault(group["layer"], {})[group["kind"]] = f"{group['kept']} of {group['of']}"
    return [
        f"| layer | {' | '.join(KIND_NAMES[kind] for kind in kinds)} |",
        "|---" * (1 + len(kinds)) + "|",
        *(f"| {layer} | {' | '.join(row.get(kind, 'all') for kind in kinds)} |" for layer, row in rows.items()),
    ]


def _licence(licence: str | None) -> str:
    if licence is None:
        return "The files of the base model name no licence. Its terms hold for this model too: look them up."
    return f"That of the base model: {licence}. Its files, if it came with any, lie beside this one."


def base_folder(source: str, name_or_path: str, revision: str | None) -> Path | None:
    """Folder of the dense model's files: its folder, or the hub's cache.

    Args:
        source: As given to `load_backbone`; beside a single file may lie anything.
        name_or_path: The loaded model's.
        revision: Revision of a hub model.
    """
    if source.endswith(".gguf"):
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def licence_of(folder: Path | None) -> str | None:
    """The licence that a model card names in its head, else the first line of a licence file."""
    card = folder and folder / "README.md"
    if card and card.is_file():
        head = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            named = load_yaml(head[1], str(card)).get("license") if head else None
        except (KoffError, AttributeError):  # somebody else's card; nothing of ours depends on it
            named = None
        if named:
            return ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    for file in licence_files(folder):
        if text := file.read_text(encoding="utf-8", errors="replace").strip():
            return text.splitlines()[0].strip()
    return None


def licence_files(folder: Path | None) -> list[Path]:
    """Files of a model's folder that state its terms."""
    files = sorted(folder.iterdir()) if folder else []
    return [file for file in files if file.is_file() and _LICENCE_FILES.fullmatch(file.name)]
