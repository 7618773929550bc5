"""Rebuild the bundled corpora from the original JSON-lines files.

    python recipes/koff_tiny/build_corpora.py FOLDER [--out src/koff_lightning/tiny/corpora]

FOLDER holds one ``{"text", "id", "source"}`` object per line in

    lo_en lo_de lo_fr lo_es lo_ru lo_zh (.jsonl)
        The LibreOffice help pages, version 7.4.7, as packaged by Debian in
        libreoffice-help-{en-us,de,fr,es,ru,zh-cn}.  Pages are parallel: one id
        is the same page in every language.  Program code and paragraphs left
        in English were dropped.                               Licence: MPL-2.0
    code_python.jsonl
        The Python 3.11.2 standard library as packaged by Debian in
        libpython3.11-stdlib and libpython3.11-minimal.        Licence: PSF-2.0

For every domain this writes ``<domain>.train.jsonl.xz`` and
``<domain>.heldout.jsonl.xz``.  The split looks at the document id only, so a
page held out in one language is held out in all of them: a model that has seen
the German page cannot have an easier time with the French one.
"""

import argparse
import hashlib
import json
import lzma
from pathlib import Path

# domain name in the package -> name of the original file
DOMAINS = {
    "en": "lo_en",
    "de": "lo_de",
    "fr": "lo_fr",
    "es": "lo_es",
    "ru": "lo_ru",
    "zh": "lo_zh",
    "python": "code_python",
}
HELDOUT_FRACTION = 0.05


def is_heldout(doc_id: str, fraction: float = HELDOUT_FRACTION) -> bool:
    """Same rule as ``koff_lightning.data.sources.is_heldout`` (kept inline so that
    this script runs without the package)."""
    return int(hashlib.sha256(doc_id.encode()).hexdigest()[:8], 16) / 2**32 < fraction


def build(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for domain, name in DOMAINS.items():
        with open(folder / f"{name}.jsonl", encoding="utf-8") as lines:
            docs = [json.loads(line) for line in lines]
        heldout = [d for d in docs if is_heldout(d["id"])]
        # A train document whose exact text is also held out would leak: drop it.
        held_texts = {d["text"] for d in heldout}
        train = [d for d in docs if not is_heldout(d["id"]) and d["text"] not in held_texts]
        for split, part in (("train", train), ("heldout", heldout)):
            rows = (json.dumps({k: d[k] for k in ("text", "id", "source")}, ensure_ascii=False) for d in part)
            raw = ("\n".join(rows) + "\n").encode("utf-8")
            packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
            (out / f"{domain}.{split}.jsonl.xz").write_bytes(packed)
            total += len(packed)
            text_bytes = sum(len(d["text"].encode("utf-8")) for d in part)
            print(
                f"{domain:7s} {split:8s} {len(part):5d} docs {text_bytes:9,d} text bytes {len(packed):9,d} bytes packed"
            )
        leaked = len(docs) - len(heldout) - len(train)
        if leaked:
            print(f"{domain:7s} dropped  {leaked:5d} train docs equal to a held-out one")
    print(f"total {total:,d} bytes packed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the original .jsonl files")
    parser.add_argument("--out", type=Path, default=Path("src/koff_lightning/tiny/corpora"))
    args = parser.parse_args()
    build(args.folder, args.out)
