"""Corpora, spoilt: cut lines and files, bytes that are no UTF-8, huge lines, nested JSON, NULs, copies, wrong suffixes.

A run is correct if it took the documents that are there, no more and no less. What is there is found by a reader of a
few lines that knows nothing of ours: it decompresses strictly, decodes strictly, and takes what is text. Then exit
status 0 must come with just these documents on each side of the split; and a refusal must have a reason in the file.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from fuzz import Case, Outcome

from koff_lightning.data.readers import Fields, read_records
from koff_lightning.data.sources import bundled_file
from koff_lightning.loading import load_tokenizer

DOCUMENTS = 60
FRACTION = 0.2  # held out
SCORED = 100  # batches of held-out text; only huge lines have more
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
UNPACK = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}
TOO_LITTLE = (  # refusals of text that is sound, but not enough for this run
    "has no training text",
    "has no held-out text",
    "is empty",
    "document is two tokens or longer",
    "too short for a memory",
    "too little training text",
    "training text that could be used",
    "held-out text that could be used",
)


def maker(backbone: str) -> Callable[[int, int], Case]:
    """What makes case number n of a seed."""
    tokenizer = load_tokenizer(backbone)
    source = read_records(bundled_file("de", "train"), Fields(), print)
    texts = [document.text[:300] for (_, document), _ in zip(source, range(DOCUMENTS), strict=False)]

    def make(seed: int, number: int) -> Case:
        rng = random.Random(f"{seed} {number} corpora")
        kind, pack = rng.choice((".jsonl", ".jsonl", ".jsonl", ".csv", ".parquet", ".txt")), rng.choice(list(PACK))
        pack = "" if kind == ".parquet" else pack
        name, done = f"corpus{kind}{pack}", [kind + pack]
        content = BUILD[kind](texts, rng)
        for _ in range(rng.choice((1, 1, 2, 3))):
            content, what = rng.choice(RECORDS if kind == ".jsonl" else BYTES)(content, rng)
            done.append(what)
        content = PACK[pack](content)
        if rng.random() < 0.25:
            content, what = rng.choice(FILES)(content, rng)
            done.append(what)
        skip = rng.random() < 0.5
        streams = kind == ".jsonl" and rng.random() < 0.2
        config = _config(backbone, name, skip, streams)
        truth = {"tokenizer": tokenizer, "skip": skip, "streams": streams, "found": _documents(content, kind, pack)}
        done += ["bad lines are left out"] * skip + ["streamed"] * streams
        return Case(number, ", ".join(done), {"run.yaml": config, name: content}, truth)

    return make


def _config(backbone: str, name: str, skip: bool, streams: bool) -> bytes:
    data = {"seq_len": 32, "batch_size": 4, "heldout_fraction": FRACTION, "on_bad_line": "skip" if skip else "fail"}
    data |= {"domains": {"mine": name}, "streaming": streams, "max_heldout_bytes": 10**9 if streams else None}
    options = {
        "model": {"backbone": backbone, "sparsity": {"min_channels": 8}, "kv": {"slots": 2}, "lora": {"rank": 2}},
        "data": data,
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
        | {"limit_test_batches": SCORED},
        "export": {"enabled": False},
    }
    return yaml.safe_dump(options).encode()


def unending(case: Case) -> bool:
    """None is."""
    return False


def unjust(case: Case, outcome: Outcome) -> str:
    """A refusal needs a line or file that cannot be used, or too little text."""
    found = case.truth["found"]
    if found is None or (found[1] and not case.truth["skip"]):
        return ""
    if case.what.startswith(".csv") and "new-line character seen in unquoted field" in outcome.said:
        return ""  # rows that end as they did on old machines
    if any(reason in outcome.said for reason in TOO_LITTLE):
        train, heldout = _sides(found[0], case.truth["tokenizer"])
        enough = min(len(train), len(heldout)) > 2 and sum(map(len, train)) > 500
        return f"{len(train)} and {len(heldout)} documents are enough" if enough else ""
    return f"{len(found[0])} sound documents"


def wrong(case: Case, outcome: Outcome) -> str:
    """What is wrong with a run that ended well."""
    found = case.truth["found"]
    if found is None:
        return "ran on a file that cannot be read"
    if found[1] and not case.truth["skip"]:
        return f"ran in spite of {found[1]} lines that cannot be used"
    if outcome.results is None or outcome.texts is None:
        return "no results"
    sides = _sides(found[0], case.truth["tokenizer"])
    want = [number for side in sides for number in (len(side), sum(len(text.encode()) for text in side))]
    got = outcome.texts["mine"]
    if case.truth["streams"]:  # the training text is a sample of the head
        want, got = want[2:], got[2:]
    if got != want:
        return f"took documents and bytes {got} instead of {want}"
    scored, size = outcome.results["heldout_bytes"]["mine"], want[-1]
    if scored != size and not (size > SCORED * 128 and 0 < scored < size):
        return f"scored {scored} bytes of {size}"
    if found[1] and f"left out {found[1]} line(s)" not in outcome.said and not case.truth["streams"]:
        return f"does not say that {found[1]} lines were left out"
    return ""


# ---------------------------------------------------------------------------------- what is there, independently


def _documents(content: bytes, kind: str, pack: str) -> tuple[list[tuple[str, str]], int] | None:
    """(id, text) of the documents, and how many lines cannot be used; None if the file cannot be read."""
    try:
        plain = UNPACK[pack](content)
        return READ[kind](plain)
    except Exception:
        return None


def _jsonl(plain: bytes) -> tuple[list[tuple[str, str]], int]:
    found, bad = [], 0
    for number, line in enumerate(plain.split(b"\n")):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if not line.strip(b" \t\n\r\x0b\x0c"):
            continue
        try:
            record = json.loads(line.decode())
            text, key = record["text"], record.get("id")
            text.encode()
            key = text if key is None else str(key)
            key.encode()
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            bad += 1
        else:
            found += [(key, text)] if text else []
    return found, bad


def _csv(plain: bytes) -> tuple[list[tuple[str, str]], int]:
    csv.field_size_limit(2**31 - 1)
    text = plain.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    found, bad = [], 0
    if rows.fieldnames is not None and "text" not in rows.fieldnames:
        raise ValueError
    for row in rows:
        try:
            value, key = row["text"], row.get("id")
            value.encode()
            key = value if key is None else str(key)
            key.encode()
        except (UnicodeError, AttributeError):
            bad += 1
        else:
            found += [(key, value)] if value else []
    return found, bad


def _txt(plain: bytes) -> tuple[list[tuple[str, str]], int]:
    try:
        text = plain.decode("utf-8-sig")
    except UnicodeDecodeError:
        return [], 1
    return [(text, text)] if text else [], 0


def _parquet(plain: bytes) -> tuple[list[tuple[str, str]], int]:
    rows = pyarrow.parquet.read_table(io.BytesIO(plain)).to_pylist()
    good = [row for row in rows if isinstance(row["text"], str)]
    keys = [row["text"] if row["id"] is None else str(row["id"]) for row in good]
    return [(k, row["text"]) for k, row in zip(keys, good, strict=True) if row["text"]], len(rows) - len(good)


def _sides(found: list[tuple[str, str]], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Texts of training and held-out documents that are two tokens or longer."""
    held = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 < FRACTION for key, _ in found]
    heldout = [text for (_, text), out in zip(found, held, strict=True) if out]
    train = [text for (_, text), out in zip(found, held, strict=True) if not out and text not in set(heldout)]
    bos = tokenizer.bos_token_id is not None
    return tuple(
        [text for text in side if len(tokenizer(text, add_special_tokens=False)["input_ids"]) + bos >= 2]
        for side in (train, heldout)
    )


