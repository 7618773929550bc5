"""Where did the knowledge go? What a decomposition removed, what its memories hold, with statistics.

Read docs/analysis.md for how the parts go together.
"""

from koff_lightning.studies.analysis.activations import Activations as Activations
from koff_lightning.studies.analysis.activations import collect as collect
from koff_lightning.studies.analysis.activations import collect_dense as collect_dense
from koff_lightning.studies.analysis.attention_mass import attention_mass as attention_mass
from koff_lightning.studies.analysis.causal import reinserted as reinserted
from koff_lightning.studies.analysis.causal import reinsertion as reinsertion
from koff_lightning.studies.analysis.comparison import OddsOfRuns as OddsOfRuns
from koff_lightning.studies.analysis.comparison import RatioOfOdds as RatioOfOdds
from koff_lightning.studies.analysis.comparison import odds_of_runs as odds_of_runs
from koff_lightning.studies.analysis.comparison import odds_ratio_ratio as odds_ratio_ratio
from koff_lightning.studies.analysis.enrichment import Enrichment as Enrichment
from koff_lightning.studies.analysis.enrichment import corrected as corrected
from koff_lightning.studies.analysis.enrichment import enrichment as enrichment
from koff_lightning.studies.analysis.enrichment import enrichment_table as enrichment_table
from koff_lightning.studies.analysis.knockout import knockout as knockout
from koff_lightning.studies.analysis.lape import Specialists as Specialists
from koff_lightning.studies.analysis.lape import entropy as entropy
from koff_lightning.studies.analysis.lape import identify as identify
from koff_lightning.studies.analysis.lape import identify_weighted as identify_weighted
from koff_lightning.studies.analysis.masks import Mask as Mask
from koff_lightning.studies.analysis.masks import NothingRemoved as NothingRemoved
from koff_lightning.studies.analysis.masks import mask_of as mask_of
from koff_lightning.studies.analysis.masks import read_mask as read_mask
from koff_lightning.studies.analysis.memory_use import adapter_norms as adapter_norms
from koff_lightning.studies.analysis.memory_use import promoted_tokens as promoted_tokens
from koff_lightning.studies.analysis.opening import open_run as open_run
from koff_lightning.studies.analysis.overlap import Overlap as Overlap
from koff_lightning.studies.analysis.overlap import overlap as overlap
from koff_lightning.studies.analysis.overlap import overlap_table as overlap_table
from koff_lightning.studies.analysis.regression import Logistic as Logistic
from koff_lightning.studies.analysis.regression import logistic as logistic
from koff_lightning.studies.analysis.scoring import score as score
from koff_lightning.studies.analysis.stability import Stability as Stability
from koff_lightning.studies.analysis.stability import stability as stability
from koff_lightning.studies.analysis.tables import layer_table as layer_table
from koff_lightning.studies.analysis.tables import strata as strata
from koff_lightning.studies.analysis.transfer import Transfer as Transfer
from koff_lightning.studies.analysis.transfer import transfer as transfer
