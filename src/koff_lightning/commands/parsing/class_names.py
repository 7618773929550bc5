"""What code a config may name: our classes, and the parts of Lightning and torch from which a trainer is put together.

A `class_path` is code: it imports a module and calls what it finds there, with arguments from the same file. So configs
from others are data only as long as the names in them are ours to choose. The parser asks before it imports, wherever
the name stands: in a config, an overlay, on the command line, or inside the `init_args` of another class. The files of
lm-eval's tasks are code too: they name functions beside them (`!function`) or a class, and lm-eval calls these. And so
is a model that brings its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def only_known_classes(allow_custom: bool) -> Iterator[None]:
    """Refuse other names inside the block, before anything of theirs is imported.

    Args:
        allow_custom: Let configs name any class, but for those of the standard library that jsonargparse knows to run
            commands or to load code.
    """
    before = dict(parsing_settings)
    # A mapping under an option of any type stays a mapping, even if it names a class.
    set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
    if not allow_custom:
        set_parsing_settings(import_path_denylist=["*", *UNSAFE], import_path_allowlist=list(KNOWN))
    try:
        yield
    finally:
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
        words: Of the command line, which may say the same.
    """
    said = " ".join(words).replace(f"{TRUST} ", f"{TRUST}=").split()
    if trusted and SWITCH not in words and f"{TRUST}=true" not in said:
        raise KoffError(
            "model.trust_remote_code: true lets code of the model's repository run, which is not for a config to say. "
            f"If you trust that repository, add {TRUST}=true to the command"
        )
