"""What a run says while it works and when it ends: log lines, bars, speed figures, the last lines on the screen."""

from __future__ import annotations

import logging
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..engine import distributed
from ..errors import visible

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Seconds between the lines of a progress that is not watched
_SILENCE = 30.0
_PACKAGE = __name__.partition(".")[0]
_FORMAT = ("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")
# On a terminal what must not be overlooked is yellow or red, and nothing else has a colour
_COLORS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar:16}|{percentage:3.0f}%{postfix}"


class _TerminalHandler(logging.StreamHandler):
    """Writes above the bars that are on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        color = None if os.environ.get("NO_COLOR") else _COLORS.get(record.levelno)
        return f"\x1b[{color}m{super().format(record)}\x1b[0m" if color else super().format(record)


def setup_logging(output_dir: Path | None, rank: int, rank_logs: bool) -> logging.Logger:
    """The package's logger, with these handlers in place of any it had. `output_dir` must exist.

    Rank 0 writes to stdout and OUTPUT_DIR/log.txt, the others only warnings to stderr. With `rank_logs` every rank also
    writes OUTPUT_DIR/train_{rank}.log. Files are appended to. Python's warnings go the same ways.
    """
    screen = sys.stdout if rank == 0 else sys.stderr
    handlers: list[logging.Handler] = [(_TerminalHandler if screen.isatty() else logging.StreamHandler)(screen)]
    handlers[0].setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if output_dir is not None:
        for name, wanted in (("log.txt", rank == 0), (f"train_{rank}.log", rank_logs)):
            if wanted:
                handlers.append(logging.FileHandler(Path(output_dir) / name, encoding="utf-8"))
    formatter = Formatter(*_FORMAT)
    logging.captureWarnings(True)
    package = logging.getLogger(_PACKAGE)
    for name in (_PACKAGE, "py.warnings"):
        target = logging.getLogger(name)
        for old in list(target.handlers):
            target.removeHandler(old)
            old.close()
        for handler in handlers:
            handler.setFormatter(formatter)
            target.addHandler(handler)
    package.setLevel(logging.INFO)
    return package


class Formatter(logging.Formatter):
    """Without control characters, which names in data sets may have."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class TrainingMeter:
    """How long steps take, from what the loop measured. Only counts: it never waits for a device.

    images_per_iteration_all_ranks: images of a step, over all ranks. warmup_steps: the first so many steps of this
    process take no part in any speed figure. Times outside steps (evaluation, checkpoints) are never seen.
    """

    def __init__(
        self, total_iterations: int, start_iteration: int, images_per_iteration_all_ranks: int, warmup_steps: int
    ) -> None:
        self.total_iterations = total_iterations
        self.start_iteration = start_iteration
        self.images_per_iteration_all_ranks = images_per_iteration_all_ranks
        self.warmup_steps = warmup_steps
        self._steps = array("d")
        self._waits = array("d")
        self._line = slice(0, 0)  # the steps that the last console line speaks of
        self.brief = ""  # that line, in short

    def add(self, step_seconds: float, data_seconds: float) -> None:
        """One step: its whole time, and the part of it spent waiting for data."""
        self._steps.append(step_seconds)
        self._waits.append(data_seconds)

    def step_seconds(self) -> np.ndarray:
        """Raw samples after the warm-up, float64 seconds."""
        return np.array(self._steps[self.warmup_steps :], dtype=np.float64)

    @property
    def images_per_second(self) -> float | None:
        """Over all ranks, after the warm-up; None before a step was counted."""
        return _divide(self.images_per_iteration_all_ranks, _mean(self.step_seconds()))

    @property
    def data_wait_share(self) -> float | None:
        """Share of the step time spent waiting for data, 0..1, after the warm-up."""
        return _divide(sum(self._waits[self.warmup_steps :]), float(self.step_seconds().sum()))

    def eta(self) -> str:
        """Training time left at the mean speed so far, as days and h:mm:ss."""
        counted = self.step_seconds()
        mean = _mean(counted if counted.size else np.array(self._steps))
        if mean is None:
            return "n/a"
        left = self.total_iterations - self.start_iteration - len(self._steps)
        return str(timedelta(seconds=round(mean * max(0, left))))

    def recent(self) -> dict[str, float | None]:
        """Means over the steps between the last two console lines, for metrics.jsonl: `time` and `data_time` in
        seconds, `images_per_second` over all ranks.

        Means, not medians: on a device that works behind the host's back, the step that logs also waits for the work
        of those before it, so only their sum is true.
        """
        time = _mean(np.array(self._steps[self._line]))
        return {
            "time": time,
            "data_time": _mean(np.array(self._waits[self._line])),
            "images_per_second": _divide(self.images_per_iteration_all_ranks, time),
        }

    def console_line(self, iteration: int, losses: dict[str, float], lr: float, max_mem_mb: float) -> str:
        """The line that a person and the launchers read, about the steps since the last one.

        iteration: finished steps. losses: `loss`, their sum, first. max_mem_mb: peak device memory in MB.
        """
        self._line = slice(self._line.stop, len(self._steps))
        recent, eta = self.recent(), self.eta()
        waiting = _divide(recent["data_time"], recent["time"])
        self.brief = (
            f"{_show(recent['images_per_second'], 1)} images/s, eta {eta}, "
            f"data wait {_show(waiting and 100 * waiting, 0)}%, "
            + ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        )
        pairs = "  ".join(f"{name}: {value:.4f}" for name, value in losses.items())
        return (
            f"eta: {eta} iter: {iteration}  {pairs}  "
            f"time: {_show(recent['time'], 4)} data: {_show(recent['data_time'], 4)}  lr: {lr:.6g}  "
            f"max mem: {max_mem_mb:.0f}  average_train_fps: {_show(self.images_per_second, 2)}"
        )

    def performance(self) -> dict[str, Any]:
        """`performance` of result.json, but max_memory_mb and eval_seconds. None where no step was counted."""
        counted = self.step_seconds()
        percentiles = np.percentile(counted, (50, 90, 99)) * 1000 if counted.size else (None,) * 3
        return {
            "images_per_second": self.images_per_second,
            "images_per_second_per_device": _divide(self.images_per_second, distributed.world_size()),
            "step_ms": {
                name: None if value is None else float(value) for name, value in zip(("p50", "p90", "p99"), percentiles)
            },
            "data_wait_share": self.data_wait_share,
            "warmup_steps": self.warmup_steps,
        }


