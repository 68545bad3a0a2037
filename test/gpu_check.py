"""The stages of gpu_check.sh, one after the other in processes of their own, and the JSON that they make together.

{"format": 1, "device": its name, "commit": the checkout's or null, "environment": {what environment.describe says, or
 null}, "stages": [stage], "targets": [target]}
stage: {"name", "started": ISO time, "command", "status": exit status or null where it ran past its time, "seconds",
 "tail", "results"}
    tail: the last lines of a stage that failed. results: by name what it wrote, raw samples included
target: {"name", "wanted", "measured": number or null, "met": bool or null where it was not measured}
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from maskrcnn_benchmark import command
from maskrcnn_benchmark.benchmark import environment
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine.checkpoint import write_atomically
from maskrcnn_benchmark.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("INPUT.FIXED_SHAPES", "((800, 1344), (1344, 800))")
CAPTURE = ("SOLVER.GRAPH_CAPTURE", "True")
RECIPE = "configs/e2e_mask_rcnn_R_50_FPN_1x_torchvision.yaml"
# The tests that use a GPU where there is one
GPU_TESTS = ("test/test_cuda_kernels.py", "test/test_fixed_shapes.py", "test/test_graphs.py")
GPU_TESTS += ("-k", "cuda_agrees or cuda_never or cuda_deterministic or gpu")
PARITY = ("tools/parity.py", "--device", "cuda", "--json")
FACTS = "environment.json"
# In a process of its own: it sees the kernels that were just built
ENVIRONMENT = """import json, sys
from maskrcnn_benchmark.benchmark import environment
from maskrcnn_benchmark.device import get_device
with open(sys.argv[1], "w") as file:
    json.dump(environment.describe(get_device("cuda")), file)
"""
SYSTEMS = ("ours", "torchvision")
TAIL = 40
# Curves: steps; bfloat16 has 8 bits, and the means over 10 steps may be five roundings apart
STEPS, WINDOW, APART = 50, 10, 5 * 2.0**-8
# As many anchors and RoIs as there are, so that nothing is drawn at random, which devices do each in their own way
ALL_SAMPLED = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "20000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1024"),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "SOLVER.BASE_LR", "0.001", "SOLVER.WARMUP_ITERS", "10"),
    *("SOLVER.IMS_PER_BATCH", "4"),
)


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take. results: files it writes in the scratch directory, by name; JSON, or JSON
    lines where they end in .jsonl. needs: the stage that draws its images there."""

    name: str
    command: Sequence[str | Path]
    limit: int
    results: tuple[str, ...] = ()
    needs: str | None = None


def stages(scratch: Path) -> list[Stage]:
    """All of them; they share `scratch`."""
    benchmark, bf16 = (sys.executable, "tools/benchmark.py"), ("--device", "cuda", "--dtype", "bfloat16")
    peer = ("--against", "torchvision")
    step = (*bf16, "--size", "800x1344", "--batch", 12, "--steps", 20, "--warmup", 6, *peer)
    real = (*bf16, "--data", "real", "--batch", 12, "--steps", 80, "--warmup", 60, "--config-file", RECIPE)
    workers = max(1, min(16, os.cpu_count() or 1) - 1)
    shapes = ("DATA.PATH", scratch / "shapes", "DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.WEIGHT", "")
    shapes += ("MODEL.ROI_BOX_HEAD.NUM_CLASSES", 6, "DATALOADER.NUM_WORKERS", workers)
    infer = (*bf16, "--size", "800x1333", "--batch", 1, "--batch", 8, *peer)

    def measured(name: str, limit: int, options: tuple, overrides: tuple = (), needs: str | None = None) -> Stage:
        kind, file = name.split()[0], f"{name.replace(' ', '_')}.json"
        return Stage(name, (*benchmark, kind, *options, "--out", scratch / file, *overrides), limit, (file,), needs)

    # Without CUDA kernels composites would be measured in their place
    build = ("env", "FORCE_CUDA=1", "MASKRCNN_REQUIRE_EXT=1", sys.executable, "setup.py", "--quiet", "build_ext")

    return [
        Stage("build", (*build, "--inplace"), 240),
        Stage("environment", (sys.executable, "-c", ENVIRONMENT, scratch / "environment.json"), 30, (FACTS,)),
        Stage("tests", (sys.executable, "-m", "pytest", "-q", "-rs", *GPU_TESTS), 120),
        Stage("parity", (sys.executable, *PARITY, scratch / "parity.json"), 90, ("parity.json",)),
        measured("ops", 150, ("--device", "cuda", *peer, "--budget", 1)),
        measured("train", 150, step),
        measured("train graph", 150, step, (*CAPTURE, *SHAPES)),
        generated(scratch / "shapes", 1200, (480, 640)),
        measured("train real", 90, real, (*shapes, *CAPTURE, *SHAPES), needs="shapes drawn"),
        measured("infer", 120, infer),
        generated(scratch / "small", 64, (128, 128)),
        curve(scratch, "eager", "cuda"),
        curve(scratch, "graph", "cuda", *CAPTURE),
        curve(scratch, "cpu", "cpu"),
    ]


