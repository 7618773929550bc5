"""Toy text and a toy tokenizer for the tests of `data`: no model, no download."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "während",
    "größere",
    "Füchse",
    "schlafen",
    "и",
    "кошки",
    "狐狸",
    "跳过",
]


def toy_documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 3 to `longest` words, no two alike."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document per line; ids are numbers, so they split the same way in every file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"doc-{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def toy_tokenizer(folder: Path, *, bos: bool = True) -> str:
    """Save a byte-level BPE of about 300 tokens in a folder that passes for a Llama's; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(toy_documents(50), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)
