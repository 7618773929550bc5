"""`koff generate`: continue prompts with a domain's memory, in the terminal or beside the dense model."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koff_lightning.commands.parsing.counts import check_seed
from koff_lightning.support.errors import KoffError, require
from koff_lightning.support.names import AUTO
from koff_lightning.support.quick_imports import quick_imports
from koff_lightning.support.seeds import seed_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from koff_lightning.artifact.decomposed import DecomposedModel


def generate(
    *,
    model: str,
    prompt: list[str] | None = None,
    file: str | None = None,
    domain: list[str] | None = None,
    compare: Literal["dense"] | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float = 1.0,
    generation_config: Literal["none", "model"] = "none",
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Continue prompts with the memory of a domain.

    Args:
        model: Folder that `koff export` wrote, or org/name of one on the hub.
        prompt: Text to continue; may be given several times.
        file: File with one prompt per line, in place of --prompt.
        domain: Whose memory to use, `auto` for what the router picks: once for all prompts or once for each; without it
            the bare pruned backbone.
        compare: `dense` shows the dense model, the pruned one without memory and the one with it side by side.
        max_new_tokens: Most tokens to add.
        temperature: Temperature of sampling; 0, or nothing asked for, takes the most likely token each time.
        top_p: Sample from the likeliest tokens that together have this probability; used with --temperature.
        generation_config: `model` starts from what the model's generation_config.json says (temperature, penalties and
            so on); options given here go before it.
        seed: Seed of sampling.
        batch_size: Prompts that are continued at a time.
        device: Torch device; by default a GPU if there is one.
        dtype: Dtype of the backbone; by default as exported.
    """
    prompts = _prompts(prompt, file)
    options = sampling(max_new_tokens, temperature, top_p)
    domains = _per_prompt(domain, len(prompts))
    check_seed(seed)
    require(batch_size >= 1, f"batch_size must be at least 1; got {batch_size}")
    require(not compare or domain, "--compare shows what a memory changes: give its --domain")
    with quick_imports():
        from koff_lightning.artifact.decomposed import default_device, dense_of, load_decomposed

    decomposed = load_decomposed(model, default_device(device), dtype, domains=[*filter(None, dict.fromkeys(domains))])
    check_room(decomposed, prompts, max_new_tokens)
    domains = routed(decomposed, domains, prompts)
    options = asked(decomposed, options, generation_config)
    dense = dense_of(decomposed) if compare else None
    for start in range(0, len(prompts), batch_size):
        part, rows = prompts[start : start + batch_size], domains[start : start + batch_size]
        options["seed"] = seed_of(seed, start)  # by batch: the columns of a comparison draw alike
        if dense is not None:
            _side_by_side(decomposed, dense, part, rows, options)
        elif len(prompts) == 1 and domain != [AUTO] and not _beams(options):  # which are known at their end
            _stream(decomposed, part, rows, options)
        else:
            texts = _continue(decomposed.generate, decomposed.tokenizer, part, options | {"domains": rows})
            for name, before, after in zip(rows, part, texts, strict=True):
                print(f"[{name or 'no memory'}] {before}{after}\n")


def routed(model: "DecomposedModel", domains: list[str | None], prompts: list[str]) -> list[str | None]:
    """The domain of each prompt, the router's choice in the place of `auto`."""
    if AUTO not in domains or AUTO in model.domains:
        return domains
    auto = [prompt for name, prompt in zip(domains, prompts, strict=True) if name == AUTO]
    picked = iter(model.route(auto))
    return [next(picked) if name == AUTO else name for name in domains]


def check_room(model: "DecomposedModel", prompts: list[str], max_new_tokens: int) -> None:
    """Raise KoffError where a prompt and its continuation would be longer than what the model's positions are for."""
    from koff_lightning.data.encoding import encode_prompt

    room = model.backbone.config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        length = len(encode_prompt(model.tokenizer, prompt))
        if length + max_new_tokens > room:
            most = f"give --max_new_tokens {room - length} or less" if length < room else "give a shorter prompt"
            raise KoffError(
                f"prompt {number} has {length} tokens and {max_new_tokens} more are asked for, the model reads {room}: "
                f"{most}"
            )


