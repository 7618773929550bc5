"""Knowledge offloading for frozen LLMs: a smaller shared backbone and one light, swappable memory per domain.

The public door. Names are imported when first used (PEP 562); the model types that we write are made known at once.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from koff_lightning.support.threads import wait_asleep

if TYPE_CHECKING:  # what type checkers and editors know of the names below
    from IPython.core.interactiveshell import InteractiveShell

    from koff_lightning.artifact.checkpoint import from_checkpoint as from_checkpoint
    from koff_lightning.artifact.decomposed import load_decomposed as load_decomposed
    from koff_lightning.artifact.export import export as export
    from koff_lightning.callbacks.anneal import AnnealSparsity as AnnealSparsity
    from koff_lightning.data import DomainDataModule as DomainDataModule
    from koff_lightning.kv_memory import KVMemory as KVMemory
    from koff_lightning.loading import load_backbone as load_backbone
    from koff_lightning.loading import load_tokenizer as load_tokenizer
    from koff_lightning.memory import MemoryBank as MemoryBank
    from koff_lightning.specs.memories import KVSpec as KVSpec
    from koff_lightning.specs.memories import LoraSpec as LoraSpec
    from koff_lightning.specs.sparsity import SparsitySpec as SparsitySpec
    from koff_lightning.specs.training import LossSpec as LossSpec
    from koff_lightning.specs.training import OptimSpec as OptimSpec
    from koff_lightning.support.errors import KoffError as KoffError
    from koff_lightning.training.module import KOFFModule as KOFFModule

__version__ = "0.1.0"

_HOME = {
    "AnnealSparsity": "callbacks.anneal",
    "DomainDataModule": "data",
    "KOFFModule": "training.module",
    "KVMemory": "kv_memory",
    "KVSpec": "specs.memories",
    "KoffError": "support.errors",
    "LoraSpec": "specs.memories",
    "LossSpec": "specs.training",
    "MemoryBank": "memory",
    "OptimSpec": "specs.training",
    "SparsitySpec": "specs.sparsity",
    "export": "artifact.export",
    "from_checkpoint": "artifact.checkpoint",
    "load_backbone": "loading",
    "load_decomposed": "artifact.decomposed",
    "load_tokenizer": "loading",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'koff_lightning' has no attribute {name!r}")
    return getattr(import_module(f"koff_lightning.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(shell: "InteractiveShell") -> None:
    """Make the line magic `%koff` known: `%load_ext koff_lightning` in a notebook calls this."""
    from koff_lightning.notebook import load

    load(shell)


def _is_command() -> bool:
    """Whether this process is `koff` or `python -m koff_lightning`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # Python is still looking for the module to run
        return "koff_lightning" in sys.orig_argv
    return Path(program).name in ("koff", "koff.exe", "koff-script.py")


if "torch" not in sys.modules:  # OpenMP reads the environment as torch is loaded
    wait_asleep()

# `import koff_lightning` must suffice for `AutoModelForCausalLM.from_pretrained` on an artifact. The lightest way into
# transformers is by its own classes: 5 s of imports, which nearly every use of this package needs anyway. The help of
# the command does not, so there it is left to the verbs that load a model (backbone.py).
if not _is_command():
    import_module("koff_lightning.artifact.modeling_koff")