READ = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}


# ---------------------------------------------------------------------------------------------------- spoiling


def _as_jsonl(texts: list[str], rng: random.Random) -> bytes:
    keys = rng.random() < 0.7
    lines = [json.dumps({"text": text} | ({"id": f"d{n}"} if keys else {})) for n, text in enumerate(texts)]
    return "".join(f"{line}\n" for line in lines).encode()


def _as_csv(texts: list[str], rng: random.Random) -> bytes:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("id", "text"), *((f"d{n}", text) for n, text in enumerate(texts))])
    return table.getvalue().encode()


def _as_parquet(texts: list[str], rng: random.Random) -> bytes:
    table, values = io.BytesIO(), list(texts)
    if rng.random() < 0.4:
        values[rng.randrange(len(values))] = None
    columns = {"text": rng.choice((values, values, [len(text) for text in texts], [text.encode() for text in texts]))}
    columns["id"] = [f"d{n}" if rng.random() < 0.9 else None for n in range(len(texts))]
    pyarrow.parquet.write_table(pyarrow.table(columns), table, row_group_size=rng.choice((7, 1000)))
    return table.getvalue()


def _as_txt(texts: list[str], rng: random.Random) -> bytes:
    return "\n".join(texts).encode()


BUILD = {".jsonl": _as_jsonl, ".csv": _as_csv, ".txt": _as_txt, ".parquet": _as_parquet}
Spoil = Callable[[bytes, random.Random], tuple[bytes, str]]


