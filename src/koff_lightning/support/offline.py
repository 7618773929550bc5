"""`--offline`: no network for anybody. The libraries read their switches when imported, so this comes before them."""

import os

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
ASKED = "KOFF_OFFLINE"  # ours, for the processes that a run starts
TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def switch_off() -> None:
    """Switch off the network for huggingface_hub, transformers, datasets, evaluate and what reports to them."""
    os.environ.update(dict.fromkeys((ASKED, *SWITCHES, *TELEMETRY), "1"))


def is_asked() -> bool:
    """Whether this process, or the one that started it, was given `--offline`."""
    return os.environ.get(ASKED, "0") not in ("", "0")
