"""A checkpoint of `koff fit` as a model, and as the start of another run."""

from pathlib import Path

from koff_lightning.decomposition import Decomposition
from koff_lightning.memory import KVSpec, LoraSpec
from koff_lightning.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.training.checkpoints import read_checkpoint


def from_checkpoint(path: str | Path, backbone: str | None = None) -> Decomposition:
    """The decomposition that a checkpoint holds, on the CPU, ready to run.

    The backbone is loaded without code of its own, whatever the run's options were.

    Args:
        path: A `.ckpt` file of `koff fit`.
        backbone: Where the backbone is, if it is no longer where the run found it.

    Raises:
        KoffError: No such file, not a checkpoint of `koff fit`, or a backbone that is missing or another one.
    """
    path = Path(path).expanduser()
    checkpoint = read_checkpoint(path, mmap=True)
    options = checkpoint["hyper_parameters"]
    if options.get("artifact"):
        raise KoffError(
            f"{path} holds memories for the artifact {options['artifact']!r}, where that run put them, and no backbone"
        )
    try:
        module = Decomposition(
            backbone or options["backbone"],
            options["domains"],
            SparsitySpec(**options["sparsity"]),
            options["lora"] and LoraSpec(**options["lora"]),
            options["kv"] and KVSpec(**options["kv"]),
            options["shared_memory"],
            revision=options["revision"] if backbone is None else None,
            dtype=options["dtype"],
        )
    except (TypeError, KeyError) as error:
        raise KoffError(f"{path} was written by another release of koff-lightning ({error}): use that one") from error
    try:
        module.configure_model()
    except KoffError as error:
        hint = "" if backbone else " (if the backbone has moved, say where it is with --backbone)"
        raise KoffError(f"{path}: {error}{hint}") from error
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module


def warm_start(module: Decomposition, path: str) -> None:
    """Give a new run the trained weights of a checkpoint, from whatever strategy and number of processes it came.

    Memories and mask come along; steps, rates, multipliers and random state do not. A mask that was fixed stays fixed,
    so that only the memories train on; one that was not is ordered anew when the ramp begins, by what it sees.

    Raises:
        KoffError: The checkpoint cannot be read or is of another make, or its mask is fixed at another size.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    module.check_fits(checkpoint)
    state = checkpoint["state_dict"]
    anew = ("gates.seed", "penalty.")
    if not state.get("gates.hardened", False):
        anew += ("gates.importance",)
    module.load_state_dict({name: value for name, value in state.items() if not name.startswith(anew)}, strict=False)
