"""Read documents from one file: jsonl, csv, txt (each plain or .gz, .xz, .zst) and parquet.

A document is its text and an id. A line that cannot be used is reported with file and line number; what happens then
(stop or go on) is the caller's choice, passed in as ``on_bad``. A file that cannot be opened or decompressed is not a
bad line: that always stops.
"""

import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from koff_lightning.errors import KoffError

FORMATS = (".jsonl", ".csv", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
OnBad = Callable[[str], None]


class Document(NamedTuple):
    """One text with its id; a document without an id is its own id, so that its side of the split never changes."""

    id: str
    text: str


def read_file(path: Path, text_field: str, id_field: str, on_bad: OnBad) -> Iterator[Document]:
    """Yield the non-empty documents of one file.

    Args:
        path: A file whose name ends in one of `FORMATS`, all but parquet optionally followed by one of `COMPRESSIONS`.
        text_field: Field (jsonl) or column (csv, parquet) that holds the text; txt files are one document each.
        id_field: Field or column that holds the id; where it is absent or null the text is the id.
        on_bad: Called with "file:line: what is wrong" for each line (csv: record, parquet: row) that cannot be used;
            it raises to stop, or returns to leave that line out.

    Raises:
        KoffError: Unknown suffix, unreadable file, or a table without the text column.
    """
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt, ".parquet": _read_parquet}[format_of(path)]
    try:
        for line, fields, problem in read(path, text_field, id_field):
            document = None if problem else _as_document(fields, text_field, id_field)
            if isinstance(document, Document):
                if document.text:  # an empty text predicts nothing and has no bytes: leaving it out changes no figure
                    yield document
            else:
                on_bad(f"{path}:{line}: {problem or document}")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise KoffError(f"cannot read {path}: {error}. It is missing, damaged or not what its name says") from error


def format_of(path: Path) -> str:
    """Return the format suffix of `path` without its compression, or raise a KoffError that lists the known ones."""
    suffix, packed = (Path(path.stem).suffix, True) if path.suffix in COMPRESSIONS else (path.suffix, False)
    if suffix not in FORMATS or (packed and suffix == ".parquet"):
        known = ", ".join(FORMATS) + "; all but parquet also with " + ", ".join(COMPRESSIONS)
        raise KoffError(f"cannot read {path}: unknown kind of file '{path.suffix}'. Known: {known}")
    return suffix


Record = tuple[int, Any, str | None]  # line number, fields by name, what is wrong with the line (None: nothing)


def _as_document(fields: Any, text_field: str, id_field: str) -> Document | str:
    """Return the document in one record, or a phrase that says why there is none."""
    if not isinstance(fields, dict):
        return f"expected a JSON object with a field '{text_field}', got a {type(fields).__name__}"
    if text_field not in fields:
        return f"no field '{text_field}', only {_listed(fields)}: set text_field to the right one"
    text, doc_id = fields[text_field], fields.get(id_field)
    if not isinstance(text, str):
        return f"field '{text_field}' should be text, got {'null' if text is None else type(text).__name__}"
    document = Document(text if doc_id is None else str(doc_id), text)
    try:
        "".join(document).encode()  # fails on the surrogates that stand for bad bytes, and on a lone "\ud800" in JSON
    except UnicodeEncodeError:
        return "not valid UTF-8"
    return document


def _read_jsonl(path: Path, text_field: str, id_field: str) -> Iterator[Record]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            try:
                yield number, json.loads(_decode(raw.rstrip(), number)), None
            except json.JSONDecodeError as error:
                yield number, None, f"not valid JSON ({error.msg} at column {error.colno})"
            except RecursionError:
                yield number, None, "not usable JSON (nested too deeply)"


def _read_csv(path: Path, text_field: str, id_field: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than many documents
    with _open(path) as file:
        rows = csv.DictReader(_decode(raw, number) for number, raw in enumerate(file, start=1))
        if rows.fieldnames is not None:  # None: the file is empty
            _require_column(path, list(rows.fieldnames), text_field)
        try:
            for row in rows:
                yield rows.line_num, row, None
        except csv.Error as error:
            raise KoffError(f"cannot read {path}:{rows.line_num}: {error}") from error


def _read_txt(path: Path, text_field: str, id_field: str) -> Iterator[Record]:
    with _open(path) as file:
        yield 1, {text_field: _decode(file.read(), 1)}, None


def _read_parquet(path: Path, text_field: str, id_field: str) -> Iterator[Record]:
    import pyarrow  # here: importing it costs a fifth of a second, and only parquet needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require_column(path, table.schema_arrow.names, text_field)
            columns = [name for name in dict.fromkeys((text_field, id_field)) if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    number += 1
                    try:
                        yield number, {n: v.as_py() for n, v in zip(columns, values, strict=True)}, None
                    except UnicodeDecodeError:
                        yield number, None, "not valid UTF-8"
    except pyarrow.ArrowException as error:
        raise KoffError(f"cannot read {path}: {error}") from error


def _require_column(path: Path, columns: list[str], text_field: str) -> None:
    if text_field not in columns:
        raise KoffError(
            f"{path} has no column '{text_field}', only {_listed(columns)}: set text_field to the right one"
        )


def _open(path: Path) -> BinaryIO:
    """Open for reading bytes: lines are decoded one by one so that a bad one has a number."""
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        case ".xz":
            return lzma.open(path, "rb")  # type: ignore[return-value]
        case ".zst":
            return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard  # optional: the standard library has no zstd before Python 3.14
    except ImportError as error:
        raise KoffError(f"cannot read {path}: .zst needs the zstandard package: pip install zstandard") from error
    return zstandard.open(path, "rb")


def _decode(raw: bytes, line: int) -> str:
    """Decode, keeping undecodable bytes as surrogates for `_as_document` to find; Windows puts a mark before line 1."""
    return raw.decode("utf-8-sig" if line == 1 else "utf-8", errors="surrogateescape")


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"
