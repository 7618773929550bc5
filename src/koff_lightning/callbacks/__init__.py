"""When things happen in a run: the schedule of the mask, checks, progress, and the report at the end."""

from koff_lightning.callbacks.anneal import AnnealSparsity as AnnealSparsity
from koff_lightning.callbacks.coverage import GradientCoverage as GradientCoverage
from koff_lightning.callbacks.progress import KoffProgress as KoffProgress
from koff_lightning.callbacks.report import RunReport as RunReport
