"""Exported files answer as the model does: programs of torch.export, and ONNX graphs in onnxruntime."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from test_keypoint_head import KEYPOINTS
from test_models import SMALL, TINY, model_of
from test_retinanet import RETINANET
from torch import Tensor, nn
from torch.export import Dim

from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.engine import export
from maskrcnn_benchmark.errors import CheckpointError, ConfigError, DependencyError
from maskrcnn_benchmark.models.retinanet import RetinaNet

FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0"]
C4 = [
    *("MODEL.BACKBONE.CONV_BODY", "R-18-C4", "MODEL.MASK_ON", "True", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "32"),
]
CASES = {
    "FPN": (SMALL, [*TINY, *FROZEN, "MODEL.FPN.USE_GN", "False"]),
    "C4": (
        None,
        [*C4, *FROZEN, *KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", "(0.0625,)", "MODEL.MASK_ON", "True"],
    ),
    "RetinaNet": (None, [*RETINANET, *FROZEN, "MODEL.RETINANET.NUM_CONVS", "1"]),
}
PROPOSALS = [*C4, *FROZEN, "MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"]
SHAPES = ((1, 160, 192), (2, 192, 224), (1, 137, 203))


@pytest.fixture(scope="module")
def onnxruntime():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    return sys.modules["onnxruntime"]


def noise(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The first image is smaller than the batch; the second is grey, which is close to zero once normalized."""
    pixels = torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(height))
    sizes = torch.tensor([[height, width]] * batch)
    sizes[0] -= torch.tensor([10, 21])
    pixels[1:] = 115
    return pixels.to(torch.uint8), sizes


@torch.no_grad()
def tame(model: nn.Module) -> None:
    """Widens the outputs of fresh weights, so that no two scores are alike but by rounding, and sets the score
    threshold so that a grey image has no detections and noise has."""
    inference, heads = export.Inference(model), [model]
    layers = [model.rpn["head"].cls_logits, model.rpn["head"].bbox_pred] if isinstance(model, RetinaNet) else None
    if layers is None:
        heads = [model.roi_heads["box"]]
        predictor = heads[0].predictor
        layers = [model.rpn.head.cls_logits, model.rpn.head.bbox_pred, predictor.cls_score, predictor.bbox_pred]
    for layer, deviation in zip(layers, (3.0, 0.3, 3.0, 0.5)):
        seen = []
        handle = layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].flatten()))
        inference(*noise(1, 160, 192))
        handle.remove()
        layer.weight *= deviation / torch.cat(seen).std()
        nn.init.zeros_(layer.bias)
    heads[0].score_threshold = 0.0
    grey = inference(*(tensor[1:] for tensor in noise(2, 192, 224)))["scores"]
    heads[0].score_threshold = grey.max().item() + 1e-3


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory, onnxruntime):
    """A model and the files made of it."""
    config, overrides = CASES[request.param]
    model = model_of(config, overrides)
    tame(model)
    program = export.trace(model, get_config(config, overrides))
    directory = tmp_path_factory.mktemp("export")
    for suffix in ("pt2", "onnx"):
        export.save(program, directory / f"model.{suffix}", {"categories": "[]"})
    return model, directory


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_files_answer_as_the_model_does(exported, suffix):
    model, directory = exported
    run = export.load(directory / f"model.{suffix}")
    for shape in SHAPES:
        images = noise(*shape)
        with torch.no_grad():
            expected = export.Inference(model)(*images)
        found = run(*images)
        assert list(found) == list(expected)
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
        counts = expected["valid"].sum(1).tolist()
        assert counts[0] > 10 and counts[1:] == [0] * (shape[0] - 1)
        worst = export.differences(expected, found)
        assert max(worst.values()) <= (1e-3 if suffix == "onnx" else 0), worst
        if "keypoints" in expected:
            moved = (found["keypoints"] - expected["keypoints"]).abs().amax(-1)[expected["valid"]]
            assert (moved <= 1e-3).float().mean() > 0.95
    assert len(expected) == 4 + sum(name in getattr(model, "roi_heads", {}) for name in ("mask", "keypoint"))


def test_graphs_hold_standard_operators_and_named_axes(exported):
    import onnx

    graph = onnx.load(exported[1] / "model.onnx")
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert {"Conv", "NonMaxSuppression"} <= {node.op_type for node in graph.graph.node}
    axes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert axes["pixels"] == ["batch", 3, "height", "width"] and axes["sizes"] == ["batch", 2]
    assert axes["boxes"] == ["batch", 100, 4]
    assert {prop.key: prop.value for prop in graph.metadata_props} == {"categories": "[]"}


