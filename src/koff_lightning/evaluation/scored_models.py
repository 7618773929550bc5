"""What may be scored: an artifact, a checkpoint of a run, a dense model; and what goes with each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.decomposed import DecomposedModel, default_device, load_decomposed
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.backbone import ask_nothing_
from koff_lightning.decomposition import Decomposition
from koff_lightning.listed_files import MANIFEST
from koff_lightning.loading import load_backbone, load_config, load_tokenizer
from koff_lightning.support.errors import KoffError
from koff_lightning.support.run_places import artifact_near
from koff_lightning.training.run_folder import run_config

Model = Decomposition | DecomposedModel | PreTrainedModel


def load_model(path: str, backbone: str | None = None, device: str | None = None, dtype: str | None = None) -> Model:
    """What stands at `path`: an artifact, a checkpoint of `koff fit`, or a dense model.

    Raises:
        KoffError: It cannot be loaded, or not with these options.
    """
    where, place = default_device(device), Path(path).expanduser()
    if backbone is not None and place.suffix != ".ckpt":
        raise KoffError(f"only a checkpoint is read over a backbone, and {path} is none: leave backbone out")
    if (place / MANIFEST).is_file():
        return load_decomposed(place, where, dtype)
    if place.suffix == ".ckpt":
        if dtype is not None:
            raise KoffError(f"{path} is read in the dtype of its run: leave dtype out")
        return from_checkpoint(place, backbone).to(where).eval()
    if place.is_dir() and not (place / "config.json").exists() and artifact_near(place):
        read_manifest(place)  # of a run's folder it says which one to give
    stored = str(load_config(path).dtype or "float32").removeprefix("torch.")
    model = load_backbone(path, dtype=dtype or stored).to(where)
    ask_nothing_(model)  # a task says how it is answered
    model.name_or_path = path  # of a .gguf file it is the folder, which holds no tokenizer
    return model


def rows_of(path: str | Path | Model) -> int | None:
    """Tokens of the rows (`data.seq_len`) that an artifact's or a checkpoint's run has trained on and scored.

    Whole texts are read in such rows, so that the figures compare with the run's own. None where nothing says it: of a
    dense model, of a checkpoint that was moved away from its `config.yaml`.
    """
    found = (_data_of(path) or {}).get("seq_len")
    return found if type(found) is int and found > 1 else None


def opens_with_start(path: str | Path | Model) -> bool:
    """Whether the rows of its run that open inside a document begin with the start token (`data.open_with_start`).

    Those of earlier releases do not. Where nothing says what the rows were, they are taken to be as now.
    """
    data = _data_of(path)
    return True if data is None else data.get("open_with_start") is True


def _data_of(path: str | Path | Model) -> Mapping[str, Any] | None:
    """The options `data` of its run, where they are known."""
    config: Mapping[str, Any] | None = None
    if isinstance(path, DecomposedModel):
        config = path.manifest.config
    elif isinstance(path, str | Path):
        place = Path(path).expanduser()
        config = run_config(place) if place.suffix == ".ckpt" else None
        if (place / MANIFEST).is_file():
            config = read_manifest(place).config
    data = (config or {}).get("data")
    return data if isinstance(data, Mapping) else None


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a loaded model."""
    if isinstance(model, DecomposedModel):
        return model.tokenizer
    if isinstance(model, Decomposition):
        loading = {k: v for k, v in model.loading.items() if k != "dtype"}
        return load_tokenizer(model.source, **loading)
    return load_tokenizer(model.name_or_path)


def domains_of(model: Model) -> list[str]:
    """The domains that a loaded model has memories of."""
    return [] if isinstance(model, PreTrainedModel) else list(model.domains)


def check_router(model: Model, name: str) -> None:
    """Raise KoffError unless a model has a router that picks among its memories."""
    if not isinstance(model, DecomposedModel):
        raise KoffError(
            f"only an artifact has a router, and {name} is none: export the run, then `koff router fit --model DIR`"
        )
    model.route([])
