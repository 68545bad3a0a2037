"""SOLVER.GRAPH_CAPTURE: training steps recorded as graphs of the device, one for each shape of their batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..device import Device
from ..device.graphs import Graphs
from ..errors import ConfigError
from ..structures import ImageBatch, Targets
from . import distributed
from .exchange import GradientExchange

logger = logging.getLogger(__name__)

Batches = list[tuple[ImageBatch, Targets]]
Losses = dict[str, Tensor]

# Steps of a shape that run as they are before the next one is recorded: torch's documents want 3
WARM_UP = 3
# Shapes that are recorded. Two padded shapes of the images, some three sizes of G and of the packed polygons each
MOST_GRAPHS = 32


def asked_for(cfg: CfgNode, device: Device) -> bool:
    """Whether steps are to be captured; where the device cannot, the log says that they run eagerly."""
    if cfg.SOLVER.GRAPH_CAPTURE and not device.graph_type:
        logger.info("SOLVER.GRAPH_CAPTURE: device %s records no graphs, so steps run eagerly", device.type)
    return cfg.SOLVER.GRAPH_CAPTURE and bool(device.graph_type)


class StepGraphs:
    """A training step that is captured, see `Recorded`. Every call is a step of training, and computes the same in
    whatever way it runs.

    With one rank a step is one graph. With several there are two, for ranks tell each other their gradients in between:
    one of forward and backward, and one of the update, which has no shapes. An update is captured where all it reads
    lies on the device.

    model: bare; its gradients are averaged here. gradients: batches -> losses by name; leaves gradients. update: the
    parameters, from the gradients. Raises ConfigError: see GradientExchange.
    """

    def __init__(
        self,
        device: Device,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: Callable[[Batches], Losses],
        update: Callable[[], None],
    ) -> None:
        self._optimizer, self._gradients, self._update = optimizer, gradients, update
        # A device's own optimizers take a number, which a graph would keep
        self._whole = all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
        self._exchange = GradientExchange(model, device) if distributed.world_size() > 1 else None
        recorders = device.graphs()
        self._first = Recorded(recorders, self._compute)
        self._second = Recorded(recorders, lambda _: self._finish() or {})

    def __call__(self, batches: Batches) -> Losses:
        """The losses are the caller's: a later step does not change them."""
        if self._exchange:
            self._exchange.share_running()
        losses = self._first(batches)
        if self._exchange:
            self._exchange.add_up()
        if not self._whole:
            self._finish()
        elif self._exchange:
            self._second([])
        return losses

    def _compute(self, batches: Batches) -> Losses:
        losses = self._gradients(batches)
        if self._exchange:
            self._exchange.collect()
        elif self._whole:
            self._finish()
        return losses

    def _finish(self) -> None:
        if self._exchange:
            self._exchange.hand_out()
        self._update()
        if not (self._exchange or self._whole):
            self._check_gradients_stay()

    def _check_gradients_stay(self) -> None:
        """A graph adds to gradients where they lay; an optimizer outside of it must find them there."""
        for group in self._optimizer.param_groups:
            if any(parameter.grad is None for parameter in group["params"]):
                name = type(self._optimizer).__name__
                raise ConfigError(
                    f"SOLVER.GRAPH_CAPTURE is True, but {name} takes its learning rate from the host and drops the"
                    " gradients of a step, which no graph can follow; set it to False"
                )


class Recorded:
    """Work on batches that is captured per shape: first it runs eagerly, WARM_UP times a shape, then it is recorded,
    from then on replayed."""

    def __init__(self, graphs: Graphs, work: Callable[[Batches], Losses]) -> None:
        self._graphs, self._work = graphs, work
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, tuple[Batches, Callable[[], None], Losses]] = {}
        self._told = False

    def __call__(self, batches: Batches) -> Losses:
        shapes = tuple((t.shape, t.dtype) for t in _tensors(batches))
        if shapes not in self._captured:
            self._seen[shapes] += 1
            if self._seen[shapes] <= WARM_UP or not self._has_room():
                with self._graphs.warm_up():
                    return self._work(batches)
            self._captured[shapes] = self._capture(batches)
        inputs, replay, losses = self._captured[shapes]
        for mine, given in zip(_tensors(inputs), _tensors(batches)):
            mine.copy_(given)
        replay()
        return {name: loss.clone() for name, loss in losses.items()}

    def _has_room(self) -> bool:
        room = len(self._captured) < MOST_GRAPHS
        if not room and not self._told:
            self._told = True
            logger.warning(
                "SOLVER.GRAPH_CAPTURE: steps of %d shapes are captured, those of further ones run eagerly;"
                " INPUT.FIXED_SHAPES keeps shapes few",
                MOST_GRAPHS,
            )
        return room

    def _capture(self, batches: Batches) -> tuple[Batches, Callable[[], None], Losses]:
        """Inputs of these shapes, what replays the work on them, and where it leaves the losses."""
        inputs = [tuple(part.clone() for part in batch) for batch in batches]
        if inputs:
            logger.info("capturing a training step, %d of at most %d", len(self._captured) + 1, MOST_GRAPHS)
        return (inputs, *self._graphs.capture(lambda: self._work(inputs)))


def _tensors(batches: Batches) -> list[Tensor]:
    return [tensor for batch in batches for part in batch for tensor in part.tensors()]
