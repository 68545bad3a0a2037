"""Captured training steps: with the double of graph_double.py they train as eager ones do, bit for bit."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from graph_double import graph_device
from test_benchmark_steps import request_of
from test_fixed_shapes import SMALL_STEP, HostWaits, make_run, shapes_of

from maskrcnn_benchmark.benchmark import runs
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.device.graphs import Graphs
from maskrcnn_benchmark.engine import distributed, graphs
from maskrcnn_benchmark.engine.exchange import GradientExchange
from maskrcnn_benchmark.engine.optim import set_learning_rate
from maskrcnn_benchmark.engine.train import build_run, save, train_step
from maskrcnn_benchmark.errors import ConfigError, DeviceError, UserError
from maskrcnn_benchmark.models.anchors import AnchorGenerator

CAPTURE = ("SOLVER.GRAPH_CAPTURE", "True")


def captured_run(tiny_config, output, *overrides: str, **changes):
    output.mkdir(exist_ok=True)
    run = build_run(
        get_config(tiny_config, [*SMALL_STEP, *CAPTURE, *overrides]), graph_device(**changes), output, False
    )
    run.parallel.train()
    return run


def steps(run, count: int, parts: int = 1) -> tuple[list, list, list]:
    """Of `count` steps as the training loop takes them: losses, images, and shapes of the batches."""
    losses, images, shapes = [], [], []
    for iteration in range(count):
        # No two alike, and float32 as on the device: AdamW's arithmetic on the CPU would see the rest of a double
        set_learning_rate(run.optimizer, torch.tensor(run.schedule.lr(iteration) * (1 + iteration)).item())
        distributed.seed_step(run.cfg.SEED, iteration)
        batches = [next(run.batches) for _ in range(parts)]
        losses.append(train_step(run, batches) | {"left out": run.guard.left_out.clone()})
        images += [images_.image_ids for images_, _ in batches]
        shapes.append(tuple(tuple(shapes_of(batch)) for batch in batches))
    return losses, images, shapes


SGD = ("SOLVER.OPTIMIZER", "SGD")
CLIPPED = ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS_NORM", "1.0", "DTYPE", "bfloat16")
HALF = {"autocast_dtypes": (torch.bfloat16, torch.float16), "grad_scaler": True}


@pytest.mark.parametrize(
    ("overrides", "count", "parts", "warm_up", "changes"),
    [
        (SGD, 20, 1, 3, {}),
        (CLIPPED, 12, 1, 1, {}),
        ((*SGD, "DTYPE", "float16"), 8, 1, 1, HALF),
        ((*SGD, "SOLVER.ACCUMULATE_STEPS", "2"), 16, 2, 0, {}),
    ],
    ids=["SGD", "AdamW-bf16-clipped", "SGD-fp16-scaled", "accumulated"],
)
def test_captured_steps_are_eager_ones(tiny_config, tmp_path, monkeypatch, overrides, count, parts, warm_up, changes):
    """Images, losses and weights, with a learning rate and random numbers that change from step to step."""
    monkeypatch.setattr(graphs, "WARM_UP", warm_up)
    captured = captured_run(tiny_config, tmp_path / "captured", *overrides, **changes)
    eager = make_run(tiny_config, tmp_path / "eager", *overrides, **changes)
    losses, images, shapes = steps(captured, count, parts)
    wanted, wanted_images, _ = steps(eager, count, parts)
    assert images == wanted_images
    for mine, theirs in zip(losses, wanted):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name, value in captured.model.state_dict().items():
        assert torch.equal(value, eager.model.state_dict()[name]), name
    made, numbers = captured.device.made, Counter(shapes)
    recorded = [shape for shape, number in numbers.items() if number > warm_up]
    assert len(made.captures) == len(recorded) > (1 if count == 20 else 0)
    assert made.eager == sum(min(number, warm_up) for number in numbers.values())
    assert len(made.replays) == count - made.eager > len(recorded)


@pytest.fixture
def one_image(tiny_config, tmp_path, monkeypatch):
    """Makes runs and the same batch twice, so that the second step is a replay."""
    monkeypatch.setattr(graphs, "WARM_UP", 1)

    def make(*overrides: str, **changes):
        run = captured_run(tiny_config, tmp_path, *overrides, **changes)
        return run, next(run.batches)

    return make


def test_what_the_double_is_for(one_image):
    """A step that relies on the host computes something else when it is replayed: so the test above can fail."""
    run, batch = one_image("SOLVER.OPTIMIZER", "SGD")
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = run.model.state_dict()["rpn.head.conv.weight"].clone()
    for _ in range(2):
        train_step(run, [batch])
    set_learning_rate(run.optimizer, 0.1)
    train_step(run, [batch])
    assert torch.equal(run.model.state_dict()["rpn.head.conv.weight"], before), "a number is kept by the graph"


def test_a_gradient_that_is_not_finite_is_kept_from_the_weights_in_a_replay(one_image):
    run, batch = one_image("SOLVER.OPTIMIZER", "SGD")
    for _ in range(3):
        train_step(run, [batch])
    weight = run.model.rpn.head.conv.weight
    before, images = weight.clone(), replace(batch[0], sizes=batch[0].sizes.clone())
    targets = replace(batch[1], boxes=torch.full_like(batch[1].boxes, torch.nan))
    losses = train_step(run, [(images, targets)])
    assert not sum(losses.values()).isfinite() and run.guard.left_out == 1
    assert torch.equal(weight, before)
    train_step(run, [batch])
    assert torch.equal(weight, before) and run.guard.left_out == 0, "the policy stop holds all later steps, too"
    assert len(run.device.made.replays) == 4


def test_losses_are_the_callers(one_image):
    run, batch = one_image("SOLVER.OPTIMIZER", "SGD")
    set_learning_rate(run.optimizer, 0.01)
    losses = [train_step(run, [batch]) for _ in range(4)]
    values = [sum(step.values()).item() for step in losses]
    assert len(run.device.made.replays) == 3 and len(set(values)) == 4


def test_further_shapes_run_eagerly_and_the_log_says_so_once(tiny_config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "WARM_UP", 0)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    run = captured_run(tiny_config, tmp_path, "SOLVER.OPTIMIZER", "SGD")
    with caplog.at_level(logging.WARNING):
        _, _, shapes = steps(run, 12)
    known = set(list(dict.fromkeys(shapes))[:2])
    beyond = sum(shape not in known for shape in shapes)
    assert len(set(shapes)) > 3 and len(run.device.made.captures) == 2 and run.device.made.eager == beyond > 1
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "SOLVER.GRAPH_CAPTURE: steps of 2 shapes are captured, those of further ones run eagerly; INPUT.FIXED_SHAPES"
        " keeps shapes few"
    ]


def test_the_benchmark_measures_captured_steps(tiny_config):
    """The step is one phase, and does what the eager one did: losses, RoIs and sizes of every step."""
    made = {}
    for name, device, overrides in (("captured", graph_device(), CAPTURE), ("eager", graph_device(graph_type=""), ())):
        cfg = get_config(tiny_config, ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.OPTIMIZER", "SGD", *overrides])
        request = request_of(cfg, "train", warmup=4, steps=3, phase_steps=1)
        (made[name],) = runs.run(request, device)["cases"]
    captured, eager = made.values()
    assert "graph" in captured["name"] and "graph" not in eager["name"]
    assert {"step_ms", "data_ms"} < captured["metrics"].keys() and "backward_ms" not in captured["metrics"]
    assert "backward_ms" in eager["metrics"] and len(captured["losses"]) == len(eager["losses"]) == 8
    assert captured["losses"][0] == eager["losses"][0] != captured["losses"][-1]
    for name in ("sampled_rois", "mask_head_rois", "flop"):
        assert captured["metrics"][name]["samples"] == eager["metrics"][name]["samples"]
    with pytest.raises(DeviceError, match="device cpu cannot record work"):
        runs.run(replace(request, cfg=get_config(tiny_config, CAPTURE)), get_device("cpu"))
    with pytest.raises(UserError, match="the first 3 steps are eager"):
        runs.check(replace(request, cfg=get_config(tiny_config, CAPTURE), warmup=3))


class HostSGD(torch.optim.SGD):
    """Like a device's own optimizer: the learning rate is a number, and gradients stay where they are."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_optimizer_that_takes_a_number_updates_beside_the_graph(tiny_config, tmp_path, monkeypatch, keeps):
    """As torch_npu's. Its update is not captured; one that drops the gradients is refused."""
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    changes = {"optimizers": {"SGD": HostSGD if keeps else torch.optim.SGD}}
    captured = captured_run(tiny_config, tmp_path / "captured", "SOLVER.OPTIMIZER", "SGD", **changes)
    if not keeps:
        with pytest.raises(ConfigError, match="SGD takes its learning rate from the host and drops the gradients"):
            steps(captured, 12)
        return
    eager = make_run(tiny_config, tmp_path / "eager", "SOLVER.OPTIMIZER", "SGD", **changes)
    losses, _, _ = steps(captured, 12)
    wanted, _, _ = steps(eager, 12)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(losses, wanted) for name in a)
    assert len(captured.device.made.replays) > 3
    updates = {"_fused_sgd_", "_foreach_add_", "_foreach_mul_"}
    for recorder in captured.device.made.captures:
        assert not updates & {operator._schema.name.split("::")[1] for operator, *_ in recorder.calls}


