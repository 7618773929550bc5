"""Read documents from one file: jsonl, csv, txt (each plain or .gz, .xz, .zst) and parquet.

A document is its text and an id. A line that cannot be used is reported with file and line number; what happens then
(stop or go on) is the caller's choice, passed in as ``on_bad``. A file that cannot be opened or decompressed is not a
bad line: that always stops. Records are numbered from 0 in each file, so that a reader can go on in its middle and
several can share it.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from koff_lightning.data.messages import TALK, as_talk
from koff_lightning.support.errors import KoffError

FORMATS = (".jsonl", ".csv", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
# Text is packed to a tenth or so of its size. What unpacks to more than this, and to more than so many bytes, is made
# to fill memory or time.
MOST_TIMES, FREE = 250, 2**28
LOOKED_AT = 10  # records of a file whose first one is bad
OnBad = Callable[[str], None]
Where = tuple[tuple[str, tuple[str, ...]], ...]  # field and its wanted values, of which a record must have one each


def refuse(message: str) -> None:
    """Raise a KoffError: an `on_bad` that stops at the first bad record."""
    raise KoffError(message)


class OfFile(str):
    """Said of a file that begins with bad records alone: to leave such out would leave little."""

    __slots__ = ()


class Document(NamedTuple):
    """One text with its id; a document without an id is its own id, so that its side of the split never changes."""

    id: str
    text: str


class Fields(NamedTuple):
    """Where a record (a line of jsonl, a row of a table) holds its document.

    Attributes:
        text: Field (jsonl) or column (csv, parquet) of the text; txt files are one document each.
        id: Field or column of the id; where it is absent, null or empty the text is the id.
        chat: Records are talks: see `as_talk`.
        where: Records with other values of these fields are passed over.
    """

    text: str = "text"
    id: str = "id"
    chat: bool = False
    where: Where = ()

    @property
    def of_text(self) -> tuple[str, ...]:
        """The fields in which the text may lie; of a talk they are `TALK` where `text` names none."""
        return TALK if self.chat and self.text == "text" else (self.text,)

    @property
    def others(self) -> tuple[str, ...]:
        """The other fields that are read."""
        return self.id, *(name for name, _ in self.where)


class Part(NamedTuple):
    """Some records of a file: from number `first` on those whose number leaves the remainder `turn` modulo `of`."""

    first: int = 0
    turn: int = 0
    of: int = 1

    def __contains__(self, record: object) -> bool:
        return isinstance(record, int) and record >= self.first and record % self.of == self.turn


ALL = Part()


def read_records(
    path: Path, fields: Fields, on_bad: OnBad, part: Part = ALL, until: int | None = None
) -> Iterator[tuple[int, Document]]:
    """Yield (number, document) of the non-empty documents of one file.

    Args:
        path: A file whose name ends in one of `FORMATS`, all but parquet optionally followed by one of `COMPRESSIONS`.
        fields: Where the documents are in it.
        on_bad: Called with "file:line: what is wrong" for each line (csv: record, parquet: row) that cannot be used;
            it raises to stop, or returns to leave that line out.
        part: The records to read; the others are passed over as cheaply as the format allows.
        until: Number of the record at which reading ends; by default the end of the file.

    Raises:
        KoffError: Unknown suffix, unreadable file, or a table without the text column.
    """
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt, ".parquet": _read_parquet}[format_of(path)]
    if fields.chat and format_of(path) == ".txt":
        raise KoffError(f"cannot read {path}: a txt file holds no talks (chat): give jsonl, csv or parquet")
    if fields.where and format_of(path) == ".txt":
        raise KoffError(f"cannot read {path}: a txt file has no field '{fields.where[0][0]}' to choose by (where)")
    try:
        for number, line, record, problem in read(path, fields, part):
            if until is not None and number >= until:
                return
            document = None if problem else as_document(record, fields)
            if isinstance(document, Document):
                if document.text:  # an empty text predicts nothing and has no bytes: leaving it out changes no figure
                    yield number, document
            else:
                said = f"{path}:{line}: {problem or document}"
                on_bad(_of_file(said, path, fields) if number == 0 else said)
    except PermissionError as error:
        raise KoffError(f"cannot read {path}: you may not (its rights or those of its folder forbid it)") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise KoffError(f"cannot read {path}: {reason}. It is missing, damaged or not what its name says") from error


def _of_file(said: str, path: Path, fields: Fields) -> str:
    """What is wrong with the first record; said of the whole file where the next ones are no better."""
    format_ = format_of(path)
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}.get(format_)
    if read is None:
        return said
    records = islice(read(path, fields, ALL), LOOKED_AT)
    usable = [not problem and isinstance(as_document(record, fields), Document) for _, _, record, problem in records]
    if any(usable) or len(usable) < 2:
        return said
    advice = ". A .jsonl file holds one JSON object a line: name csv .csv and plain text .txt" * (format_ == ".jsonl")
    advice = ". Save it as UTF-8" if said.endswith("not valid UTF-8") else advice
    return OfFile(f"{said}; the next {len(usable) - 1} are no better{advice}")


def format_of(path: Path) -> str:
    """Return the format suffix of `path` without its compression, or raise a KoffError that lists the known ones."""
    suffix, packed = (Path(path.stem).suffix, True) if path.suffix in COMPRESSIONS else (path.suffix, False)
    if suffix not in FORMATS or (packed and suffix == ".parquet"):
        known = ", ".join(FORMATS) + "; all but parquet also with " + ", ".join(COMPRESSIONS)
        raise KoffError(f"cannot read {path}: unknown kind of file '{path.suffix}'. Known: {known}")
    return suffix


Record = tuple[int, int, Any, str | None]  # number, line, fields by name, what is wrong with it (None: nothing)


def as_document(record: Any, fields: Fields) -> Document | str:
    """Return the document in one record, or a phrase that says why there is none; an unwanted one is empty."""
    if not isinstance(record, dict):
        names = " or ".join(f"'{name}'" for name in fields.of_text[:2])
        return f"expected a JSON object with a field {names}, got a {type(record).__name__}"
    for name, wanted in fields.where:
        if name not in record:
            return f"no field '{name}', only {_listed(record)}: set where to the right one"
        values = record[name] if isinstance(record[name], list) else [record[name]]
        if not any(written(value) in wanted for value in values):
            return Document("", "")
    if fields.chat:
        try:
            text = as_talk(record, fields.of_text)
        except ValueError as error:
            return str(error)
    elif fields.text not in record:
        return f"no field '{fields.text}', only {_listed(record)}: set text_field to the right one{_about_chat(record)}"
    else:
        text = record[fields.text]
    doc_id = record.get(fields.id)
    if not isinstance(text, str):
        return f"field '{fields.text}' should be text, got {'null' if text is None else type(text).__name__}"
    document = Document(text if doc_id in (None, "") else str(doc_id), text)  # csv has no other word for null
    try:
        for part in {*document}:  # one by one: a text may be large, and its own id
            part.encode()  # fails on the surrogates that stand for bad bytes, and on a lone "\ud800" in JSON
    except UnicodeEncodeError:
        return "not valid UTF-8"
    return document


def written(value: Any) -> str:
    """A value as a file has it, by which `where` compares: JSON's `true`, and a whole number without decimals."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _about_chat(names: Any) -> str:
    """What to do where there is no text, but talks are."""
    return ", or for talks chat: answers" if TALK[0] in names or {*TALK[1:]} <= {*names} else ""


