"""The matcher against hand-worked cases, a loop and its composite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from maskrcnn_benchmark.ops.matching import match, match_composite

NAN = float("nan")


def whole_boxes(generator: torch.Generator, *shape: int, dtype=torch.float32) -> torch.Tensor:
    """Small whole numbers, so that equal IoUs, and empty and inverted boxes, are frequent."""
    corner = torch.randint(0, 8, (*shape, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(-1, 8, (*shape, 2), generator=generator)], dim=-1).to(dtype)


def test_by_hand():
    gt = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    #                         IoU 1        .5 with 0     .2 with 0     .6 with 1       none
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [24, 0, 30, 10], [50, 50, 60, 60]])
    index, label = match(gt, valid, anchors, 0.7, 0.3, False)
    assert index.tolist() == [[0, 0, 0, 1, 0]]
    assert label.tolist() == [[1, -1, 0, -1, 0]]
    _, label = match(gt, valid, anchors, 0.7, 0.3, True)
    assert label.tolist() == [[1, -1, 0, 1, 0]]


def test_thresholds_include_high_and_exclude_low():
    gt = torch.tensor([[[0.0, 0, 10, 10]]])
    anchors = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 2.5]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert match(gt, valid, anchors, 0.5, 0.25, False)[1].tolist() == [[1, -1]]


def test_all_anchors_that_tie_for_a_ground_truth_become_positive_and_keep_their_own_index():
    gt = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 20, 10]]])
    anchors = torch.tensor([[0.0, 0, 10, 12], [0, -2, 10, 10], [0, 0, 5, 10]])
    index, label = match(gt, torch.ones(1, 2, dtype=torch.bool), anchors, 0.99, 0.3, True)
    assert index.tolist() == [[0, 0, 0]]
    assert label.tolist() == [[1, 1, -1]]


def test_ties_take_the_lowest_ground_truth_and_padding_never_wins():
    gt = torch.tensor([[[0.0, 0, 4, 4]] * 3])
    anchors = torch.tensor([[0.0, 0, 4, 4]])
    assert match(gt, torch.tensor([[False, True, True]]), anchors, 0.5, 0.5, True)[0].item() == 1
    index, label = match(gt, torch.zeros(1, 3, dtype=torch.bool), anchors, 0.5, 0.5, True)
    assert (index.item(), label.item()) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), gt_count=st.integers(0, 19), anchor_count=st.integers(0, 40), low_quality=st.booleans()
)
def test_equals_the_loop_and_the_composite(dtype, shared, seed, gt_count, anchor_count, low_quality):
    generator = torch.Generator().manual_seed(seed)
    gt = whole_boxes(generator, 2, gt_count, dtype=dtype)
    valid = torch.rand(2, gt_count, generator=generator) > 0.3
    anchors = whole_boxes(generator, *([] if shared else [2]), anchor_count, dtype=dtype)
    arguments = (gt, valid, anchors, 0.5, 0.25, low_quality)
    index, label = match(*arguments)
    for ours, composite in zip((index, label), match_composite(*arguments)):
        assert torch.equal(ours, composite)
    for image in range(2):
        rows = (anchors if shared else anchors[image]).numpy()
        expected = reference.match(gt[image].numpy(), valid[image].tolist(), rows, 0.5, 0.25, low_quality)
        assert (index[image].tolist(), label[image].tolist()) == expected


def test_more_anchors_than_a_block_equal_the_composite():
    generator = torch.Generator().manual_seed(0)
    gt, anchors = whole_boxes(generator, 2, 11), whole_boxes(generator, 2, 5000) + 0.25
    valid = torch.ones(2, 11, dtype=torch.bool)
    for ours, composite in zip(
        match(gt, valid, anchors, 0.7, 0.3, True), match_composite(gt, valid, anchors, 0.7, 0.3, True)
    ):
        assert torch.equal(ours, composite)


def test_what_is_not_a_number_or_infinite_matches_nothing():
    gt = torch.tensor([[[0.0, 0, 4, 4], [NAN, 0, 4, 4], [0, 0, float("inf"), 4]]])
    anchors = torch.tensor(
        [[0.0, 0, 4, NAN], [NAN] * 4, [0, 0, float("inf"), 4], [-1e30, -1e30, 1e30, 1e30], [0, 0, 4, 4]]
    )
    arguments = (gt, torch.ones(1, 3, dtype=torch.bool), anchors, 0.5, 0.3, True)
    index, label = match(*arguments)
    assert index.tolist() == [[0] * 5]
    assert label.tolist() == [[0, 0, 0, 0, 1]]
    assert all(torch.equal(a, b) for a, b in zip(match_composite(*arguments), (index, label)))


@pytest.mark.parametrize(
    "gt, valid, anchors", [((2, 3, 4), (2, 2), (5, 4)), ((2, 3, 4), (2, 3), (3, 5, 4)), ((2, 3, 4), (2, 3), (5, 5))]
)
def test_wrong_shapes_are_errors(gt, valid, anchors):
    with pytest.raises(ValueError, match="match"):
        match(torch.zeros(gt), torch.zeros(valid, dtype=torch.bool), torch.zeros(anchors), 0.7, 0.3, True)


def test_opcheck():
    generator = torch.Generator().manual_seed(1)
    gt, valid, anchors = whole_boxes(generator, 2, 3), torch.ones(2, 3, dtype=torch.bool), whole_boxes(generator, 9)
    opcheck(torch.ops.maskrcnn_benchmark.match, (gt, valid, anchors, 0.7, 0.3, True))


CROWDED = """
import resource, sys
import numpy as np
import torch
from maskrcnn_benchmark.ops.matching import match, match_composite

