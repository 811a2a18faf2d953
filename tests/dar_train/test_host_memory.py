"""In a process of its own, since the setting is the process's: pages of freed blocks come back."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from dar_train.host_memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else True)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    for _ in range(4):
        torch.ones(64 * 2**20, dtype=torch.uint8)

for _ in range(4):  # the heap grows to its peak
    step()
before = faults()
step()
print(faults() - before)
"""
PAGES = 4 * 64 * 2**20 // 4096  # of a step, where they are not huge


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_pages_are_used_again(keep) -> None:
    command = [sys.executable, "-c", PROGRAM, "keep" if keep else "leave"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    arranged, faults = done.stdout.split()
    if arranged != "True":
        pytest.skip("another C library")
    assert int(faults) < PAGES / 100 if keep else int(faults) > PAGES / 100


def test_other_systems_are_left_alone(monkeypatch) -> None:
    from dar_train.host_memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
