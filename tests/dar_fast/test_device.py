"""The device that a caller names."""

import pytest
import torch

from dar_fast.device import pick_device


@pytest.mark.parametrize(("gpu", "expected"), [(False, "cpu"), (True, "cuda")])
def test_by_default_the_gpu_where_there_is_one(gpu, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert pick_device(None) == torch.device(expected)


def test_as_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("abacus", ValueError, "device: expected one such as 'cpu' or 'cuda', got 'abacus'"),
        ("cuda:0", ValueError, "got 'cuda:0': no GPU is at hand"),
        (3, TypeError, "device: expected a string or torch.device, got int"),
    ],
)
def test_what_is_no_device_here(device, error, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        pick_device(device)