RETINANET = (
    *("MODEL.RETINANET_ON", "True", "MODEL.MASK_ON", "False", "MODEL.BACKBONE.CONV_BODY", "R-18-FPN-RETINANET"),
    *("MODEL.RETINANET.NUM_CLASSES", "6", "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RETINANET.LOSS_NORMALIZER", "moving_average"),
)
# All RoIs are sampled, and so are ground truth's: a NaN in its boxes comes to the losses
SKIPPING = (*SGD, "SOLVER.SKIP_NONFINITE_STEPS", "1", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64")
# Of graph_ranks.py: overrides, steps, micro-batches a step, and what is other about the device
VARIANTS = {
    "SGD": (SKIPPING, 8, 1, {}),
    "AdamW-bf16-clipped": (CLIPPED, 6, 1, {}),
    "SGD-fp16-scaled": ((*SGD, "DTYPE", "float16"), 6, 1, HALF),
    "accumulated": ((*SGD, "SOLVER.ACCUMULATE_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4"), 9, 2, {}),
    "buffers": ((*SGD, *RETINANET), 5, 1, {}),
    "host": (SGD, 5, 1, {"optimizers": {"SGD": torch.optim.SGD}}),
    "host-own-gradients": (SGD, 5, 1, {"optimizers": {"SGD": HostSGD}, "gradient_views": False}),
}
STATISTICS = ("running_mean", "running_var", "positives_average")
SPOILT = 6  # of the first one's steps: both ranks replay it


@pytest.fixture(scope="module")
def ranks(tiny_config, tmp_path_factory) -> list[dict]:
    """What graph_ranks.py found on each of two ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "test" / "graph_ranks.py", tiny_config, directory]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same(mine: dict, theirs: dict) -> None:
    """What graph_ranks.trained gives."""
    assert mine["shapes"] == theirs["shapes"] and len(mine["losses"]) == len(theirs["losses"])
    for ours, wanted in zip(mine["losses"], theirs["losses"]):
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name].nan_to_num(7), wanted[name].nan_to_num(7)) for name in ours)
    for name, value in mine["model"].items():
        assert torch.equal(value, theirs["model"][name]), name


@pytest.mark.parametrize("name", VARIANTS)
def test_captured_ranks_train_as_distributed_data_parallel(ranks, name):
    """Bit for bit, also where one rank replays a step that the other computes eagerly; from weights and buffers that
    were others on rank 1. Running statistics are the main rank's alone."""
    both = [found[name] for found in ranks]
    for found in both:
        captured, eager = found["captured"], found["eager"]
        assert captured["parallel"] != eager["parallel"] == "DistributedDataParallel"
    assert_same(both[0]["captured"], both[0]["eager"])
    first, second = (found["captured"] for found in both)
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]) or key.endswith(STATISTICS), key
    replayed = [[shape in way["shapes"][:step] for step, shape in enumerate(way["shapes"])] for way in (first, second)]
    assert sum(replayed[0]) > 0 and sum(replayed[1]) > 0
    assert name == "buffers" or any(a != b for a, b in zip(*replayed)), "the ranks always did alike"
    update = 0 if name.startswith("host") else len(replayed[0]) - 1
    assert [way["replays"] for way in (first, second)] == [sum(steps_) + update for steps_ in replayed]


