"""attention: which back end is chosen, and what is said of one that cannot run."""

import pytest
import torch

from dar_kernels import UnavailableError, attention, prefer
from dar_kernels import attention_backends as backends
from dar_kernels.attention import OP

NATIVE = OP.named("native").missing() is None


def inputs():
    return [torch.randn(2, heads, 9, 16) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "call", "reason"),
    [
        ("flash-attn", "cpu", torch.bfloat16, None, "runs on cuda only"),
        ("flash-attn", "cuda", torch.float32, None, "takes torch.float16, torch.bfloat16 only"),
        ("flash-attn", "cuda", torch.bfloat16, (12, False, "full"),
         "takes head widths 8 to 256 in steps of 8, got 12"),
        ("sdpa-cudnn", "cuda", torch.bfloat16, (256, False, "full"),
         "takes head widths 8 to 128 in steps of 8, got 256"),
        ("native", "cuda", torch.bfloat16, None, "runs on cpu only"),
        ("native", "cpu", torch.float32, None, "takes torch.bfloat16 only"),
    ],
)  # fmt: skip
def test_reasons_are_sentences(name, device, dtype, call, reason):
    assert OP.named(name).why_not(device, dtype, named=True, grad=True, call=call) == reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (backends.Limits(head_dims=(16, 32)), "takes head widths 16, 32, got 64"),
        (backends.Limits(grouped=False), "takes as many heads of keys as of queries"),
        (backends.Limits(kinds=("full",)), "takes calls of kind full, got prefix"),
        (backends.Limits(), None),
    ],
    ids=["width", "grouped", "kind", "none"],
)
def test_limits_of_a_call(limits, reason):
    assert limits(backends.Call(64, True, "prefix")) == reason


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr("dar_kernels.dispatch.capability", lambda: (8, 6))
    found = backends._library("young", lambda *x: None, lambda: None, capability=(9, 0))
    reason = found.why_not("cuda", torch.bfloat16, named=True)
    assert reason == "needs compute capability 9.0, this device has 8.6"


NEEDS = {"flash-attn-4": "flash_attn.cute", "flash-attn": "flash_attn", "xformers": "xformers"}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_says_how_to_get_it(name, monkeypatch):
    def absent(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(backends, "import_module", absent)
    OP.named(name).missing.cache_clear()
    try:
        with pytest.raises(UnavailableError, match=rf"{name}: not installed: pip .*\[{name}\]"):
            with prefer(name, op="attention"):
                pass
    finally:
        OP.named(name).missing.cache_clear()


def test_a_package_that_does_not_load_says_why(monkeypatch):
    def broken(module):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(backends, "import_module", broken)
    missing = backends._package("flash_attn", "flash_attn_func", "flash-attn")
    assert "undefined symbol: _ZN3c10" in missing()
    monkeypatch.setattr(backends, "import_module", lambda module: object())
    missing = backends._package("flash_attn", "flash_attn_func", "flash-attn")
    assert "no attribute 'flash_attn_func'" in missing()  # only flash-attn-4 is there

    def half(module):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(backends, "import_module", half)
    missing = backends._package("xformers.ops", "memory_efficient_attention", "xformers")
    assert missing().startswith("does not import (No module named 'numpy'): ")
    assert missing().endswith("pip install 'dar-fast[xformers]'")


def test_a_name_is_no_hint():
    q, k, v = inputs()
    with prefer("reference", op="attention"):
        assert OP.pick("cpu", torch.float32) == "reference"
        assert OP.pick("cpu", torch.float32, "sdpa") == "sdpa"
        with prefer("torch"):  # a wish gives way to an order
            assert OP.pick("cpu", torch.float32) == "reference"
    with pytest.raises(UnavailableError, match=r"attention on cpu in torch.float32: flash-attn: "):
        attention(q, k, v, implementation="flash-attn")
    with pytest.raises(ValueError, match=r"expected implementation one of native, sdpa, .*'flash'"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="attention: expected implementation one of"):
        with prefer("fast", op="attention"):
            pass
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'atention'"):
        with prefer("sdpa", op="atention"):
            pass


@pytest.mark.skipif(not NATIVE, reason="no AVX-512 BF16")
def test_a_named_back_end_refuses_a_call_that_it_does_not_take():
    q, k, v = inputs()
    with prefer("native", op="attention"):
        assert attention(*(x.bfloat16() for x in (q, k, v))).dtype == torch.bfloat16
        with pytest.raises(UnavailableError, match=r"native: takes torch.bfloat16 only"):
            attention(q, k, v)


def test_wishes_name_the_library_or_our_own():
    with prefer("torch"):
        assert OP.pick("cpu", torch.bfloat16) == "sdpa"
    assert OP.pick("cpu", torch.float32, "torch") == "sdpa"
    assert OP.pick("cpu", torch.float32) == "sdpa"
    first = OP.pick("cpu", torch.bfloat16)
    assert first == ("native" if NATIVE else "sdpa")
    assert OP.pick("cuda", torch.bfloat16) == "sdpa"
