"""One of two ranks of test_graphs.py: trains each variant captured and by DistributedDataParallel.

What came out lies in rank0.pt and rank1.pt.

python test/graph_ranks.py CONFIG DIRECTORY, with torchrun's variables.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from graph_double import graph_device
from test_benchmark_steps import request_of
from test_fixed_shapes import SMALL_STEP, make_run
from test_graphs import CAPTURE, SGD, SPOILT, VARIANTS, captured_run, steps

from maskrcnn_benchmark.benchmark import runs
from maskrcnn_benchmark.benchmark.steps import whole
from maskrcnn_benchmark.config import get_config
from maskrcnn_benchmark.device import get_device
from maskrcnn_benchmark.engine import distributed, graphs, nonfinite, train
from maskrcnn_benchmark.errors import NonFiniteLossError


def spoilt(batches: Iterator, numbers: Container[int]) -> Iterator:
    """Boxes of NaN in these batches of rank 1."""
    for number, (images, targets) in enumerate(batches):
        if number in numbers and distributed.rank() == 1:
            targets = replace(targets, boxes=torch.full_like(targets.boxes, torch.nan))
        yield images, targets


def trained(run: train.Run, count: int, parts: int) -> dict[str, Any]:
    losses, _, shapes = steps(run, count, parts)
    return {
        "losses": losses,
        "shapes": shapes,
        "model": {name: value.clone() for name, value in run.model.state_dict().items()},
        "parallel": type(run.parallel).__name__,
        "replays": len(run.device.made.replays) if run.captured else 0,
    }


def resumed(former: train.Run, count: int) -> dict[str, Any]:
    """Two steps more of a run that goes on, and of runs from its checkpoint with graphs and without."""
    train.save(former, count, "model_0000000.pth")
    distributed.all_values(None)
    made = {"former": former}
    for name, device in (("graphs", graph_device()), ("eager", replace(get_device("cpu"), compacts=False))):
        made[name] = train.build_run(former.cfg, device, former.output, resume=True)
        made[name].parallel.train()
    return {name: trained(run, 2, 1) for name, run in made.items()}


def reported(run: train.Run) -> str:
    """What is said when two steps are spoilt and one is allowed."""
    run.batches, loader = spoilt(run.batches, range(2)), nonfinite.train_loader
    nonfinite.train_loader = lambda *options: spoilt(loader(*options), range(1))
    for done in (1, 2):
        ((losses,), images, _) = steps(run, 1)
        run.losses.add(done, losses, images[0], losses.pop("left out"))
    try:
        train.read_losses(run)
    except NonFiniteLossError as error:
        return str(error)


def benchmarked(config: Path) -> dict[str, Any]:
    """Losses of the benchmark's steps, the last of them a replay."""
    losses = {}
    for name, device, overrides in (("captured", graph_device(), CAPTURE), ("eager", graph_device(graph_type=""), ())):
        cfg = get_config(config, ["SOLVER.IMS_PER_BATCH", "2", *SGD, *overrides])
        request = request_of(cfg, "train")
        side = runs.make_side(request, *runs.side_names(request), device, runs.make_workload(request, device))
        for _ in range(4):
            whole(side.phases)
        losses[name] = side.read_losses()
    return losses


def main() -> None:
    config, directory = map(Path, sys.argv[1:])
    rank, build_model = distributed.rank(), train.build_model

    def other_on_rank_1(cfg, device):
        model = build_model(cfg, device)
        if rank:
            for tensor in model.state_dict().values():
                tensor += 1
        return model

    train.build_model, graphs.WARM_UP = other_on_rank_1, 1
    found: dict[str, Any] = {}
    for name, (overrides, count, parts, changes) in VARIANTS.items():
        captured = captured_run(config, directory / name, *overrides, **changes)
        eager = make_run(config, directory / name, *overrides, **changes)
        if name == "SGD":
            captured.batches, eager.batches = (spoilt(run.batches, {SPOILT}) for run in (captured, eager))
        found[name] = {way: trained(run, count, parts) for way, run in (("captured", captured), ("eager", eager))}
        if name == "SGD":
            found["resumed"], found["report"] = resumed(captured, count), reported(captured)
    found["benchmark"] = benchmarked(config)
    without = train.build_run(get_config(config, [*SMALL_STEP, *CAPTURE]), get_device("cpu"), directory, False)
    found["without graphs"] = type(without.parallel).__name__, without.captured is None
    torch.save(found, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group(get_device("cpu")):
        main()
