"""When things happen in a run: the schedule of the mask, checks, progress, and at the end report and artefact."""

from koff_lightning.callbacks.anneal import AnnealSparsity as AnnealSparsity
from koff_lightning.callbacks.coverage import GradientCoverage as GradientCoverage
from koff_lightning.callbacks.export import ExportArtefact as ExportArtefact
from koff_lightning.callbacks.progress import KoffProgress as KoffProgress
from koff_lightning.callbacks.report import RunReport as RunReport