def _at(content: bytes, rng: random.Random, piece: bytes, what: str) -> tuple[bytes, str]:
    place = rng.randrange(len(content) + 1)
    return content[:place] + piece + content[place:], what


def _line(piece: bytes, what: str) -> Spoil:
    """Put a line among the others, a few times."""

    def spoil(content: bytes, rng: random.Random) -> tuple[bytes, str]:
        lines = content.splitlines(keepends=True)
        for _ in range(rng.choice((1, 1, 3))):
            lines.insert(rng.randrange(len(lines) + 1), piece + b"\n")
        return b"".join(lines), what

    return spoil


def _piece(piece: bytes, what: str) -> Spoil:
    return lambda content, rng: _at(content, rng, piece, what)


def _cut(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    return content[: rng.randrange(len(content) + 1)], "cut off"


def _gap(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.randrange(200) :], "bytes missing"


def _flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 50)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed), "other bytes"


def _twice(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    return content * rng.choice((2, 5)), "everything several times"


def _copies(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    return b"".join(lines + [rng.choice(lines)] * 30 if lines else lines), "one line thirty times"


def _whole(change: Callable[[bytes], bytes], what: str) -> Spoil:
    return lambda content, rng: (change(content), what)


def _utf16(content: bytes) -> bytes:
    return content.decode(errors="replace").encode("utf-16")


BYTES: list[Spoil] = [
    _cut,
    _cut,
    _gap,
    _flip,
    _flip,
    _twice,
    _piece(b"\xff\xc3", "bytes that are no UTF-8"),
    _piece(b"\x00", "a NUL"),
    _piece(b'"', "a quote"),
    _piece(b"x" * 3_000_000, "three million letters"),
    _piece("\u2028\x85".encode(), "other line ends"),
    _whole(lambda content: b"", "empty"),
    _whole(lambda content: b"\n \r\n\t\n", "blank lines"),
    _whole(lambda content: b"\xef\xbb\xbf" + content, "a byte order mark"),
    _whole(lambda content: content.replace(b"\n", b"\r\n"), "Windows line ends"),
    _whole(lambda content: content.replace(b"\n", b"\r"), "old line ends"),
    _whole(_utf16, "UTF-16"),
]
RECORDS: list[Spoil] = [
    *BYTES,
    _copies,
    _copies,
    _line(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "lists in lists"),
    _line(b'{"text": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}", "objects in objects"),
    _line(b'{"text": {"text": "inner"}}', "an object for a text"),
    _line(b'{"text": 7}', "a number for a text"),
    _line(b'{"text": null}', "null for a text"),
    _line(b'{"text": ""}', "an empty text"),
    _line(b'{"text": "   "}', "a blank text"),
    _line(b'{"text": "a"}', "a text of one letter"),
    _line(b'{"txt": "other field"}', "another field"),
    _line(b'["text"]', "a list"),
    _line(b"NaN", "not a number"),
    _line(b"1" * 5_000, "a number of 5,000 digits"),
    _line(b'{"text": "\\ud800"}', "half a character"),
    _line(b'{"text": "ok \\u0000 NUL"}', "an escaped NUL"),
    _line(b'{"text": "same id", "id": "d0"}', "an id twice"),
    _line(b'{"text": "list for id", "id": [1, {"a": 2}]}', "a list for an id"),
    _line(b'{"text": "half an id", "id": "\\udfff"}', "half a character in an id"),
    _line(b'{"text": "one", "text": "two, which counts"}', "a field twice"),
    _line(b'{"text": "' + b"word " * 500_000 + b'"}', "a huge line"),
    _line(b'{"text": "cut', "half a line"),
    _line(b'{"text": "tab\there"}', "a control character"),
]
FILES: list[Spoil] = [
    _cut,
    _cut,
    _flip,
    _flip,
    _gap,
    _twice,
    _whole(gzip.compress, "packed once more by gzip"),
    _whole(bz2.compress, "packed by bzip2"),
    _whole(lzma.compress, "packed once more by xz"),
    _whole(lambda content: b"plain text\n", "not packed"),
    _whole(lambda content: content + b"rest", "something behind"),
    _whole(lambda content: b"", "no bytes at all"),
]
