"""`koff prepare`: tokenise a run's text once, or fetch all that it needs for a machine without network."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from koff_lightning.commands.offline import find_task, is_asked, is_on_hub, tokenizer_of
from koff_lightning.data import DomainDataModule
from koff_lightning.data.patience import patiently
from koff_lightning.data.sources import HUB
from koff_lightning.errors import KoffError
from koff_lightning.evaluation.one_shot import KoffTrainer

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")  # no second copy in an older format


class VerbTrainer(KoffTrainer):
    """The trainer whose methods are all verbs of training."""

    def prepare(self, model: Any, datamodule: Any, out: str | None = None, prefetch_only: bool = False) -> None:
        """Tokenise the text of a run into a cache that it then uses; see `prepare`, which does it without a trainer.

        Args:
            model: Not built.
            datamodule: Not built.
            out: Folder for the tokenised text, to be given to runs as data.cache; by default where they look anyway.
            prefetch_only: Do not tokenise; fetch the model, hub datasets and the data of evaluation tasks, for a
                machine without network.
        """


def prepare(config: Any) -> None:
    """Tokenise the text of every domain into the cache, or fetch what a run needs; prints what was done.

    Args:
        config: Of the verb: sections as those of `koff fit`, and out, prefetch_only.

    Raises:
        KoffError: Text, tokenizer or network that are not there, or no room.
    """
    if config.prefetch_only:
        if is_asked():
            raise KoffError("--prefetch-only fetches, --offline forbids it: give one of them")
        for what, get in _wanted(config):
            patiently(get, what)
            print(f"fetched {what}", flush=True)
        return
    data = DomainDataModule(**config.data.as_dict() | ({"cache": config.out} if config.out else {}))
    for name, made in data.prepare(tokenizer_of(config)).items():
        print(f"{name}: {'tokenised' if made else 'is there already'}", flush=True)
    print(f"in {data.cache.folder}" + (f"; give it to runs: --data.cache {config.out}" if config.out else ""))


def _wanted(config: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be fetched, each with the function that does."""
    import datasets
    from huggingface_hub import snapshot_download

    model = config.model
    for name, revision in ((not model.artifact and model.backbone, model.revision), (config.data.tokenizer, None)):
        if name and is_on_hub(name):
            yield name, partial(snapshot_download, name, revision=revision, allow_patterns=FILES)
    for source in DomainDataModule(**config.data.as_dict()).sources.values():
        for entry in source.entries:
            if entry.startswith(HUB):
                repo, _, revision = entry.removeprefix(HUB).partition("@")
                what = " ".join(filter(None, (entry, source.subset, source.split)))
                load = partial(datasets.load_dataset, split=source.split, revision=revision or None)
                yield what, partial(load, repo, source.subset)
    for task in config.lm_eval.tasks or ():
        yield f"task {task.task}", partial(find_task, task.task, config.lm_eval.include_path)
