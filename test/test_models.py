"""The detector's parts: anchors, sampling, schedules of shapes, and the two ways to treat padding."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.models.anchors import AnchorGenerator, cell_anchors
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.layers import FrozenBatchNorm2d, SyncBatchNorm2d, conv_norm
from maskrcnn_benchmark.models.resnet import ResNet
from maskrcnn_benchmark.models.rpn import best_of_batch, inside
from maskrcnn_benchmark.models.sampling import sample
from maskrcnn_benchmark.structures import Detections, ImageBatch, PolygonBatch, Targets

SMALL = ROOT / "configs" / "e2e_mask_rcnn_R_18_FPN_small.yaml"
TINY = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "64"),
    *("MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(32,)", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
]
C4 = [
    *("MODEL.BACKBONE.CONV_BODY", "R-50-C4", "MODEL.MASK_ON", "True", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "128"),
]


def make_batch(counts: tuple[int, ...] = (2, 0, 1)) -> tuple[ImageBatch, Targets]:
    """Three images of noise with square objects, padded."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(counts), 3, 96, 128), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[96, 128], [80, 100], [64, 128]])[: len(counts)]
    groups = max(*counts, 1)
    boxes, labels = torch.zeros(len(counts), groups, 4), torch.zeros(len(counts), groups, dtype=torch.long)
    valid, points, ends = torch.zeros(len(counts), groups, dtype=torch.bool), [], [0]
    for image, count in enumerate(counts):
        for g in range(groups):
            if g < count:
                x, y, side = 10.0 + 30 * g, 8.0 + 5 * g, 24.0 + 10 * g
                boxes[image, g] = torch.tensor([x, y, x + side, y + side])
                labels[image, g], valid[image, g] = 1 + g, True
                points += [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
            ends.append(len(points) // 4)
    packed = PolygonBatch(torch.tensor(points).reshape(-1, 2), torch.arange(0, len(points) + 1, 4), torch.tensor(ends))
    images = ImageBatch(pixels, sizes, [tuple(s) for s in sizes.tolist()], list(range(len(counts))))
    return images, Targets(boxes, labels, valid, packed)


def model_of(config, overrides, **device_changes):
    torch.manual_seed(0)
    device = dataclasses.replace(get_device("cpu"), **device_changes)
    return build_model(get_config(config, overrides), device)


def step(model, batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and the gradients of all that is trained."""
    torch.manual_seed(1)
    losses = model(*batch)
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {k: v.item() for k, v in losses.items()}, gradients


@pytest.mark.parametrize(("config", "overrides"), [(SMALL, TINY), (None, C4)], ids=["FPN", "C4"])
def test_padding_dropped_or_kept_gives_the_same_losses_and_gradients(config, overrides):
    losses, gradients, rows = {}, {}, {True: [], False: []}
    for compacts, heads in rows.items():
        model = model_of(config, [*overrides, "MODEL.RPN.NMS_THRESH", "0.3"], compacts=compacts)
        for head in model.roi_heads.values():
            head.predictor.register_forward_hook(lambda _, inputs, __, heads=heads: heads.append(len(inputs[0])))
        losses[compacts], gradients[compacts] = step(model, make_batch())
    padded = [kept - dropped for kept, dropped in zip(rows[False], rows[True])]
    assert len(padded) == 2 and min(padded) > 0, "nothing was padded, so nothing was compared"
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert set(losses[True]) == {
        *("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    }  # fmt: skip
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        assert (gradient - gradients[False][name]).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert sum(bool(gradient.any()) for gradient in gradients[True].values()) > 0.9 * len(gradients[True])


@pytest.mark.parametrize("compacts", [True, False])
def test_images_without_objects_give_finite_losses_and_every_gradient(compacts):
    """Every head stays in the graph on every rank, or ranks would wait for each other's gradients for ever."""
    losses, gradients = step(model_of(SMALL, TINY, compacts=compacts), make_batch((0, 0)))
    assert all(math.isfinite(value) for value in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("compacts", [True, False])
@pytest.mark.parametrize(("config", "overrides"), [(SMALL, TINY), (None, C4)], ids=["FPN", "C4"])
def test_detections_lie_in_their_images(config, overrides, compacts):
    model = model_of(config, [*overrides, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"], compacts=compacts).eval()
    images, _ = make_batch()
    with torch.no_grad():
        detections = model(images)
    assert isinstance(detections, Detections)
    assert detections.boxes.shape == (3, 100, 4) and detections.valid.any(1).all()
    limit = images.sizes.flip(1).repeat(1, 2)[:, None]
    inside_image = (detections.boxes >= 0) & (detections.boxes <= limit)
    assert inside_image[detections.valid].all()
    assert (detections.scores.diff(dim=1)[detections.valid[:, 1:]] <= 0).all()
    assert detections.masks.min() >= 0 and detections.masks.max() <= 1


def test_an_image_is_detected_alike_alone_and_in_a_batch():
    model = model_of(SMALL, [*TINY, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]).eval()
    images, _ = make_batch()
    alone = ImageBatch(images.pixels[:1], images.sizes[:1], images.original_sizes[:1], images.image_ids[:1])
    with torch.no_grad():
        together, single = model(images), model(alone)
    torch.testing.assert_close(together.boxes[0], single.boxes[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(together.masks[0], single.masks[0], atol=1e-4, rtol=1e-4)


def test_pixels_in_the_padding_do_not_matter():
    model = model_of(SMALL, [*TINY, "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]).eval()
    images, _ = make_batch()
    noisy = dataclasses.replace(images, pixels=images.pixels.clone())
    noisy.pixels[1, :, 80:] = 255
    with torch.no_grad():
        torch.testing.assert_close(model(images).boxes, model(noisy).boxes)


ASCEND_YAML = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  WEIGHT: "catalog://ImageNetPretrained/MSRA/R-50"
  BACKBONE:
    CONV_BODY: "R-50-FPN"
    OUT_CHANNELS: 256
  RPN:
    USE_FPN: True
    ANCHOR_STRIDE: (4, 8, 16, 32, 64)
    PRE_NMS_TOP_N_TRAIN: 2000
    PRE_NMS_TOP_N_TEST: 1000
    POST_NMS_TOP_N_TEST: 1000
    FPN_POST_NMS_TOP_N_TEST: 1000
  ROI_HEADS:
    USE_FPN: True
  ROI_BOX_HEAD:
    POOLER_RESOLUTION: 7
    POOLER_SCALES: (0.25, 0.125, 0.0625, 0.03125)
    POOLER_SAMPLING_RATIO: 2
    FEATURE_EXTRACTOR: "FPN2MLPFeatureExtractor"
    PREDICTOR: "FPNPredictor"
  ROI_MASK_HEAD:
    POOLER_SCALES: (0.25, 0.125, 0.0625, 0.03125)
    FEATURE_EXTRACTOR: "MaskRCNNFPNFeatureExtractor"
    PREDICTOR: "MaskRCNNC4Predictor"
    POOLER_RESOLUTION: 14
    POOLER_SAMPLING_RATIO: 2
    RESOLUTION: 28
    SHARE_BOX_FEATURE_EXTRACTOR: False
  MASK_ON: True
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
DATALOADER:
  SIZE_DIVISIBILITY: 32
SOLVER:
  BASE_LR: 0.02
  WEIGHT_DECAY: 0.0001
  STEPS: (60000, 80000)
  MAX_ITER: 90000
DTYPE: "float16"
SAVE_CHECKPOINTS: False
PER_EPOCH_EVAL: True
MLPERF:
  MIN_BBOX_MAP: 0.377
  MIN_SEGM_MAP: 0.339
"""


def test_upstream_parameter_names_and_shapes(shared, tmp_path):
    """The Ascend fork's yaml builds upstream's R-50-FPN: its published weights must load."""
    import json

    file = shared / "fixtures" / "maskrcnn_benchmark_e2e_mask_rcnn_R_50_FPN_1x.json"
    theirs = {name: tuple(shape) for name, shape in json.loads(file.read_text())["state_dict"].items()}
    (tmp_path / "ascend.yaml").write_text(ASCEND_YAML)
    for config in (tmp_path / "ascend.yaml", ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml"):
        model = model_of(config, [])
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == theirs


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_strides_channels_and_freezing(depth, norm):
    config = get_config(SMALL, ["MODEL.RESNETS.NORM", norm])
    from maskrcnn_benchmark.models.build import build_norm

    body = ResNet(depth, build_norm(config, norm), freeze_at=2)
    maps = body(torch.zeros(1, 3, 64, 96))
    width = 64 if depth == 18 else 256
    assert [tuple(m.shape[1:]) for m in maps] == [(width * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "layer1"}
    body.train()
    assert not body.stem.training and not body.layer1.training and body.layer2.training


@pytest.mark.parametrize(("in_1x1", "first", "middle"), [(True, 2, 1), (False, 1, 2)])
def test_stride_in_1x1_or_3x3(in_1x1, first, middle):
    body = ResNet(50, FrozenBatchNorm2d, stride_in_1x1=in_1x1)
    block = body.layer2[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == (first, middle)


def test_a_frozen_norms_map_is_kept_until_a_buffer_changes():
    norm, other = FrozenBatchNorm2d(2, eps=0.0), FrozenBatchNorm2d(2, eps=0.0)
    with torch.inference_mode():
        norm.scale_and_shift()
    first = norm.scale_and_shift()
    assert all(again is tensor for again, tensor in zip(norm.scale_and_shift(), first))
    x = torch.ones(1, 2, 1, 1, requires_grad=True)
    (norm(x) * norm(x)).sum().backward()  # what inference mode had made could not be kept for this
    norm.running_var.fill_(4.0)
    assert norm.scale_and_shift()[0].tolist() == [0.5, 0.5] and norm.scale_and_shift()[0] is first[0]
    other.running_mean.fill_(3.0)
    norm.load_state_dict(other.state_dict())
    assert [tensor.tolist() for tensor in norm.scale_and_shift()] == [[1, 1], [-3, -3]]
    copied = copy.deepcopy(norm)
    copied.running_mean.zero_()
    assert copied.scale_and_shift()[1].tolist() == [0, 0] and norm.scale_and_shift()[1].tolist() == [-3, -3]
    assert norm.double().scale_and_shift()[1].dtype == torch.float64


def test_frozen_norm_folds_into_the_convolution():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(5, 7, 3, bias=False), FrozenBatchNorm2d(7)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 5, 8, 8)
    reference = torch.nn.functional.batch_norm(
        conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    torch.testing.assert_close(conv_norm(x, conv, norm), reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm(conv(x)), reference, atol=1e-5, rtol=1e-5)


def test_anchors_by_hand():
    # area 32^2; ratio .5 is wide: 45.25 x 22.63
    expected = torch.tensor(
        [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16], [-11.3137, -22.6274, 11.3137, 22.6274]]
    )
    torch.testing.assert_close(cell_anchors((32,), (0.5, 1.0, 2.0)), expected, atol=1e-4, rtol=0)
    assert cell_anchors((32,), (0.5,), "corners").tolist() == [[-23, -11, 23, 11]]
    grid = AnchorGenerator(((2,),), (1.0,), (4,))([(2, 3)], (8, 12), torch.device("cpu"))[0]
    assert grid.tolist() == [[x - 1, y - 1, x + 1, y + 1] for y in (0, 4) for x in (0, 4, 8)]


def test_torchvision_grid_takes_its_stride_from_the_image():
    """P6 of an image 800 high has 13 rows: 61 pixels apart in torchvision, 64 elsewhere."""
    anchors = AnchorGenerator(((2,),), (1.0,), (64,), grid="image")([(13, 1)], (800, 64), torch.device("cpu"))[0]
    assert anchors[1, 1] - anchors[0, 1] == 61


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.lists(st.sampled_from([1, 0, -1]), min_size=12, max_size=12), min_size=1, max_size=3),
    size=st.integers(1, 20),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_sampling_takes_what_the_rule_says(labels, size, fraction):
    labels = torch.tensor(labels)
    chosen = sample(labels, size, fraction)
    for row, index, positive, valid in zip(labels, chosen.index, chosen.positive, chosen.valid):
        positives = min(int((row == 1).sum()), int(size * fraction))
        negatives = min(int((row == 0).sum()), size - positives)
        assert int(positive.sum()) == positives and int(valid.sum()) == positives + negatives
        assert positive[:positives].all() and valid[: positives + negatives].all()  # positives first, padding last
        assert (row[index[positive]] == 1).all() and (row[index[valid & ~positive]] == 0).all()
        assert len(set(index[valid].tolist())) == int(valid.sum())  # nothing twice


def test_sampling_is_uniform():
    counts = torch.zeros(6)
    torch.manual_seed(0)
    for _ in range(600):
        chosen = sample(torch.tensor([[1, 1, 1, 0, 0, 0]]), 2, 0.5)
        counts[chosen.index[0]] += 1
    assert (counts - 200).abs().max() < 50  # 4.3 standard deviations


def test_best_of_batch_counts_over_images():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.95, 0.2]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert best_of_batch(scores, valid, 3).tolist() == [[True, True, False], [True, False, False]]


def test_anchors_across_the_border():
    anchors = torch.tensor([[0.0, 0, 10, 10], [-1, 0, 10, 10], [0, 0, 20, 10], [5, 5, 19, 9]])
    sizes = torch.tensor([[10, 20], [40, 40]])
    assert inside(anchors, sizes, 0).tolist() == [[False, False, False, True], [True, False, True, True]]


def sync_batch_norm_rank(rank: int, port: int, queue) -> None:
    """One of two ranks with different numbers of images; its share of the gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, norm = sync_batch_norm_input()
    norm = SyncBatchNorm2d(4)
    mine = x[:3] if rank == 0 else x[3:]
    mine.requires_grad_()
    (norm(mine) * torch.arange(mine[0].numel()).view(mine[0].shape)).sum().backward()
    queue.put((rank, mine.grad.numpy(), norm.weight.grad.numpy(), norm.running_var.numpy()))
    dist.destroy_process_group()


def sync_batch_norm_input() -> tuple[torch.Tensor, torch.nn.BatchNorm2d]:
    return torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.nn.BatchNorm2d(4)


def test_sync_batch_norm_over_ranks_equals_batch_norm_over_all_images():
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=sync_batch_norm_rank, args=(rank, port, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
    x, norm = sync_batch_norm_input()
    x.requires_grad_()
    (norm(x) * torch.arange(x[0].numel()).view(x[0].shape)).sum().backward()
    ours = torch.cat([torch.from_numpy(result[1]) for result in results])
    torch.testing.assert_close(ours, x.grad, atol=1e-4, rtol=1e-4)
    weight = sum(torch.from_numpy(result[2]) for result in results)
    torch.testing.assert_close(weight, norm.weight.grad, atol=1e-4, rtol=1e-4)
    for result in results:
        torch.testing.assert_close(torch.from_numpy(result[3]), norm.running_var)


def test_proposals_of_low_probability_are_dropped():
    """What is left is what was there above the threshold: a better box is never suppressed by a worse one."""
    torch.manual_seed(0)
    model, (images, _) = model_of(SMALL, TINY).eval(), make_batch()
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.3)
    with torch.no_grad():
        features, padded = model.features(images)
        everything, _ = model.rpn(features, padded, images.sizes)
        model.rpn.score_threshold = 0.6
        few, _ = model.rpn(features, padded, images.sizes)
    for image in range(len(images.sizes)):
        wanted = everything.valid[image] & (everything.scores[image] >= 0.6)
        assert 0 < wanted.sum() < everything.valid[image].sum()
        assert torch.equal(few.boxes[image][few.valid[image]], everything.boxes[image][wanted])
