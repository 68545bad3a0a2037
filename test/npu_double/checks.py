"""Run by test_device_npu.py in a process of its own, where PrivateUse1 is the test double's `npu`."""

from __future__ import annotations

import math

import pytest
import torch
import torch_npu
from test_models import SMALL, TINY, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskrcnn_benchmark import ops
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.models.build import build_model

DEVICE = get_device("npu")
NPU = DEVICE.torch_device


@pytest.fixture(autouse=True)
def calls() -> list[tuple[str, dict]]:
    torch_npu.calls.clear()
    return torch_npu.calls


@pytest.fixture(autouse=True)
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def names(calls) -> list[str]:
    return [name for name, _ in calls]


def random_boxes(rng, *shape: int, size: float = 100.0) -> torch.Tensor:
    start = torch.rand(*shape, 2, generator=rng) * size
    return torch.cat([start, start + torch.rand(*shape, 2, generator=rng) * size * 0.6], dim=-1)


# ---------------------------------------------------------------------------------------------- documented examples


def test_roi_align_of_the_documentation():
    features = torch.arange(1.0, 37.0).view(1, 1, 6, 6).to(NPU)
    rois = torch.tensor([[0, -2.0, -2.0, 22.0, 22.0]]).to(NPU)
    pooled = torch.ops.npu.npu_roi_align(features, rois, 0.25, 3, 3, 2, 0)
    expected = [[4.5, 6.5, 8.5], [16.5, 18.5, 20.5], [28.5, 30.5, 32.5]]
    torch.testing.assert_close(pooled.cpu(), torch.tensor([[expected]]))


def test_box_encode_of_the_documentation():
    anchors = torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 6]]).to(NPU)
    boxes = torch.tensor([[5.0, 6, 7, 8], [7, 8, 9, 6]]).to(NPU)
    deltas = torch.ops.npu.npu_bounding_box_encode(anchors, boxes, 0, 0, 0, 0, 0.1, 0.1, 0.2, 0.2)
    expected = torch.tensor([[13.3281, 13.3281, 0, 0], [13.3281, 6.6641, 0, -5.4922]])
    torch.testing.assert_close(deltas.cpu(), expected, rtol=1e-3, atol=0)  # rounded to half precision


def test_box_decode_of_the_documentation():
    rois = torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 6]]).to(NPU)
    deltas = torch.tensor([[5.0, 6, 7, 8], [7, 8, 9, 6]]).to(NPU)
    boxes = torch.ops.npu.npu_bounding_box_decode(rois, deltas, 0, 0, 0, 0, 1, 1, 1, 1, (10, 10), 0.1)
    torch.testing.assert_close(boxes.cpu(), torch.tensor([[2.5, 6.5, 9, 9], [9, 9, 9, 9]]))


def test_box_decode_of_mindspores_documentation():
    """The same CANN operator; this example shows that boxes are clipped to 0."""
    rois = torch.tensor([[4.0, 1, 2, 1], [2, 2, 2, 3]]).to(NPU)
    deltas = torch.tensor([[3.0, 1, 2, 2], [1, 2, 1, 4]]).to(NPU)
    boxes = torch.ops.npu.npu_bounding_box_decode(rois, deltas, 0, 0, 0, 0, 1, 1, 1, 1, (768, 1280), 0.016)
    expected = torch.tensor([[4.1953125, 0, 0, 5.1953125], [2.140625, 0, 3.859375, 60.59375]])
    torch.testing.assert_close(boxes.cpu(), expected, rtol=1e-3, atol=0)


def test_iou_of_the_documentation():
    boxes = torch.tensor([[0, 0, 10, 10], [10, 10, 20, 20], [32, 32, 38, 42]]).half().to(NPU)
    gt = torch.tensor([[0, 0, 10, 20], [0, 10, 10, 10], [10, 10, 20, 20]]).half().to(NPU)
    expected = torch.tensor([[0.4985, 0, 0], [0, 0, 0], [0, 0.9961, 0]]).half()
    torch.testing.assert_close(torch.ops.npu.npu_iou(boxes, gt).cpu(), expected, rtol=5e-3, atol=0)


def test_nms_v4_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 10]]).to(NPU)
    scores = torch.tensor([0.5, 0.9, 0.3, 0.1]).to(NPU)
    limits = torch.tensor(0.5).to(NPU), torch.tensor(0.2).to(NPU)
    index, count = torch.ops.npu.npu_nms_v4(boxes, scores, 3, *limits, True)
    assert (index.tolist(), count.item(), index.dtype, count.dtype) == ([1, 2, 0], 2, torch.int32, torch.int32)


