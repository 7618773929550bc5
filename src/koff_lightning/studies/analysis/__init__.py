"""Where did the knowledge go? What a decomposition removed, what its memories hold, with statistics.

Read docs/analysis.md for how the parts go together.
"""

from koff_lightning.studies.analysis.activations import Activations, collect, collect_dense
from koff_lightning.studies.analysis.attention_mass import attention_mass
from koff_lightning.studies.analysis.causal import reinserted, reinsertion
from koff_lightning.studies.analysis.comparison import OddsOfRuns, RatioOfOdds, odds_of_runs, odds_ratio_ratio
from koff_lightning.studies.analysis.enrichment import Enrichment, corrected, enrichment, enrichment_table
from koff_lightning.studies.analysis.knockout import knockout
from koff_lightning.studies.analysis.lape import Specialists, entropy, identify, identify_weighted
from koff_lightning.studies.analysis.masks import Mask, NothingRemoved, mask_of, read_mask
from koff_lightning.studies.analysis.memory_use import adapter_norms, promoted_tokens
from koff_lightning.studies.analysis.opening import open_run
from koff_lightning.studies.analysis.overlap import Overlap, overlap, overlap_table
from koff_lightning.studies.analysis.regression import Logistic, logistic
from koff_lightning.studies.analysis.scoring import score
from koff_lightning.studies.analysis.stability import Stability, stability
from koff_lightning.studies.analysis.tables import layer_table, strata
from koff_lightning.studies.analysis.transfer import Transfer, transfer

__all__ = [
    "Activations",
    "Enrichment",
    "Logistic",
    "Mask",
    "NothingRemoved",
    "OddsOfRuns",
    "Overlap",
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
    "promoted_tokens",
    "read_mask",
    "reinserted",
    "reinsertion",
    "score",
    "stability",
    "strata",
    "transfer",
]
