"""`koff fit` for real, a few steps on little bundled text, in a folder of the test's own."""

import signal
from contextlib import contextmanager

import yaml

from koff_lightning.cli import main


@contextmanager
def small_fits(folder, monkeypatch, **options):
    """Gives `run(root, *argv)`, which returns the exit status. Signal handlers are afterwards as before.

    Args:
        folder: The current one inside the block.
        options: Sections of a config, over those that keep a run small.
    """
    text = {"seq_len": 64, "batch_size": 4, "max_train_bytes": 20_000, "max_heldout_bytes": 1_500}
    quiet = {"accelerator": "cpu", "num_sanity_val_steps": 0, "enable_progress_bar": False, "log_every_n_steps": 1}
    small = {
        "data": {"domains": {"de": "bundled:de", "python": "bundled:python"}} | text,
        "trainer": quiet | options.pop("trainer"),
        "checkpoint": {"every_n_train_steps": 2},
    }
    monkeypatch.chdir(folder)
    (folder / "mine.yaml").write_text(yaml.safe_dump(small | options))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda root, *argv: main(["fit", "--config", "mine.yaml", f"--trainer.default_root_dir={root}", *argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
