"""Backbones and pyramids: deformable, vd, HRNet, P6 and P7, other channels, and any module of one's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import make_batch, step
from torch import nn

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.config.conv_body import parse
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.errors import ConfigError
from maskrcnn_benchmark.models.anchors import AnchorGenerator
from maskrcnn_benchmark.models.box_head import BoxHead, BoxPredictor, ConvFCFeatureExtractor, MLPFeatureExtractor
from maskrcnn_benchmark.models.build import build_model
from maskrcnn_benchmark.models.fpn import FPN, HRFPN, LastLevelP6P7, add_enlarged
from maskrcnn_benchmark.models.hrnet import HRModule, HRNet
from maskrcnn_benchmark.models.layers import DeformConv2d, group_norm
from maskrcnn_benchmark.models.rcnn import RCNN, Normalize
from maskrcnn_benchmark.models.resnet import ResNet, Shortcut
from maskrcnn_benchmark.models.roi_pool import RoIPool
from maskrcnn_benchmark.models.rpn import RPN, RPNHead
from maskrcnn_benchmark.models.weights import inflate, load_weights
from maskrcnn_benchmark.structures import ImageBatch

NORM = group_norm(2, -1, 1e-5)


@pytest.mark.parametrize(("modulated", "share"), [(False, 1.0), (True, 0.5)])
def test_a_fresh_deformable_convolution_moves_no_tap(modulated, share):
    """Both papers start the offsets at zero; a modulation of zero weighs each tap by its sigmoid, a half."""
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, stride=2, groups=2, offset_groups=2, modulated=modulated)
    x = torch.randn(2, 4, 9, 12)
    expected = share * F.conv2d(x, layer.conv.weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), expected)


def test_a_constant_offset_shifts_the_image():
    """Offsets of (dy, dx) = (1, 2) in every tap: the convolution of the image moved up by 1 and left by 2."""
    torch.manual_seed(0)
    layer = DeformConv2d(3, 5, modulated=True)
    with torch.no_grad():
        layer.offset.bias[:18] = torch.tensor([1.0, 2.0]).repeat(9)
        layer.offset.bias[18:] = 50.0  # its sigmoid is 1
    x = torch.randn(1, 3, 10, 10)
    moved = F.pad(x, (0, 2, 0, 1))[..., 1:, 2:]
    torch.testing.assert_close(
        layer(x)[..., 1:-2, 1:-3], F.conv2d(moved, layer.conv.weight, padding=1)[..., 1:-2, 1:-3]
    )


def test_stages_take_deformable_convolutions_as_told():
    cfg = get_config(overrides=["MODEL.RESNETS.STAGE_WITH_DCN", "(False, True, False, True)", *SMALL_C5])
    body = build_model(cfg, get_device("cpu")).backbone.body
    found = [isinstance(getattr(body, f"layer{n}")[0].conv2, DeformConv2d) for n in (1, 2, 3, 4)]
    assert found == [False, True, False, True]


SMALL_C5 = [
    *("MODEL.BACKBONE.CONV_BODY", "R-50-C5", "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "128"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RPN.ANCHOR_STRIDE", "(32,)"),
    *("MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPN2MLPFeatureExtractor", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "3"),
    *("MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.03125,)", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
]


def test_c5_is_one_map_of_stride_32():
    model = build_model(get_config(overrides=SMALL_C5), get_device("cpu"))
    assert [tuple(x.shape) for x in model.backbone(torch.zeros(1, 3, 64, 96))] == [(1, 128, 2, 3)]
    losses, _ = step(model, make_batch())
    assert all(torch.tensor(list(losses.values())).isfinite())


def test_vd_looks_at_every_pixel():
    """The plain shortcut of stride 2 reads one pixel of four; the pooled one has a gradient for each."""
    for pooled, share in ((False, 0.25), (True, 1.0)):
        shortcut = Shortcut(2, 4, 2, nn.Identity, pooled)
        x = torch.zeros(1, 2, 8, 8, requires_grad=True)
        shortcut(x).sum().backward()
        assert (x.grad != 0).float().mean() == share


def test_vd_stem_and_names():
    body = ResNet(50, NORM, stem_channels=8, res2_channels=16, width_per_group=4, deep_stem=True, pooled_shortcut=True)
    stem = {name: tuple(p.shape) for name, p in body.stem.named_parameters() if "conv" in name}
    assert stem == {"conv1.weight": (4, 3, 3, 3), "conv2.weight": (4, 4, 3, 3), "conv3.weight": (8, 4, 3, 3)}
    assert tuple(body(torch.zeros(1, 3, 64, 96))[0].shape[1:]) == (16, 16, 24)
    assert "layer2.0.downsample.0.weight" in body.state_dict()  # as without pooling: the same weights fit


@pytest.mark.parametrize("sides", [(8, 12), (7, 12)], ids=["doubled", "odd"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_maps_are_added_as_torch_enlarges_them(sides, layout):
    """Bit for bit, forward and backward, in x's layout."""
    torch.manual_seed(0)
    x, top = torch.randn(2, 3, *sides), torch.randn(2, 3, 4, 6)
    x, top = (maps.to(memory_format=layout).requires_grad_() for maps in (x, top))
    gradient = torch.randn(2, 3, *sides)
    ours, theirs = add_enlarged(x, top), x + F.interpolate(top, size=sides, mode="nearest")
    assert ours.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for mine, expected in zip(*(torch.autograd.grad(out, (x, top), gradient) for out in (ours, theirs))):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_both_predictions_of_the_rpn_are_those_of_their_layers():
    torch.manual_seed(0)
    head, maps = RPNHead(8, 3), [torch.randn(2, 8, 6, 9), torch.randn(2, 8, 3, 5)]
    logits, deltas = head(maps)
    for x, logit, delta in zip(maps, logits, deltas):
        hidden = head.conv(x).relu()
        torch.testing.assert_close(logit, head.cls_logits(hidden))
        torch.testing.assert_close(delta, head.bbox_pred(hidden))