def _read_jsonl(path: Path, fields: Fields, part: Part) -> Iterator[Record]:
    number = -1
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):
            if raw.removeprefix(codecs.BOM_UTF8).isspace():
                continue
            number += 1
            if number not in part:
                continue
            try:
                yield number, line, json.loads(_decode(raw.rstrip(), line, errors="strict")), None
            except UnicodeDecodeError:
                yield number, line, None, "not valid UTF-8"
            except json.JSONDecodeError as error:
                yield number, line, None, f"not valid JSON ({error.msg} at column {error.colno})"
            except RecursionError:
                yield number, line, None, "not usable JSON (nested too deeply)"
            except ValueError:  # Python's limit
                yield number, line, None, "not usable JSON (a number of thousands of digits)"


def _read_csv(path: Path, fields: Fields, part: Part) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than many documents
    with _open(path) as file:
        rows = csv.DictReader((_decode(raw, line) for line, raw in enumerate(file, start=1)), strict=True)
        try:
            if rows.fieldnames is not None:  # None: the file is empty
                require_column(path, list(rows.fieldnames), fields)
            for number, row in enumerate(rows):
                if number in part:
                    yield number, rows.reader.line_num, row, _misfit(row)
        except csv.Error as error:
            raise KoffError(
                f"cannot read {path}: {error}, in lines {rows.line_num + 1} to {rows.reader.line_num}. It is cut off, "
                "or a text in quotes has quotes that are not written twice"
            ) from error


def _misfit(row: dict[Any, Any]) -> str | None:
    """What is wrong with a row that has other columns than the header: text is in the wrong one then, or in none."""
    if None in row or None in row.values():
        return "more or fewer fields than the header: a text with commas or line ends must stand in quotes"
    return None


def _read_txt(path: Path, fields: Fields, part: Part) -> Iterator[Record]:
    if 0 in part:
        with _open(path) as file:
            yield 0, 1, {fields.text: _decode(file.read(), 1)}, None


