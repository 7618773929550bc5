"""`koff memory`: list, add, remove, combine and exchange the memories of an artifact."""

from pathlib import Path
from typing import TYPE_CHECKING

from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    from koff_lightning.artifact.decomposed import DecomposedModel


def list_memories(folder: str) -> None:
    """List the memories of an exported model.

    Args:
        folder: Folder that `koff export` wrote, or org/name of one on the hub.
    """
    from koff_lightning.artifact.folder import read_manifest
    from koff_lightning.artifact.hub import local_folder
    from koff_lightning.commands.inspection import domain_table

    path = local_folder(folder)
    print("\n".join(domain_table(path, read_manifest(path))))


def add(folder: str, memory: str, *, as_: str | None = None) -> None:
    """Copy a memory into an exported model, after checking that it was made for its backbone.

    Args:
        folder: Folder that `koff export` wrote.
        memory: Folder of the memory: DIR/memories/NAME of another export, or what a training left.
        as_: Domain to keep it as; by default its own.
    """
    from koff_lightning.artifact.memories import add_memory

    print(f"added {add_memory(folder, memory, as_)} to {folder}")


def remove(folder: str, domain: str) -> None:
    """Delete a memory of an exported model.

    Args:
        folder: Folder that `koff export` wrote.
        domain: Whose memory.
    """
    from koff_lightning.artifact.memories import remove_memory

    remove_memory(folder, domain)
    print(f"removed {domain} from {folder}")


def compose(folder: str, a: str, b: str, *, as_: str, weights: tuple[float, float] = (0.5, 0.5)) -> None:
    """Make a new memory of two: their KV slots over one window, and a weighted sum of their LoRA. An experiment.

    Args:
        folder: Folder that `koff export` wrote.
        a: Domain of the first memory.
        b: Domain of the second.
        as_: Domain of the new one.
        weights: How much the LoRA of each counts, as [0.7, 0.3].
    """
    from koff_lightning.artifact import compose as composing
    from koff_lightning.artifact.memories import add_from_bank

    model = _loaded(folder, [a, b], as_)
    composing.compose(model.memories, a, b, as_, weights)
    add_from_bank(folder, model.memories, [as_])
    print(f"added {as_} to {folder}, made of {a} and {b}")


def cartridge(folder: str, domain: str, *, out: str | None = None, from_: str | None = None) -> None:
    """Write a KV memory as an adapter of PEFT's CARTRIDGE kind, or read one.

    Args:
        folder: Folder that `koff export` wrote.
        domain: Whose KV memory to write; with --from the name that the new memory gets.
        out: Folder to write the adapter to.
        from_: Folder of an adapter to add to the exported model as a memory without LoRA.
    """
    if (out is None) == (from_ is None):
        raise KoffError("memory cartridge: give either --out FOLDER to write an adapter or --from FOLDER to read one")
    from koff_lightning.artifact.cartridge import check_in_sight, from_cartridge, to_cartridge
    from koff_lightning.artifact.memories import add_from_bank
    from koff_lightning.backbone import rotary_inv_freqs
    from koff_lightning.kv_memory import KVMemory, check_movable

    model = _loaded(folder, [] if out is None else [domain], domain if out is None else None)
    check_movable(model.backbone.config)
    freqs = rotary_inv_freqs(model.backbone)
    if from_ is not None:
        slots = KVMemory.from_tensors(from_cartridge(Path(from_).expanduser(), freqs))
        model.memories.add(domain, None, slots)
        add_from_bank(folder, model.memories, [domain])
        print(f"added {domain} to {folder}")
    elif (slots := model.memories.slots(domain)) is None:
        raise KoffError(f"the memory {domain!r} of {folder} has no KV slots, so there is nothing for a CARTRIDGE")
    else:
        check_in_sight(model.backbone.config)
        to_cartridge(slots, freqs, Path(out).expanduser(), model.manifest.base["id"])
        print(f"wrote {out}")


def _loaded(folder: str, domains: list[str], new: str | None) -> "DecomposedModel":
    """The model with the memories that are read, once it is clear that it can take the `new` one."""
    from koff_lightning.artifact.decomposed import load_decomposed
    from koff_lightning.artifact.folder import read_manifest
    from koff_lightning.artifact.memories import check_free_name

    if new is not None:
        check_free_name(read_manifest(folder), Path(folder), new)
    return load_decomposed(folder, domains=domains)
