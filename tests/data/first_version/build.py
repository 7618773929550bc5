"""What the commands in README.md start from (`start`), and what their results compute (`finish`)."""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from koff_lightning import load_decomposed

HERE = Path(__file__).parent
PROMPT = "At noon the wind"
NEW = 12  # tokens of a greedy continuation
DOMAINS = {  # sentences: one of each list, in order
    "weather": (
        ["At dawn", "By noon", "After dark", "On Friday", "Next week", "All morning", "In März"],
        ["the wind", "a cold front", "light rain", "thick fog", "the high tide", "das Gewitter", "fresh snow"],
        ["moves over", "settles on", "leaves", "slows above", "hides", "reaches", "passes by"],
        ["the harbour", "the northern hills", "the old bridge", "the islands", "Köln", "the east coast", "the valley"],
        ["and the air clears.", "while gulls wait.", "at 12 degrees.", "before the ferry sails.", "for 3 hours."],
    ),
    "kitchen": (
        ["First", "Meanwhile", "Then", "Slowly", "At last", "For the sauce", "Zum Schluss"],
        ["chop", "fry", "stir in", "weigh", "rinse", "fold in", "roast"],
        ["two onions", "200 g of flour", "the lentils", "a pinch of salt", "three eggs", "die Äpfel", "some butter"],
        ["in a wide pan", "with cold water", "under a cloth", "on low heat", "in the oven", "by hand", "off the stove"],
        ["until golden.", "for 20 minutes.", "and taste.", "before it boils.", "then serve warm."],
    ),
}


def start() -> None:
    """Write `text/` and `backbone/`."""
    random.seed(0)
    texts = {
        name: [" ".join(_sentence(p) for _ in range(random.randint(2, 5))) for _ in range(80)]
        for name, p in DOMAINS.items()
    }
    for name, documents in texts.items():
        lines = [json.dumps({"id": f"{name}-{i}", "text": t}, ensure_ascii=False) for i, t in enumerate(documents)]
        path = HERE / "text" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _tokenizer([text for documents in texts.values() for text in documents])
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.15, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(HERE / "backbone")


def finish() -> None:
    """Write `logits.safetensors` and `greedy.json`: what `run/artifact/` computes."""
    model = load_decomposed(HERE / "run" / "artifact")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    logits, greedy = {}, {}
    for domain in (*DOMAINS, None):
        with torch.no_grad():
            logits[domain or "off"] = model(ids, domains=domain).logits[0].contiguous()  # [T, V]
        made = model.generate(ids, domains=domain, max_new_tokens=NEW, do_sample=False)
        greedy[domain or "off"] = made[0].tolist()
    save_file(logits, HERE / "logits.safetensors")
    found = {"prompt": PROMPT, "input_ids": ids[0].tolist(), "greedy": greedy}
    (HERE / "greedy.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def _sentence(parts: tuple[list[str], ...]) -> str:
    return " ".join(random.choice(part) for part in parts)


def _tokenizer(texts: list[str]) -> None:
    """A byte-level BPE of 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(HERE / "backbone")


if __name__ == "__main__":
    {"start": start, "finish": finish}[sys.argv[1]]()
