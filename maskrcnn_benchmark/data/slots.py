"""Memory that workers fill with the pixels of batches, again and again, and that the device copies them from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Slots:
    """As many batches as can be on their way at once, each of at most so many bytes.

    Fresh memory for every batch cost a page fault every 4 KB, more of a worker's time than decoding. Where the device
    can pin it, it is pinned once, and pixels go from where a worker wrote them to the device without another copy.

    memory: [slots, bytes] uint8, shared with the workers.
    """

    memory: Tensor

    @classmethod
    def allocate(cls, count: int, bytes_each: int) -> Slots:
        """Raises RuntimeError or OSError where shared memory is full."""
        return cls(torch.empty(count, bytes_each, dtype=torch.uint8).share_memory_())

    def holds(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) <= self.memory.shape[1]

    def view(self, number: int, shape: tuple[int, ...]) -> Tensor:
        """uint8 tensor of this shape for batch `number`, 0, 1, ...; of other memory where it does not fit in."""
        if not self.holds(shape):
            return torch.empty(shape, dtype=torch.uint8)
        return self.memory[number % len(self.memory), : math.prod(shape)].view(shape)