count, cap = int(sys.argv[2]), int(sys.argv[3])
random = np.random.default_rng(0)
def boxes(count, largest):
    corner = random.uniform(0, 1300, (count, 2))
    return np.concatenate([corner, corner + random.uniform(4, largest, (count, 2))], 1).astype(np.float32)
gt, anchors = boxes(3000, 60), boxes(count, 120)
valid = torch.ones(1, 3000, dtype=torch.bool)
arguments = (torch.from_numpy(gt)[None], valid, torch.from_numpy(anchors), 0.5, 0.3, True)
function = {"match": match, "composite": match_composite}[sys.argv[1]]
function(arguments[0], arguments[1], arguments[2][:2000], *arguments[3:])  # libraries and threads have their memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (cap << 20), resource.RLIM_INFINITY))
index, label = function(*arguments)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
best, best_index = np.empty(count, np.float32), np.empty(count, np.int64)
gt_best, reached = np.zeros(3000, np.float32), []
# The matrix, a thousand neighbouring anchors at a time, and of the objects those that reach where they are
for which in np.array_split(np.lexsort((anchors[:, 1], anchors[:, 0] // 100)), count // 1000):
    part = anchors[which]
    near = ((gt[:, :2] < part[:, 2:].max(0)) & (gt[:, 2:] > part[:, :2].min(0))).all(1).nonzero()[0]
    some = gt[near]
    sides = (np.minimum(some[:, None, 2:], part[:, 2:]) - np.maximum(some[:, None, :2], part[:, :2])).clip(0)
    shared = sides[..., 0] * sides[..., 1]
    iou = shared / (area(some)[:, None] + area(part) - shared)
    best[which] = iou.max(0)
    best_index[which] = np.where(best[which] > 0, near[iou.argmax(0)], 0)
    high = iou.max(1)
    for row in np.flatnonzero((high >= gt_best[near]) & (high > 0)):
        reached.append((near[row], high[row], which[iou[row] == high[row]]))
    gt_best[near] = np.maximum(gt_best[near], high)
expected = np.where(best >= 0.5, 1, np.where(best < 0.3, 0, -1))
for g, high, which in reached:
    if high == gt_best[g]:
        expected[which] = 1
assert (index[0].numpy() == best_index).all() and (label[0].numpy() == expected).all()
print((expected == 1).sum(), (expected == -1).sum())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc/self/statm")
@pytest.mark.parametrize(
    ("function", "anchors", "cap"), [("match", 240_000, 128), ("composite", 24_000, 128)], ids=["kernel", "composite"]
)
def test_3000_objects_under_a_memory_cap(function, anchors, cap):
    """With 240,000 anchors a matrix would take 2.9 GB, with 24,000 of the composite's 288 MB; they may take 128 MB. The
    result is the same as that of the matrix."""
    command = [sys.executable, "-c", CROWDED, function, str(anchors), str(cap)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    positive, ignored = map(int, done.stdout.split())
    assert positive > 1000 and ignored > 1000
