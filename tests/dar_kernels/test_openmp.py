"""Teams of threads that are let go are gone, and come back when they are needed."""

import os
import threading

import pytest
import torch

from dar_kernels import openmp


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads")
def test_a_team_goes_and_comes_back() -> None:
    seen: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(2):
            seen.append(threads())
            assert torch.ones(2**22).sum() == 2**22
            seen.append(threads())
            assert openmp.release_threads()
            seen.append(threads())

    if not openmp.release_threads():
        pytest.skip("torch has another OpenMP runtime here")
    before = torch.get_num_threads()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    torch.set_num_threads(before)
    alone, team, gone = seen[:3]
    assert (team, gone) == (alone + 1, alone)
    assert seen[3:] == seen[:3]


def test_without_that_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_pause", lambda: None)
    assert not openmp.release_threads()
