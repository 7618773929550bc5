"""`koff chat`: talk to an exported chat model; a memory is changed between two questions at no cost."""

import copy
from typing import TYPE_CHECKING, Any, Literal

from koff_lightning.commands.generate import asked, own_settings_told, sampling
from koff_lightning.commands.parsing.counts import check_seed
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO
from koff_lightning.support.quick_imports import quick_imports

if TYPE_CHECKING:
    from torch import Tensor

    from koff_lightning.artifact.decomposed import DecomposedModel

HELP = (
    "/domain NAME changes the memory, /domain auto lets the router pick, /domain alone uses none, /clear forgets the "
    "talk, /help says this, /exit ends"
)


def chat(
    *,
    model: str,
    domain: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float = 1.0,
    generation_config: Literal["none", "model"] = "none",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Talk to an exported chat model.

    Args:
        model: Folder that `koff export` wrote, or org/name of one on the hub.
        domain: Whose memory to begin with, `auto` for what the router picks from each question and those before it;
            without it the bare pruned backbone.
        system: Instruction that stands before the talk.
        max_new_tokens: Most tokens of an answer.
        temperature: Temperature of sampling; 0, or nothing asked for, takes the most likely token each time.
        top_p: Sample from the likeliest tokens that together have this probability; used with --temperature.
        generation_config: `model` starts from what the model's generation_config.json says (temperature, penalties and
            so on); options given here go before it.
        seed: Seed of sampling.
        device: Torch device; by default a GPU if there is one.
        dtype: Dtype of the backbone; by default as exported.
    """
    check_seed(seed)
    options = sampling(max_new_tokens, temperature, top_p)
    with quick_imports():
        import torch

        from koff_lightning.artifact.decomposed import default_device, load_decomposed

    decomposed = load_decomposed(model, default_device(device), dtype, AUTO if domain == AUTO else None)
    if not decomposed.tokenizer.chat_template:
        raise KoffError(
            f"the tokenizer of {model} has no chat template, so this is no chat model: "
            f"koff generate --model {model} --prompt '...' continues text"
        )
    if domain not in (None, AUTO):
        decomposed.manifest.refuse_others([domain], model)
    opening = [{"role": "system", "content": system}] if system else []
    _check_template(decomposed.tokenizer, opening)
    options = asked(decomposed, options, generation_config)
    torch.manual_seed(seed)
    _talk(decomposed, domain, opening, options)


def _check_template(tokenizer: Any, opening: list[dict[str, str]]) -> None:
    """Write the beginning of a talk, before anybody types.

    Raises:
        KoffError: The template does not take it.
    """
    from koff_lightning.data.rendering import render, writing

    try:
        with writing():
            render(tokenizer, [*opening, {"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except KoffError as error:
        raise KoffError(f"{'--system: ' if opening else ''}{error}") from error


def _talk(model: "DecomposedModel", domain: str | None, opening: list[dict[str, str]], options: dict[str, Any]) -> None:
    from koff_lightning.data.messages import last_questions_first

    about = f"domains: {', '.join(model.domains) or 'none'}. {HELP}"
    print(about)
    messages = list(opening)
    while True:
        try:
            line = input(f"{domain or 'no memory'}> ").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return
        if word == "/clear":
            messages = list(opening)
        elif word == "/help":
            print(about)
        elif word == "/domain" and rest.strip() in ("", *model.domains):
            domain = rest.strip() or None
        elif word == "/domain" and rest.strip() == AUTO:
            domain = AUTO if _can_route(model) else domain
        elif line.startswith("/"):
            print(f"not understood: {line}; {about}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                ids, within = _written(model, messages, options)
            except _TooLong as error:
                print(error)
                messages.pop()
                continue
            memory = domain
            if domain == AUTO and AUTO not in model.domains:
                memory = model.route([last_questions_first(messages)])[0]
                print(f"[{memory or 'no memory'}]")
            messages.append({"role": "assistant", "content": _answer(model, memory, ids, within)})


def _can_route(model: "DecomposedModel") -> bool:
    """Whether there is a router for these memories; what is wrong is said, and the talk goes on."""
    try:
        model.route([])
    except KoffError as error:
        print(error)
        return False
    return True


class _TooLong(KoffError):
    """A talk that the model has no positions for; a shorter one may go on."""


def _written(
    model: "DecomposedModel", messages: list[dict[str, str]], options: dict[str, Any]
) -> tuple["Tensor", dict[str, Any]]:
    """A talk as token ids [1, T], and the options with no more tokens than what the model reads leaves room for.

    Raises:
        _TooLong: It leaves none.
    """
    import torch

    from koff_lightning.data.encoding import encode
    from koff_lightning.data.rendering import render, writing

    with writing():
        written = render(model.tokenizer, messages, add_generation_prompt=True)
    ids = encode(model.tokenizer, written, add_special_tokens=False)["input_ids"]
    room = model.backbone.config.max_position_embeddings - len(ids)
    if room < 1:
        raise _TooLong(
            f"the talk would have {len(ids)} tokens with this, the model reads {room + len(ids)} with its answer: "
            "/clear forgets the talk, or say less"
        )
    settings = options.get("generation_config")
    if settings is None:
        within = options | {"max_new_tokens": min(room, options["max_new_tokens"])}
    else:
        within = {"generation_config": copy.deepcopy(settings)}
        within["generation_config"].max_new_tokens = min(room, settings.max_new_tokens)
    return torch.tensor([ids]), within


def _answer(model: "DecomposedModel", domain: str | None, ids: "Tensor", options: dict[str, Any]) -> str:
    """Stream the answer to the terminal and return it."""
    import torch
    from transformers import TextStreamer

    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with own_settings_told(options):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), domains=domain, streamer=streamer, **options)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
