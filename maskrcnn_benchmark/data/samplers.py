"""Which images go into which batch: pure functions of (seed, epoch, rank, world size), so a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class TrainSampler:
    """Batches of image indices for one rank. Every image comes at least once an epoch, over all ranks together.

    Args:
        sizes: [N, 2] (height, width) of the images.
        batch_size_per_rank: images a batch; every batch is full.
        rank, world_size: this process and how many there are; each rank gets the same number of batches.
        seed: of the order.
        grouping: portrait and landscape images in batches of their own.
    """

    def __init__(
        self, sizes: np.ndarray, batch_size_per_rank: int, rank: int, world_size: int, seed: int, grouping: bool
    ) -> None:
        sizes = np.asarray(sizes)
        self.batch_size, self.rank, self.world_size = batch_size_per_rank, rank, world_size
        self.seed = seed % 2**63
        portrait = (sizes[:, 0] > sizes[:, 1]) & grouping
        self.groups = [group for group in (np.flatnonzero(portrait), np.flatnonzero(~portrait)) if len(group)]
        batches = sum(-(-len(group) // batch_size_per_rank) for group in self.groups)
        self.batches_per_epoch = -(-batches // world_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """This rank's batches: `batches_per_epoch` lists of `batch_size_per_rank` image indices."""
        batches = self.order(epoch)
        # The first batches come again at the end, so that no rank runs out before the others.
        dealt = np.arange(self.rank, self.batches_per_epoch * self.world_size, self.world_size) % len(batches)
        return batches[dealt].tolist()

    def order(self, epoch: int) -> np.ndarray:
        """[batches, batch_size] image indices of all ranks' batches, in the order in which they are dealt."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = np.concatenate([self._batches(rng.permutation(group)) for group in self.groups])
        return batches[rng.permutation(len(batches))]

    def _batches(self, group: np.ndarray) -> np.ndarray:
        """[n, batch_size] indices; the last batch is completed with the group's first images."""
        count = -(-len(group) // self.batch_size)
        return np.resize(group, (count, self.batch_size))


class InferenceSampler:
    """Batches of image indices for one rank: over all ranks each of `n` images exactly once, so that no detection is
    counted twice. Ranks may get different numbers of batches."""

    def __init__(self, n: int, batch_size_per_rank: int, rank: int, world_size: int) -> None:
        indices = list(range(rank, n, world_size))
        self.batches = [indices[i : i + batch_size_per_rank] for i in range(0, len(indices), batch_size_per_rank)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
