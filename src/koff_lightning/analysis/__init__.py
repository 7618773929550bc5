"""Where did the knowledge go? What a decomposition removed, what its memories hold, with statistics.

Read docs/analysis.md for how the parts go together.
"""

from koff_lightning.analysis.activations import Activations, collect, collect_dense
from koff_lightning.analysis.attention_mass import attention_mass
from koff_lightning.analysis.causal import reinserted, reinsertion
from koff_lightning.analysis.comparison import OddsOfRuns, RatioOfOdds, odds_of_runs, odds_ratio_ratio
from koff_lightning.analysis.enrichment import Enrichment, corrected, enrichment, enrichment_table
from koff_lightning.analysis.knockout import knockout, part_off
from koff_lightning.analysis.lape import Specialists, entropy, identify, identify_weighted
from koff_lightning.analysis.masks import Mask, NothingRemoved, mask_of, read_mask
from koff_lightning.analysis.memory_use import adapter_norms, promoted_tokens
from koff_lightning.analysis.opening import open_run
from koff_lightning.analysis.overlap import Overlap, overlap, overlap_table
from koff_lightning.analysis.planted import Planted, plant
from koff_lightning.analysis.regression import Logistic, logistic
from koff_lightning.analysis.scoring import score
from koff_lightning.analysis.stability import Stability, stability
from koff_lightning.analysis.tables import layer_table, strata
from koff_lightning.analysis.transfer import Transfer, transfer

__all__ = [
    "Activations",
    "Enrichment",
    "Logistic",
    "Mask",
    "NothingRemoved",
    "OddsOfRuns",
    "Overlap",
    "Planted",
    "RatioOfOdds",
    "Specialists",
    "Stability",
    "Transfer",
    "adapter_norms",
    "attention_mass",
    "collect",
    "collect_dense",
    "corrected",
    "enrichment",
    "enrichment_table",
    "entropy",
    "identify",
    "identify_weighted",
    "knockout",
    "layer_table",
    "logistic",
    "mask_of",
    "odds_of_runs",
    "odds_ratio_ratio",
    "open_run",
    "overlap",
    "overlap_table",
    "part_off",
    "plant",
    "promoted_tokens",
    "read_mask",
    "reinserted",
    "reinsertion",
    "score",
    "stability",
    "strata",
    "transfer",
]