# ---------------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        *((op, "native") for op in ("roi_align", "roi_align_backward", "nms", "match", "box_encode", "box_decode")),
        *((op, "native") for op in ("proposals", "deform_conv2d", "deform_conv2d_backward")),
        ("polygon_targets", "composite"),
        ("box_decode_backward", "composite"),
    ],
)
def test_kernel_in_use(op, kernel):
    assert ops.kernel_in_use(op, "npu") == kernel


def test_the_device():
    assert (DEVICE.type, DEVICE.name, DEVICE.dist_backend) == ("npu", "test double", "hccl")
    assert torch.npu.compile_modes[0] is False
    assert get_device("auto").type == "npu"
    held = torch.zeros(1 << 20, device=NPU)
    assert DEVICE.max_memory_mb() >= 4
    assert held.cpu().sum() == 0


# ---------------------------------------------------------------------------------------------- operators


def pyramid(rng, batch=2, channels=3) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, *size, generator=rng) for size in ((25, 33), (13, 17), (7, 9))]


@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_and_its_gradient(rng, calls, aligned, sampling_ratio):
    features = [f.requires_grad_() for f in pyramid(rng)]
    on_npu = [f.detach().to(NPU).requires_grad_() for f in features]
    boxes = random_boxes(rng, 12) - 10  # some of them partly outside
    image, level = torch.arange(12) % 2, torch.arange(12) % 3
    image[10], level[11] = 5, -1  # rows that do not exist
    scales = [0.25, 0.125, 0.0625]
    expected = ops.roi_align.roi_align(features, boxes, image, level, scales, 7, sampling_ratio, aligned)
    rows = (t.to(NPU) for t in (boxes, image, level))
    pooled = ops.roi_align.roi_align(on_npu, *rows, scales, 7, sampling_ratio, aligned)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not pooled[10:].cpu().any()

    grad = torch.randn(expected.shape, generator=rng)
    expected.backward(grad)
    pooled.backward(grad.to(NPU))
    for ours, theirs in zip(on_npu, features):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-5)

    mode = 2 if aligned else 0
    assert names(calls) == ["npu_roi_align"] * 3 + ["npu_roi_alignbk"] * 3
    assert [c["spatial_scale"] for _, c in calls] == scales * 2
    assert {c["roi_end_mode"] for _, c in calls} == {mode}
    assert {c["rois"] for _, c in calls} == {(torch.float32, (12, 5))}
    assert [c["xdiff_shape"] for _, c in calls[3:]] == [[2, 3, 25, 33], [2, 3, 13, 17], [2, 3, 7, 9]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision(rng, calls, dtype):
    features = [f.to(dtype) for f in pyramid(rng)]
    boxes, index = random_boxes(rng, 6), torch.arange(6) % 2
    rows = [t.to(NPU) for t in (boxes, index, index)]
    scales = [0.25, 0.125, 0.0625]
    expected = ops.roi_align.roi_align(features, boxes, index, index, scales, 7, 2, True)
    pooled = ops.roi_align.roi_align([f.to(NPU) for f in features], *rows, scales, 7, 2, True)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.cpu(), expected)
    assert len(calls) == 3


def test_roi_align_of_bitmaps_and_of_nothing(rng):
    bitmaps = (torch.rand(2, 1, 30, 40, generator=rng) > 0.5).to(torch.uint8)
    boxes, index, level = random_boxes(rng, 4, size=25), torch.arange(4) % 2, torch.zeros(4, dtype=torch.int64)
    expected = ops.roi_align.roi_align([bitmaps], boxes, index, level, [1.0], 14, 0, False)
    rows = [t.to(NPU) for t in (boxes, index, level)]
    pooled = ops.roi_align.roi_align([bitmaps.to(NPU)], *rows, [1.0], 14, 0, False)
    torch.testing.assert_close(pooled.cpu(), expected)
    nothing = ops.roi_align.roi_align([bitmaps.to(NPU)], *(t[:0] for t in rows), [1.0], 14, 0, False)
    assert nothing.shape == (0, 1, 14, 14)


def test_float64_is_the_composites(rng, calls):
    """The kernels know no float64."""
    features, boxes = [torch.randn(1, 2, 9, 9, dtype=torch.float64)], random_boxes(rng, 3, size=8)
    zero = torch.zeros(3, dtype=torch.int64)
    expected = ops.roi_align.roi_align(features, boxes, zero, zero, [1.0], 3, 2, True)
    pooled = ops.roi_align.roi_align(
        [features[0].to(NPU)], *(t.to(NPU) for t in (boxes, zero, zero)), [1.0], 3, 2, True
    )
    torch.testing.assert_close(pooled.cpu(), expected)
    encoded = ops.box_coder.encode(boxes.double().to(NPU), (boxes + 1).double().to(NPU), (1, 1, 1, 1))
    assert encoded.dtype == torch.float64
    assert calls == []