def test_p6_of_c5_or_p5_and_p7_of_p6():
    torch.manual_seed(0)
    maps = [torch.randn(1, 4 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(3)]
    for use_c5 in (True, False):
        fpn = FPN([4, 8, 16], 8, first_level=2, top_blocks=LastLevelP6P7(16, 8, use_c5))
        assert {name.split(".")[0] for name in fpn.state_dict()} == {
            *(f"fpn_{part}{level}" for part in ("inner", "layer") for level in (2, 3, 4)),
            "top_blocks",
        }
        outputs = fpn(maps)
        assert [tuple(x.shape[2:]) for x in outputs] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        p6 = fpn.top_blocks.p6(maps[-1] if use_c5 else outputs[2])
        torch.testing.assert_close(outputs[3], p6)
        torch.testing.assert_close(outputs[4], fpn.top_blocks.p7(p6.relu()))


def test_hrnet_keeps_four_resolutions():
    """W18's weights as published: 9.5 million without the classifier, and these channels."""
    with torch.device("meta"):
        body = HRNet(18, nn.BatchNorm2d, freeze_at=2)
        maps = body(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(18 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    names = set(body.state_dict())
    assert {
        *("layer1.0.downsample.0.weight", "transition1.1.0.0.weight", "stage2.0.branches.1.3.conv2.weight"),
        *("stage3.3.fuse_layers.2.0.1.0.weight", "stage4.2.fuse_layers.0.3.0.weight", "transition3.3.0.0.weight"),
    } <= names
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "layer1"}


def test_an_exchange_is_the_sum_of_all_branches():
    """With convolutions that pass a channel on as it is, worked by hand: 1 everywhere fine, 10 everywhere coarse."""
    module = HRModule([1, 1], lambda channels: nn.Identity())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()  # blocks become their shortcuts
        module.fuse_layers[0][1][0].weight.fill_(1.0)
        module.fuse_layers[1][0][0][0].weight[0, 0, 1, 1] = 1.0
    fine, coarse = module([torch.ones(1, 1, 4, 4), torch.full((1, 1, 2, 2), 10.0)])
    assert fine.unique().tolist() == [11.0] and coarse.unique().tolist() == [11.0]


def test_hrfpn_pools_one_map_to_five_strides():
    pyramid = HRFPN([2, 4], 8)
    outputs = pyramid([torch.zeros(1, 2, 32, 48), torch.zeros(1, 4, 16, 24)])
    assert [tuple(x.shape) for x in outputs] == [(1, 8, 32 // 2**i, 48 // 2**i) for i in range(5)]
    assert pyramid.reduction.weight.shape == (8, 6, 1, 1)


def test_convolutions_before_the_fully_connected_layer():
    """Upstream's numbering: convolution, norm, ReLU; or without norm convolution and ReLU."""
    names = [name for name in ConvFCFeatureExtractor(4, 3, (6, 6), 5, NORM).state_dict() if "xconvs" in name]
    assert names == [f"xconvs.{i}.{p}" for i, p in ((0, "weight"), (1, "weight"), (1, "bias"))] + [
        f"xconvs.{i}.{p}" for i, p in ((3, "weight"), (4, "weight"), (4, "bias"))
    ]
    plain = ConvFCFeatureExtractor(4, 3, (6, 6), 5, dilation=2)
    assert [name for name in plain.state_dict() if name.endswith("weight")][1] == "xconvs.2.weight"
    assert plain(torch.randn(2, 4, 3, 3)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("R-50-C4", (50, False, 0, "C4")),
        ("R-101vd-FPN", (101, True, 0, "FPN")),
        ("R-101-FPN-RETINANET", (101, False, 0, "FPN-RETINANET")),
        ("HRNet-W18-FPN", (0, False, 18, "FPN")),
    ],
)
def test_conv_body(name, form):
    assert parse(name) == form


@pytest.mark.parametrize("name", ["R-51-FPN", "HRNet-W18-C4", "R-50", "r-50-fpn", "FBNet"])
def test_unknown_bodies_are_refused(name):
    with pytest.raises(ConfigError, match=r"known are|FBNet is left out"):
        get_config(overrides=["MODEL.BACKBONE.CONV_BODY", name])


def test_hrnet_has_no_deformable_stages():
    dcn = ["MODEL.BACKBONE.CONV_BODY", "HRNet-W18-FPN", "MODEL.RESNETS.STAGE_WITH_DCN", "(True, False, False, False)"]
    with pytest.raises(ConfigError, match=r"STAGE_WITH_DCN.*HRNet"):
        get_config(overrides=dcn)


@given(channels=st.integers(1, 9), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_inflated_weights_answer_grey_images_as_before(channels, seed):
    torch.manual_seed(seed)
    weight, grey = torch.randn(4, 3, 3, 3), torch.randn(2, 1, 6, 6)
    before = F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    after = F.conv2d(grey.expand(-1, channels, -1, -1), inflate(weight, channels))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_inflated_weights_keep_their_colours():
    weight = torch.arange(6.0).view(2, 3, 1, 1)
    assert inflate(weight, 4).flatten(1).tolist() == [[0, 0.75, 1.5, 0.75], [2.25, 3, 3.75, 3]]
    assert inflate(weight, 1).flatten().tolist() == [3, 12]
    assert torch.equal(inflate(weight, 3), weight)


def test_a_three_channel_file_loads_into_a_model_of_five(tmp_path):
    narrow = ["MODEL.RPN_ONLY", "True", *SMALL_C5]
    five = ["INPUT.PIXEL_MEAN", "[100., 110., 120., 7., 9.]", "INPUT.PIXEL_STD", "[1., 1., 1., 2., 2.]"]
    three = build_model(get_config(overrides=narrow), get_device("cpu"))
    torch.save(three.state_dict(), tmp_path / "three.pth")
    model = build_model(get_config(overrides=[*narrow, *five]), get_device("cpu"))
    load_weights(model, str(tmp_path / "three.pth"))
    stem = three.state_dict()["backbone.body.stem.conv1.weight"]
    assert torch.equal(model.backbone.body.stem.conv1.weight, inflate(stem, 5))
    pixels = torch.randint(0, 256, (1, 5, 64, 64), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[64, 64]]), [(64, 64)], [0])
    with torch.no_grad():
        assert model.eval()(images).boxes.isfinite().all()


def test_data_sets_do_not_give_five_channels():
    from maskrcnn_benchmark.data.catalog import build_dataset

    cfg = get_config(overrides=["INPUT.PIXEL_MEAN", "[1., 2.]", "INPUT.PIXEL_STD", "[1., 1.]"])
    with pytest.raises(ConfigError, match=r"PIXEL_MEAN.*RGB"):
        build_dataset(("coco_2017_val",), cfg, training=False)


def test_red_and_blue_change_places_and_further_channels_stay():
    normalize = Normalize((1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 1.0, 2.0), bgr255=True)  # blue, green, red, another
    pixels = torch.tensor([30.0, 20.0, 10.0, 40.0]).view(1, 4, 1, 1)  # red, green, blue, another
    images = ImageBatch(pixels, torch.tensor([[1, 1]]), [(1, 1)], [0])
    assert normalize(images).flatten().tolist() == [9, 18, 27, 18]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, filter each channel by itself, narrow."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.add = stride == 1 and narrow == wide
        hidden = 6 * narrow
        self.layers = nn.Sequential(
            *(nn.Conv2d(narrow, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, wide, 1, bias=False), nn.BatchNorm2d(wide)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.add else self.layers(x)


class Features(nn.Sequential):
    """`features` as MobileNetV2 has them: one map, of stride 32, in a list."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [super().forward(x)]


def test_any_module_as_backbone():
    """docs/models.md's example, with features that a classifier might bring."""
    torch.manual_seed(0)
    features = Features(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        *(InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2), InvertedResidual(12, 16, 2)),
        *(InvertedResidual(16, 24, 2), InvertedResidual(24, 32, 2)),
    )
    anchors = AnchorGenerator(((16, 32, 64),), (0.5, 1.0, 2.0), (32,))
    extractor = MLPFeatureExtractor(in_channels=32, resolution=3, hidden=24)
    model = RCNN(
        normalize=Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), bgr255=False),
        backbone=features,
        rpn=RPN(RPNHead(32, anchors.per_position), anchors, pre_nms=(100, 100), post_nms=(50, 20)),
        box_head=BoxHead(RoIPool((1 / 32,), 3, 2, True), extractor, BoxPredictor(24, classes=4), batch_size=16),
    )
    losses, gradients = step(model, make_batch())
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert all(gradient is not None for gradient in gradients.values())
    with torch.no_grad():
        assert model.eval()(make_batch()[0]).boxes.isfinite().all()