def test_a_nan_on_one_rank_is_left_out_on_both(ranks):
    for found in ranks:
        left_out = [step["left out"].item() for step in found["SGD"]["captured"]["losses"]]
        assert left_out == [0, 0, 0, 0, 0, 0, 1, 0] and left_out[SPOILT]
    sums = [[sum(step.values()).isfinite() for step in found["SGD"]["captured"]["losses"]] for found in ranks]
    assert all(sums[0]) and not sums[1][SPOILT]


def test_the_rank_of_a_nan_is_named(ranks):
    """One step was allowed. Every rank computes its part of the second again, without the others' gradients."""
    said = ranks[0]["report"]
    assert said == ranks[1]["report"] and said.startswith("iteration 2: ") and " on rank 1, images [" in said
    assert "rank 0" not in said and "passing fault" not in said


def test_ranks_continue_with_and_without_graphs(ranks):
    for found in ranks:
        former, captured, eager = found["resumed"].values()
        assert captured["parallel"] != eager["parallel"] == "DistributedDataParallel"
        assert_same(captured, former)
        assert_same(eager, former)


def test_the_benchmark_measures_captured_ranks(ranks):
    losses = ranks[0]["benchmark"]
    assert losses["captured"] == losses["eager"] and len(losses["eager"]) == 4


