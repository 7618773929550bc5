"""Text of several domains -> batches: `sources` (what text), `packing` (rows), `mixture` (which rows when)."""

from koff_lightning.data.datamodule import DomainDataModule as DomainDataModule
from koff_lightning.data.encoding import check_vocabulary as check_vocabulary
from koff_lightning.data.sources import DomainSource as DomainSource
from koff_lightning.data.sources import bundled_domains as bundled_domains
from koff_lightning.data.split import is_heldout as is_heldout
