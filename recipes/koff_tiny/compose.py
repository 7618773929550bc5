"""Measure composed memories: held-out text of two domains under no memory, each one's own, and the two made into one.

    python recipes/koff_tiny/compose.py runs/demo/artifact de fr

Scores only; nothing is written into the artifact.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from koff_lightning import load_decomposed
from koff_lightning.artifact.compose import compose
from koff_lightning.artifact.decomposed import DecomposedModel
from koff_lightning.data import DomainDataModule
from koff_lightning.metrics import BitsPerByte

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"


@torch.inference_mode()
def bits(model: DecomposedModel, batches: list[dict], memory: str | None) -> float:
    """Bits per byte of held-out batches under one memory for all rows."""
    metric = BitsPerByte()
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        logits = model(**inputs, domains=memory).logits[:, :-1]  # [B, T-1, V]
        nats = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum", ignore_index=-100)
        metric.update(nats, batch["num_bytes"])
    return float(metric.compute())


def rows(model: DecomposedModel, a: str, b: str, size: int) -> Iterator[list[str]]:
    """A row of the table for each of the two texts."""
    data = DomainDataModule({d: f"bundled:{d}" for d in (a, b)}, str(model.folder / "backbone"), max_heldout_bytes=size)
    data.setup()
    for domain, other in ((a, b), (b, a)):
        batches = [batch for batch in data.test_dataloader() if domain in batch["domains"]]
        figures = [bits(model, batches, memory) for memory in (None, domain, other, "composed")]
        yield [domain, *(f"{figure:.4f}" for figure in figures)]


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--max-heldout-bytes", type=int, default=60_000)
    options = parser.parse_args()
    model = load_decomposed(options.artifact, domains=[options.a, options.b])
    compose(model.memories, options.a, options.b, "composed")
    head = ["text", "no memory", "own", "the other's", "composed"]
    table = [head, ["---"] * len(head), *rows(model, options.a, options.b, options.max_heldout_bytes)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    command = f"python recipes/koff_tiny/compose.py {options.artifact} {options.a} {options.b}"
    text = (
        f"# Composed memories\n\nCommand: `{command}`\n\nBits per byte of held-out text; weights 0.5, 0.5.\n\n{text}\n"
    )
    print(text)
    (DOCS / "compose.md").write_text(text)


if __name__ == "__main__":
    main()
