"""tools/benchmark.py scaling: its formulas against figures worked by hand, its buckets against torch's own."""

import json
import re

import pytest
import torch.distributed as dist
from benchmark_results import result
from conftest import ROOT

from maskrcnn_benchmark.benchmark import flops, results, scaling, sides, workload
from maskrcnn_benchmark.benchmark.scaling import Bucket, Cluster, Evaluation, Link, Prediction, Step
from maskrcnn_benchmark.config import flat, get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import train
from maskrcnn_benchmark.errors import UserError

# Nodes of 4 with links of 1 GB/s and 10 us, a network of .1 GB/s and 100 us
CLUSTER = Cluster(4, Link(1.0, 10.0), Link(0.1, 100.0), launch_microseconds=1000.0)
FULL = ROOT / "configs" / "e2e_mask_rcnn_R_50_FPN_1x.yaml"
WIDE = ("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "1024")
STEP = Step(milliseconds=100.0, backward=60.0, images=2, source="by hand")


@pytest.mark.parametrize(
    ("devices", "milliseconds"),
    [
        (1, 1.0),  # the launch alone
        (4, 1 + 6 * 0.01 + 6 * 1.0),  # 6 messages of 1 MB in the node
        # as before in the nodes; between the two, each device sends 2 messages of an eighth over the network
        (8, 1 + 6 * 1.01 + 2 * (0.1 + 5.0)),
        (16, 1 + 6 * 1.01 + 6 * (0.1 + 2.5)),  # 4 nodes: 6 messages of a sixteenth
    ],
)
def test_all_reduce_by_hand(devices, milliseconds):
    assert 1000 * CLUSTER.all_reduce_seconds(4e6, devices) == pytest.approx(milliseconds)


def test_one_node_is_the_plain_ring():
    """2 (n - 1) / n size / bandwidth, without latencies."""
    cluster = Cluster(8, Link(360.0, 0.0), Link(1e-9, 1e9), 0.0)
    assert cluster.all_reduce_seconds(176e6, 8) == pytest.approx(2 * 7 / 8 * 176e6 / 360e9)
    alone = Cluster(1, Link(1e-9, 1e9), Link(40.0, 0.0), 0.0)  # a device a node: the ring is the network's
    assert alone.all_reduce_seconds(176e6, 8) == pytest.approx(2 * 7 / 8 * 176e6 / 40e9)


def test_devices_must_fill_their_nodes():
    with pytest.raises(UserError, match="12 devices do not fill nodes of 8"):
        Cluster().nodes(12)
    assert [Cluster().nodes(n) for n in (1, 4, 8, 64)] == [1, 1, 1, 8]


def test_buckets_by_hand():
    """Of 1 MB, that is 262,144 values: 200,000 and 100,000 close one together, 300,000 alone, the last one is left."""
    ready = ((200_000, 0.1), (100_000, 0.2), (300_000, 0.5), (5, 1.0))
    gradients = [flops.Gradient(str(values), values, share) for values, share in ready]
    assert scaling.buckets(gradients, 1) == [
        Bucket(1_200_000, 2, 0.2),
        Bucket(1_200_000, 1, 0.5),
        Bucket(20, 1, 1.0),
    ]


def test_buckets_and_their_order_are_torchs(cfg, tmp_path, monkeypatch):
    """In a group of one rank. After the first step torch fills its buckets anew, in the order in which gradients
    came."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = sides.fresh_model(cfg, get_device("cpu")).train()
        monkeypatch.setattr(train.distributed, "world_size", lambda: 2)  # else there would be nothing to exchange
        parallel = train.parallelize(model, get_device("cpu"), 1)
        batch = workload.training_workload(cfg, get_device("cpu"), 1, (96, 96), 4)
        for _ in range(3):  # torch tells them a step after it has filled them
            sum(parallel(batch.images, batch.targets).values()).backward()
        logged = parallel._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    filled = scaling.buckets(flops.gradients(cfg, (96, 96), 4), 1)
    assert len(filled) > 2
    assert logged["bucket_cap_bytes"] == 2**20 and logged["gradient_as_bucket_view"]
    assert logged["rebuilt_bucket_sizes"] == ", ".join(str(bucket.size) for bucket in filled)


@pytest.fixture(scope="module")
def cfg(tiny_config):
    """Wide enough for a few buckets of 1 MB."""
    return get_config(tiny_config, WIDE)


def test_gradients_of_r50_fpn():
    """Mask head first, then box head, RPN, FPN and the backbone from its top, down to res3's first block.
    fc6 is 12,544 x 1,024. torchvision states 44,401,393 parameters with 91 classes, of which stem and res2 are frozen
    here: 7 x 7 x 3 x 64, and 212,992 of three blocks."""
    made = flops.gradients(get_config(FULL, ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "91"]), (128, 128), 4)
    places = ("roi_heads.mask", "roi_heads.box", "rpn", "backbone.fpn", "backbone.body")
    order = [next(i for i, place in enumerate(places) if g.name.startswith(place)) for g in made]
    assert order == sorted(order) and "layer2.0" in made[-1].name
    assert [g.ready for g in made] == sorted(g.ready for g in made) and made[-1].ready == 1
    assert {g.name: g.values for g in made}["roi_heads.box.feature_extractor.fc6.weight"] == 12_544 * 1_024
    assert sum(g.values for g in made) == 44_401_393 - 9_408 - 212_992


def test_a_timeline_by_hand():
    """Of a backward pass of 60 ms two buckets, there after 30 and 60 ms. On 4 devices each takes 1 + 6 * 1.01 = 7.06:
    the first is hidden, the second is not."""
    filled = [Bucket(4_000_000, 3, 0.5), Bucket(4_000_000, 4, 1.0)]
    found = scaling.predict(STEP, filled, CLUSTER, 4)
    assert found.all_reduce == pytest.approx(14.12) and found.exposed == pytest.approx(7.06)
    assert found.overlap == pytest.approx(7.06 / 60) and found.step == pytest.approx(107.06)
    assert found.efficiency == pytest.approx(100 / 107.06)
    assert found.images_per_second == pytest.approx(4 * 2 / 0.10706)
    assert found.bound_by == "network" and found.nodes == 1


def test_a_bucket_waits_for_the_one_before_it():
    """Three that are there after 54 ms: the last one ends at 54 + 3 * 7.06, which is 15.18 after the pass."""
    found = scaling.predict(STEP, [Bucket(4_000_000, 1, 0.9)] * 3, CLUSTER, 4)
    assert found.exposed == pytest.approx(15.18)
    assert found.overlap == pytest.approx(6 / 60)


def test_one_device_exchanges_nothing():
    found = scaling.predict(STEP, [Bucket(4_000_000, 1, 1.0)], CLUSTER, 1)
    assert (found.all_reduce, found.exposed, found.step, found.efficiency) == (0, 0, 100, 1)
    assert found.images_per_second == 20 and found.bound_by == "computing"


def test_a_slow_loader_bounds():
    """10 images/s a device: 2 images take 200 ms."""
    found = scaling.predict(STEP, [Bucket(4_000_000, 1, 1.0)], CLUSTER, 4, loader=10.0)
    assert (found.step, found.efficiency, found.images_per_second) == (200, 0.5, 40) and found.bound_by == "data"
    assert scaling.predict(STEP, [], CLUSTER, 4, loader=1000.0).bound_by == "computing"


def test_evaluation_by_hand():
    """4 devices train 4,000 images in 100 s and infer 400 in 10; scoring of 130 s is awaited for 30."""
    prediction = Prediction(4, 1, 0.0, 0.0, 0.0, 100.0, 1.0, 40.0, "computing")
    found = scaling.epoch(prediction, Evaluation(infer=10.0, scoring=130.0), images=4_000, test_images=400)
    assert (found.training, found.inference, found.waiting) == (100, 10, 30)
    assert found.share == pytest.approx(40 / 140)
    assert scaling.epoch(prediction, Evaluation(10.0, None), 4_000, 400).waiting == 0


# ---- files and words


def measured(cfg, **changes):
    parts = {"step_ms": 100.0, "data_ms": 0.0, "forward_ms": 60.0, "backward_ms": 120.0, "optimizer_ms": 20.0}
    metrics = {name: results.metric([value], "ms") for name, value in parts.items()}
    work = {"data": "synthetic", "batch": 2, "image": [96, 96], "mask_head_rois": 8}
    made = result(metrics, work=work, **changes)
    made["environment"]["world_size"] = changes.get("world_size", 1)
    made["cases"][0]["config"] = flat(cfg)
    return made


def test_what_the_tool_prints_and_writes(run, cfg, tmp_path):
    """Backward is 120 of the phases' 200 ms, so 60 of the step's 100."""
    train, infer, scored, data, out = (tmp_path / f"{name}.json" for name in ("train", "infer", "eval", "data", "out"))
    results.write(train, measured(cfg))
    for path, kind, name, value in (
        (infer, "infer", "images_per_second", 5.0),
        (scored, "eval", "eval_seconds", 2.0),
        (data, "data", "images_per_second_overall", 16.0),
    ):
        made = result({name: results.metric([value], "")}, work={"images": 100})
        made["cases"][0] |= {"kind": kind, "name": "eval detections hotcoco"}
        results.write(path, made)
    done = run("tools/benchmark.py", "scaling", "--train", train, "--infer", infer, "--eval", scored, "--data", data,
               "--devices", 4, "--devices", 8, "--devices-per-node", 4, "--network-bandwidth", 0.5, "--out", out,
               "DISTRIBUTED.BUCKET_MB", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    filled = scaling.buckets(flops.gradients(cfg, (96, 96), 4), 1)
    assert [Bucket(**bucket) for bucket in found["buckets"]] == filled
    assert found["bytes"] == 4 * found["trainable_parameters"] == sum(bucket.size for bucket in filled)
    cluster = Cluster(4, network=Link(0.5, 14.0))
    step = Step(100.0, 60.0, 2, found["step"]["source"])
    assert found["predictions"] == [vars(scaling.predict(step, filled, cluster, n, 16.0)) for n in (4, 8)]
    assert found["predictions"][0]["bound_by"] == "data"
    assert found["epochs"][0]["inference"] == 5_000 / (5 * 4)
    assert "node: 360 GB/s each way, 3.4 us (assumed" in done.stdout
    assert "network: 0.5 GB/s each way, 14 us (as given)" in done.stdout


def test_a_given_step_needs_no_file_and_captured_steps_hide_nothing(run, tiny_config):
    """Captured, all gradients are exchanged at once after the backward pass."""
    done = run("tools/benchmark.py", "scaling", "--step-ms", 50, "--batch", 4, "--size", "96x96", "--positives", 4,
               "--config-file", tiny_config, "--devices", 1, "--devices", 8, "--node-bandwidth", 1, *WIDE,
               "DISTRIBUTED.BUCKET_MB", 1, "SOLVER.GRAPH_CAPTURE", "True")  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, eight = (line.split() for line in done.stdout.splitlines()[-2:])
    assert "80.00 images/s" in done.stdout and one[-3:] == ["100.0%", "80.0", "computing"]
    size = float(re.search(r"parameters: (\S+) MB .* in 1 buckets", done.stdout)[1])
    milliseconds = 2 * 7 * (size / 8 + 0.0034) + 0.0084
    assert size > 2 and float(eight[2]) == float(eight[4]) == pytest.approx(milliseconds, abs=0.05)
    assert eight[3] == "0.0%"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_size": 2}, "2 devices"),
        ({"kind": "ops"}, "one case of train"),
        ({"data": "real"}, "--data synthetic"),
        ({"without": "backward_ms"}, "no backward_ms"),
    ],
)
def test_files_that_are_no_step_of_one_device(cfg, tmp_path, change, words):
    made = measured(cfg, world_size=change.get("world_size", 1))
    (case,) = made["cases"]
    case["kind"] = change.get("kind", "train")
    case["work"]["data"] = change.get("data", "synthetic")
    case["metrics"].pop(change.get("without"), None)
    results.write(tmp_path / "train.json", made)
    with pytest.raises(UserError, match=words):
        scaling.read_step(tmp_path / "train.json", None, [])


def test_every_kind_of_detector_can_be_reckoned_with():
    for name in ("retinanet/retinanet_R-50-FPN_1x.yaml", "e2e_keypoint_rcnn_R_50_FPN_1x.yaml"):
        cfg = get_config(ROOT / "configs" / name)
        assert flops.gradients(cfg, (128, 128), 4)[-1].ready == 1