def result_table(name: str, performance: dict[str, Any], results: dict[str, Any]) -> str:
    """A run as a row of the Ascend ModelZoo's table of results. name: such as 8p-NPU-910; the rest as `final_lines`."""
    scores = [_show((results.get(task) or {}).get("AP"), 3) for task in ("bbox", "segm")]
    header = ("NAME", "FPS", "Box mAP", "Segm mAP")
    row = (name, _show(performance.get("images_per_second"), 2), *scores)
    widths = [max(map(len, column)) for column in zip(header, row)]
    rule = ["-" * width for width in widths]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) for cells in (header, rule, row)]
    return "\n".join(f"| {line} |" for line in lines)


def final_lines(performance: dict[str, Any], results: dict[str, Any], training_seconds: float) -> str:
    """The last lines on the screen. performance: of TrainingMeter; results: of evaluation.coco.evaluate, or empty."""
    box, segm = ((results.get(task) or {}).get("AP") for task in ("bbox", "segm"))
    return "\n".join(
        [
            "------------------ Final result ------------------",
            f"Final Performance images/sec : {_show(performance.get('images_per_second'), 2)}",
            f"Final Train Accuracy : {_show(segm if box is None else box, 3)}",
            f"Final Box mAP : {_show(box, 3)}",
            f"Final Segm mAP : {_show(segm, 3)}",
            f"E2E Training Duration sec : {training_seconds:.0f}",
        ]
    )


def case_log(
    path: str | Path,
    network: str,
    rank_size: int,
    batch_size: int,
    device_type: str,
    accuracy: bool,
    fps: float | None,
    training_time: float | None,
    train_accuracy: float | None,
    loss: float | None,
    e2e_time: float,
) -> Path:
    """Writes CaseName.log, the Ascend ModelZoo's record of a run, into the directory `path`; returns the file.

    batch_size: images a step over all ranks. accuracy: a full run (acc), not one for speed (perf). fps: images/s over
    all ranks. training_time: of a step, ms. train_accuracy: AP, 0..1. e2e_time: seconds. None is written as n/a.
    """
    case = f"{network}_bs{batch_size}_{rank_size}p_{'acc' if accuracy else 'perf'}"
    lines = {
        "Network": network,
        "RankSize": rank_size,
        "BatchSize": batch_size,
        "DeviceType": device_type,
        "CaseName": case,
        "ActualFPS": _show(fps, 2),
        "TrainingTime": _show(training_time, 2),
        "TrainAccuracy": _show(train_accuracy, 4),
        "ActualLoss": _show(loss, 4),
        "E2ETrainingTime": f"{e2e_time:.0f}",
    }
    file = Path(path) / f"{case}.log"
    file.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()), encoding="utf-8")
    return file


def _watched() -> bool:
    """Whether a person looks at this rank."""
    return distributed.is_main() and sys.stderr.isatty()


def training_progress(iterations: range, meter: TrainingMeter) -> Iterator[int]:
    """Passes the iterations on; on the main rank's terminal over a bar that says what the last log line does: rate,
    time left, share of waiting for data, losses."""
    if not _watched():
        yield from iterations
        return
    from tqdm import tqdm

    options = {"desc": "training", "bar_format": _BAR, "dynamic_ncols": True}
    with tqdm(total=iterations.stop, initial=iterations.start, **options) as bar:
        for iteration in iterations:
            yield iteration
            bar.set_postfix_str(meter.brief, refresh=False)
            bar.update()


def progress(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes the items on, and shows how far they are, how fast, and how long it will take: a bar on the main rank's
    terminal, elsewhere a log line every half minute, none for what is done sooner."""
    if _watched():
        from tqdm import tqdm

        yield from tqdm(iterable, total=total, desc=label, leave=None, dynamic_ncols=True)  # under another bar it goes
        return
    started = said = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - said >= _SILENCE:
            said, rate = now, done / (now - started)
            left = timedelta(seconds=round((total - done) / rate))
            logger.info("%s: %d of %d, %.2f a second, eta %s", label, done, total, rate, left)


def _mean(samples: np.ndarray) -> float | None:
    return float(samples.mean()) if samples.size else None


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _show(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
