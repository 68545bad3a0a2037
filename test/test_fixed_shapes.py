"""Fixed-shape mode: a training step never waits for the device, compiles as one graph, and computes the same."""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from conftest import ROOT
from test_data_loader import sample_of
from test_models import C4, SMALL, TINY, make_batch, model_of, step
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskrcnn_benchmark import ops
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.data.loader import collate
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine.train import build_run, train_step
from maskrcnn_benchmark.ops import box_coder, convolution, epilogue, masks, matching, nms, proposals, roi_align

COMPOSITES = {
    "box_encode": box_coder.encode_composite,
    "box_decode": box_coder.decode_composite,
    "box_decode_backward": box_coder.decode_backward_composite,
    "epilogue_": epilogue.epilogue_composite,
    "match": matching.match_composite,
    "nms": nms.nms_composite,
    "polygon_targets": masks.polygon_targets_composite,
    "proposals": proposals.proposals_composite,
    "conv3x3": convolution.conv3x3_composite,
    "conv3x3_input_gradient": convolution.conv3x3_input_gradient_composite,
    "conv3x3_weight_gradient": convolution.conv3x3_weight_gradient_composite,
    "pointwise": convolution.pointwise_composite,
    "pointwise_input_gradient": convolution.pointwise_input_gradient_composite,
    "pointwise_weight_gradient": convolution.pointwise_weight_gradient_composite,
    "roi_align": roi_align.roi_align_composite,
    "roi_align_backward": roi_align.roi_align_backward_composite,
}
# By these an operator hands a value to the host, or has a shape that only the device knows: either way, a wait.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"),
    *("bincount", "histc", "unique_dim", "unique_consecutive", "_unique", "_unique2", "_to_dense"),
}
# On a CPU these give their value without an operator. A tensor made of Python numbers is copied from the host.
HOST_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, torch.tensor, torch.as_tensor)


class HostWaits(ExitStack):
    """Counts, while it is active, all by which a step would wait for the device, by name and place.

    composites: the package's operators are served by their composites, as on a device without kernels, and what those
    do is counted too.
    """

    def __init__(self, composites: bool = False) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.composites = composites

    def __enter__(self) -> HostWaits:
        super().__enter__()
        self.enter_context(_Operators(self))
        self.enter_context(_HostMethods(self))
        return self

    def note(self, name: str) -> None:
        frames = [
            f for f in traceback.extract_stack() if f.filename != __file__ and "_python_dispatch" not in f.filename
        ]
        ours = [f for f in frames if "maskrcnn_benchmark" in f.filename]
        place = (ours or frames)[-1]
        self.found[f"{name} at {place.filename}:{place.lineno}"] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = operator._schema.name.split("::")
        if namespace == "maskrcnn_benchmark":
            self.waits.served[name] += 1
            if self.waits.composites or ops.kernel_in_use(name, "cpu") == "composite":
                with self:  # a mode is off within its own function
                    return COMPOSITES[name](*args)
        elif name in WAITING or self._waits(name, operator, args, kwargs):
            self.waits.note(name)
        return operator(*args, **kwargs)

    @staticmethod
    def _waits(name: str, operator, args: tuple, kwargs: dict) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "repeat_interleave":
            return operator._overloadname in ("Tensor", "self_Tensor")  # lengths that the device knows
        if name == "_to_copy":
            return torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        return name == "copy_" and args[0].device.type != args[1].device.type


class _HostMethods(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HOST_METHODS:
            self.waits.note(function.__name__)
        return function(*args, **(kwargs or {}))


VALUES = torch.tensor([3, 0, 5, 5])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x[0]),
        lambda x: int(x[0]) + 1,
        lambda x: float(x[0]),
        lambda x: list(range(x[0])),
        lambda x: x[0].item(),
        lambda x: "yes" if x.any() else "no",
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(4, device="meta").copy_(x),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.zeros((), dtype=torch.int64)),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.bincount(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.tensor([1, 2]) + x[:2],
        lambda x: nms.nms_indices(torch.ones(4, 4), x.float(), 0.5),
    ],
)
def test_a_wait_is_counted(wait):
    with HostWaits() as waits:
        wait(VALUES)
    assert waits.found.total() >= 1


def test_work_without_a_wait_is_not_counted():
    with HostWaits() as waits:
        x = VALUES[torch.arange(4)].to(torch.float32).repeat_interleave(2)
        torch.where(x > 0, x, 0).clamp(min=1).topk(2)
        x.masked_fill_(x > 3, 1)
        torch.zeros(3).copy_(x[:3])
    assert not waits.found


