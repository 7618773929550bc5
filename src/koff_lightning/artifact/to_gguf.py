"""An artifact as GGUF files for llama.cpp: the backbone, and every LoRA as an adapter that a request may choose.

A backbone whose layers are alike is written under its family's architecture. Layers of unequal width, and biases that
stand for removed units, go under `deci` (DeciLM, Nemotron-NAS): its graph takes the counts of heads and neurons layer
by layer and has every bias, but no q/k norms. What follows was read off llama.cpp's src/models and is held by
tests/test_llamacpp.py, which runs it.

KV memories have no place in a GGUF: `serving.llamacpp` gives them to the engine.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from koff_lightning import __version__
from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.gguf_tokenizer import write_tokenizer
from koff_lightning.backbone import end_tokens, head_size, kv_shapes, rotary_inv_freqs, rotary_scaling
from koff_lightning.gguf_files import ROPE_FREQS
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_free, new_folder
from koff_lightning.support.json_files import read_json_object
from koff_lightning.surgery import plain_state

FORMAT = 1
MARK, MODEL, LORA = "koff-gguf.json", "model.gguf", "{}.lora.gguf"
TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32  # numbers that share a scale in q8_0: rows of another length stay f16
_LARGEST = 65504.0  # of f16
_OWN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NEIGHBOURS = ("llama", "deci")  # these rotate dimensions 2i and 2i + 1, transformers i and i + d / 2
_ROTATED = (".attn_q.", ".attn_k.")


@dataclass(frozen=True)
class Form:
    """What the GGUF file of a backbone says and holds.

    Args:
        arch: llama.cpp's architecture.
        head: Dimensions of an attention head.
        heads: Query heads of each layer.
        kv_heads: Key-value heads of each layer.
        widths: Neurons of each layer.
    """

    arch: str
    head: int
    heads: list[int]
    kv_heads: list[int]
    widths: list[int]

    def name(self, name: str) -> str:
        """A tensor's name in a GGUF, from its name in transformers."""
        arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == self.arch)
        found = gguf.get_tensor_name_map(arch, len(self.widths)).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KoffError(f"llama.cpp's architecture {self.arch!r} has no place for {name}: use another engine")
        return found

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor [out, ...] with the rows in llama.cpp's order; `name` is the one in a GGUF."""
        turned = self.arch in _NEIGHBOURS and any(part in name for part in _ROTATED)
        return _neighbours(tensor, self.head) if turned else tensor

    def rotated(self, keys: Tensor) -> Tensor:
        """Keys [..., head] after the rotary embedding, with their dimensions in llama.cpp's order."""
        return _neighbours(keys.movedim(-1, 0), self.head).movedim(0, -1) if self.arch in _NEIGHBOURS else keys


