"""Text of several domains -> batches: `sources` (what text), `packing` (rows), `mixture` (which rows when).

Names are imported when first used: a server that only encodes prompts needs no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koff_lightning.data.datamodule import DomainDataModule as DomainDataModule
    from koff_lightning.data.encoding import check_vocabulary as check_vocabulary
    from koff_lightning.data.sources import DomainSource as DomainSource
    from koff_lightning.data.sources import bundled_domains as bundled_domains
    from koff_lightning.data.split import is_heldout as is_heldout

_HOME = {
    "DomainDataModule": "datamodule",
    "DomainSource": "sources",
    "bundled_domains": "sources",
    "check_vocabulary": "encoding",
    "is_heldout": "split",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'koff_lightning.data' has no attribute {name!r}")
    return getattr(import_module(f"koff_lightning.data.{_HOME[name]}"), name)
