"""Weights of a decoder in one byte, and pages that are copied."""

import pytest
import torch
from decoders import ODD, PLAIN, clone, make_pages, make_weights

from dar_kernels.decoder_weights import new_decoder_pages
from dar_kernels.pages import LARGEST_CODE, PAGE_DTYPES
from dar_kernels.quantize import QuantizedWeight, quantize_weight

BYTES = [torch.int8, torch.float8_e4m3fn]


def bits(tensor):
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_quantize_takes_products_and_head_alone(dtype):
    weights = make_weights(ODD, torch.bfloat16)
    assert weights.quantized is None
    ours = weights.quantize(dtype)
    assert ours.quantized == dtype
    for plain, layer in zip(weights.layers, ours.layers, strict=True):
        assert layer.attention_norm is plain.attention_norm and layer.mlp_norm is plain.mlp_norm
        for weight, quantized in zip(plain.products(), layer.products(), strict=True):
            expected = quantize_weight(weight, dtype)
            assert torch.equal(bits(quantized.values), bits(expected.values))
            assert torch.equal(quantized.scale, expected.scale)
    assert isinstance(ours.head, QuantizedWeight)
    assert ours.token_embedding is weights.token_embedding and ours[5:] == weights[5:]


def test_quantize_twice_copies_nothing_or_is_refused():
    weights = make_weights(PLAIN).quantize(torch.int8)
    again = weights.quantize(torch.int8)
    assert again.head is weights.head and again.layers[1].down is weights.layers[1].down
    with pytest.raises(TypeError, match=r"expected dtype torch.int8, which .* got torch.float8"):
        weights.quantize(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"expected dtype one of .*, got torch.int16"):
        make_weights(PLAIN).quantize(torch.int16)


def test_map_reaches_every_tensor():
    weights = make_weights(PLAIN).quantize(torch.int8)
    seen = []
    moved = weights.map(lambda t: seen.append(t) or t.to("meta"))
    assert len(seen) == 2 * (2 + 2 * 5) + 2 + 4  # layers of 2 norms, 5 pairs; head; the others
    assert moved.head.values.device.type == moved.layers[0].qkv.scale.device.type == "meta"
    assert moved.quantized == torch.int8 and moved.heads == weights.heads


@pytest.mark.parametrize("dtype", PAGE_DTYPES, ids=str)
def test_new_pages_and_their_layers(dtype):
    weights = make_weights(ODD)
    pages = new_decoder_pages(weights, 5, dtype)
    assert pages.keys.shape == pages.values.shape == (2, 5, 2, 32, 24)
    assert pages.keys.dtype == dtype and not bits(pages.keys).any()
    assert (pages.key_scales is not None) == (dtype in LARGEST_CODE)
    layers = list(pages.by_layer())
    assert len(layers) == 2
    for part, whole in zip(layers[1], pages, strict=True):
        assert (part is None) == (whole is None)
        if part is not None:
            assert part.data_ptr() == whole[1].data_ptr() and part.shape == whole.shape[1:]
            assert part.dtype == whole.dtype


def test_pages_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"expected dtype one of .*, got torch.int32"):
        new_decoder_pages(make_weights(ODD), 5, torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *BYTES], ids=str)
def test_copies_read_all_before_they_write(dtype):
    pages, _ = make_pages(make_weights(ODD), 2, dtype)
    before = clone(pages)
    pages.copy([(0, 1), (1, 2), (5, 5), (0, 7)])
    expected = list(range(pages.keys.shape[1]))
    expected[1], expected[2], expected[7] = 0, 1, 0
    for ours, theirs in zip(pages, before, strict=True):
        assert (ours is None) == (theirs is None) == (dtype not in LARGEST_CODE) or ours is not None
        if ours is not None:
            assert torch.equal(bits(ours), bits(theirs)[:, expected])


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([(0, 9)], ValueError, r"pages in \[0, 9\), got 9"),
        ([(-1, 0)], ValueError, r"pages in \[0, 9\), got -1"),
        ([(0, 3), (1, 3)], ValueError, "different targets, got page 3 twice"),
        ([(0, 1.0)], TypeError, "pages as integers, got 1.0"),
        ([(True, 1)], TypeError, "got True"),
    ],
    ids=str,
)
def test_pages_that_cannot_be_copied_are_named(pairs, error, message):
    pages, _ = make_pages(make_weights(ODD), 2, torch.float32)
    before = clone(pages)
    pages.copy([])
    with pytest.raises(error, match=message):
        pages.copy(pairs)
    assert torch.equal(pages.keys, before.keys)
