"""Knowledge offloading for frozen LLMs: a smaller shared backbone and one light, swappable memory per domain.

The public door. Names are imported when first used (PEP 562), so importing the package is immediate.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AnnealSparsity": "callbacks.anneal",
    "DomainDataModule": "data",
    "KOFFModule": "module",
    "KVMemory": "kv_memory",
    "KVSpec": "memory",
    "KoffError": "errors",
    "LoraSpec": "memory",
    "LossSpec": "losses",
    "MemoryBank": "memory",
    "OptimSpec": "optim",
    "SparsitySpec": "sparsity",
    "load_backbone": "backbone",
    "load_tokenizer": "backbone",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'koff_lightning' has no attribute {name!r}")
    return getattr(import_module(f"koff_lightning.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
