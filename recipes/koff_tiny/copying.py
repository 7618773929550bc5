"""How far koff_cloze gets without a model: take the choice whose word stands in the context, else guess.

    python recipes/koff_tiny/copying.py

Figures: docs/results/tasks.md.
"""

import json
import lzma
from pathlib import Path

from build_tasks import DOMAINS, TAIL, Item, length

DATA = Path(__file__).resolve().parents[2] / "src/koff_lightning/tasks/data"


def items(domain: str) -> list[Item]:
    """The items of koff_cloze_<domain>."""
    with lzma.open(DATA / f"cloze_{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def standing(domain: str, item: Item) -> list[int]:
    """Places of the choices whose word, a choice without its tail, stands in the context."""
    tail = length(domain, TAIL)
    return [place for place, choice in enumerate(item["choices"]) if choice[:-tail] in item["context"]]


def accuracy(domain: str) -> float:
    """Expected share of right answers, of a guess among the choices that stand there or else among all."""
    found = items(domain)
    taken = [standing(domain, item) or range(len(item["choices"])) for item in found]
    return sum((item["answer"] in places) / len(places) for item, places in zip(found, taken, strict=True)) / len(found)


if __name__ == "__main__":
    print("domain  items  right word stands there  a wrong one  accuracy")
    for domain in DOMAINS:
        found = [(item["answer"], standing(domain, item)) for item in items(domain)]
        right = sum(answer in places for answer, places in found) / len(found)
        wrong = sum(bool({*places} - {answer}) for answer, places in found) / len(found)
        print(f"{domain:6}  {len(found):5}  {right:23.3f}  {wrong:11.3f}  {accuracy(domain):8.3f}")