def _neighbours(tensor: Tensor, head: int) -> Tensor:
    """Dimensions [heads * head, ...] from halves (i, i + head / 2), as transformers rotates, to (2i, 2i + 1)."""
    return tensor.reshape(-1, 2, head // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def form_of(model: DecomposedModel) -> Form:
    """Which architecture of llama.cpp computes what this backbone does.

    Raises:
        KoffError: None does.
    """
    config = model.backbone.config
    family, head = model.manifest.base["family"], head_size(config)
    if family not in _OWN:
        raise KoffError(
            f"koff convert gguf writes {', '.join(_OWN)} models, this one is {family}, with sliding windows and two "
            "rotary embeddings that no architecture of llama.cpp has beside unequal widths: `koff serve` it as it is"
        )
    layers = range(config.num_hidden_layers)
    state = {name: tensor.shape for name, tensor in plain_state(model.backbone).items()}
    kv_heads = [heads for heads, _ in kv_shapes(model.backbone)]
    own = Form(_OWN[family], head, [], kv_heads, [0] * len(layers))
    shapes = {own.name(name): shape for name, shape in state.items()}
    heads = [shapes[f"blk.{i}.attn_q.weight"][0] // head for i in layers]
    widths = [shapes[f"blk.{i}.ffn_down.weight"][1] for i in layers]
    _check(config, head)
    reasons = []
    if any(len(set(counts)) > 1 for counts in (heads, kv_heads, widths)):
        reasons.append("layers of unequal width")
    usual = (".attn_q.bias", ".attn_k.bias", ".attn_v.bias") if family == "qwen2" else ()
    if any(name.endswith(".bias") and not name.endswith(usual or "-") for name in shapes):
        reasons.append("biases that its family does not have")
    if family == "qwen2" and heads[0] * head != config.hidden_size:
        reasons.append("heads that do not add up to the hidden size")
    if family.startswith("qwen") and config.rope_parameters.get("rope_type") == "llama3":
        reasons.append("a rotary embedding scaled as in Llama 3")
    if reasons and any("attn_q_norm" in name for name in shapes):
        raise KoffError(
            f"no architecture of llama.cpp holds a {family} model with {' and '.join(reasons)}: `deci`, which takes "
            "them, has no q/k norms; use another engine, or for equal widths train with sparsity.layout: uniform"
        )
    return Form("deci" if reasons else own.arch, head, heads, kv_heads, widths)


def _check(config: PreTrainedConfig, head: int) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise KoffError(f"llama.cpp computes these families with SiLU, the model has {config.hidden_act!r}")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if (betas := (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)) != (32, 1):
        raise KoffError(f"llama.cpp computes yarn with beta_fast 32 and beta_slow 1 only, the model has {betas}")
    if kind == "yarn" and rope.get("truncate") is False:
        raise KoffError("llama.cpp computes yarn with truncate true only, the model's is false: use another engine")
    if kind not in ("default", "linear", "yarn", "llama3") or head % 2:
        raise KoffError(f"a rotary embedding of type {kind!r} is not written to a GGUF: use another engine")


def to_gguf(source: str | Path, out: str | Path, kind: str = "f16", overwrite: bool = False) -> Form:
    """Write an artifact's backbone and LoRA as GGUF files, with a README of the commands.

    Args:
        source: The artifact.
        out: Folder for the files. It appears in full, or not at all.
        kind: How weights are kept: `f32`, `f16` or `q8_0`. Norms, biases and LoRA are f32.
        overwrite: Replace such a folder that is there.

    Returns:
        How it was written.

    Raises:
        KoffError: No sound artifact, one that llama.cpp cannot hold (nothing is written then), or a folder that is
            taken.
    """
    if kind not in TYPES:
        raise KoffError(f"the type of a GGUF's weights must be one of {', '.join(TYPES)}; got {kind!r}")
    out = Path(out).expanduser().resolve()
    check_free(out, overwrite, MARK)
    model = load_decomposed(source)
    form = form_of(model)
    with new_folder(out, overwrite, MARK) as folder:
        pre = _write_backbone(model, form, folder / MODEL, kind)
        adapters = [name for name in model.domains if write_lora(model, form, name, folder / LORA.format(name))]
        mark = {"format_version": FORMAT, "type": kind, "arch": form.arch, "pre_tokenizer": pre}
        mark |= {"backbone": backbone_id(model), "adapters": adapters, "created_by": f"koff-lightning {__version__}"}
        (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(model, kind, adapters), encoding="utf-8")
    return form


def backbone_id(model: DecomposedModel) -> dict[str, str]:
    """What tells that GGUF files and an artifact have the same backbone."""
    manifest = model.manifest
    about = {"base": manifest.base["hash"], "mask": manifest.mask_hash, "layout": manifest.layout}
    return about | {"merged": manifest.domain or ""}


def check_same(folder: Path, model: DecomposedModel) -> str:
    """The type of the weights in a folder of GGUF files, once it is clear that they are this artifact's.

    Raises:
        KoffError: They are not, or the folder holds no such files.
    """
    if not (folder / MARK).is_file():
        raise KoffError(f"{folder} holds no {MARK}: `koff convert gguf {model.folder} --out DIR` writes such a folder")
    mark = read_json_object(folder / MARK)
    if mark.get("format_version") != FORMAT or mark.get("backbone") != backbone_id(model):
        raise KoffError(f"{folder} was not made from {model.folder} as it is now: convert it again")
    return str(mark["type"])


# --------------------------------------------------------------------------------------------------- the files


def _write_backbone(model: DecomposedModel, form: Form, path: Path, kind: str) -> str:
    """Write the backbone and its tokenizer; returns llama.cpp's name of the pre-tokenizer."""
    config = model.backbone.config
    writer = gguf.GGUFWriter(path, form.arch)
    writer.add_name(model.manifest.base["id"].rpartition("/")[2])
    writer.add_file_type(TYPES[kind])
    _write_sizes(writer, form, config)
    freqs = _write_rope(writer, model, form)
    ends = end_tokens(model.own_settings.eos_token_id)
    pre = write_tokenizer(writer, model.tokenizer, config.vocab_size, ends)
    tensors = {form.name(name): tensor for name, tensor in plain_state(model.backbone).items()}
    tensors = {name: form.rows(name, tensor) for name, tensor in tensors.items()}
    if freqs is not None:
        tensors[ROPE_FREQS] = freqs
    _write_tensors(writer, tensors, kind)
    return pre


def _write_sizes(writer: gguf.GGUFWriter, form: Form, config: PreTrainedConfig) -> None:
    """The sizes, as one number each where the architecture is for layers that are alike."""

    def counts(values: list[int]) -> int | list[int]:
        return values if form.arch == "deci" else values[0]

    window = getattr(config, "sliding_window", None)  # no graph here has one: the context ends where it would begin
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(form.widths))
    writer.add_feed_forward_length(counts(form.widths))
    writer.add_head_count(counts(form.heads))
    writer.add_head_count_kv(counts(form.kv_heads))
    writer.add_key_length(form.head)
    writer.add_value_length(form.head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_rope(writer: gguf.GGUFWriter, model: DecomposedModel, form: Form) -> Tensor | None:
    """The rotary embedding; returns what its frequencies are divided by, [head / 2], where the file wants it."""
    rope = model.backbone.config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(form.head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, form.head, 2).double() / form.head)
        return (plain / rotary_inv_freqs(model.backbone)[0].double().cpu()).float()
    if kind == "default":
        return None
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # there cos and sin are multiplied by attn_factor (1 + 0.1 ln factor)
        writer.add_rope_scaling_attn_factors(rotary_scaling(model.backbone) / (1 + 0.1 * math.log(rope["factor"])))
    return None


def write_lora(model: DecomposedModel, form: Form, domain: str, path: Path) -> bool:
    """Write a domain's adapter; False where its memory has none."""
    spec, weights = model.memories.lora(domain), model.memories.weights(domain)
    if spec is None or not weights:
        return False
    writer = gguf.GGUFWriter(path, form.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(spec.alpha))
    _write_tensors(writer, dict(_adapter(form, weights)), "f32")
    return True


def _adapter(form: Form, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        path, _, side = name.removesuffix(".weight").rpartition(".")
        new = form.name(f"{path}.weight")
        tensor = tensor.detach().cpu().float()
        yield f"{new}.{side.lower()}", form.rows(new, tensor) if side == "lora_B" else tensor


def _write_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Write the file; only one tensor at a time is there in the file's type."""
    kinds = {name: _type(tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(
            name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kinds[name]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            tensor = tensor.detach().float()
            if kinds[name] == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > _LARGEST:
                raise KoffError(f"{name} holds numbers above the largest of f16: write f32")
            writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), kinds[name]))
    finally:
        writer.close()


def _type(tensor: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    if tensor.ndim == 1 or kind == "f32":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % _BLOCK == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


# ---------------------------------------------------------------------------------------- the README beside them

_HEAD = """# {name} for llama.cpp

Written by `koff convert gguf` from an artifact of layout `{layout}`: `model.gguf` (weights {kind}) is the pruned
backbone{merged}{adapters}.

    llama-server -m model.gguf{options}

Any client of OpenAI's protocol talks to it; by itself it answers without a memory.
"""

_LORA = """
## A domain per request

The numbers are the order of `--lora` above. A request names all of them, the others with scale 0:

    curl http://localhost:8080/completion -d '{body}'

`lora` goes with `/v1/completions` and `/v1/chat/completions` too.

| domain | id |
| --- | --- |
{table}
"""

_KV = """
## KV memories

{names} also have learned keys and values ({slots} slots), which a plain llama-server has no place for: without them
these domains answer less well than they were scored. `koff serve ARTIFACT --engine llamacpp --gguf .`, of
`koff-lightning[serve,llamacpp]`, gives them to the same engine.
"""


def _readme(model: DecomposedModel, kind: str, adapters: list[str]) -> str:
    """The text of the README beside a GGUF export.

    Args:
        model: The model that was written.
        kind: Type of the weights.
        adapters: Domains that have a LoRA file.
    """
    manifest = model.manifest
    text = _HEAD.format(
        name=manifest.base["id"].rpartition("/")[2],
        layout=manifest.layout,
        kind=kind,
        merged=f" with the LoRA of `{manifest.domain}` in its weights" if manifest.domain else "",
        adapters=", and each `DOMAIN.lora.gguf` the LoRA of a domain" if adapters else "",
        options="".join(f" --lora {name}.lora.gguf" for name in adapters)
        + (" --lora-init-without-apply" if adapters else ""),
    )
    if adapters:
        lora = [{"id": i, "scale": float(i == 0)} for i in range(len(adapters))]
        body = json.dumps({"prompt": "Once upon a time", "n_predict": 32, "lora": lora})
        table = "\n".join(f"| {name} | {number} |" for number, name in enumerate(adapters))
        text += _LORA.format(body=body, table=table)
    slots = {name: about["slots"] for name, about in manifest.domains.items() if about["slots"]}
    if slots:
        text += _KV.format(names=", ".join(f"`{n}`" for n in slots), slots=", ".join(map(str, set(slots.values()))))
    return text
