"""A random share of positives and negatives for a loss, with fixed shapes and no wait for the device.

Negatives of all overlaps alike: Libra R-CNN (Pang et al. 2019, section 3.1, with K = 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.boxes import iou

GROUPS = 3  # the paper's K


@dataclass
class Sample:
    """index [B, S] int64 of the sampled candidates, positives first; positive [B, S] and valid [B, S] bool.

    A row that is not valid is padding: there were fewer candidates than S.
    """

    index: Tensor
    positive: Tensor
    valid: Tensor


def sample(labels: Tensor, size: int, positive_fraction: float, groups: Tensor | None = None) -> Sample:
    """Up to `size` candidates an image, at most `positive_fraction` of them positive, the rest negative.

    Random keys and two top-k's under masks do what the peers do with nonzero and randperm.

    labels: [B, A] of 1 positive, 0 negative, -1 ignored. groups: [B, A] int64 in 0..2: equal shares of the negatives
    come from each group, and from any where a group has too few.
    """
    candidates = labels.shape[1]
    size_here = min(size, candidates)
    most_positive = min(int(size * positive_fraction), size_here)
    # Image innermost: padding behind the candidates leaves the keys of those before it as they are.
    key = torch.rand(labels.shape[::-1], device=labels.device).t()
    positive_key, chosen = torch.where(labels == 1, key, -1.0).topk(most_positive, dim=1)
    score = torch.where(labels == 0, key, -1.0)
    if groups is not None:
        room = size_here - (positive_key >= 0).sum(1, keepdim=True)
        score = score + equal_shares(score, groups, room, size_here)
    # Negatives have at most 2 (1 + a key just below 1 rounds up), so 3 + key puts every chosen positive before them.
    chosen_score = torch.where(positive_key >= 0, 3 + positive_key, score.gather(1, chosen))
    score = score.scatter(1, chosen, chosen_score)
    score, index = score.topk(size_here, dim=1)
    return Sample(index=index, positive=score >= 3, valid=score >= 0)


def equal_shares(key: Tensor, groups: Tensor, room: Tensor, most: int) -> Tensor:
    """[B, A] of 1 or 0: in each group the `room` / 3 of the highest keys.

    key: [B, A], negative where there is nothing to choose; groups: [B, A] int64 in 0..2; room: [B, 1], at most `most`.
    """
    chosen = torch.zeros_like(key)
    place = torch.arange(most // GROUPS, device=key.device)
    for group in range(GROUPS):
        best, index = torch.where(groups == group, key, -1.0).topk(len(place), dim=1)
        wanted = (best >= 0) & (place < room // GROUPS)
        chosen = chosen.scatter_add(1, index, wanted.to(key.dtype))
    return chosen


def overlap_groups(boxes: Tensor, truth: Tensor, limit: float) -> Tensor:
    """[B, A] int64 in 0..2: which third of 0..limit has the IoU of each box [B, A, 4] with its `truth` [B, A, 4]."""
    overlap = iou(boxes[:, :, None], truth[:, :, None])[..., 0, 0]
    return (overlap / limit * GROUPS).long().clamp(max=GROUPS - 1)
