"""Launches among a profile's averages; nothing to say where there is no GPU."""

from types import SimpleNamespace

import torch

from dar_fast.bench.host import count_launches, host_work


def test_launches_are_counted_by_name_and_times():
    names = {
        "cudaGraphLaunch": 8,
        "cudaLaunchKernel": 3,
        "aten::mm": 99,
        "cudaStreamSynchronize": 5,
    }
    events = [SimpleNamespace(key=key, count=count) for key, count in names.items()]
    assert count_launches(events) == 11


def test_a_cpu_launches_nothing():
    assert host_work(None, [0], 16, torch.device("cpu")) is None
