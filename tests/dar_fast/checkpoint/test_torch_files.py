"""What torch.save writes is read back; other people's classes come back as records."""

import argparse
import pathlib
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from dar_fast.checkpoint.records import Record
from dar_fast.checkpoint.storages import DTYPES
from dar_fast.checkpoint.unpickler import read_torch_file


@pytest.fixture
def round_trip(tmp_path, read):
    def run(value, **options):
        torch.save(value, tmp_path / "file.pt", **options)
        return read(tmp_path / "file.pt")

    return run


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_dtypes(round_trip, dtype):
    tensor = torch.arange(1, 49, dtype=torch.uint8).view(dtype).clone()
    loaded = round_trip({"t": tensor})["t"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(round_trip, protocol):
    value = {
        "a": torch.arange(3),
        "n": -5,
        "big": 1 << 80,
        "s": "é" * 300,
        "none": None,
        "b": b"x\x00",
    }
    loaded = round_trip(value, pickle_protocol=protocol)
    assert torch.equal(loaded.pop("a"), value.pop("a"))
    assert loaded == value


def test_views_and_ties(round_trip):
    base = torch.arange(24.0).reshape(4, 6)
    loaded = round_trip(
        {"base": base, "t": base.t(), "tail": base[1:], "column": base[:, 2], "none": base[:0]}
    )
    for name, expected in (("t", base.t()), ("tail", base[1:]), ("column", base[:, 2])):
        assert torch.equal(loaded[name], expected), name
        assert loaded[name].stride() == expected.stride()
    assert loaded["none"].shape == (0, 6)
    loaded["base"][1, 2] = -1.0
    assert loaded["t"][2, 1] == loaded["tail"][0, 2] == loaded["column"][1] == -1.0


def test_writes_do_not_reach_the_file(tmp_path, read):
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(4)}, path)
    before = path.read_bytes()
    read(path)["w"].fill_(7.0)
    assert path.read_bytes() == before


def test_weights_are_mapped_and_not_read(tmp_path, read):
    """A gigabyte of holes opens: only the pickle is touched."""
    path = tmp_path / "file.pt"
    with torch.serialization.skip_data():
        torch.save({"w": torch.empty(1 << 28)}, path)
    assert path.stat().st_size > 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 24
    assert read(path)["w"].shape == (1 << 28,)


def test_parameters_and_modules_state(round_trip):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    loaded = round_trip(module.state_dict())
    assert type(loaded) is OrderedDict
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "attributes make torch use another constructor"
    assert torch.equal(round_trip([parameter])[0], torch.ones(2))


def test_containers_and_plain_values(round_trip):
    value = {
        "tuple": (1, (2.5, True)), "set": {1, 2}, "frozen": frozenset({"a"}), 3: [None],
        "size": torch.Size([2, 3]), "device": torch.device("cuda", 1), "dtype": torch.bfloat16,
        "array": bytearray(b"xyz"), "complex": 1 + 2j, "lists": defaultdict(list, a=[1]),
        "float": np.float64(0.5), "int": np.int64(-7), "bool": np.bool_(True),
    }  # fmt: skip
    loaded = round_trip(value)
    assert loaded == value
    assert type(loaded["size"]) is torch.Size
    assert type(loaded["int"]) is int


def test_namespace(round_trip):
    args = argparse.Namespace(
        lr=1e-4, path=pathlib.PurePosixPath("a/b"), inner=argparse.Namespace(x=1)
    )
    record = round_trip({"args": args})["args"]
    assert isinstance(record, Record)
    assert (record.module, record.name) == ("argparse", "Namespace")
    assert record.plain() == {"lr": 1e-4, "path": "a/b", "inner": {"x": 1}}


@pytest.fixture
def config_class():
    """A dict-like configuration class of a package that is gone when the file is read."""
    module = types.ModuleType("somebodys_config")

    class Config:
        def __init__(self, data):
            self._data = data

        def __getattr__(self, name):
            raise AttributeError(name)

        def __setstate__(self, state):
            raise AssertionError("ran")

    class Options(dict):
        pass

    for cls in (Config, Options):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


@pytest.mark.parametrize("protocol", [2, 4])
def test_dict_like_config_class(tmp_path, read, config_class, protocol):
    inner = config_class.Config({"depth": 2})
    value = {
        "config": config_class.Config({"dim": 8, "inner": inner}),
        "options": config_class.Options(a=1),
    }
    torch.save(value, tmp_path / "file.pt", pickle_protocol=protocol)
    del sys.modules[config_class.__name__]
    loaded = read(tmp_path / "file.pt")
    assert loaded["config"].plain() == {"dim": 8, "inner": {"depth": 2}}
    assert loaded["options"].plain() == {"a": 1}
    assert config_class.__name__ not in sys.modules


def test_optimizer_state(round_trip):
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    loaded = round_trip({"optimizer": optimizer.state_dict(), "steps": 3})
    expected = optimizer.state_dict()
    assert loaded["optimizer"]["param_groups"] == expected["param_groups"]
    moments = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, expected["state"][0]["exp_avg"])


def test_paths_may_be_strings(tmp_path):
    torch.save([1], tmp_path / "file.pt")
    assert read_torch_file(str(tmp_path / "file.pt")) == [1]