def test_ranks_without_graphs_run_eagerly(ranks):
    assert [found["without graphs"] for found in ranks] == [("DistributedDataParallel", True)] * 2


def test_a_device_without_graphs_runs_eagerly_and_says_so(tiny_config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = make_run(tiny_config, tmp_path, *CAPTURE)
        losses, _, _ = steps(run, 2)
    said = [record.message for record in caplog.records if "graphs" in record.message]
    assert said == ["SOLVER.GRAPH_CAPTURE: device cpu records no graphs, so steps run eagerly"]
    assert run.captured is None and len(losses) == 2


def test_refusals(monkeypatch, tiny_config, tmp_path):
    with pytest.raises(DeviceError, match="device cpu cannot record work as a graph"):
        get_device("cpu").graphs()
    with pytest.raises(ConfigError, match="ApexFusedSGD takes its learning rate from the host"):
        get_config(tiny_config, [*CAPTURE, "SOLVER.OPTIMIZER", "ApexFusedSGD"])
    assert not graphs.asked_for(get_config(tiny_config), graph_device())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"2 ranks, but backbone\.body\.\S+ \(SyncBN\) asks the others .* MODEL.RESNETS.NORM"
    ):
        captured_run(tiny_config, tmp_path, "MODEL.RESNETS.NORM", "SyncBN")


def test_a_run_continues_with_and_without_graphs(tiny_config, tmp_path):
    """A learning rate that is a tensor in the checkpoint of one run is a number in the other."""
    captured = captured_run(tiny_config, tmp_path, "SOLVER.OPTIMIZER", "SGD")
    steps(captured, 2)
    save(captured, 2, "model_0000002.pth")
    for device in (graph_device(), get_device("cpu")):
        run = build_run(captured.cfg, device, tmp_path, resume=True)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        assert [isinstance(rate, torch.Tensor) for rate in rates] == [bool(device.graph_type)] * 2
        set_learning_rate(run.optimizer, 0.25)
        train_step(run, [next(run.batches)])
        assert all(group["lr"] == 0.25 * group["lr_factor"] for group in run.optimizer.param_groups)


