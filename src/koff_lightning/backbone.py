"""Load the frozen LLM and list what can be removed from it. The only file that knows the families' attribute names.

To add a family, check that its decoder layer has the names in `_FFN` and `_ATTENTION` below and add its `model_type`
to `FAMILIES`. Qwen2's q/k/v biases are counted and cut with their rows; Qwen3's q/k norms act inside one head and are
shared by all heads, so there is nothing of them to cut.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from koff_lightning.loading_bar import bar_for_large
from koff_lightning.support.errors import KoffError

TINY = "koff-tiny"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS = ("channel", "kv_group")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_FFN = ("mlp", ("gate_proj", "up_proj"), "down_proj")
_ATTENTION = ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")


@dataclass(frozen=True)
class PrunableGroup:
    """The units of one kind in one layer: FFN neurons (`channel`) or whole kv heads with their queries (`kv_group`).

    A unit owns `rows` rows of every producer and `width` columns of the consumer, so removing it leaves smaller but
    otherwise ordinary linears (method: structured pruning in the units of Sheared-LLaMA, with GQA groups kept whole).
    """

    layer: int
    kind: str
    size: int  # units
    producers: tuple[tuple[str, int], ...]  # (module path, output rows per unit)
    consumer: str  # module path; its INPUT is what a gate multiplies
    width: int  # input columns of the consumer per unit
    params_per_unit: int


def load_backbone(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal LM from a hub id, a local folder, a `.gguf` file or `koff-tiny`; frozen, in eval mode.

    Args:
        source: Where the weights are.
        revision: Branch, tag or commit of a hub model.
        dtype: Name of the torch dtype the frozen weights are kept in.
        trust_remote_code: Allow code from the model repository to run.
        config: In place of the one at `source`.

    Raises:
        KoffError: Nothing there, no access, no network, or a family that is not supported.
    """
    where = _resolve(source, revision, trust_remote_code)
    config = config or load_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if "gguf_file" in where:
        from transformers import GgufConfig

        where = where | {
            "quantization_config": GgufConfig(dequantize=True)
        }  # packed weights can be neither cut nor adapted
    where = where | {"config": config, "dtype": torch_dtype(dtype), "output_loading_info": True}
    with bar_for_large(where["pretrained_model_name_or_path"], where.get("gguf_file")):
        model, info = _loading(source, AutoModelForCausalLM.from_pretrained, where)
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        missing = sorted(info["missing_keys"])
        raise KoffError(
            f"backbone {source!r}: its files lack {len(missing)} tensors that its config asks for, first {missing[0]}: "
            "the download is incomplete, or config and weights belong to different models"
        )
    model.config.use_cache = False  # a cache makes packed documents see each other, silently
    return model.requires_grad_(False).eval()