def sampling(max_new_tokens: int, temperature: float | None, top_p: float) -> dict[str, Any]:
    """Checked options of transformers' `generate`; temperature None leaves it to the settings that they go before."""
    if max_new_tokens < 1:
        raise KoffError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if temperature is not None and temperature != 0 and not 1e-6 <= temperature < math.inf:  # lower ones overflow
        raise KoffError(f"temperature must be 0 (most likely token) or a number from 1e-6 on; got {temperature}")
    if not 0 < top_p <= 1:
        raise KoffError(f"top_p must lie in (0, 1]; got {top_p}")
    if top_p < 1 and not temperature:
        raise KoffError(f"top_p {top_p} is of sampling: give --temperature too (1.0, say), or leave it out")
    if temperature is None:
        return {"max_new_tokens": max_new_tokens}
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def asked(model: "DecomposedModel", options: dict[str, Any], start: str) -> dict[str, Any]:
    """Options of `generate` alone, or (`start` is "model") put over what the model's own settings say."""
    options = options | {"pad_token_id": model.tokenizer.pad_token_id}
    if start == "none":
        return options
    settings = copy.deepcopy(model.own_settings)
    if options.get("do_sample") is False:  # else transformers warns of what has no effect then
        settings.update(temperature=None, top_p=None, top_k=None)
    settings.update(**options, return_dict_in_generate=False)
    return {"generation_config": settings}


def _beams(options: dict[str, Any]) -> bool:
    """Whether the model's own settings ask for several beams; no option here does."""
    return getattr(options.get("generation_config"), "num_beams", None) not in (None, 1)


@contextmanager
def own_settings_told(options: dict[str, Any]) -> Iterator[None]:
    """Say in one line what transformers raises at settings that come with a model, from anyone.

    Args:
        options: As `asked` gives them.
    """
    try:
        yield
    except (KoffError, MemoryError):
        raise
    except Exception as error:  # values of other kinds, and ways of generating that take more than a model
        if "generation_config" not in options:
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise KoffError(
            f"the settings in the model's generation_config.json cannot be used ({said}): leave out "
            "--generation_config model"
        ) from error


def _prompts(prompt: list[str] | None, file: str | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise KoffError("generate: give either --prompt, as often as you like, or --file with one prompt per line")
    if file is None:
        return [_as_typed(text) for text in prompt]
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()  # Windows puts a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise KoffError(f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or error}") from error
    if prompts := [line for line in lines if line.strip()]:
        return prompts
    raise KoffError(f"{file} holds no prompt: write one per line")


def _as_typed(text: str) -> str:
    """A word of the command line in UTF-8 also where the locale has less, and Python holds its bytes as surrogates."""
    with suppress(UnicodeError):
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    return text


def _per_prompt(domain: list[str] | None, prompts: int) -> list[str | None]:
    domains = domain or [None]
    if len(domains) not in (1, prompts):
        raise KoffError(f"{len(domains)} domains for {prompts} prompts: give one for all or one for each")
    return domains * prompts if len(domains) == 1 else domains


def _continue(
    run: "Callable[..., Any]", tokenizer: "PreTrainedTokenizerBase", prompts: list[str], options: dict[str, Any]
) -> list[str]:
    """What `run`, a model's `generate`, adds to each prompt."""
    import torch

    from koff_lightning.data.encoding import encode_prompts

    ids, mask = encode_prompts(tokenizer, prompts)
    torch.manual_seed(options["seed"])
    given = {name: value for name, value in options.items() if name != "seed"}
    with own_settings_told(given):
        out = run(ids, attention_mask=mask, **given)  # [B, T + new]
    before = tokenizer.batch_decode(ids, skip_special_tokens=True)
    whole = tokenizer.batch_decode(out, skip_special_tokens=True)  # a tokenizer may drop a space that stands first
    return [text[len(start) :] for text, start in zip(whole, before, strict=True)]


def _stream(model: "DecomposedModel", prompts: list[str], domains: list[str | None], options: dict[str, Any]) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
    _continue(model.generate, model.tokenizer, prompts, options | {"domains": domains, "streamer": streamer})


def _side_by_side(
    model: "DecomposedModel",
    dense: "PreTrainedModel",
    prompts: list[str],
    domains: list[str | None],
    options: dict[str, Any],
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = {"dense": _continue(dense.generate, model.tokenizer, prompts, options)}
    if not model.manifest.form.folds:  # there the memory is part of the backbone
        bare = options | {"domains": None}
        columns["pruned, no memory"] = _continue(model.generate, model.tokenizer, prompts, bare)
    with_memory = options | {"domains": domains}
    columns["KOFF"] = _continue(model.generate, model.tokenizer, prompts, with_memory)
    for row, (before, domain) in enumerate(zip(prompts, domains, strict=True)):
        table = Table(title=Text(f"[{domain}] {before}"), title_justify="left", expand=True)
        for name in columns:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(texts[row]) for texts in columns.values()))
        Console(force_jupyter=False).print(table)
