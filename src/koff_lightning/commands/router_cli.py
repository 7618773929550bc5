"""`koff router`: train what picks a memory from the text, and test how well it picks."""

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_lightning.commands.parsing.counts import check_counts
from koff_lightning.commands.parsing.text_options import data_section, named_texts
from koff_lightning.support.errors import KoffError

HELDOUT = 500_000  # bytes of held-out text of each domain to route, at most

if TYPE_CHECKING:
    from koff_lightning.artifact.folder import Manifest
    from koff_lightning.data import DomainDataModule
    from koff_lightning.data.split import Texts
    from koff_lightning.evaluation.routing import Confusion


def fit(
    *,
    model: str,
    config: str | None = None,
    data: list[str] | None = None,
    encoder: str | None = None,
    epochs: int = 1,
    train_bytes: int = 200_000,
    none_rate: float = 0.05,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Train the router that picks a memory from the text, on the domains' own training text, into the artifact.

    Args:
        model: Folder that `koff export` wrote, with two memories or more.
        config: Config whose `data` section names the text; by default that of the artifact's run.
        data: NAME=TEXT of a domain, in place of what the config says of it: law=corpora/law/*.jsonl; several times.
        encoder: Encoder to fine-tune in place of the n-grams: hub id or folder, such as FacebookAI/roberta-base.
        epochs: Passes over the text that an encoder takes.
        train_bytes: Training text to use, of each domain, about.
        none_rate: Share of the domains' own text that may be sent to none of them, by which the threshold is set.
        seed: Seed of what is drawn.
        device: Torch device of an encoder; by default a GPU if there is one.
    """
    check_counts(epochs=epochs, train_bytes=train_bytes)
    if not 0 <= none_rate < 1:
        raise KoffError(f"router fit: none_rate must lie in [0, 1); got {none_rate}")
    from koff_lightning.artifact.router_files import check_choice, write_router
    from koff_lightning.router.routing import calibrated, training_pieces
    from koff_lightning.support.files import refuse_unwritable

    folder = Path(model).expanduser()
    manifest, text = _text(folder, config, data, most=train_bytes)
    check_choice(manifest, folder)
    refuse_unwritable(folder.resolve().parent, "router fit: --model")  # a changed copy takes its place
    read = _asked(text, text.texts())
    names = list(manifest.domains)
    parts = {name: training_pieces(read[name].train, train_bytes, seed) for name in names}
    pieces = [piece for name in names for piece in parts[name][0]]
    labels = [number for number, name in enumerate(names) for _ in parts[name][0]]
    classifier = _trained(pieces, labels, len(names), encoder, epochs, seed, device)
    kept = {name: part for name, (_, part) in parts.items()}
    router = calibrated(names, classifier, kept, none_rate)
    about = {"pieces": len(pieces), "seed": seed, "none_rate": none_rate}
    write_router(folder, router, about | ({"encoder": encoder, "epochs": epochs} if encoder else {}))
    answers = {name: router.route(part) for name, part in kept.items()}
    right = sum(answer == name for name, part in answers.items() for answer in part)
    none = sum(answer is None for part in answers.values() for answer in part)
    count = sum(map(len, answers.values()))
    print(
        f"wrote the router of {', '.join(names)} into {folder}: of {count} pieces that it was not trained on "
        f"{right / count:.1%} go to their own domain, {none / count:.1%} to none"
    )


def _trained(
    pieces: list[str], labels: list[int], count: int, encoder: str | None, epochs: int, seed: int, device: str | None
) -> Any:
    if encoder is None:
        from koff_lightning.router.ngrams import fit_ngrams

        return fit_ngrams(pieces, labels)
    import torch

    from koff_lightning.artifact.decomposed import default_device
    from koff_lightning.router.encoder import fine_tune, load_encoder

    torch.manual_seed(seed)  # of the new head
    made = load_encoder(encoder, count, new=True)
    made.model.to(default_device(device))
    fine_tune(made, pieces, labels, epochs=epochs, seed=seed)
    made.model.to("cpu")
    return made


def test(
    *,
    model: str,
    config: str | None = None,
    data: list[str] | None = None,
    unseen: list[str] | None = None,
    heldout_bytes: int = 30_000,
    out: str | None = None,
    device: str | None = None,
) -> None:
    """Test how well the router picks: on held-out text, on domains it never saw, and in bits per byte.

    Args:
        model: Folder of an artifact with a router, or org/name of one on the hub.
        config: Config whose `data` section names the text; by default that of the artifact's run.
        data: NAME=TEXT of a domain, in place of what the config says of it; several times.
        unseen: NAME=TEXT of a domain that the router does not know, whose text belongs to none; several times.
        heldout_bytes: Held-out text to read with the model, of each domain, at most; 0 for none.
        out: File to write the figures to, as JSON. Where the artifact lies in its run's folder the bits per byte are
            added to `results.json` there too, as `router`.
        device: Torch device; by default a GPU if there is one.
    """
    if heldout_bytes < 0:
        raise KoffError(f"router test: heldout_bytes must be 0 or more; got {heldout_bytes}")
    from koff_lightning.artifact.decomposed import default_device, load_decomposed
    from koff_lightning.artifact.hub import local_folder
    from koff_lightning.artifact.router_files import read_router
    from koff_lightning.data import DomainDataModule
    from koff_lightning.evaluation import routing
    from koff_lightning.support.files import write_atomically

    folder = local_folder(model)
    manifest, text = _text(folder, config, data)
    router = read_router(folder, manifest)  # before the model, which takes longer
    others = named_texts(unseen or [], "--unseen")
    if known := [name for name in others if name in router.domains]:
        raise KoffError(f"--unseen: the router knows {known[0]!r}: name what it does not know")
    decomposed = load_decomposed(folder, default_device(device), domains="auto")
    read = text.texts()
    texts = _heldout(text, read)
    if others:
        texts |= _heldout(unknown := DomainDataModule(others), unknown.texts())
    tables = {str(n): routing.confusion(router, texts, decomposed.tokenizer, n) for n in routing.FIRST}
    found: dict[str, Any] = {
        "domains": list(router.domains),
        "unseen": list(others),
        "confusion": tables,
        "accuracy": {size: routing.accuracy(table, router.domains) for size, table in tables.items()},
    }
    if heldout_bytes:
        size = max(heldout_bytes, *(min(_sizes(part.heldout)) for part in read.values()))  # one document of each
        _, text = _text(folder, config, data, heldout=size, tokenizer=str(folder / "backbone"))
        text.setup()
        found["bits_per_byte"] = routing.routed_bits(decomposed, text)
    if out:
        write_atomically(Path(out).expanduser(), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    _show(found)
    if heldout_bytes:
        _add_to_results(folder, manifest, text.max_heldout_bytes, found)


def _heldout(data: "DomainDataModule", read: "dict[str, Texts]") -> dict[str, list[str]]:
    """Held-out texts of every domain as a router meets them: the first HELDOUT bytes, and one text in any case."""
    texts = {name: part.heldout for name, part in _asked(data, read).items()}
    fitting = {name: sum(size <= HELDOUT for size in accumulate(_sizes(part))) for name, part in texts.items()}
    return {name: part[: max(fitting[name], 1)] for name, part in texts.items()}


def _sizes(texts: list[str]) -> list[int]:
    return [len(text.encode()) for text in texts]


def _add_to_results(folder: Path, manifest: "Manifest", heldout_bytes: int | None, found: dict[str, Any]) -> None:
    """Add accuracy and bits per byte, told and routed, to the results of the run in whose folder the artifact lies."""
    from koff_lightning.reports.results import as_json
    from koff_lightning.studies.analysis.runs import home_of
    from koff_lightning.support.files import write_atomically
    from koff_lightning.support.json_files import read_json_object

    path = (home_of(folder.absolute()) or folder) / "results.json"
    results = read_json_object(path) if path.is_file() else {}
    masks = [
        [{name: group[name] for name in ("layer", "kind", "of", "kept")} for group in groups]
        for groups in (results.get("kept_units", []), manifest.kept)
    ]
    if masks[0] == masks[1]:
        bits = found["bits_per_byte"]
        rows = {n: {way: v if math.isfinite(v) else None for way, v in row.items()} for n, row in bits.items()}
        about = {"heldout_bytes": heldout_bytes, "accuracy": found["accuracy"], "bits_per_byte": rows}
        write_atomically(path, as_json(results | {"router": about}))
        print(f"added to {path}, as router")


def _text(
    folder: Path,
    config: str | None,
    data: list[str] | None,
    *,
    most: int | None = None,
    heldout: int | None = None,
    tokenizer: str | None = None,
) -> "tuple[Manifest, DomainDataModule]":
    """The manifest, and the text of its memories' domains.

    Args:
        folder: The artifact.
        config: In place of the options of its run.
        data: NAME=TEXT, in place of what those say of a domain.
        most: Bytes of training text per domain.
        heldout: Bytes of held-out text per domain, at most; None for all. Of what is streamed, what the run held out.
        tokenizer: To set the text up with.
    """
    import inspect

    from koff_lightning.artifact.folder import read_manifest
    from koff_lightning.data import DomainDataModule

    manifest = read_manifest(folder)
    options = data_section(config) if config else dict((manifest.config or {}).get("data") or {})
    given = named_texts(data or [])
    manifest.refuse_others(given, f"--data: {folder}")
    sources = {**(options.get("domains") or {}), **given}
    if missing := [name for name in manifest.domains if name not in sources]:
        origin = config or f"the run of {folder}"
        raise KoffError(f"{origin} names no text of {missing[0]!r}: give --data {missing[0]}=TEXT, or a --config")
    if odd := sorted(options.keys() - inspect.signature(DomainDataModule).parameters):
        raise KoffError(f"{folder} was trained with data.{odd[0]}, which this release does not know: give a --config")
    options |= {"domains": {name: sources[name] for name in manifest.domains}, "retention": None}
    if most and not options.get("streaming"):
        options["max_train_bytes"] = min(options.get("max_train_bytes") or 10 * most, 10 * most)  # of many documents
    if not options.get("streaming"):  # there what the run did not hold out it may have trained on
        options["max_heldout_bytes"] = heldout
    return manifest, DomainDataModule(**options | {"tokenizer": tokenizer, "num_workers": 0})


def _asked(data: "DomainDataModule", read: "dict[str, Texts]") -> "dict[str, Texts]":
    """The text of every domain as a router meets it: of talks the questions, as in a chat."""
    from koff_lightning.data.messages import questions
    from koff_lightning.data.split import Texts

    return {
        name: Texts(*([questions(talk) for talk in side] for side in texts)) if data.sources[name].chat else texts
        for name, texts in read.items()
    }


def _show(found: dict[str, Any]) -> None:
    """Print the figures as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, force_jupyter=False)
    shares = found["accuracy"]
    made = Table("whose text", *(f"{size} tokens" for size in shares), box=box.SIMPLE_HEAD)
    for name in next(iter(shares.values())):
        label = f"{name} (unseen: to none)" if name in found["unseen"] else name
        made.add_row(label, *(f"{share[name]:.1%}" for share in shares.values()))
    console.print("share that goes where it should, from the first tokens of a held-out text")
    console.print(made)
    for size, table in found["confusion"].items():
        console.print(f"picked from the first {size} tokens")
        console.print(_confusion(table))
    if bits := found.get("bits_per_byte"):
        ways = list(next(iter(bits.values())))
        made = Table("bits per byte", *(w if not w.isdigit() else f"{w} tokens" for w in ways), box=box.SIMPLE_HEAD)
        for name, row in bits.items():
            made.add_row(name, *(f"{row[way]:.4f}" for way in ways))
        console.print(made)


def _confusion(table: "Confusion") -> Any:
    from rich import box
    from rich.table import Table

    columns = list(next(iter(table.values())))
    made = Table("text of", *columns, box=box.SIMPLE_HEAD)
    for name, row in table.items():
        made.add_row(name, *(str(row[column]) for column in columns))
    return made