def load_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a backbone, which is given as to `load_backbone`.

    Raises:
        KoffError: Nothing there, no access, no network, or a family that is not supported.
    """
    config = _loading(source, AutoConfig.from_pretrained, _resolve(source, revision, trust_remote_code))
    if config.model_type.removeprefix("koff_") not in FAMILIES:  # koff_*: what an artifact holds
        raise KoffError(
            f"backbone {source!r} is a {config.model_type!r} model; supported families are {', '.join(FAMILIES)}. "
            "To add one, see the head of koff_lightning/backbone.py"
        )
    return config


def load_tokenizer(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `source`, which is given as to `load_backbone`.

    transformers chooses its class by the model's config as well; `config` stands in for the one at `source`.
    """
    where = _resolve(
        source, revision, trust_remote_code, wanted=("tokenizer_config.json", "tokenizer.json", "config.json")
    )
    return _loading(source, AutoTokenizer.from_pretrained, where | ({} if config is None else {"config": config}))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks in order."""
    return list(model.model.layers)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    return [getattr(layer, _ATTENTION[0]) for layer in decoder_layers(model)]


def neuron_linears(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Of each layer's FFN the linear whose output the activation function takes, and the one that reads the neurons."""
    name, (gate, _), down = _FFN
    blocks = [getattr(layer, name) for layer in decoder_layers(model)]
    return [(getattr(block, gate), getattr(block, down)) for block in blocks]


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(kv heads, head dim) of each layer, as its weights have them."""
    heads = [attention.k_proj for attention in attention_modules(model)]
    return [(k.out_features // a.head_dim, a.head_dim) for k, a in zip(heads, attention_modules(model), strict=True)]


def hidden_states(model: PreTrainedModel, **inputs: Tensor | None) -> Tensor:
    """Last hidden states [B, T, d] after the final norm; `lm_head` is left to the loss, which works on token chunks."""
    refuse_masked_packing(inputs.get("attention_mask"), inputs.get("position_ids"))
    return model.model(use_cache=False, **inputs).last_hidden_state


def refuse_masked_packing(mask: Tensor | None, positions: Tensor | None) -> None:
    """Raise KoffError for packed rows (positions [B, T] that restart) with a padding mask [B, T]."""
    if mask is None or positions is None or mask.ndim != 2 or mask.shape[1] != positions.shape[1]:
        return
    inside = mask[:, 1:].bool() & mask[:, :-1].bool()
    if ((positions.diff(dim=1) != 1) & inside).any():  # transformers would let the documents see each other
        raise KoffError("packed rows (positions that restart) and a padding mask cannot be combined: give one of them")


def rotary_inv_freq(model: PreTrainedModel) -> Tensor:
    """Inverse frequencies of the rotary embedding, static scaling included, [head_dim / 2], radians per position."""
    return model.model.rotary_emb.inv_freq


def prunable_groups(model: PreTrainedModel, kinds: tuple[str, ...] | list[str] = KINDS) -> list[PrunableGroup]:
    """List the prunable units layer by layer. Call before adapters are injected: it reads the plain linears.

    Args:
        model: A backbone from `load_backbone`.
        kinds: Which of `channel` (FFN neurons) and `kv_group` to list.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise KoffError(f"prunable units must be some of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    groups = []
    for index, layer in enumerate(decoder_layers(model)):
        for kind, (block, producers, consumer) in zip(KINDS, (_FFN, _ATTENTION), strict=True):
            if kind in kinds:
                groups.append(
                    _group(
                        index, kind, layer.get_submodule(block), f"model.layers.{index}.{block}", producers, consumer
                    )
                )
    return groups


def _group(
    index: int, kind: str, block: nn.Module, path: str, producers: tuple[str, ...], consumer: str
) -> PrunableGroup:
    linears = [getattr(block, name) for name in producers]
    size = linears[-1].out_features // (1 if kind == "channel" else block.head_dim)  # up rows | kv heads
    rows = [linear.out_features // size for linear in linears]
    last = getattr(block, consumer)
    width = last.in_features // size
    made = sum(n * (linear.in_features + (linear.bias is not None)) for n, linear in zip(rows, linears, strict=True))
    paths = tuple((f"{path}.{name}", n) for name, n in zip(producers, rows, strict=True))
    return PrunableGroup(index, kind, size, paths, f"{path}.{consumer}", width, made + width * last.out_features)


def uniform_kv_groups(config: PreTrainedConfig) -> list[int]:
    """How many kv groups a plain config of this family can have in all layers when some are removed, most first.

    A Llama config takes only head counts that divide the hidden size, whatever its head size; the others take any.
    """
    groups, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    bound = config.model_type == "llama"
    return [n for n in range(groups, 0, -1) if not bound or config.hidden_size % (n * queries) == 0]


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with shapes and no numbers (on the meta device), to count by."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Exact parameters of the plain model: `total` (tied embeddings once) and `body` (all linears of all layers)."""
    body = sum(
        p.numel()
        for layer in decoder_layers(model)
        for m in layer.modules()
        if isinstance(m, nn.Linear)
        for p in m.parameters()
    )
    return {"total": sum(p.numel() for p in model.parameters()), "body": body}


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and bytes of the frozen weights, so that a memory knows the model it was made for."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes token ids: the fast tokenizer's own description, of a slow one the sorted vocabulary."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"padding": None, "truncation": None}  # states of the last call
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """The floating dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise KoffError(f"dtype must be a floating torch dtype such as float32, bfloat16 or float16; got {name!r}")
    return dtype


def _resolve(
    source: str, revision: str | None, trust_remote_code: bool, wanted: tuple[str, ...] = ("config.json",)
) -> dict[str, object]:
    """Keyword arguments for `from_pretrained`; a folder must hold one of the `wanted` files."""
    where: dict[str, object] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = Path(source).expanduser()
    if source == TINY:
        return {"pretrained_model_name_or_path": str(files("koff_lightning") / "tiny" / "model")}
    if source.endswith(".gguf"):
        if not path.is_file():
            raise KoffError(
                f"backbone {source!r}: no such file. `koff fetch smollm2` gets one; a hub id or a folder also works"
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not any((path / name).is_file() for name in wanted):
            raise KoffError(
                f"{source!r}: the folder holds no {' or '.join(wanted)}, so it is nothing transformers saved"
            )
        return where | {"pretrained_model_name_or_path": str(path)}
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise KoffError(
            f"backbone {source!r}: no such folder. Give a folder, a .gguf file, a hub id (owner/name) or {TINY!r}"
        )
    return where | {"pretrained_model_name_or_path": source}


def _loading(source: str, load: object, where: dict[str, object]) -> object:
    """Call `load`, turning the hub's many exceptions into one line that says what to do."""
    import koff_lightning.artifact.modeling_koff  # noqa: F401  makes the types koff_* known; costs seconds, so not at the top

    try:
        return load(**where)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        text = str(error)
        if isinstance(error, UnpicklingError):
            hint = "its weights are damaged, or hold more than tensors, which is never run: save them as safetensors"
        elif "trust_remote_code" in text:
            hint = "it brings its own code, which is not run unless trust_remote_code is true"
        elif "gated" in text.lower() or "401" in text or "403" in text:
            hint = "access is restricted: accept its licence on the hub and log in with `hf auth login`"
        elif any(
            sign in text.lower() for sign in ("offline", "connect", "couldn't reach", "resolve host", "timed out")
        ):
            hint = f"no copy is cached and the hub cannot be reached: fetch it where it can be, or use {TINY!r}"
        elif "not a valid model identifier" in text or "404" in text:
            hint = "no such model on the hub: check the spelling, or give a local folder"
        else:
            hint = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        raise KoffError(f"cannot load backbone {source!r}: {hint}") from error
