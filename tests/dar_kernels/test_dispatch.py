"""The dispatcher: preference, names that are never replaced, reasons."""

import pytest
import torch

import dar_kernels
from dar_kernels import UnavailableError, native
from dar_kernels.dispatch import Implementation, Op, report, require

FP32, FP64 = torch.float32, torch.float64

OP = Op(
    name="double",
    implementations=(
        Implementation(name="triton", run=lambda x: 4 * x, missing=lambda: "pip install triton"),
        Implementation(name="native", run=lambda x: 2 * x, devices=("cpu",), dtypes=(FP32,)),
        Implementation(name="torch", run=lambda x: x + x),
    ),
)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", FP32, "native"), ("cpu", FP64, "torch"), ("cuda", FP32, "torch")],
    ids=str,
)
def test_first_that_can_run(device, dtype, expected):
    chosen = OP.choose(device, dtype)
    assert chosen.name == expected
    assert chosen.run(3) == 6


def test_named_one_is_taken_where_another_is_preferred():
    assert OP.choose("cpu", FP32, "torch").name == "torch"


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("cpu", FP32, "triton", "double on cpu in torch.float32: triton: pip install triton"),
        ("cuda", FP32, "native", "double on cuda in torch.float32: native: runs on cpu only"),
        ("cpu", FP64, "native", "native: takes torch.float32 only"),
    ],
    ids=["not-installed", "device", "dtype"],
)
def test_named_one_that_cannot_run_raises(device, dtype, name, reason):
    with pytest.raises(UnavailableError, match=reason):
        OP.choose(device, dtype, name)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="expected implementation one of triton, native, torch"):
        OP.choose("cpu", FP32, "cudnn")


LIBRARY = Op(
    name="triple",
    implementations=(
        Implementation(
            name="young", run=lambda x: x, devices=("cuda",), capability=(9, 0), by_default=False,
        ),
        Implementation(
            name="small", run=lambda x: x, limits=lambda call: None if call < 4 else "takes 3 only",
        ),
        Implementation(name="plain", run=lambda x: x, also=("torch",)),
    ),
)  # fmt: skip


def test_what_is_not_there_by_default_waits_for_its_name(monkeypatch):
    monkeypatch.setattr("dar_kernels.dispatch.capability", lambda: (9, 0))
    assert LIBRARY.pick("cuda", FP32) == "small"
    assert LIBRARY.pick("cuda", FP32, "young") == "young"
    assert LIBRARY.explain("cuda", FP32).others["young"] == "runs only where it is named"


def test_an_older_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr("dar_kernels.dispatch.capability", lambda: (8, 6))
    reason = r"young: needs compute capability 9\.0, this device has 8\.6"
    with pytest.raises(UnavailableError, match=reason):
        LIBRARY.pick("cuda", FP32, "young")
    with pytest.raises(UnavailableError, match=reason), require(LIBRARY, "young"):
        pass


def test_limits_are_of_the_call():
    assert LIBRARY.pick("cpu", FP32, call=3) == "small"
    assert LIBRARY.pick("cpu", FP32, call=4) == "plain"
    with pytest.raises(UnavailableError, match="small: takes 3 only"):
        LIBRARY.pick("cpu", FP32, "small", call=4)


def test_an_order_holds_for_one_op_and_ends():
    with require(LIBRARY, "torch"):
        assert LIBRARY.required == "plain" and LIBRARY.pick("cpu", FP32) == "plain"
        assert OP.pick("cpu", FP32) == "native" and OP.required is None
        with require(LIBRARY, "small"):
            assert LIBRARY.pick("cpu", FP32) == "small"
            with pytest.raises(UnavailableError, match=r"triple on cpu .* small: takes 3 only"):
                LIBRARY.pick("cpu", FP32, call=4)
        assert LIBRARY.required == "plain"
    assert LIBRARY.required is None and LIBRARY.pick("cpu", FP32) == "small"
    with pytest.raises(UnavailableError, match="double: triton: pip install triton"):
        with require(OP, "triton"):
            pass
    with pytest.raises(ValueError, match="triple: expected implementation one of young, small"):
        with require(LIBRARY, "old"):
            pass


def test_none_can_run():
    op = Op(name="double", implementations=OP.implementations[:2])
    with pytest.raises(UnavailableError, match=r"triton: pip install triton; native: runs on cpu"):
        op.choose("cuda", FP32)


def test_report_gives_every_reason():
    assert report([OP]) == {
        "double": {
            "cpu": ("native", {"triton": "pip install triton", "torch": "native is preferred"}),
            "cuda": ("torch", {"triton": "pip install triton", "native": "runs on cpu only"}),
        }
    }


def test_package_report_covers_every_op():
    described = dar_kernels.report()
    assert set(described) == {op.name for op in dar_kernels.OPS}
    for op in dar_kernels.OPS:
        for device in ("cpu", "cuda"):
            choice = described[op.name][device]
            assert choice.implementation == op.choose(device, FP32).name
            assert {choice.implementation, *choice.others} == {i.name for i in op.implementations}


def test_absent_extension_says_how_to_get_it(monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    reason = tmp_path / "reason.txt"
    reason.write_text("no working C++ compiler was found\n")
    monkeypatch.setattr(native, "import_module", absent)
    monkeypatch.setattr(native, "REASON", reason)
    native.missing.cache_clear()
    try:
        z = torch.randn(4, 8)
        with pytest.raises(UnavailableError, match=r"no working C\+\+ compiler.*pip install"):
            dar_kernels.vq_nearest(z, z, implementation="native")
        assert dar_kernels.report()["vq_nearest"]["cpu"].implementation == "torch"
        assert dar_kernels.vq_nearest(z, z).tolist() == [0, 1, 2, 3]
        assert native.isa_supported() == ()
        assert native.threading() is None
    finally:
        native.missing.cache_clear()


def test_broken_extension_says_what_broke(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3dar")

    monkeypatch.setattr(native, "import_module", broken)
    native.missing.cache_clear()
    try:
        assert "undefined symbol: _ZN3dar" in native.missing()
    finally:
        native.missing.cache_clear()