def test_nms_with_groups_and_images(rng, calls):
    boxes, groups = random_boxes(rng, 3, 60) - 20, torch.randint(0, 80, (3, 60), generator=rng)
    groups[1:] %= 3
    scores = (torch.rand(3, 60, generator=rng) * 12).floor()  # many of them equal
    valid = torch.rand(3, 60, generator=rng) > 0.2
    boxes[0, 0, 1] = scores[0, 1] = math.nan
    scores[0, 2] = -math.inf
    arguments = boxes, scores, groups, valid
    index, keep = ops.nms.nms(*arguments, 0.4, 50)
    on_npu = ops.nms.nms(*(t.to(NPU) for t in arguments), 0.4, 50)
    assert torch.equal(on_npu[1].cpu(), keep)
    assert torch.equal(on_npu[0].cpu(), index)
    assert 5 < keep.sum() < valid.sum()
    assert names(calls) == ["npu_nms_v4"] * 3
    assert all(c["pad_to_max_output_size"] and c["max_output_size"] == 50 for _, c in calls)
    assert {c["iou_threshold"] for _, c in calls} == {(torch.float32, ())}


def test_nms_of_fewer_boxes_than_it_may_return_and_of_none(rng):
    boxes, scores = random_boxes(rng, 1, 3), torch.rand(1, 3, generator=rng)
    boxes[0, 1] = boxes[0, 0, [2, 1, 0, 3]]  # turned over: it is empty, and overlaps nothing
    arguments = boxes, scores, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    for count in (3, 0):
        few = [t[:, :count] for t in arguments]
        index, keep = ops.nms.nms(*few, 0.5, 10)
        on_npu = ops.nms.nms(*(t.to(NPU) for t in few), 0.5, 10)
        assert torch.equal(on_npu[0].cpu(), index) and torch.equal(on_npu[1].cpu(), keep)


@pytest.mark.parametrize("allow_low_quality", [True, False])
@pytest.mark.parametrize("shared_anchors", [True, False])
def test_match(rng, calls, shared_anchors, allow_low_quality):
    gt, anchors = random_boxes(rng, 2, 11), random_boxes(rng, *((200,) if shared_anchors else (2, 200)))
    valid = torch.rand(2, 11, generator=rng) > 0.3
    gt[0, 3] = 0
    anchors.view(-1, 4)[7] = math.nan
    arguments = gt, valid, anchors
    index, label = ops.matching.match(*arguments, 0.6, 0.3, allow_low_quality)
    on_npu = ops.matching.match(*(t.to(NPU) for t in arguments), 0.6, 0.3, allow_low_quality)
    assert torch.equal(on_npu[0].cpu(), index) and torch.equal(on_npu[1].cpu(), label)
    assert set(label.flatten().tolist()) == {-1, 0, 1}
    # Chunks of 8 ground truths: two an image.
    assert names(calls) == ["npu_iou"] * 4
    assert calls[0][1]["bboxes"] == (torch.float32, (200, 4))


WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_box_encode(rng, calls):
    boxes, anchors = random_boxes(rng, 2, 50) - 40, random_boxes(rng, 2, 50) - 40
    boxes[0, :3] = 0  # padding: finite, and nothing more is asked of it
    anchors[0, 2:5] = 0
    expected = ops.box_coder.encode(boxes, anchors, WEIGHTS)
    deltas = ops.box_coder.encode(boxes.to(NPU), anchors.to(NPU), WEIGHTS).cpu()
    assert deltas.isfinite().all()
    torch.testing.assert_close(deltas.flatten(0, 1)[5:], expected.flatten(0, 1)[5:], rtol=1e-4, atol=1e-3)
    assert names(calls) == ["npu_bounding_box_encode"]
    assert [calls[0][1][f"stds{i}"] for i in range(4)] == [0.1, 0.1, 0.2, 0.2]


def test_box_decode(rng, calls):
    anchors = random_boxes(rng, 4, 50, size=400) - 200
    anchors[0, 0, 2:] = anchors[0, 0, :2]  # an empty anchor
    deltas = torch.randn(4, 50, 4, generator=rng) * 20
    deltas[0, 1, 2:] = 1000.0  # beyond the clip
    deltas[0, 2, 2:] = -1000.0  # the kernel clips this side too
    deltas = deltas.requires_grad_()
    on_npu = deltas.detach().to(NPU).requires_grad_()
    expected = ops.box_coder.decode(deltas, anchors, WEIGHTS)
    boxes = ops.box_coder.decode(on_npu, anchors.to(NPU), WEIGHTS)
    assert expected.min() < -1000 and expected.max() > 1000
    torch.testing.assert_close(boxes.cpu(), expected, rtol=1e-5, atol=1e-3)
    assert names(calls) == ["npu_bounding_box_decode"]

    expected.sum().backward()
    boxes.sum().backward()
    torch.testing.assert_close(on_npu.grad.cpu(), deltas.grad)


