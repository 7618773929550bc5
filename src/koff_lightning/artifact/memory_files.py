"""One memory in one folder: `memory.json` beside its adapter in peft's own format and its KV memory.

    memory.json                 whose it is and which backbone it fits (MemoryCard)
    adapter_config.json         as peft saves an adapter, so that `PeftModel.from_pretrained(backbone, folder)` reads it
    adapter_model.safetensors   `base_model.model.<module path>.lora_A.weight` and `.lora_B.weight`, fp32
    kv_memory.safetensors       `layers.{i}.key` and `layers.{i}.value`, each fp32 [K_i, P, dh]; keys after the rotary
                                embedding, at the positions -P..-1

A memory may lack either part. Nothing is pickled, nothing is run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from koff_lightning.artifact.folder import FORMAT, MEMORIES, Manifest, describe_file, describe_files, read_versioned
from koff_lightning.kv_memory import KVMemory
from koff_lightning.listed_files import CARD, check_files
from koff_lightning.memory import MemoryBank
from koff_lightning.model_files import not_finite, tensors_in
from koff_lightning.placement import ALL, check_words, shortest, shown
from koff_lightning.specs.memories import MAX_SLOTS, LoraSpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_sha256
from koff_lightning.support.forms import fault_in, options_of
from koff_lightning.support.json_files import json_object
from koff_lightning.support.names import check_name
from koff_lightning.surgery import PEFT_PREFIX

KV_FILE = "kv_memory.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Entries of adapter_config.json that change what an adapter computes, or add tensors to it.
_OTHERWISE = ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
_OTHERWISE += ("lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
_OTHERWISE += ("alora_invocation_tokens", "corda_config", "arrow_config", "monteclora_config", "megatron_config")
_OTHERWISE += ("velora_config", "kasa_config", "exclude_modules", "layers_pattern")
_FORM = dict.fromkeys(("domain", "mask_hash", "tokenizer_hash", "shapes"), str) | {  # of memory.json
    "base": {"id": str, "revision?": (str, None), "hash": str},
    "lora": (LoraSpec, None),
    "kv": ({"slots": int, "positions": [float], "source_text_hash": (str, None), "layers?": [int]}, None),
    "parameters": int,
    "files": {str: {"sha256": str, "size": int}},
}
_PARTS = {"lora": (ADAPTER_CONFIG, ADAPTER), "kv": (KV_FILE,)}


@dataclass(frozen=True)
class MemoryCard:
    """Content of a memory's `memory.json`.

    Args:
        domain: Name of the domain.
        base: The dense model: `id`, `revision`, `hash` of its weights.
        mask_hash: Hash of the mask that it was trained under.
        tokenizer_hash: Hash of the tokenizer that it was trained with.
        shapes: What its tensors are shaped for, as `Layout.shapes` says.
        lora: `rank`, `alpha`, `targets`, and `layers` if it is not in all; None without an adapter.
        kv: `slots`, `positions` (first and last of the window they lie in), `source_text_hash`, and `layers` if they
            are not in all; None without slots.
        parameters: Numbers stored, counted from the tensors when they are written.
        files: Hash and size of the other files, filled in when they are written.
        format_version: Version of this file.
    """

    domain: str
    base: dict[str, Any]
    mask_hash: str
    tokenizer_hash: str
    shapes: str
    lora: dict[str, Any] | None
    kv: dict[str, Any] | None
    parameters: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT

    def to_json(self) -> str:
        """The text of `memory.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def summary(self, card_sha256: str) -> dict[str, Any]:
        """What the manifest of an artifact says of the memory; the hash is that of the card's file."""
        lora, kv = self.lora or {}, self.kv or {}
        about = {"rank": lora.get("rank"), "alpha": lora.get("alpha"), "slots": kv.get("slots")}
        placement = {"lora_layers": lora.get("layers"), "kv_layers": kv.get("layers")}
        about |= {name: layers for name, layers in placement.items() if layers is not None}
        return about | {"parameters": self.parameters, "card_sha256": card_sha256}


def card_of(
    bank: MemoryBank, domain: str, *, base: dict[str, Any], mask_hash: str, tokenizer_hash: str, shapes: str
) -> MemoryCard:
    """The card of a memory of a bank, as far as it is known before its tensors are written."""
    lora, slots = bank.lora(domain), bank.slots(domain)
    kv = slots and {
        "slots": slots.slots,
        "positions": [-slots.slots, -1],
        "source_text_hash": slots.source_hash,
        "layers": shortest(slots.layers, slots.depth),
    }
    base = {name: base.get(name) for name in ("id", "revision", "hash")}
    lora, kv = (_unless_all(part) for part in (lora and asdict(lora), kv))
    return MemoryCard(domain, base, mask_hash, tokenizer_hash, shapes, lora, kv)


def _unless_all(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A part without the entry `layers` where it is in all: the card is then that of earlier releases."""
    return part and {name: value for name, value in part.items() if (name, value) != ("layers", ALL)}


def lora_state(bank: MemoryBank, domain: str) -> dict[str, Tensor] | None:
    """A domain's adapter by peft's names, without the adapter's; None if it has none."""
    return {PEFT_PREFIX + name: weight for name, weight in bank.weights(domain).items()} or None


def write_memory(
    folder: Path, card: MemoryCard, lora: Mapping[str, Tensor] | None, kv: Mapping[str, Tensor] | None
) -> MemoryCard:
    """Write a memory into a new or empty folder.

    Args:
        folder: Folder to write.
        card: What is known of it; sizes and hashes are filled in.
        lora: Its adapter as `lora_state` gives it.
        kv: Its KV memory as `KVMemory.tensors` gives it.

    Returns:
        The card as it was written.

    Raises:
        KoffError: The folder holds something, or the card speaks of a part that is not there or the other way round.
    """
    check_name(card.domain)
    if (card.lora is None, card.kv is None) != (lora is None, kv is None):
        raise KoffError(f"the card of memory {card.domain!r} and its tensors disagree about which parts it has")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise KoffError(f"{folder} is not empty: remove what is in it, or give another folder")
    if lora is not None:
        (folder / ADAPTER_CONFIG).write_text(_adapter_config(card), encoding="utf-8")
        _save(lora, folder / ADAPTER, {"format": "pt"})
    if kv is not None:
        _save(kv, folder / KV_FILE, {"format": f"koff-kv-{FORMAT}"})  # one entry: of several the order is random
    count = sum(tensor.numel() for part in (lora, kv) for tensor in (part or {}).values())
    card = replace(card, parameters=count, files=describe_files(folder))
    (folder / CARD).write_text(card.to_json(), encoding="utf-8")
    return card


def write_loaded(folder: Path, bank: MemoryBank, domain: str, manifest: Manifest) -> MemoryCard:
    """Write a memory of a bank that hangs on an artifact's backbone, as `write_memory`."""
    about = {"base": manifest.base, "mask_hash": manifest.mask_hash, "tokenizer_hash": manifest.tokenizer_hash}
    card, slots = card_of(bank, domain, **about, shapes=manifest.form.shapes), bank.slots(domain)
    return write_memory(folder, card, lora_state(bank, domain), None if slots is None else slots.tensors())


def _adapter_config(card: MemoryCard) -> str:
    """The adapter_config.json that peft writes, sets sorted so that the same memory is the same file."""
    from peft import LoraConfig  # takes seconds, and only writing needs it

    alpha = card.lora["alpha"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=card.base["id"],
        revision=card.base["revision"],
        inference_mode=True,
        r=card.lora["rank"],
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # peft declares it as a whole number
        target_modules=card.lora["targets"],
        layers_to_transform=card.lora.get("layers"),
        lora_dropout=0.0,
        bias="none",
    )
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted) + "\n"


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def read_card(folder: Path) -> MemoryCard:
    """Read `memory.json`.

    Raises:
        KoffError: The file is missing, damaged, or of another format version.
    """
    path = folder / CARD
    if not path.is_file():
        hint = f"{folder / 'memories'} holds some" if (folder / "memories").is_dir() else "an export makes some"
        raise KoffError(f"{folder} holds no {CARD}, so it is not the folder of a memory: {hint}")
    content = read_versioned(path)
    if odd := sorted({entry.name for entry in fields(MemoryCard)} ^ content.keys()):
        fault = "has an unknown entry" if odd[0] in content else "lacks"
        raise KoffError(f"{path} {fault} {odd[0]!r}: it is damaged; get it again")
    if clause := fault_in(content, _FORM, "it"):
        raise KoffError(f"{path} cannot be used ({clause}): get it again")
    card = MemoryCard(**content)
    parts = [name for part, names in _PARTS.items() if content[part] is not None for name in names]
    try:
        check_name(card.domain)
        _specs(card)
    except (KoffError, TypeError) as error:  # an option of LoRA that is none
        raise KoffError(f"{path} cannot be used ({error}): get it again") from error
    if set(card.files) != set(parts):
        raise KoffError(f"{path} must name the files {', '.join(parts)} and no other: get it again")
    return card


def _specs(card: MemoryCard) -> tuple[LoraSpec | None, int | None]:
    """Its adapter, and how many slots it has: one is enough to read, only training needs two."""
    lora, slots = card.lora, None if card.kv is None else card.kv["slots"]
    for part in (lora or {}, card.kv or {}):
        if not isinstance(layers := part.get("layers", [0]), list):
            raise KoffError(f"layers is a list of numbers where it is said, not {layers!r}")
        check_words(layers, "layers")
    if slots is not None and (type(slots) is not int or not 1 <= slots <= MAX_SLOTS):
        raise KoffError(f"a KV memory has 1 to {MAX_SLOTS} slots, not {slots!r}")
    return None if lora is None else options_of(LoraSpec, lora, "lora"), slots


def load_memory(bank: MemoryBank, folder: Path, name: str | None = None, expect: Manifest | None = None) -> str:
    """Add the memory in a folder to a bank, frozen. The bank stays as it was when anything is wrong.

    Args:
        bank: Memories of the backbone that the memory is for.
        folder: Folder of the memory.
        name: Domain to load it as; by default its own.
        expect: Manifest of the bank's backbone; None skips the comparison, so that only shapes can tell.

    Returns:
        The domain.

    Raises:
        KoffError: As `read_memory`, its tensors do not fit, or the name is unsafe or taken.
    """
    if name is not None:
        check_name(name)
    card, weights, memory = read_memory(folder, bank.depth, expect)
    held = [*(weights or {}).values(), *(memory.tensors().values() if memory else ())]
    if (count := sum(tensor.numel() for tensor in held)) != card.parameters:
        raise KoffError(f"memory {folder}: {CARD} speaks of {card.parameters} parameters, its files hold {count}")
    domain = card.domain if name is None else name
    try:
        bank.add(domain, _specs(card)[0], memory, weights)
    except (KoffError, ValueError, TypeError, KeyError) as error:
        raise KoffError(f"memory {folder}: {error}") from error
    return domain


def read_memory(
    folder: Path, depth: int, expect: Manifest | None = None
) -> tuple[MemoryCard, dict[str, Tensor] | None, KVMemory | None]:
    """Read the memory in a folder.

    Args:
        folder: Where the memory lies.
        depth: Layers of its backbone.
        expect: Manifest of its backbone; None skips the comparison.

    Returns:
        Its card, the matrices of its adapter by module path, and its slots; None for a part that it lacks.

    Raises:
        KoffError: A file is missing, extra or changed, the memory belongs to another base, mask, tokenizer or layout,
            or its tensors are not what its card says.
    """
    card = read_card(folder)
    if expect is not None:
        _check_home(card, folder, expect)
    check_files(folder, card.files | {CARD: {"size": (folder / CARD).stat().st_size}}, hashes=False)
    spec, slots = _specs(card)
    try:
        weights = _adapter(folder, card, spec) if spec else None
        memory = _slots(folder, card, depth) if slots else None
        for path, closed in (expect.closed() if expect and weights else {}).items():
            if (up := weights.get(f"{path}.lora_B.weight")) is not None and up[closed].any():
                raise KoffError(
                    f"its adapter writes to channels of {path} that the mask has closed: train it for this artifact "
                    "with this release (koff fit --config add_domain.yaml)"
                )
    except (KoffError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise KoffError(f"memory {folder}: {error}") from error
    return card, weights, memory


def _slots(folder: Path, card: MemoryCard, depth: int) -> KVMemory:
    """The KV memory, as the card has it."""
    slots, layers = card.kv["slots"], card.kv.get("layers")
    tensors, source = _tensors(folder, KV_FILE, card), card.kv["source_text_hash"]
    memory = KVMemory.from_tensors(tensors, source, None if layers is None else depth)
    if memory.slots != slots:
        raise KoffError(f"{CARD} speaks of {slots} slots, {KV_FILE} holds {memory.slots}")
    if layers not in (None, memory.layers):
        raise KoffError(
            f"{CARD} speaks of slots in layers {shown(layers)}, {KV_FILE} holds those of {shown(memory.layers)}"
        )
    return memory


def _check_home(card: MemoryCard, folder: Path, expect: Manifest) -> None:
    """Raise KoffError unless the memory was made for this backbone."""
    ours, theirs = expect.base, card.base
    if theirs["hash"] != ours["hash"]:
        raise KoffError(
            f"memory {folder} belongs to base {theirs['id']!r} (hash {theirs['hash'][:12]}), this backbone was made "
            f"from {ours['id']!r} (hash {ours['hash'][:12]}): load it on a backbone made from its own base"
        )
    if card.mask_hash != expect.mask_hash:
        raise KoffError(
            f"memory {folder} was trained under another mask (hash {card.mask_hash[:12]}, this backbone's is "
            f"{expect.mask_hash[:12]}): load it on the backbone of its own run, or train it for this one "
            "(koff fit --config add_domain.yaml)"
        )
    if card.tokenizer_hash != expect.tokenizer_hash:
        raise KoffError(
            f"memory {folder} was trained with another tokenizer (hash {card.tokenizer_hash[:12]}, this backbone's is "
            f"{expect.tokenizer_hash[:12]}): use the tokenizer and backbone of its own run"
        )
    if card.shapes != (due := expect.form.shapes):
        raise KoffError(
            f"memory {folder} has {card.shapes!r} shapes, a backbone of layout {expect.layout!r} takes {due!r} ones: "
            f"export its run again with --layout {expect.layout}"
        )


def _adapter(folder: Path, card: MemoryCard, spec: LoraSpec) -> dict[str, Tensor]:
    """The adapter's matrices by module path."""
    config = json_object(_content(folder, ADAPTER_CONFIG, card), ADAPTER_CONFIG)
    odd = [name for name in _OTHERWISE if config.get(name)]
    odd += ["init_lora_weights"] if isinstance(config.get("init_lora_weights"), str) else []  # some change the backbone
    if odd:
        raise KoffError(f"{ADAPTER_CONFIG} asks for {odd[0]}, so peft would compute otherwise than we do: get it again")
    if (config.get("peft_type"), config.get("bias") or "none") != ("LORA", "none"):
        raise KoffError(f"{ADAPTER_CONFIG} is not of LoRA alone (peft_type, bias): get it again")
    targets = config.get("target_modules")
    targets = set(map(str, targets)) if isinstance(targets, list) else targets
    said = (config.get("r"), config.get("lora_alpha"), targets, config.get("layers_to_transform"))
    if said != (spec.rank, spec.alpha, set(spec.targets), None if spec.layers == ALL else spec.layers):
        raise KoffError(f"{ADAPTER_CONFIG} and {CARD} disagree about rank, alpha, targets or layers: get it again")
    return {key.removeprefix(PEFT_PREFIX): value for key, value in _tensors(folder, ADAPTER, card).items()}


def _tensors(folder: Path, name: str, card: MemoryCard) -> dict[str, Tensor]:
    tensors = tensors_in(_content(folder, name, card), name)
    if odd := not_finite(tensors):
        raise KoffError(f"{name} holds numbers that are not finite, in {odd}: get it again")
    return tensors


def _content(folder: Path, name: str, card: MemoryCard) -> bytes:
    """A file's bytes, read once: what was hashed is what is used."""
    content = (folder / name).read_bytes()
    check_sha256(hashlib.sha256(content).hexdigest(), card.files[name]["sha256"], name)
    return content


def check_memories(folder: Path, manifest: Manifest) -> None:
    """Compare every file of an artifact's memories with the hash that its card has; `verify` compares the cards.

    Raises:
        KoffError: A file is missing, extra, truncated or changed.
    """
    for name in manifest.domains:
        home = folder / MEMORIES / name
        card = read_card(home)
        check_files(home, card.files | {CARD: describe_file(home / CARD)})


def listed(manifest: Manifest, card: MemoryCard, card_sha256: str) -> Manifest:
    """The manifest of an artifact that has one memory more; the hash is that of its card's file."""
    counts = manifest.parameters
    active = counts["active"] | {card.domain: counts["backbone"] + card.parameters}
    return replace(
        manifest,
        domains=manifest.domains | {card.domain: card.summary(card_sha256)},
        parameters=counts | {"active": active, "stored": counts["stored"] + card.parameters},
    )


def unlisted(manifest: Manifest, domain: str) -> Manifest:
    """The manifest of an artifact that has one memory less."""
    counts = manifest.parameters
    active = {name: count for name, count in counts["active"].items() if name != domain}
    stored = counts["stored"] - manifest.domains[domain]["parameters"]
    return replace(
        manifest,
        domains={name: about for name, about in manifest.domains.items() if name != domain},
        parameters=counts | {"active": active, "stored": stored},
    )
