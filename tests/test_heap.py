"""Memory that was freed stays with the process: what is as large as a step's tensors is not mapped anew each time."""

import os
import subprocess
import sys

import pytest

from koff_lightning.cli import main

LOOP = """
import ctypes, resource, sys
if sys.argv[1:]:
    from koff_lightning.support.heap import keep_freed
    keep_freed()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks, size = [0] * 16, 4 * 2**20
def step():
    for place in range(16):  # all alive at one time, then freed
        blocks[place] = c.malloc(size)
        ctypes.memset(blocks[place], 1, size)
    for block in blocks:
        c.free(block)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> int:
    """Pages that the system mapped in four steps of 64 MiB, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", LOOP, *words]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_steps_find_their_memory_where_the_last_one_left_it() -> None:
    mapped = 4 * 64 * 2**20 // os.sysconf("SC_PAGESIZE")
    assert faults() > mapped / 2  # without it, all of it is mapped anew
    assert faults("keep") < mapped / 20
    assert faults("keep", MALLOC_ARENA_MAX="2") > mapped / 2  # the environment wins


def test_every_verb_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("koff_lightning.cli.keep_freed", lambda: asked.append(True))
    assert main(["configs"]) == 0
    assert asked == [True]
