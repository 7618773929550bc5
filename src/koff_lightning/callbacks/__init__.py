"""When things happen in a run: the schedule of the mask, checks, progress, and at the end report and artifact."""

from koff_lightning.callbacks.anneal import AnnealSparsity as AnnealSparsity
from koff_lightning.callbacks.checkpoints import Checkpoints as Checkpoints
from koff_lightning.callbacks.checkpoints import ContinuedLog as ContinuedLog
from koff_lightning.callbacks.coverage import GradientCoverage as GradientCoverage
from koff_lightning.callbacks.export import ExportArtefact as ExportArtefact
from koff_lightning.callbacks.export import ExportArtifact as ExportArtifact
from koff_lightning.callbacks.lm_eval import LMEval as LMEval
from koff_lightning.callbacks.lm_eval import LMEvalTask as LMEvalTask
from koff_lightning.callbacks.placement import PlaceMemories as PlaceMemories
from koff_lightning.callbacks.preview import Preview as Preview
from koff_lightning.callbacks.progress import KoffProgress as KoffProgress
from koff_lightning.callbacks.report import RunReport as RunReport
