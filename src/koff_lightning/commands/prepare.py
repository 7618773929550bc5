"""`koff prepare`: tokenise a run's text once, or fetch all that it needs for a machine without network."""

from typing import Any

from koff_lightning.commands.baseline import KoffTrainer
from koff_lightning.commands.needs import fetch_all, needs_of, tokenizer_of
from koff_lightning.data import DomainDataModule
from koff_lightning.support.errors import KoffError
from koff_lightning.support.offline import is_asked


class VerbTrainer(KoffTrainer):
    """The trainer whose methods are all verbs of training."""

    def prepare(
        self,
        model: Any,
        datamodule: Any,
        out: str | None = None,
        prefetch_only: bool = False,
        prefetch_bytes: int | None = None,
    ) -> None:
        """Tokenise the text of a run into a cache that it then uses; see `prepare`, which does it without a trainer.

        Args:
            model: Not built.
            datamodule: Not built.
            out: Folder for the tokenised text, to be given to runs as data.cache; by default where they look anyway.
            prefetch_only: Do not tokenise; fetch the model, hub datasets and the data of evaluation tasks, for a
                machine without network.
            prefetch_bytes: UTF-8 bytes of text to copy of each hub dataset that is streamed, from its head.
        """


def prepare(config: Any) -> None:
    """Tokenise the text of every domain into the cache, or fetch what a run needs; prints what was done.

    Args:
        config: Of the verb: sections as those of `koff fit`, and out, prefetch_only, prefetch_bytes.

    Raises:
        KoffError: Text, tokenizer or network that are not there, or no room.
    """
    if config.prefetch_only:
        if is_asked():
            raise KoffError("--prefetch-only fetches, --offline forbids it: give one of them")
        fetch_all(needs_of(config))
        return
    if config.prefetch_bytes is not None:
        raise KoffError("--prefetch_bytes is the size of what --prefetch-only copies: give both, or neither")
    data = DomainDataModule(**config.data.as_dict() | ({"cache": config.out} if config.out else {}))
    for name, made in data.prepare(tokenizer_of(config)).items():
        print(f"{name}: {'tokenised' if made else 'is there already'}", flush=True)
    print(f"in {data.cache.folder}" + (f"; give it to runs: --data.cache {config.out}" if config.out else ""))
