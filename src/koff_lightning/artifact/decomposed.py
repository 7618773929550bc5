"""A decomposed model as it is used: the small backbone of an artifact, and a memory for each row of a batch.

    model = load_decomposed("runs/demo/artifact", domains=["de", "python"])
    model(input_ids, attention_mask, domains=["de", None, "python"]).logits
    model.generate(input_ids, domains="de", max_new_tokens=64)

Shapes: B rows, T tokens, P memory slots.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from koff_lightning.artifact.calls import (
    CACHES,
    check_arguments,
    check_attention,
    check_domains,
    check_generation,
    check_ids,
    check_mask,
    check_packing,
    check_prompt_mask,
    given_cache,
    positions,
    refuse_overflow,
)
from koff_lightning.artifact.folder import MEMORIES, Manifest, read_manifest
from koff_lightning.artifact.folder import verify as verify_files
from koff_lightning.artifact.hub import local_folder
from koff_lightning.artifact.memory_files import load_memory
from koff_lightning.artifact.router_files import check_fit, read_router
from koff_lightning.backbone import ask_nothing_, is_recomputed
from koff_lightning.data.encoding import encode_prompts
from koff_lightning.listed_files import BACKBONE
from koff_lightning.loading import device_named, fingerprint, load_backbone, load_tokenizer
from koff_lightning.lora import Routes
from koff_lightning.memory import MemoryBank
from koff_lightning.router.routing import Router
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO

Domains = str | Sequence[str | None] | None

_CALLS = 4  # number of calls whose routes are kept, for texts that are continued in turn


def load_decomposed(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    domains: str | Sequence[str] | None = None,
    verify: bool = True,
) -> "DecomposedModel":
    """Load what `koff export` wrote.

    Args:
        path: The artifact's folder, or `org/name` of one on the hub.
        device: Device to load the model onto.
        dtype: Dtype of the backbone, a name or a torch dtype; by default the one it was exported in. Memories stay fp32
            and are cast where they are used.
        domains: The memories to load, no others are read; by default all. "auto" loads all of them and the router.
        verify: Compare every file of the backbone with its hash in the manifest; costs one reading of the files. Those
            of the memories are always compared.

    Raises:
        KoffError: No artifact, one of another format version, missing, extra or damaged files, a domain that it does
            not have, or a device or dtype that does not exist here.
    """
    check_domains(domains)
    folder = local_folder(path)
    manifest = read_manifest(folder)
    chosen = list(manifest.domains) if domains is None else [domains] if isinstance(domains, str) else list(domains)
    if auto := AUTO in chosen and AUTO not in manifest.domains:
        chosen = list(manifest.domains)
    manifest.refuse_others(chosen, folder)
    where = device_named(device)
    if verify:
        verify_files(folder, backbone=True)
    name = manifest.dtype if dtype is None else str(dtype).removeprefix("torch.")
    config = manifest.form.read_config(folder / BACKBONE, manifest.base["family"])
    backbone = load_backbone(str(folder / BACKBONE), dtype=name, config=config)
    model = DecomposedModel(backbone.to(where), manifest, folder)
    for domain in dict.fromkeys(chosen):
        if (held := model.add_memory(folder / MEMORIES / domain)) != domain:
            raise KoffError(
                f"{folder / MEMORIES / domain} holds the memory {held!r}: its folder was renamed; rename it back"
            )
    if auto:
        model.router  # noqa: B018  what is wrong with it is said now
    return model


class DecomposedModel(nn.Module):
    """A pruned backbone whose rows read the memories of their domains. Made by :func:`load_decomposed`.

    What a row reads belongs to the call: threads may call one model at the same time, each for domains of its own.

    Attributes:
        backbone: The transformers model; called by itself it reads what `memories.activate` was told, else nothing.
        memories: The memories loaded.
        own_settings: What the backbone's generation_config.json says of sampling, penalties and the like. `generate`
            uses none of it but the token ids, unless it is given as `generation_config`.
        manifest: What `koff.json` says.
        folder: Where the artifact lies.
    """

    def __init__(self, backbone: PreTrainedModel, manifest: Manifest, folder: Path) -> None:
        super().__init__()
        self._own_parameters = sum(p.numel() for p in backbone.parameters())  # tied embeddings once
        backbone.set_attn_implementation("koff")
        self.own_settings = ask_nothing_(backbone)
        for settings in (self.own_settings, backbone.generation_config):
            settings.use_cache = True  # the config's own False is for packed rows, not for `generate`
            settings.disable_compile = True  # correct, but every change of rows would compile anew
        self.backbone, self.manifest, self.folder = backbone, manifest, folder
        self.memories = MemoryBank(backbone)
        self._last: tuple[tuple[list[str | None], Routes], ...] = ()  # of calls, with what decoding has stacked
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    @property
    def domains(self) -> list[str]:
        """The domains whose memories are loaded."""
        return list(self.memories.domains)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, read when first asked for. It pads on the left, as generation needs it."""
        family = AutoConfig.for_model(self.manifest.base["family"])  # so that its class is the dense model's
        tokenizer = load_tokenizer(str(self.folder / BACKBONE), config=family)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked in any case
        return tokenizer

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, domains: Domains = None, **inputs: Any
    ) -> Any:
        """Run the backbone, each row with its domain's memory.

        Args:
            input_ids: Long [B, T].
            attention_mask: [B, T], or [B, past + T] with a token cache; 0 for padding, on either side.
            domains: One per row, None for the bare pruned backbone, "auto" for what the router picks from the row's
                text; or one word for all rows.
            inputs: Further arguments of the transformers model. Positions are counted from the mask unless
                `position_ids` [B, T] say otherwise; a token cache is kept only with `use_cache=True` or when one is
                given.

        Returns:
            The transformers model's output; `.logits` is [B, T, V].
        """
        check_ids(input_ids, self.backbone)
        check_mask(attention_mask)
        device, cache = self.backbone.device, given_cache(inputs, self.backbone)
        check_arguments(inputs, self.backbone)
        input_ids, attention_mask = input_ids.to(device), None if attention_mask is None else attention_mask.to(device)
        inputs["use_cache"] = bool(inputs.get("use_cache", cache is not None))
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(attention_mask, input_ids, cache)
        else:
            check_packing(attention_mask, inputs["position_ids"], inputs["use_cache"])
            inputs["position_ids"] = inputs["position_ids"].to(device)
        if torch.is_grad_enabled() and is_recomputed(self.backbone):
            raise KoffError(
                "activation checkpointing would compute layers again after this call, without its memories: activate "
                "the rows' memories with model.memories.activate, and call model.backbone, with position_ids that "
                "count from where a row's padding ends"
            )
        chosen = self._chosen(domains, input_ids, attention_mask, cache)
        with self.memories.scope(self._routes(chosen)):
            return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, domains: Domains = None, **options: Any
    ) -> Any:
        """Continue every row with its domain's memory.

        Args:
            input_ids: Long [B, T], padded on the left.
            attention_mask: [B, T], 0 for padding.
            domains: As for `forward`. With beams or several returned sequences, still one per prompt.
            options: Arguments of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`, `streamer` ...
                What is not given is not done, whatever the model's own settings say: greedy is greedy.

        Returns:
            What transformers' `generate` returns: by default long [B, T + new].

        Raises:
            KoffError: Padding on the right, a domain that is not loaded, a way of generating that goes round the
                memories, or logits that are no numbers.
        """
        check_ids(input_ids, self.backbone)
        check_generation(options)
        given_cache(options, self.backbone)
        check_mask(attention_mask)
        input_ids = input_ids.to(self.device)
        if attention_mask is not None:
            check_prompt_mask(attention_mask := attention_mask.to(self.device), input_ids)
        if options.get("custom_generate") is not None or self._option(options, "cache_implementation") not in CACHES:
            raise KoffError(
                "generate: custom_generate and caches other than "
                f"{', '.join(map(str, CACHES[1:]))} have not been checked with memories: leave them out"
            )
        copies = max(self._option(options, "num_beams") or 1, self._option(options, "num_return_sequences") or 1)
        chosen = self._chosen(domains, input_ids, attention_mask)
        options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or []), refuse_overflow])
        with self.memories.scope(self._routes(chosen, copies)):
            return self.backbone.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, T] of prompts, padded on the left, as `generate` takes them.

        As in training the start token stands before each and no end token behind, whatever the tokenizer puts there.
        """
        ids, mask = encode_prompts(self.tokenizer, prompts)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @cached_property
    def router(self) -> Router:
        """What `koff router fit` has left in the artifact, read when first asked for.

        Raises:
            KoffError: There is none, it is damaged, or it was fitted for other memories.
        """
        return read_router(self.folder, self.manifest)

    def route(self, texts: Sequence[str]) -> list[str | None]:
        """The domain whose memory each text wants, by the artifact's router; None for none: the bare backbone.

        Raises:
            KoffError: There is no router, or it was fitted for other memories than those that are loaded.
        """
        check_fit(self.router.domains, self.domains, self.folder, loaded=True)
        return self.router.route(texts)

    def add_memory(self, path: str | Path, name: str | None = None) -> str:
        """Load one more memory from its folder, for this process only; `koff memory add` changes the artifact.

        Args:
            path: Folder of a memory that was made for this backbone.
            name: Domain to load it as; by default its own.

        Returns:
            The domain.

        Raises:
            KoffError: It belongs to another base, mask or tokenizer, is damaged, or the name is taken.
        """
        return load_memory(self.memories, Path(path).expanduser(), name, expect=self.manifest)

    def remove_memory(self, name: str) -> None:
        """Drop a loaded memory and free its tensors."""
        self._check_loaded([name])
        self.memories.remove(name)
        self._last = ()

    def active_parameters(self, domain: str | None = None) -> int:
        """Parameters in use for a row of this domain: the backbone's, tied embeddings once, and its memory's."""
        if domain is None:
            return self._own_parameters
        self._check_loaded([domain])
        return self._own_parameters + self.memories.size(domain)

    def _chosen(self, domains: Domains, input_ids: Tensor, mask: Tensor | None, cache: Any = None) -> list[str | None]:
        """The domain of each row; where "auto" is asked for, what the router picks from the row's text."""
        rows = len(input_ids)
        check_domains(domains, by_row=True)
        chosen = [domains] * rows if domains is None or isinstance(domains, str) else list(domains)
        if len(chosen) != rows:
            raise KoffError(f"{len(chosen)} domains for {rows} rows: give one per row, None for no memory")
        if AUTO in chosen and AUTO not in self.domains:  # a memory that is called so is older than the router
            if cache is not None and cache.get_seq_length():
                raise KoffError("a call that goes on from a token cache has no whole text to route: give model.route's")
            if mask is not None and mask.ndim != 2:
                raise KoffError("the router reads rows by a mask [rows, tokens]: give the domains, or such a mask")
            auto = [row for row, name in enumerate(chosen) if name == AUTO]
            real = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
            ids = [input_ids[row][real[row] > 0].tolist() for row in auto]
            picked = iter(self.route(self.tokenizer.batch_decode(ids, skip_special_tokens=True)))
            chosen = [next(picked) if name == AUTO else name for name in chosen]
        self._check_loaded(chosen)
        check_attention(self.backbone, any(self.memories.slots(d) is not None for d in {*chosen} - {None}))
        return chosen

    def _routes(self, chosen: Sequence[str | None], copies: int = 1) -> Routes:
        """The routes of a call. Recent ones for the same rows are used again, since they cache stacked tensors."""
        copied = [domain for domain in chosen for _ in range(copies)]
        known = [(rows, routes) for rows, routes in self._last if routes.valid]
        found = next((one for one in known if one[0] == copied), None) or (copied, self.memories.routes_of(copied))
        self._last = (found, *[one for one in known if one is not found])[:_CALLS]  # anew, for threads that read it
        return found[1]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an artifact of what is loaded: the backbone as it was read, and the memories that are here now.

        Args:
            folder: A new one.

        Raises:
            KoffError: The folder is taken, or what would be written is not what its manifest says: the backbone was
                changed or has another dtype than in the artifact, or the artifact is no longer the one that was loaded.
        """
        from koff_lightning.artifact.memories import save_artifact  # what is only used is loaded faster without

        save_artifact(self.backbone, self.memories, self.manifest, self.folder, Path(folder).expanduser())

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DecomposedModel":
        """For `to`, `half`, `cuda` and the like: all tensors move, but only the backbone's weights change their dtype.

        As after loading in that dtype, memories and the frequencies of the rotary embedding stay fp32.
        """
        self._last = ()  # cached tensors do not move along
        memories = [*self.memories.lora_parameters(), *self.memories.kv_parameters()]
        exact = {id(tensor) for tensor in (*self.buffers(), *memories, *(p.grad for p in memories))}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in exact and new.dtype != tensor.dtype else new

        return super()._apply(moved, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's. Drops cached tensors: with `assign=True` those of the model are replaced."""
        self._last = ()
        return super().load_state_dict(*args, **kwargs)

    def _check_loaded(self, domains: Sequence[str | None]) -> None:
        if missing := [name for name in domains if name is not None and name not in self.memories.domains]:
            raise KoffError(f"domain {missing[0]!r} is not loaded; loaded: {', '.join(self.domains) or 'none'}")

    def _option(self, options: dict[str, Any], name: str) -> Any:
        """An option of `generate` by transformers' precedence: given by name, in a config given, in the model's own."""
        sources = (options.get("generation_config"), self.backbone.generation_config)
        values = [options.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in values if value is not None), None)


def dense_of(model: DecomposedModel) -> PreTrainedModel:
    """The dense model that the artifact was cut from, where its backbone is and as exact.

    Raises:
        KoffError: It cannot be loaded, or is not what it was.
    """
    base = model.manifest.base
    dense = load_backbone(base["id"], revision=base.get("revision"), dtype=model.manifest.dtype)
    if fingerprint(dense) != base["hash"]:
        raise KoffError(f"{base['id']!r} is no longer the model that {model.folder} was cut from: its weights differ")
    dense.set_attn_implementation("koff")
    ask_nothing_(dense)
    for parameter in dense.parameters():  # the weights alone: rotary frequencies stay as exact as they are
        parameter.data = parameter.data.to(model.backbone.dtype)
    return dense.to(model.device)


def default_device(name: str | None) -> str:
    """The device named, else a GPU if there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
