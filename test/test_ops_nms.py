"""Non-maximum suppression against hand-worked cases, a loop, its composite and maskrcnn-benchmark."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from maskrcnn_benchmark.ops import nms as nms_module
from maskrcnn_benchmark.ops.nms import nms, nms_composite, nms_indices

NAN, INF = float("nan"), float("inf")
PAIR = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU .5


def one_image(boxes, scores, groups=None, valid=None):
    boxes, scores = torch.as_tensor(boxes), torch.as_tensor(scores)
    groups = torch.zeros(len(scores), dtype=torch.int64) if groups is None else torch.as_tensor(groups)
    valid = torch.ones(len(scores), dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return boxes[None], scores[None], groups[None], valid[None]


def kept(inputs, threshold: float, max_output: int = 10) -> list[int]:
    index, keep = nms(*inputs, threshold, max_output)
    assert index.shape == keep.shape == (1, max_output)
    count = int(keep.sum())
    assert keep[0, :count].all(), "kept rows come first"
    assert (index[0, count:] == 0).all(), "rows beyond them are 0"
    return index[0, :count].tolist()


def test_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 0, 12, 10]])
    # 0 and 1 share 9 / 11, 0 and 3 share 8 / 12: box 1 wins over both, 3 shares 9 / 11 with it.
    assert kept(one_image(boxes, [0.8, 0.9, 0.1, 0.7]), 0.5) == [1, 2]
    assert kept(one_image(boxes, [0.8, 0.9, 0.1, 0.7]), 0.7) == [1, 2]
    assert kept(one_image(boxes, [0.9, 0.8, 0.1, 0.7]), 0.7) == [0, 3, 2], "a dropped box drops nothing"


def test_only_an_iou_above_the_threshold_suppresses():
    assert kept(one_image(PAIR, [0.9, 0.8]), 0.5) == [0, 1]
    assert kept(one_image(PAIR, [0.9, 0.8]), 0.49) == [0]


def test_equal_scores_keep_their_order():
    assert kept(one_image(PAIR, [0.5, 0.5]), 0.4) == [0]
    assert kept(one_image(PAIR.flip(0), [0.5, 0.5]), 0.9) == [0, 1]


def test_groups_and_invalid_rows():
    assert kept(one_image(PAIR, [0.9, 0.8], groups=[7, -3]), 0.1) == [0, 1]
    assert kept(one_image(PAIR, [0.9, 0.8], valid=[False, True]), 0.1) == [1]


def test_stops_at_max_output():
    boxes = torch.arange(5.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    assert kept(one_image(boxes, [0.1, 0.5, 0.3, 0.4, 0.2], groups=[0, 1, 0, 1, 0]), 0.5, max_output=3) == [1, 3, 2]
    assert kept(one_image(boxes, [0.1, 0.5, 0.3, 0.4, 0.2]), 0.5, max_output=0) == []


@pytest.mark.parametrize("function", [nms, nms_composite])
def test_what_is_not_a_number_neither_comes_out_nor_suppresses(function):
    boxes = [[0, 0, NAN, 10.0], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, INF, 10], [10, 10, 0, 0], [0, 0, 10, 10]]
    scores = [0.9, NAN, 0.7, 0.6, 0.5, -INF]
    index, keep = function(*one_image(boxes, scores), 0.5, 4)
    assert keep.tolist() == [[True, True, True, False]]
    assert index.tolist() == [[2, 3, 4, 0]], (
        "an infinite and an inverted box overlap nothing, the last equals the first"
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 60),
    groups=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    max_output=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_loop_and_the_composite(seed, count, groups, threshold, max_output, dtype):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (2, count, 2), generator=generator)
    sides = torch.randint(0, 8, (2, count, 2), generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=-1).to(dtype)
    scores = torch.randint(0, 20, (2, count), generator=generator).to(dtype)
    group = torch.randint(0, groups, (2, count), generator=generator)
    valid = torch.rand(2, count, generator=generator) > 0.2
    inputs = (boxes, scores, group, valid, threshold, max_output)
    index, keep = nms(*inputs)
    for ours, composite in zip((index, keep), nms_composite(*inputs)):
        assert torch.equal(ours, composite)
    for i in range(2):
        rows = (boxes[i].numpy(), scores[i].numpy(), group[i].tolist(), valid[i].tolist())
        # The operator compares the intersection with threshold x union, so does the loop for whole numbers.
        assert index[i][keep[i]].tolist() == reference.nms(*rows, threshold, max_output)


@pytest.mark.parametrize("max_output", [3, 50, 300, 2000])
def test_composite_equals_the_kernel_over_several_blocks(monkeypatch, max_output):
    monkeypatch.setattr(nms_module, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(2, 500, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + torch.rand(2, 500, 2, generator=generator) * 60], dim=-1)
    scores = torch.rand(2, 500, generator=generator)
    groups = torch.randint(0, 2, (2, 500), generator=generator)
    valid = torch.rand(2, 500, generator=generator) > 0.1
    inputs = (boxes, scores, groups, valid, 0.4, max_output)
    for ours, composite in zip(nms(*inputs), nms_composite(*inputs)):
        assert torch.equal(ours, composite)


def test_a_chain_of_overlaps_settles_in_the_composite():
    """Each box overlaps only its neighbours: every second one stays, and the answer travels down the whole chain."""
    boxes = torch.arange(300.0)[:, None] * torch.tensor([4.0, 0, 4, 0]) + torch.tensor([0.0, 0, 10, 10])
    inputs = one_image(boxes, torch.linspace(1, 0, 300))
    index, keep = nms_composite(*inputs, 0.3, 300)
    assert index[keep].tolist() == list(range(0, 300, 2)) == kept(inputs, 0.3, 300)


def test_scores_of_another_precision():
    assert kept(one_image(PAIR, torch.tensor([0.25, 0.5], dtype=torch.bfloat16)), 0.4) == [1]


def test_nms_indices():
    boxes = torch.cat([PAIR, torch.tensor([[50.0, 50, 60, 60]])])
    assert nms_indices(boxes, torch.tensor([0.1, 0.3, 0.9]), 0.4).tolist() == [2, 1]
    assert nms_indices(torch.zeros(0, 4), torch.zeros(0), 0.4).tolist() == []


def test_wrong_shapes_are_errors():
    boxes, scores, groups, valid = one_image(PAIR, [0.9, 0.8])
    with pytest.raises(ValueError, match="boxes must be"):
        nms(boxes[0], scores, groups, valid, 0.5, 3)
    with pytest.raises(ValueError, match="valid must be"):
        nms(boxes, scores, groups, valid[:, :1], 0.5, 3)
    with pytest.raises(ValueError, match="max_output"):
        nms(boxes, scores, groups, valid, 0.5, -1)


def test_opcheck():
    opcheck(torch.ops.maskrcnn_benchmark.nms, (*one_image(PAIR, [0.9, 0.8]), 0.4, 5))


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_agrees_with_maskrcnn_benchmark(shared, threshold):
    """It takes widths as x2 - x1 + 1 and returns ascending indices; no pair of `boxes` lies exactly at a threshold."""
    with np.load(shared / "fixtures" / "maskrcnn_benchmark_ops.npz") as arrays:
        boxes, scores = torch.from_numpy(arrays["nms/boxes"]), torch.from_numpy(arrays["nms/scores"])
        expected = arrays[f"nms/keep_{threshold}"]
    index = nms_indices(boxes + torch.tensor([0.0, 0, 1, 1]), scores, threshold)
    assert index.sort().values.tolist() == expected.tolist()