def test_gradients_in_the_exchanges_buffer(tmp_path):
    """Each with its weight's size and strides, at a multiple of 256 bytes, divided by the ranks; 0 where there is none,
    also after a step with one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(5, 3)).to(
            memory_format=torch.channels_last
        )
        model[1].bias.requires_grad_(False)
        exchange = GradientExchange(model, graph_device())
        exchange._ranks = 2
        conv, linear = model[0], model[1]
        for given in (True, False):
            conv.weight.grad, conv.bias.grad = torch.randn_like(conv.weight), None
            linear.weight.grad = torch.ones(3, 5) if given else None
            wanted = conv.weight.grad / 2, torch.zeros(5), torch.full((3, 5), 0.5 if given else 0.0)
            with HostWaits() as waits:
                exchange.collect()
                assert conv.weight.grad is conv.bias.grad is linear.weight.grad is None
                exchange.add_up()
                exchange.hand_out()
            assert not waits.found
            for parameter, mean in zip((conv.weight, conv.bias, linear.weight), wanted):
                assert torch.equal(parameter.grad, mean) and parameter.grad.stride() == parameter.stride()
                assert (parameter.grad.storage_offset() * 4) % 256 == 0
        assert model[1].bias.grad is None and conv.weight.stride() == (27, 1, 9, 3)
    finally:
        dist.destroy_process_group()


class FakeModule:
    """torch.cuda as far as Graphs sees it; `told` is what it was asked, in turn."""

    def __init__(self) -> None:
        self.told: list = []
        self.place = "default"

    def Stream(self) -> FakeStream:
        return FakeStream(self, "side")

    def current_stream(self) -> FakeStream:
        return FakeStream(self, self.place)

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def stream(self, stream: FakeStream):
        former, self.place = self.place, stream.name
        yield
        self.place = former

    @contextmanager
    def graph(self, graph: FakeGraph, **options):
        inspect.signature(torch.cuda.graph).bind(graph, **options)
        self.told.append(("begin", options["pool"], options["stream"].name, options["capture_error_mode"]))
        yield
        self.told.append("end")

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)


@dataclass
class FakeStream:
    module: FakeModule
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.module.told.append(f"{self.name} waits for {other.name}")


@dataclass
class FakeGraph:
    module: FakeModule

    def replay(self) -> None:
        self.module.told.append("replay")


def test_how_a_device_module_is_asked():
    """The names are CUDA's, and those that torch_npu gives its own."""
    assert all(hasattr(torch.cuda, name) for name in ("Stream", "stream", "current_stream", "graph_pool_handle"))
    assert hasattr(torch.cuda, "CUDAGraph") and hasattr(torch.cuda.CUDAGraph, "replay")
    module = FakeModule()
    made = Graphs(module, "CUDAGraph")
    with made.warm_up():
        module.told.append(module.place)
    replay, result = made.capture(lambda: module.told.append("work") or 7)
    replay()
    assert result == 7
    assert module.told == [
        *("side waits for default", "side", "default waits for side"),
        *(("begin", "pool", "side", "thread_local"), "work", "end", "replay"),
    ]


def test_anchors_that_were_kept_stay_where_they_are():
    """A captured graph reads them there."""
    anchors = AnchorGenerator(((8.0,),), (1.0,), (4,))
    first = anchors([(2, 2)], (8, 8), torch.device("cpu"))[0]
    for side in range(3, 3 + 2 * AnchorGenerator.CACHED_SHAPES):
        assert len(anchors([(side, 1)], (4 * side, 4), torch.device("cpu"))[0]) == side
    assert anchors([(2, 2)], (8, 8), torch.device("cpu"))[0] is first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing for real needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_captured_steps_on_a_gpu_are_eager_ones(tiny_config, tmp_path, dtype):
    """Up to the order of atomic sums. Two shapes take turns, so that graphs share their memory."""
    losses = {}
    for name, more in (("captured", CAPTURE), ("eager", ())):
        (tmp_path / name).mkdir()
        cfg = get_config(tiny_config, [*SMALL_STEP, *more, "DTYPE", dtype, "SOLVER.OPTIMIZER", "SGD"])
        run = build_run(cfg, get_device("cuda"), tmp_path / name, resume=False)
        run.parallel.train()
        batches = list({tuple(shapes_of(batch)): batch for batch in itertools.islice(run.batches, 12)}.values())[:2]
        losses[name] = []
        for iteration in range(16):
            set_learning_rate(run.optimizer, 1e-3 * (1 + iteration))
            distributed.seed_step(0, iteration)
            losses[name].append(train_step(run, [batches[iteration % 2]]))
        assert run.captured is None or len(run.captured._captured) == 2
    values = [[sum(step.values()).item() for step in steps_] for steps_ in losses.values()]
    assert values[0] == pytest.approx(values[1], rel=1e-3 if dtype == "float32" else 2e-2)
