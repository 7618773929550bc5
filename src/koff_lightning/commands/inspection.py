"""`koff inspect`: what an artifact holds, from its manifest and the sizes of its files; no weights are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_lightning.placement import shown
from koff_lightning.support.errors import KoffError
from koff_lightning.support.mask_words import KIND_NAMES, sparsity_lines

if TYPE_CHECKING:
    from rich.console import Console

    from koff_lightning.artifact.folder import Manifest

BAR = 24  # characters


def inspect(folder: str, png: str | None = None, verify: bool = False, check: str | None = None) -> None:
    """Show sizes, sparsity by layer, parameters and domains of an exported model.

    Args:
        folder: Folder that `koff export` wrote, or org/name of one on the hub.
        png: File to draw the sparsity by layer into, besides the terminal.
        verify: Compare every file with its hash in the manifest too.
        check: Engines to ask what they can take, with commas: hf,peft,vllm,sglang,gguf.
    """
    from rich.console import Console

    from koff_lightning.artifact.folder import read_manifest
    from koff_lightning.artifact.folder import verify as check_backbone
    from koff_lightning.artifact.hub import local_folder
    from koff_lightning.artifact.memory_files import check_memories

    path = local_folder(folder)
    manifest = read_manifest(path)
    if verify:
        check_backbone(path)
        check_memories(path, manifest)
    console = Console(highlight=False, soft_wrap=True, force_jupyter=False)  # in a notebook too plain text
    sparsity = sparsity_lines(manifest.sparsity)
    for line in [*_about(path, manifest), *_sizes(path, manifest), *sparsity, *_parameters(manifest)]:
        console.print(line, markup=False)
    _layers(console, manifest)
    _domains(console, path, manifest)
    if verify:
        console.print("every file is as its hash says")
    if png:
        _draw(manifest, Path(png).expanduser())
    if check:
        from koff_lightning.artifact import engines

        print(engines.text(engines.check(path, engines.names(check))))


def _about(path: Path, manifest: "Manifest") -> list[str]:
    base = manifest.base
    of = f" of domain {manifest.domain}" if manifest.domain else ""
    revision = f" at {base['revision']}" if base.get("revision") else ""
    return [
        f"base        {base['id']}{revision} ({base['family']}), weights {base['hash'][:12]}",
        f"layout      {manifest.layout}{of}, {manifest.dtype}, mask {manifest.mask_hash[:12]}",
        f"licence     {manifest.licence or 'not known: ask whoever made the base model'}",
        f"made by     {manifest.created_by}",
        f"router      {_router(path, manifest)}",
    ]


def _router(path: Path, manifest: "Manifest") -> str:
    """Whether there is one, and picks among these memories."""
    from koff_lightning.artifact.router_files import read_fitting_card

    if manifest.router is None:
        return "none: koff router fit makes one"
    try:
        read_fitting_card(path, manifest)
    except KoffError as error:
        return f"one was fitted and cannot be used: {error}"
    return "one was fitted"


def _sizes(path: Path, manifest: "Manifest") -> list[str]:
    memories = {name: folder_size(path / "memories" / name) for name in manifest.domains}
    backbone, every = folder_size(path / "backbone"), sum(memories.values())
    parts = f"backbone {_bytes(backbone)}, {len(memories)} memories {_bytes(every)}"
    return [f"on disk     {_bytes(backbone + every)}: {parts}"]


def _parameters(manifest: "Manifest") -> list[str]:
    """Dense, active and stored; net is the change against the dense model."""
    counts = manifest.parameters
    dense, most = counts["dense_total"], max(counts["active"].values(), default=counts["backbone"])
    rows = {
        "backbone": (counts["backbone"], ""),
        "active": (most, "with one memory, the largest"),
        "stored": (counts["stored"], "with all memories"),
    }
    lines = [f"parameters  {'dense':<9}{dense:>16,}"]
    for name, (count, note) in rows.items():
        net = f"{100 * (count / dense - 1):+.2f} % net of dense"
        lines.append(f"{'':<12}{name:<9}{count:>16,}  {net:<24}{note}".rstrip())
    return lines


def _layers(console: "Console", manifest: "Manifest") -> None:
    """A bar for each layer and kind of unit: how much of it is kept."""
    full, empty = ("#", ".") if console.options.ascii_only else ("█", "░")
    kinds = [kind for kind in KIND_NAMES if any(entry["kind"] == kind for entry in manifest.kept)]
    table: dict[int, dict[str, str]] = {}
    for entry in manifest.kept:
        filled = round(BAR * entry["kept"] / entry["of"])
        share = f"{100 * entry['kept'] / entry['of']:3.0f} %  {entry['kept']} of {entry['of']}"
        table.setdefault(entry["layer"], {})[entry["kind"]] = f"{full * filled}{empty * (BAR - filled)} {share}"
    width = 2 + max((len(text) for row in table.values() for text in row.values()), default=0)
    lines = {"kept        layer": KIND_NAMES} | {f"{layer:>17}": row for layer, row in table.items()}
    for start, row in lines.items():
        cells = "".join(f"{row.get(kind, ''):<{width}}" for kind in kinds)
        console.print(f"{start} {cells}".rstrip(), markup=False)


def _domains(console: "Console", path: Path, manifest: "Manifest") -> None:
    for line in domain_table(path, manifest):
        console.print(line, markup=False)


def domain_table(path: Path, manifest: "Manifest") -> list[str]:
    """The domains with rank, slots, parameters and size on disk, as lines."""
    if not manifest.domains:
        return ["domains     none"]
    wide = max(map(len, manifest.domains)) + 2
    lines = [f"{'domains':<12}{'':<{wide}}{'rank':>6}{'slots':>7}{'parameters':>14}{'on disk':>12}"]
    for name, memory in manifest.domains.items():
        rank, slots = (str(memory[key] or "-") for key in ("rank", "slots"))
        size = _bytes(folder_size(path / "memories" / name))
        where = _placement(memory)
        lines.append(f"{'':<12}{name:<{wide}}{rank:>6}{slots:>7}{memory['parameters']:>14,}{size:>12}{where}")
    return lines


def _placement(memory: dict[str, Any]) -> str:
    """In which layers a memory sits, where it is not in all."""
    parts = {"LoRA": memory.get("lora_layers"), "KV": memory.get("kv_layers")}
    found = [f"{part} in layers {shown(layers)}" for part, layers in parts.items() if layers]
    return "  " + ", ".join(found) if found else ""


def _draw(manifest: "Manifest", file: Path) -> None:
    from koff_lightning.reports.plots import kept_by_layer

    if file.is_dir():  # matplotlib would write beside it
        raise KoffError(f"cannot write {file}: it is a folder; give a file, as {file / 'kept.png'}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept_by_layer(manifest.kept).savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise KoffError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from error


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
