"""Run-length strings against pycocotools, damaged ones, and kernels against their composites."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.library import opcheck

from maskrcnn_benchmark.ops import kernel_in_use
from maskrcnn_benchmark.ops.rle import (
    compress_rle,
    compress_rle_composite,
    decode_rle,
    rle_areas,
    rle_areas_composite,
)

OPS = torch.ops.maskrcnn_benchmark


# Larger runs overflow the buffer in which pycocotools itself writes a string.
runs = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**22)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(runs, max_size=4))
def test_compressed_strings_equal_pycocotools(counts):
    offsets = torch.tensor(np.cumsum([0] + [len(run) for run in counts]))
    flat = torch.tensor([count for run in counts for count in run], dtype=torch.int64)
    expected = [
        coco_mask.frPyObjects({"size": [1, 1], "counts": run}, 1, 1)["counts"].decode("ascii") for run in counts
    ]
    assert compress_rle(flat, offsets) == expected
    for ours, composite in zip(OPS.compress_rle(flat, offsets), compress_rle_composite(flat, offsets)):
        assert torch.equal(ours, composite)
    sizes = np.array([sum(run) for run in counts])
    assert rle_areas(expected, sizes).tolist() == [sum(run[1::2]) for run in counts]
    assert rle_areas(expected, sizes - 1).tolist() == [-1] * len(counts)


DAMAGED = ["0o", "\x01\u00e9", "zz", "0`1", "0" + "o" * 13 + "0", "oooooooooooo0" * 2, "0Q", "\u4e00"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_strings_have_no_area(text):
    assert rle_areas(["4", text, "04"], np.array([16, 16, 16])).tolist() == [0, -1, 4]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20).map(lambda b: bytes(48 + v % 66 for v in b).decode()), max_size=5))
def test_areas_of_any_text_equal_the_composite(texts):
    offsets = torch.tensor(np.cumsum([0] + [len(text) for text in texts]))
    text = torch.tensor(list("".join(texts).encode()), dtype=torch.uint8)
    pixels = torch.full((len(texts),), 10**6)
    expected = rle_areas_composite(text, offsets, pixels)
    assert torch.equal(OPS.rle_areas(text, offsets, pixels), expected)
    for one, area in zip(texts, expected.tolist()):
        if area >= 0:
            assert coco_mask.area({"size": [1000, 1000], "counts": one}) == area


def test_decode_rle_takes_every_form():
    bitmap = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(bitmap))
    for counts in (encoded["counts"], encoded["counts"].decode(), [2, 3, 1]):
        np.testing.assert_array_equal(decode_rle({"size": [2, 3], "counts": counts}), bitmap)


@pytest.mark.skipif(kernel_in_use("compress_rle", "cpu") == "composite", reason="the compiled kernels are not in use")
def test_wrong_offsets_are_errors():
    with pytest.raises(RuntimeError, match="ascend from 0 to 2"):
        OPS.compress_rle(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match="ascend"):
        OPS.rle_areas(torch.zeros(2, dtype=torch.uint8), torch.tensor([2, 0, 2]), torch.ones(2, dtype=torch.int64))


def test_opcheck():
    opcheck(OPS.compress_rle, (torch.tensor([3, 1, 100]), torch.tensor([0, 1, 3])))
    opcheck(OPS.rle_areas, (torch.tensor([48, 52], dtype=torch.uint8), torch.tensor([0, 2]), torch.tensor([9])))