LEGACY = ("_BASE_", str(ROOT / "configs" / "conventions" / "maskrcnn_benchmark.yaml"))
# Small enough for the composites, which walk row by row.
SMALL_STEP = [
    *("SOLVER.IMS_PER_BATCH", "2", "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "50", "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "50"),
]


def make_run(tiny_config, output, *overrides: str, **device_changes):
    """A run on the CPU, in fixed-shape mode unless `device_changes` say otherwise."""
    device = dataclasses.replace(get_device("cpu"), **{"compacts": False, **device_changes})
    output.mkdir(exist_ok=True)
    run = build_run(get_config(tiny_config, [*SMALL_STEP, *overrides]), device, output, resume=False)
    run.parallel.train()
    return run


def waits_of_a_step(run, composites: bool) -> HostWaits:
    """Of the second step: the first may make what is kept, such as anchors and the optimizer's state."""
    batches = [[next(run.batches)] for _ in range(2)]
    train_step(run, batches[0])
    with HostWaits(composites) as waits:
        train_step(run, batches[1])
    return waits


BOTH = pytest.mark.parametrize("composites", [False, True], ids=["native", "composite"])


@BOTH
@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.OPTIMIZER", "SGD"),
        ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS_NORM", "1.0", "DTYPE", "bfloat16"),
        ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS_NORM", "1.0", "DTYPE", "float16"),
        ("SOLVER.OPTIMIZER", "SGD", *LEGACY),
    ],
    ids=["SGD", "AdamW-bf16", "AdamW-fp16-scaled", "legacy"],
)
def test_a_training_step_never_waits_for_the_device(tiny_config, tmp_path, overrides, composites):
    changes = {"autocast_dtypes": (torch.bfloat16, torch.float16), "grad_scaler": True}
    run = make_run(tiny_config, tmp_path, *overrides, **changes)
    waits = waits_of_a_step(run, composites)
    assert not waits.found
    unused = {"box_decode", "box_decode_backward"}
    served = {"conv3x3": True, "pointwise": "bfloat16" in overrides}
    for name, wanted in served.items():
        if not wanted or ops.kernel_in_use(name, "cpu") == "composite":  # torch's convolution serves
            unused |= {op for op in COMPOSITES if op.startswith(name)}
    # The ReLU behind the mask head's 1x1 convolution is the only one that is not a norm's
    if "pointwise" not in unused or ops.kernel_in_use("epilogue_", "cpu") == "composite":
        unused.add("epilogue_")
    assert waits.served.keys() == COMPOSITES.keys() - unused
    assert run.scaler.is_enabled() == ("float16" in overrides)


@BOTH
def test_the_counter_sees_the_waits_of_a_compacting_step(tiny_config, tmp_path, composites):
    waits = waits_of_a_step(make_run(tiny_config, tmp_path, compacts=True), composites)
    assert waits.found.total() == 2 and all(place.startswith("nonzero at") for place in waits.found), waits.found


@pytest.mark.parametrize(("composites", "ratio", "expected"), [(False, 0, 0), (True, 2, 0), (True, 0, 4)])
def test_c4_never_waits_but_for_adaptive_sampling_in_the_composite(composites, ratio, expected):
    """sampling_ratio 0 takes as many samples as the largest box needs: on y and on x, forward and backward."""
    if not composites and ops.kernel_in_use("roi_align", "cpu") == "composite":
        pytest.skip("the compiled kernels are not in use")
    small = ["MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "50", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"]
    model = model_of(None, [*C4, *small, "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", str(ratio)], compacts=False)
    batch = make_batch()
    with HostWaits(composites) as waits:
        sum(model(*batch).values()).backward()
    assert waits.found.total() == expected, waits.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own watch for waits is CUDA's, and there is none")
