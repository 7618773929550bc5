"""What code a config may name: our classes, and the parts of Lightning and torch from which a trainer is put together.

A `class_path` is code: it imports a module and calls what it finds there, with arguments from the same file. So configs
from others are data only as long as the names in them are ours to choose. The parser asks before it imports, wherever
the name stands: in a config, an overlay, on the command line, or inside the `init_args` of another class. The files of
lm-eval's tasks are code too: they name functions beside them (`!function`) or a class, and lm-eval calls these. And so
is a model that brings its own.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings  # there is no public way to take a setting back

from koff_lightning.support.errors import KoffError

SWITCH = "--allow-custom-classes"
TRUST = "--model.trust_remote_code"
KNOWN = (
    "koff_lightning",
    *(f"lightning.pytorch.{kind}" for kind in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
    *(f"lightning.{part}.accelerators" for part in ("fabric", "pytorch")),
    *(f"lightning.fabric.{kind}" for kind in ("plugins", "strategies")),
    "torch.device",
    "torch.distributed.fsdp",
    "torch.nn",
    "torch.optim",
    "torch.profiler",
)
# Classes of those parts that do whatever their arguments say.
UNSAFE = (
    "koff_lightning.cli",
    "koff_lightning.commands",
    "lightning.pytorch.callbacks.lambda_function",
)

# Where the classes of 0.1.0 are now: a config that a run has left may name the old place.
MOVED = {
    "koff_lightning.module": "koff_lightning.training.module",
    "koff_lightning.strategies": "koff_lightning.training.strategies",
    "koff_lightning.run.checkpoint_io": "koff_lightning.training.checkpoints",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module of `MOVED` by its old name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return import_module(MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its own name."""


@contextmanager
def only_known_classes(allow_custom: bool) -> Iterator[None]:
    """Refuse other names inside the block, before anything of theirs is imported.

    Args:
        allow_custom: Let configs name any class, but for those of the standard library that jsonargparse knows to run
            commands or to load code. Modules in the current folder are found too, as with `python script.py`.
    """
    if allow_custom and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for good: callbacks may import when they run
    before = dict(parsing_settings)
    # A mapping under an option of any type stays a mapping, even if it names a class.
    set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
    if not allow_custom:
        set_parsing_settings(import_path_denylist=["*", *UNSAFE], import_path_allowlist=list(KNOWN))
    moved = _Moved()
    sys.meta_path.append(moved)
    try:
        yield
    finally:
        sys.meta_path.remove(moved)
        parsing_settings.update(before)


def refuse_task_files(include_path: str | None, tasks: Iterable[str]) -> None:
    """Raise KoffError if a config takes tasks from files that are not lm-eval's or ours.

    Args:
        include_path: Its `lm_eval.include_path`.
        tasks: Names, patterns or paths of its `lm_eval.tasks`.
    """
    files = {f"lm_eval.include_path {include_path}": include_path}
    files |= {f"lm_eval.tasks: {task}": task.endswith((".yaml", ".yml")) for task in tasks}
    for what, is_file in files.items():
        if is_file:
            raise KoffError(f"{what}: task files may run Python of their own. If you trust them, add {SWITCH}")


def refuse_remote_code(trusted: bool, words: Sequence[str]) -> None:
    """Raise KoffError if a config alone lets the code of a model's repository run.

    Args:
        trusted: Its `model.trust_remote_code`.
        words: Words of the command line, which may say the same.
    """
    said = " ".join(words).replace(f"{TRUST} ", f"{TRUST}=").split()
    if trusted and SWITCH not in words and f"{TRUST}=true" not in said:
        raise KoffError(
            "model.trust_remote_code: true lets code of the model's repository run, which is not for a config to say. "
            f"If you trust that repository, add {TRUST}=true to the command"
        )
