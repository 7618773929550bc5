"""How threads wait for each other."""

import os


def wait_asleep() -> None:
    """Let the threads of a process that has not loaded torch yet sleep while they wait; what the environment says wins.

    OpenMP's threads spin at every barrier. On a machine that others use too they spin while the one they wait for has
    no core to run on: see "A short run, alone and on a busy machine" in docs/results/bench.md. Processes that are
    started later inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