def test_a_step_on_a_gpu_never_waits(tiny_config, tmp_path):
    run = build_run(get_config(tiny_config, ["SOLVER.OPTIMIZER", "SGD"]), get_device("cuda"), tmp_path, resume=False)
    batches = [[next(run.batches)] for _ in range(2)]
    run.parallel.train()
    train_step(run, batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(run, batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


FIXED = ("INPUT.FIXED_SHAPES", "((96, 96),)")


@pytest.mark.parametrize(
    ("overrides", "timed"), [((), False), (FIXED, True), ((*FIXED, "DETERMINISTIC", "True"), False)]
)
def test_convolutions_are_timed_where_shapes_repeat(tiny_config, tmp_path, monkeypatch, overrides, timed):
    told = []
    monkeypatch.setattr(type(get_device("cpu")), "time_convolutions", lambda device, wanted: told.append(wanted))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    make_run(tiny_config, tmp_path, *overrides)
    assert told == [timed]


def shapes_of(batch) -> list[tuple[int, ...]]:
    found = []
    for part in batch:
        part._map(lambda tensor: found.append(tuple(tensor.shape)) or tensor)
    return found


@pytest.mark.parametrize("convention", [(), LEGACY], ids=["ours", "legacy"])
def test_a_step_in_buckets_computes_what_a_compacting_one_does(tiny_config, tmp_path, convention):
    """The whole way from the loader to the weights: padded objects, polygons and rows against none."""
    fixed = make_run(tiny_config, tmp_path / "fixed", "SOLVER.OPTIMIZER", "SGD", *convention)
    compact = make_run(tiny_config, tmp_path / "compact", "SOLVER.OPTIMIZER", "SGD", *convention, compacts=True)
    for iteration in range(3):
        losses, batches = [], []
        for run in (fixed, compact):
            batches.append(next(run.batches))
            torch.manual_seed(iteration)
            losses.append({name: loss.item() for name, loss in train_step(run, [batches[-1]]).items()})
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert shapes_of(batches[0]) != shapes_of(batches[1])
    for ours, theirs in zip(fixed.model.parameters(), compact.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_shapes_repeat_from_batch_to_batch(tiny_config, tmp_path):
    runs = (make_run(tiny_config, tmp_path, compacts=compacts) for compacts in (False, True))
    bucketed, exact = ({tuple(shapes_of(next(run.batches))) for _ in range(24)} for run in runs)
    assert len(bucketed) < len(exact) / 2
    for *_, boxes, _labels, _valid, points, offsets, instances in bucketed:
        assert all(length in (8, 16, 32, 64, 128, 256, 512) for length in (boxes[1], *points[:1], *offsets))
        assert instances == (boxes[0] * boxes[1] + 1,)


@pytest.mark.parametrize(
    ("counts", "groups", "points", "offsets"),
    [((0, 0), 8, 8, 8), ((1, 0), 8, 8, 8), ((2, 3), 8, 64, 16), ((8, 2), 8, 128, 32), ((9, 1), 16, 128, 32)],
)
def test_buckets_by_hand(counts, groups, points, offsets):
    """Each object has two polygons, of 4 and 3 points."""
    samples = [sample_of(40, 40, count) for count in counts]
    (_, exact), (_, padded) = (collate(samples, 32, (), bucketed) for bucketed in (False, True))
    assert padded.boxes.shape == (2, groups, 4) and padded.labels.shape == padded.valid.shape == (2, groups)
    assert padded.masks.points.shape == (points, 2) and padded.masks.polygon_offsets.shape == (offsets,)
    assert padded.masks.instance_offsets.shape == (2 * groups + 1,)
    most = exact.valid.shape[1]
    assert not padded.valid[:, most:].any()
    for name in ("boxes", "labels", "valid"):
        assert torch.equal(getattr(padded, name)[:, :most], getattr(exact, name))
    box = torch.tensor([[0.0, 0, 40, 40]])
    for image in range(2):
        for g in range(groups):
            drawn = draw(padded.masks, image * groups + g, box)
            assert torch.equal(drawn, draw(exact.masks, image * most + g, box) if g < most else torch.zeros_like(drawn))


def draw(polygons, instance: int, box: Tensor) -> Tensor:
    """By the kernel and by the composite, which must agree."""
    packed = (polygons.points, polygons.polygon_offsets, polygons.instance_offsets)
    arguments = (*packed, torch.tensor([instance]), box, 14)
    drawn = masks.polygon_targets(*arguments)
    assert torch.equal(drawn, masks.polygon_targets_composite(*arguments))
    return drawn


@pytest.mark.parametrize(
    ("config", "overrides", "backend"),
    [(SMALL, TINY, "aot_eager"), (None, [*C4, *LEGACY], "eager")],
    ids=["FPN", "C4-legacy"],
)
def test_the_training_forward_compiles_as_one_graph(config, overrides, backend):
    """Without a break, once for all batches of a shape, with eager's losses and gradients. With aot_eager the backward
    pass is one graph too."""
    model = model_of(config, overrides, compacts=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ((2, 0, 1), (1, 2, 0)):
            images, targets = make_batch(counts)
            images.image_ids = [image_id + sum(counts) for image_id in images.image_ids]
            ours, gradients = step(compiled, (images, targets))
            eager, expected = step(model, (images, targets))
            assert ours == pytest.approx(eager, rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")])


def test_a_question_to_the_host_breaks_the_graph():
    """So the test above can fail."""
    model = model_of(SMALL, TINY, compacts=False)
    model.rpn.head.register_forward_hook(lambda _, __, output: output if output[0][0].sum() > 0 else None)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager", dynamic=False)(*make_batch())
