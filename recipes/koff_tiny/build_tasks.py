"""Make the offline multiple-choice tasks from the bundled held-out text.

    python recipes/koff_tiny/build_tasks.py [--out src/koff_lightning/tasks/data]

Only the first three quarters of each domain's held-out documents are used; the rest is for development. There is no
chance in it: what looks like a draw is the order of a SHA-256 of the item's name, so that every machine makes the same
files.

continuation
    A document is cut into passages of CONTEXT + CONTINUATION characters that do not overlap and start at a word (in zh
    at a character, in python at a line); at most PER_DOCUMENT of them are asked. The last CONTINUATION characters are
    the right answer; the cut is moved back to a space (in python to the end of a line), which then belongs to the
    answer. The three wrong ones are those of passages of other documents of the domain, equally long.
cloze
    In a passage one word is blank. The choices are this word and three others, each followed by the TAIL characters
    that stand after the blank. The others are the words of the domain's training text that are closest to it in
    frequency among those of equal length (in characters) that do not stand in the passage. A word has at least four
    letters and occurs at least five times there; in zh it is two to four Chinese characters that no others touch, in
    python an identifier that is no keyword.

Frequency and length are matched so that neither tells the answer, nor does the number of tokens: random weights prefer
texts of few tokens, and Chinese spans cut out of running text would give the right one away by this alone.
"""

import argparse
import hashlib
import json
import keyword
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
CORPORA = Path(__file__).resolve().parents[2] / "src/koff_lightning/tiny/corpora"
USED = 0.75  # share of the held-out documents
ITEMS = 120  # at most, per task
CONTEXT, CONTINUATION, TAIL = 240, 80, 24  # characters; a third of it in zh, whose characters say more
PER_DOCUMENT = {"zh": 8, "python": 24}  # passages; elsewhere 4. These have fewer documents or fewer words
LETTERS = r"\b[^\W\d_]{4,}\b"
WORD = {"zh": r"(?<![\u4e00-\u9fff])[\u4e00-\u9fff]{2,4}(?![\u4e00-\u9fff])", "python": r"[A-Za-z_][A-Za-z0-9_]{3,}"}
Item = dict[str, object]


def draw(*name: object) -> str:
    """A key to sort by that looks random and is the same everywhere."""
    return hashlib.sha256("\x00".join(map(str, name)).encode()).hexdigest()


def read(domain: str, split: str) -> list[dict[str, str]]:
    """The bundled documents; of the held-out ones the first three quarters."""
    with lzma.open(CORPORA / f"{domain}.{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return rows[: int(USED * len(rows))] if split == "heldout" else rows


def length(domain: str, characters: int) -> int:
    """So many characters, or what says about as much in Chinese."""
    return characters // 3 if domain == "zh" else characters


def passages(domain: str, size: int, per_document: int) -> Iterator[tuple[str, int, str]]:
    """(document, place, text) of passages of `size` characters that do not overlap."""
    starts = {"zh": r".", "python": r"(?m)^(?=.)"}.get(domain, r"(?<=\s)(?=\S)")
    for document in read(domain, "heldout"):
        text, place, found = document["text"], 0, []
        for match in re.finditer(starts, text):
            if match.start() >= place and match.start() + size <= len(text):
                found.append((document["id"], match.start(), text[match.start() : match.start() + size]))
                place = match.start() + size
        yield from sorted(found, key=lambda part: draw(domain, *part[:2]))[:per_document]


def choose(name: str, right: str, wrong: list[str], context: str) -> Item:
    """An item whose right answer stands at a place that its name decides."""
    place = int(draw("place", name), 16) % 4
    return {"id": name, "context": context, "choices": [*wrong[:place], right, *wrong[place:]], "answer": place}


def continuation(domain: str) -> list[Item]:
    """Items of koff_continuation_<domain>."""
    before, after = length(domain, CONTEXT), length(domain, CONTINUATION)
    found = list(passages(domain, before + after, PER_DOCUMENT.get(domain, 4)))
    items = []
    for document, place, text in found:
        name = f"{document}:{place}"
        cut = _cut(domain, text, before)
        others = sorted((part for part in found if part[0] != document), key=lambda part: draw(name, *part[:2]))
        wrong = [_cut_text(domain, part[2], before, after) for part in others[:3]]
        items.append(choose(name, text[cut : cut + after], wrong, text[:cut]))
    return first(domain, items)


def _cut(domain: str, text: str, before: int) -> int:
    """Where a passage's continuation starts: at the space or line before the cut."""
    if domain == "zh":
        return before
    return max(text.rfind("\n" if domain == "python" else " ", 0, before), before // 2)


def _cut_text(domain: str, text: str, before: int, after: int) -> str:
    cut = _cut(domain, text, before)
    return text[cut : cut + after]


def cloze(domain: str) -> list[Item]:
    """Items of koff_cloze_<domain>."""
    counts = Counter(word for row in read(domain, "train") for word in words(domain, row["text"]))
    known = {word: count for word, count in counts.items() if count >= 5 and not keyword.iskeyword(word)}
    before, tail = length(domain, CONTEXT), length(domain, TAIL)
    items = []
    for document, place, text in passages(domain, before + tail + 24, PER_DOCUMENT.get(domain, 4)):
        spans = [
            match
            for match in re.finditer(WORD.get(domain, LETTERS), text)
            if match[0] in known and match.start() >= before // 2 and match.end() + tail <= len(text)
        ]
        name = f"{document}:{place}"
        for span in sorted(spans, key=lambda match: draw(name, match.start()))[:1]:
            word, rest = span[0], text[span.end() : span.end() + tail]
            near = sorted(
                (other for other in known if len(other) == len(word) and other not in text),
                key=lambda other: (abs(known[other] - known[word]), draw(name, other)),
            )
            if len(near) >= 3:
                items.append(choose(name, word + rest, [other + rest for other in near[:3]], text[: span.start()]))
    return first(domain, items)


def words(domain: str, text: str) -> list[str]:
    """The words of a text."""
    return re.findall(WORD.get(domain, LETTERS), text)


def first(domain: str, items: list[Item]) -> list[Item]:
    """At most ITEMS of them."""
    return sorted(items, key=lambda item: draw(domain, item["id"]))[:ITEMS]


def build(out: Path) -> None:
    """Write `<suite>_<domain>.jsonl.xz`."""
    out.mkdir(parents=True, exist_ok=True)
    for make in (continuation, cloze):
        for domain in DOMAINS:
            items = make(domain)
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (out / f"{make.__name__}_{domain}.jsonl.xz").write_bytes(lzma.compress(text.encode(), preset=9))
            print(f"{make.__name__:13}{domain:7}{len(items):4} items")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("src/koff_lightning/tasks/data"))
    build(parser.parse_args().out)