def generated(directory: Path, images: int, size: tuple[int, int]) -> Stage:
    count = ("--train", images, "--val", 4, "--size", *size)
    return Stage(f"{directory.name} drawn", (sys.executable, "tools/dataset.py", "generate", directory, *count), 60)


def curve(scratch: Path, name: str, device: str, *overrides: str) -> Stage:
    """The losses of the quickstart's model over STEPS steps on generated images."""
    directory = scratch / f"curve_{name}"
    options = ("DATA.PATH", scratch / "small", "OUTPUT_DIR", directory, "SOLVER.MAX_ITER", STEPS, "LOGGING.PERIOD", 1)
    options += ("DTYPE", "bfloat16", "SAVE_CHECKPOINTS", "False", "LOGGING.TENSORBOARD", "False")
    size = ("INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MAX_SIZE_TRAIN", "128")
    train = (sys.executable, "tools/train_net.py", "--config-file", "configs/quickstart.yaml", "--device", device)
    train += ("--skip-test", *options, *size, *ALL_SAMPLED, *overrides)
    limit = 120 if device == "cpu" else 60
    return Stage(f"curve {name}", train, limit, (f"curve_{name}/metrics.jsonl",), needs="small drawn")


def chosen(among: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Those of the names, and the ones that they need, in their order."""
    if unknown := set(names) - {stage.name for stage in among}:
        known = ", ".join(stage.name for stage in among)
        raise UserError(f"--stages: there is no {', '.join(sorted(unknown))}; there are {known}")
    wanted = {*names, *(stage.needs for stage in among if stage.name in names)}
    return [stage for stage in among if stage.name in wanted]


def run_stage(stage: Stage, scratch: Path) -> dict[str, Any]:
    """What the JSON says of it. It never raises for what the stage does."""
    started, begun = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    parts = [str(part) for part in stage.command]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status = execute(parts, stage.limit, output)
        output.seek(0)
        lines = output.read().splitlines()
    results, missing = {}, []
    for name in stage.results:
        try:
            results[name] = read(scratch / name)
        except (OSError, ValueError) as error:
            missing.append(f"no {name}: {error}")
    if status == 0 and missing:
        status = 1
    return {
        "name": stage.name,
        "started": started,
        "command": parts,
        "status": status,
        "seconds": round(time.perf_counter() - begun, 1),
        "tail": [] if status == 0 else [*lines[-TAIL:], *missing],
        "results": results,
    }


def execute(parts: list[str], limit: int, output: TextIO) -> int | None:
    """The exit status, as a shell's 127 where there is no such program; None where it was stopped at the limit."""
    try:
        process = subprocess.Popen(parts, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    except OSError as error:
        output.write(f"{error}\n")
        return 127
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
        return None


def read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


# ---- targets


def targets(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was wanted of one H200, and what the stages measured. torchvision's recipe is the contiguous one."""
    found = {name: result for stage in done for name, result in stage["results"].items()}
    training = cases(found, "train.json") + cases(found, "train_graph.json")
    recipe = [case for case in training if "channels-last" not in case["name"]]
    rate, memory, waits = "images_per_second", "max_memory_mb", cases(found, "train_real.json")
    fastest = best(training, "ours", rate)
    inference = {n: [c for c in cases(found, "infer.json") if c["work"]["batch"] == n] for n in (1, 8)}
    curves = {name: found.get(f"curve_{name}/metrics.jsonl") for name in ("eager", "graph", "cpu")}
    return [
        target("training, times torchvision's recipe", ratio(fastest, best(recipe, "torchvision", rate)), least=4.0),
        target("training, images/s", fastest, least=150.0),
        target("training, images/s, reached for", fastest, least=250.0),
        target("waiting for data, share of the steps", best(waits, "ours", "data_wait_share"), most=0.05),
        *(
            target(f"inference at batch {n}, times torchvision", ratio(*(best(c, s, rate) for s in SYSTEMS)), least=2.0)
            for n, c in inference.items()
        ),
        target(
            "peak memory of training over torchvision's",
            ratio(*(best(training, system, memory, min) for system in SYSTEMS)),
            most=1.0,
        ),
        target("loss curves, graph and eager", apart(curves["graph"], curves["eager"]), most=APART),
        target("loss curves, eager and CPU", apart(curves["eager"], curves["cpu"]), most=APART),
    ]


def target(name: str, measured: float | None, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    wanted = f"at least {least:g}" if least is not None else f"at most {most:g}"
    met = None
    if measured is not None:
        met = measured >= least if least is not None else measured <= most
    return {"name": name, "wanted": wanted, "measured": measured, "met": met}


def cases(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return found[name]["cases"] if name in found else []


def best(of: list[dict[str, Any]], system: str, metric: str, choose: Callable = max) -> float | None:
    return choose((case["metrics"][metric]["p50"] for case in of if case["system"] == system), default=None)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def apart(one: list[dict[str, Any]] | None, other: list[dict[str, Any]] | None) -> float | None:
    """The largest relative difference of the mean losses of WINDOW steps."""
    if not one or not other or len(one) != len(other):
        return None

    def means(lines: list[dict[str, Any]]) -> list[float]:
        losses = [line["loss"] for line in lines]
        return [sum(losses[first : first + WINDOW]) for first in range(0, len(losses), WINDOW)]

    return max(abs(a - b) / abs(b) for a, b in zip(means(one), means(other)))


# ---- all together


def check(todo: Sequence[Stage], scratch: Path, out: Path, identity: dict[str, Any]) -> int:
    """Runs the stages, whatever becomes of those before, and writes `out` after each, beside what it holds of others.
    Returns the exit status."""
    done = kept(out, {stage.name for stage in todo}, identity)
    before = len(done)
    for stage in todo:
        print(f"== {stage.name}", flush=True)
        done.append(run_stage(stage, scratch))
        outcome = {0: "ok", None: f"stopped after {stage.limit} s"}.get(done[-1]["status"], "failed")
        print("\n".join([*done[-1]["tail"], f"   {outcome}, {done[-1]['seconds']} s"]), flush=True)
        write(out, identity, done)
    for row in targets(done):
        verdict = {True: "met", False: "missed", None: "not measured"}[row["met"]]
        print(f"{row['name']}: {row['measured']} (wanted {row['wanted']}): {verdict}")
    print(f"wrote {out}")
    return int(any(stage["status"] != 0 for stage in done[before:]))


def kept(out: Path, again: set[str], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of an earlier part in `out` that are not run again. Raises UserError where they are of another device
    or commit: targets compare stages with each other."""
    if not out.exists():
        return []
    try:
        told = json.loads(out.read_text(encoding="utf-8"))
        others = [stage for stage in told["stages"] if stage["name"] not in again]
        earlier = {key: told[key] for key in identity}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is not of gpu_check.sh ({error!r}); name another file with --out") from None
    differing = [f"{key} {earlier[key]}, here {identity[key]}" for key in identity if earlier[key] != identity[key]]
    if others and differing:
        raise UserError(f"{out} is of {'; '.join(differing)}: name another file with --out, or run all stages")
    return others


def write(out: Path, identity: dict[str, Any], done: list[dict[str, Any]]) -> None:
    facts = next((stage["results"][FACTS] for stage in done if FACTS in stage["results"]), None)
    result = {"format": 1, **identity, "environment": facts, "stages": done, "targets": targets(done)}
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(out, lambda file: file.write(text.encode()))


def main() -> int:
    parser = command.Parser(description="The stages of gpu_check.sh.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default docs/measurements/gpu_check_GPU.json")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="run these; FILE keeps what it has of others")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        todo = stages(Path(scratch))
        if args.stages:
            todo = chosen(todo, args.stages)
        identity = {"device": get_device("cuda").name, "commit": environment.commit()["commit"]}
        name = re.sub(r"\W+", "_", identity["device"]).strip("_").lower()
        place = args.out or ROOT / "docs" / "measurements" / f"gpu_check_{name}.json"
        return check(todo, Path(scratch), place, identity)


if __name__ == "__main__":
    command.run(main)
