"""Areas, overlaps and conversions of boxes."""

import numpy as np
import pytest
import reference
import torch

from maskrcnn_benchmark.ops import boxes


def random_boxes(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * 100
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 50], dim=-1)


def test_area_and_iou_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 1], [5, 5, 6, 6], [2, 0, 4, 2]])
    assert boxes.area(b).tolist() == [4, 2, 1, 4]
    assert boxes.iou(a, b)[0].tolist() == pytest.approx([1 / 7, 0.5, 0, 0])


def test_iou_equals_the_loop():
    torch.manual_seed(0)
    a, b = random_boxes(2, 7), random_boxes(2, 5)
    expected = [[[reference.box_iou(x, y) for y in b[i].tolist()] for x in a[i].tolist()] for i in range(2)]
    np.testing.assert_allclose(boxes.iou(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [5, 5, 1, 9], [float("nan"), 0, 1, 1], [0, 0, float("inf"), 1]])
def test_iou_of_a_box_without_area_is_zero(box):
    box = torch.tensor([box])
    assert boxes.iou(box, box).item() == 0


def test_clip_uses_each_image_size():
    box = torch.tensor([[[-5.0, -5, 500, 500]], [[10, 20, 30, 400]]])
    sizes = torch.tensor([[100, 200], [300, 25]])
    assert boxes.clip(box, sizes).tolist() == [[[0, 0, 200, 100]], [[10, 20, 25, 300]]]


def test_xywh_by_hand_and_back():
    box = torch.tensor([[1.0, 2, 4, 8]])
    assert boxes.to_xywh(box).tolist() == [[1, 2, 3, 6]]
    assert torch.equal(boxes.from_xywh(boxes.to_xywh(box)), box)
