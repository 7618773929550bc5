"""Small models in which it is known what every FFN neuron is for, to test whether an analysis finds it.

A token is a place j of J in a domain k of D. Its embedding has a part for k and a part for j; attention is zero, so the
next token depends on this one alone. A general neuron fires at half of the places, in all domains; a specialist does so
in one domain only. Each adds its own random preference for the next place, and the model's text is drawn from the model
itself. Specialists speak `emphasis` times as loud as would make them matter, over all domains, as much as the general
ones: from 1 on a pruner without memories has no reason to prefer them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from koff_lightning.backbone import PrunableGroup, prunable_groups
from koff_lightning.support.errors import KoffError

SHARP = 1.2  # size of a gate's weights; a hidden state of the first layer is scaled up by about 3.5
LOUDNESS = 0.0075  # of all general neurons of a layer together, so that they stay quieter than the embedding
SPREAD = 0.5  # of the logarithm of a neuron's loudness: within a class, neurons differ in importance
STAY, SPEAK = 8.0, 4.0  # weights of the head on the domain (no text leaves its own) and on the next place
BOS, EOS = 0, 1


@dataclass(frozen=True)
class Planted:
    """A planted model on disk, and what is true of it.

    Attributes:
        folder: Holds `backbone/` (model and tokenizer) and the text, `<domain>.jsonl`.
        domains: Names of the D domains.
        layer: Layer of each neuron, [N].
        serves: Which domains each neuron serves, bool [N, D]: one, or all.
    """

    folder: Path
    domains: list[str]
    layer: NDArray[np.int64]
    serves: NDArray[np.bool_]

    @property
    def specialists(self) -> NDArray[np.bool_]:
        """Neurons that serve one domain only, bool [N]."""
        return self.serves.sum(1) == 1

    @property
    def backbone(self) -> str:
        """Where the model is."""
        return str(self.folder / "backbone")

    @property
    def sources(self) -> dict[str, str]:
        """Domain -> file of its text."""
        return {name: str(self.folder / f"{name}.jsonl") for name in self.domains}


def plant(
    folder: str | Path,
    domains: Sequence[str] = ("a", "b", "c", "d", "e", "f"),
    *,
    layers: int = 2,
    general: int = 48,
    special: int = 8,
    places: int = 24,
    emphasis: float = 1.3,
    documents: int = 150,
    words: int = 64,
    seed: int = 0,
) -> Planted:
    """Write a planted model and text of its domains.

    Args:
        folder: Where to; a new or empty one.
        domains: Names of the D domains.
        layers: Layers of the model.
        general: Neurons per layer that serve all domains.
        special: Neurons per layer and domain that serve it alone.
        places: Tokens per domain, J.
        emphasis: Loudness of specialists over the one at which they matter as much as general neurons.
        documents: Texts per domain.
        words: Tokens per text.
        seed: Of everything.

    Raises:
        KoffError: The folder holds something.
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise KoffError(f"{folder} is not empty: remove what is in it, or give another folder")
    random = torch.Generator().manual_seed(seed)
    count = len(domains)
    serves = torch.zeros(general + special * count, count, dtype=torch.bool)  # of one layer
    serves[:general] = True
    serves[general:] = torch.eye(count, dtype=torch.bool).repeat_interleave(special, 0)
    serves = torch.stack([serves[torch.randperm(len(serves), generator=random)] for _ in range(layers)])
    model = _model(count, places, layers, serves.shape[1])
    with torch.no_grad():
        _write_tokens(model, count, places)
        for group, part in zip(prunable_groups(model, ["channel"]), serves, strict=True):
            _write_neurons(model, group, part, emphasis, random)
    _save(model, folder / "backbone", domains, places)
    for place, name in enumerate(domains):
        texts = _texts(model, place, places, (documents, words), name, random)
        lines = [json.dumps({"id": f"{name}-{number}", "text": text}) for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    layer = np.repeat(np.arange(layers), serves.shape[1])
    return Planted(folder, list(domains), layer, serves.flatten(0, 1).numpy())


def _model(domains: int, places: int, layers: int, width: int) -> LlamaForCausalLM:
    """All zeros but the norms. Hidden state: 1 constant, D for the domain, J for the place, J for the next place."""
    hidden = 1 + domains + 2 * places
    config = LlamaConfig(
        vocab_size=2 + domains * places,
        hidden_size=hidden + hidden % 2,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.zero_()
    return model


def _write_tokens(model: LlamaForCausalLM, domains: int, places: int) -> None:
    """Embeddings that tell domain and place, and a head that stays in the domain and takes the place it is told."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # each [V, d]
    embedding[:, 0] = 1.0
    for token in range(domains * places):
        domain, place = 1 + token // places, 1 + domains + token % places
        embedding[2 + token, [domain, place]] = 1.0
        head[2 + token, domain], head[2 + token, place + places] = STAY, SPEAK
    head[:2, 0] = -STAY  # neither BOS nor EOS


def _write_neurons(
    model: LlamaForCausalLM, group: PrunableGroup, serves: Tensor, emphasis: float, random: torch.Generator
) -> None:
    """Fill one layer: the gate asks for a half of the places, and for the domain if there is one only.

    The constant part makes the threshold. `serves` is bool [I, D].
    """
    gate, up = (model.get_submodule(path).weight for path, _ in group.producers)  # each [I, d]
    down = model.get_submodule(group.consumer).weight  # [d, I]
    width, domains = serves.shape
    first = 1 + domains  # of the places
    places = (len(down) - first) // 2
    half = torch.rand(width, places, generator=random).argsort(1) < places // 2  # bool [I, J], exactly half of them
    special = serves.sum(1) == 1
    gate[:, 0] = -1.0 - 2.0 * special
    gate[:, 1:first] = 2.0 * (serves & special[:, None])
    gate[:, first : first + places] = 2.0 * half
    gate *= SHARP
    up[:, 0] = 1.0
    loudness = LOUDNESS * torch.exp(SPREAD * torch.randn(width, generator=random)) / (~special).sum().sqrt()
    loudness *= torch.where(special, emphasis * domains**0.5, 1.0)  # firing in one of D domains, its square counts 1/D
    down[first + places : first + 2 * places] = torch.randn(places, width, generator=random) * loudness


def _save(model: LlamaForCausalLM, folder: Path, domains: Sequence[str], places: int) -> None:
    """The model, and a tokenizer whose words are domain and place: a0, a1, ..."""
    words = ["<bos>", "<eos>", *(f"{name}{place}" for name in domains for place in range(places))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)


@torch.no_grad()
def _texts(
    model: LlamaForCausalLM, domain: int, places: int, size: tuple[int, int], name: str, random: torch.Generator
) -> list[str]:
    """Texts of one domain, as many and as long as `size` says, drawn from the model."""
    count, words = size
    own = torch.arange(places) + 2 + domain * places
    chances = model(own[:, None]).logits[:, 0, own].softmax(-1)  # [J, J]: of the next place, in this domain
    drawn = [torch.randint(places, (count,), generator=random)]
    for _ in range(words - 1):
        drawn.append(torch.multinomial(chances[drawn[-1]], 1, generator=random)[:, 0])
    return [" ".join(f"{name}{place}" for place in text) for text in torch.stack(drawn, 1).tolist()]