def test_proposals(rng, calls):
    anchors = random_boxes(rng, 60)
    deltas = torch.randn(2, 60, 4, generator=rng)
    deltas[0, 3, 1] = math.nan
    index = torch.cat([torch.tensor([[3, 60], [-1, 3]]), torch.randint(60, (2, 30), generator=rng)], dim=1)
    inputs = (deltas, anchors, index, torch.tensor([[90, 120], [120, 90]]))
    expected, expected_valid = ops.proposals.decode_and_clip(*inputs)
    boxes, valid = ops.proposals.decode_and_clip(*(tensor.to(NPU) for tensor in inputs))
    assert torch.equal(valid.cpu(), expected_valid) and valid.any() and not valid[0, 0]
    torch.testing.assert_close(boxes.cpu()[expected_valid], expected[expected_valid], rtol=1e-5, atol=1e-3)
    assert not boxes[0, 1].any() and not boxes[1, 0].any()  # of no anchor
    assert names(calls) == ["npu_bounding_box_decode"]


def test_box_decode_keeps_what_is_not_a_number():
    deltas = torch.tensor([[0.0, 0, math.nan, 0]]).to(NPU)
    anchors = torch.tensor([[0.0, 0, 10, 10]]).to(NPU)
    assert ops.box_coder.decode(deltas, anchors, WEIGHTS).isnan().any()


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("size", [(3, 3), (1, 3)])
def test_deform_conv2d_and_its_gradients(rng, calls, size, modulated):
    """Uneven strides, paddings and dilations, two groups of both kinds, places outside the map."""
    taps = 2 * size[0] * size[1]
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "offset_groups": 2}
    weight = torch.randn(6, 2, *size, generator=rng)
    features = torch.randn(2, 4, 9, 11, generator=rng)
    height, width = (9 + 2 - size[0]) // 2 + 1, 11 + 4 - 2 * (size[1] - 1)
    offset = torch.randn(2, 2 * taps, height, width, generator=rng) * 2
    mask = torch.rand(2, taps, height, width, generator=rng) if modulated else None
    tensors, grads = (features, offset, mask, weight, torch.ones(6)), []
    for device in ("cpu", NPU):
        leaves = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
        output = ops.deform_conv.deform_conv2d(*leaves, **options)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(device))
        grads.append([output, *(t.grad for t in leaves if t is not None)])
    for ours, theirs in zip(grads[1], grads[0]):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    if size == (3, 3):
        # The backward kernel wants the samples of the forward one.
        assert names(calls) == ["npu_deformable_conv2d"] * 2 + ["npu_deformable_conv2dbk"]
        assert (calls[0][1]["stride"], calls[0][1]["padding"]) == ([1, 1, 2, 1], [1, 1, 2, 2])
        assert (calls[0][1]["dilation"], calls[0][1]["kernel_size"]) == ([1, 1, 1, 2], [3, 3])
        assert calls[0][1]["offset"] == (torch.float32, (2, 54, height, width))
    else:
        assert calls == []  # the composite's: torch_npu is of two minds about kernels that are not square


def test_masks_by_composites(rng):
    points = torch.tensor([[2.0, 2], [20, 4], [12, 25]])
    offsets, instances = torch.tensor([0, 3]), torch.tensor([0, 1])
    arguments = points, offsets, instances, torch.zeros(2, dtype=torch.int64), random_boxes(rng, 2, size=12)
    drawn = ops.masks.polygon_targets(*(t.to(NPU) for t in arguments), 28)
    assert torch.equal(drawn.cpu(), ops.masks.polygon_targets(*arguments, 28))


# ---------------------------------------------------------------------------------------------- the step


class HostTensors(TorchDispatchMode):
    """Notes operators that read or give a tensor of the host. Numbers, 0-dim there, go to a kernel as they are; all
    else is copied to the device, for which a captured step has no place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.seen += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors):
            self.found.append(operator._schema.name)
        return result


def test_a_training_steps_gradients_touch_no_tensor_of_the_host():
    torch.manual_seed(0)
    model = build_model(get_config(SMALL, TINY), DEVICE)
    images, targets = (part.to(NPU) for part in make_batch())
    sum(model(images, targets).values()).backward()  # the first makes what is kept
    with HostTensors() as host:
        sum(model(images, targets).values()).backward()
    assert host.seen > 500 and not host.found, host.found
    with HostTensors() as host:
        images.pixels[torch.tensor([1, 0], device=NPU)] + torch.ones(3, 96, 128).to(NPU)
        images.pixels * 2
    assert len(host.found) >= 2, "what is counted"