def to_onnx(function, arguments, path: Path, free: tuple[dict, ...]):
    """A function of tensors as a session of onnxruntime."""
    import onnxruntime

    from maskrcnn_benchmark.ops.onnx_operators import TRANSLATIONS

    class Module(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    program = torch.export.export(Module(), arguments, dynamic_shapes=(free,))
    names = [f"input{i}" for i in range(len(arguments))]
    translated = torch.onnx.export(
        program, dynamo=True, opset_version=export.OPSET, input_names=names, custom_translation_table=TRANSLATIONS
    )
    path.write_bytes(translated.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *tensors: [
        torch.from_numpy(x) for x in session.run(None, dict(zip(names, (t.numpy() for t in tensors))))
    ]


def test_nms_is_ours_to_the_index(onnxruntime, tmp_path):
    """Equal scores, groups, rows that are not valid or not numbers, fewer rows than may come out, none at all."""

    def ours(*tensors):
        return torch.ops.maskrcnn_benchmark.nms(*tensors, 0.5, 50)

    def candidates(batch: int, count: int, groups: int, valid: float):
        corner = torch.rand(batch, count, 2) * 100
        boxes = torch.cat([corner, corner + torch.rand(batch, count, 2) * 60], -1)
        scores = (torch.rand(batch, count) * 40).round() / 40
        scores[:, 3] = torch.nan
        return boxes, scores, torch.randint(0, groups, (batch, count)), torch.rand(batch, count) < valid

    torch.manual_seed(0)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    run = to_onnx(ours, candidates(2, 200, 5, 0.7), tmp_path / "nms.onnx", (free,) * 4)
    for given in ((2, 200, 5, 0.7), (1, 30, 3, 1.0), (3, 900, 80, 0.9), (2, 100, 1, 0.5), (2, 40, 4, 0.0)):
        inputs = candidates(*given)
        for expected, found in zip(ours(*inputs), run(*inputs)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("aligned", "sampling"), [(True, 0), (False, 0), (True, 2), (False, 2)])
def test_roi_align_is_ours(onnxruntime, tmp_path, aligned, sampling):
    """Boxes that reach over the border, of no area, and a level without any."""

    def ours(fine, coarse, *rows):
        return torch.ops.maskrcnn_benchmark.roi_align([fine, coarse], *rows, [0.25, 0.125], 7, sampling, aligned)

    def pyramid(batch: int, side: int, count: int):
        corner = torch.rand(count, 2) * side * 4 - 9
        boxes = torch.cat([corner, corner + torch.rand(count, 2) * side * 3], -1)
        boxes[::7] = 0
        maps = torch.randn(batch, 4, side, side + 6), torch.randn(batch, 4, side // 2, side // 2 + 3)
        return *maps, boxes, torch.randint(0, batch, (count,)), torch.randint(0, 2, (count,))

    torch.manual_seed(0)
    maps = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    free = (maps, maps, *[{0: Dim.DYNAMIC}] * 3)
    run = to_onnx(ours, pyramid(2, 24, 40), tmp_path / "roi_align.onnx", free)
    for given in ((2, 24, 40), (1, 18, 90), (3, 20, 1)):
        inputs = pyramid(*given)
        torch.testing.assert_close(run(*inputs)[0], ours(*inputs), rtol=1e-5, atol=1e-5)


def test_one_shape_and_float_pixels(tmp_path):
    model, cfg = model_of(None, PROPOSALS), get_config(None, PROPOSALS)
    export.save(export.trace(model, cfg, (1, 64, 96), torch.float32), tmp_path / "one.pt2", {})
    run, (pixels, sizes) = export.load(tmp_path / "one.pt2"), noise(1, 64, 96)
    with torch.no_grad():
        expected = export.Inference(model)(pixels.float(), sizes)
    assert export.differences(expected, run(pixels.float(), sizes)) == dict.fromkeys(expected, 0.0)
    with pytest.raises((AssertionError, RuntimeError), match=r"size|shape"):
        run(torch.zeros(1, 3, 96, 96), sizes)


def test_differences_by_hand():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 9, 9], [0, 0, 0, 0]]])
    scores, valid = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, True, False]])
    ours = {"boxes": boxes, "scores": scores, "labels": torch.tensor([[1, 2, 1]]), "valid": valid}
    swapped = {name: value[:, [1, 0, 2]] for name, value in ours.items()}
    assert export.differences(ours, swapped) == dict.fromkeys(ours, 0.0)
    moved = {**swapped, "boxes": swapped["boxes"] + torch.tensor([0.0, 0.25, 0, 0])}
    assert export.differences(ours, moved)["boxes"] == 0.25
    assert export.differences(ours, {**ours, "labels": torch.tensor([[1, 3, 1]])})["labels"] == float("inf")
    assert export.differences(ours, {**ours, "valid": torch.tensor([[True, False, False]])})["valid"] == float("inf")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DependencyError, match=r"not installed: .*onnxscript; pip install onnx onnxscript"):
        export.save(None, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


def test_several_views_are_refused():
    overrides = [*C4, "TEST.BBOX_AUG.ENABLED", "True"]
    with pytest.raises(ConfigError, match=r"set TEST\.BBOX_AUG\.ENABLED False"):
        export.trace(None, get_config(None, overrides))


def test_a_full_disk_leaves_the_old_file(monkeypatch, tmp_path):
    def fill(program, file, extra_files):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fill)
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="No space left"):
        export.save(None, tmp_path / "model.pt2", {})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_command(run, tmp_path):
    config, weights = tmp_path / "rpn.yaml", tmp_path / "weights.pth"
    config.write_text("MODEL: {RPN_ONLY: True}\n")
    keys = [*PROPOSALS[: -len(("MODEL.RPN_ONLY", "True", "MODEL.MASK_ON", "False"))], "MODEL.MASK_ON", "False"]
    torch.save(model_of(config, keys).state_dict(), weights)
    source = ("--config-file", config, "--weights", weights)
    result = run(
        "tools/export.py", *source, "--output", tmp_path / "m.pt2", "--shape", "1", "96", "128", "--check", *keys
    )
    assert result.returncode == 0, result.stderr
    assert "1 x 96 x 128: " in result.stdout and "boxes 0.0e+00" in result.stdout
    extra = {"config": "", "categories": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert "R-18-C4" in extra["config"] and json.loads(extra["categories"]) == []
    for arguments, message in (
        (("--output", tmp_path / "m.tflite"), "must end in .onnx or .pt2"),
        (("--output", tmp_path / "m.pt2", "--format", "onnx"), "must end in .onnx or .pt2"),
        (("--output", tmp_path / "nowhere" / "m.pt2"), "there is no directory"),
    ):
        result = run("tools/export.py", *source, *arguments)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