def _read_parquet(path: Path, fields: Fields, part: Part) -> Iterator[Record]:
    import pyarrow  # here: importing it costs a fifth of a second, and only parquet needs it
    import pyarrow.parquet

    try:
        source = path if isinstance(path, Path) else _with_places(path)
        with pyarrow.parquet.ParquetFile(source) as table:
            require_column(path, table.schema_arrow.names, fields)
            columns = read_columns(table.schema_arrow.names, fields)
            count, limit = 0, _most_bytes(path)
            number, groups = 0, list(range(table.num_row_groups))
            while groups and number + table.metadata.row_group(groups[0]).num_rows <= part.first:
                number += table.metadata.row_group(groups.pop(0)).num_rows
            for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
                count += batch.nbytes
                _refuse_bomb(path, count, limit)
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    if number in part:
                        yield (number, number + 1, *_python_values(columns, values))
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise KoffError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _with_places(path: Any) -> BinaryIO:
    """A file elsewhere, if it can be read from any place on."""
    file = path.open("rb")
    try:
        file.seek(-8, io.SEEK_END)
        file.read(8)
        file.seek(0)
    except (OSError, ValueError) as error:
        raise KoffError(
            f"cannot read {path}: its server gives no parts of files, and parquet takes them: get a local copy"
        ) from error
    return file


def _python_values(columns: list[str], values: tuple[Any, ...]) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return {name: value.as_py() for name, value in zip(columns, values, strict=True)}, None
    except UnicodeDecodeError:
        return None, "not valid UTF-8"


def read_columns(columns: Sequence[str], fields: Fields) -> list[str]:
    """Those of a table's columns that are read, each once."""
    return [name for name in dict.fromkeys((*fields.of_text, *fields.others)) if name in columns]


def require_column(path: object, columns: list[str], fields: Fields) -> None:
    """Raise a KoffError unless a table has the columns that hold a document, and no two of one that is read."""
    names = fields.of_text
    if twice := [name for name in (*names, *fields.others) if list(columns).count(name) > 1]:
        raise KoffError(f"{path} has several columns '{twice[0]}', and nothing says which is meant: rename them")
    if names[0] not in columns and not (names[1:] and {*names[1:]} <= {*columns}):
        others, advice = (f" (nor {' with '.join(names[1:])})", "") if names[1:] else ("", _about_chat(columns))
        raise KoffError(
            f"{path} has no column '{names[0]}'{others}, only {_listed(columns)}: set text_field to the right one"
            f"{advice}"
        )


def _open(path: Path) -> BinaryIO:
    """Open for reading bytes: lines are decoded one by one so that a bad one has a number.

    Raises:
        KoffError: Text in UTF-16 or UTF-32.
    """
    file = _open_any(path)
    head = file.peek(1024)[:1024]
    if _is_wide(head):
        file.close()
        raise KoffError(f"cannot read {path}: it is not UTF-8 but, as it seems, UTF-16 or UTF-32: save it as UTF-8")
    return file


def _is_wide(head: bytes) -> bool:
    """Whether a file begins in UTF-16 or UTF-32; the first may pass as UTF-8 where the text is Cyrillic, say.

    There the higher byte of each pair is a control character's, and zero for what is ASCII, as spaces are.
    """
    halves = [part for part in (head[::2], head[1::2]) if 0 in part]
    return head.count(0) * 4 > len(head) or any(sum(byte < 32 for byte in part) * 2 > len(part) for part in halves)


class _Bounded(io.RawIOBase):
    """What a packed file unpacks to, up to a multiple of its own size."""

    def __init__(self, path: Any, file: Any) -> None:
        super().__init__()
        self.path, self.file, self.count, self.limit = path, file, 0, _most_bytes(path)

    def readable(self) -> bool:
        """True; RawIOBase asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes put into `buffer`; raises KoffError where they are too many."""
        read = self.file.readinto(buffer)
        self.count += read
        _refuse_bomb(self.path, self.count, self.limit)
        return read

    def close(self) -> None:
        """Close the packed file too."""
        self.file.close()
        super().close()


def _most_bytes(path: Any) -> int:
    """How much a packed file may hold; where its own size is not known, as much as one of a gigabyte."""
    size = path.stat().st_size if isinstance(path, Path) else path.size
    return max(FREE, MOST_TIMES * (2**30 if size is None else size))


def _refuse_bomb(path: Any, count: int, limit: int) -> None:
    if count > limit:
        raise KoffError(
            f"cannot read {path}: it unpacks to more than {limit:,} bytes, which is not how text is packed: unpack it "
            "yourself if it is text all the same"
        )


def _open_any(path: Path) -> Any:
    source = path if isinstance(path, Path) else path.open("rb")
    match path.suffix:
        case ".gz":
            return io.BufferedReader(_Bounded(path, gzip.open(source, "rb")), 2**16)
        case ".xz":
            return io.BufferedReader(_Bounded(path, lzma.open(source, "rb")), 2**16)
        case ".zst":
            import pyarrow  # it brings a decoder; the standard library has none before Python 3.14

            return io.BufferedReader(_Bounded(path, pyarrow.input_stream(source, compression="zstd")), 2**16)
    return path.open("rb") if source is path else source


def _decode(raw: bytes, line: int, errors: str = "surrogateescape") -> str:
    """Decode, keeping undecodable bytes as surrogates for `as_document` to find; Windows puts a mark before line 1."""
    return raw.decode("utf-8-sig" if line == 1 else "utf-8", errors=errors)


def _listed(names: Any) -> str:
    names = [repr(str(name))[1:-1] for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"
