"""The data sets of a run: files are read once, however many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence

from yacs.config import CfgNode

from ..data.catalog import AnyDataset, build_dataset, check_num_classes, is_sendable
from . import distributed


def open_dataset(names: Sequence[str], cfg: CfgNode, training: bool) -> AnyDataset:
    """The data sets of these names as one, checked against the model's number of classes.

    The main rank reads the files, and the others get what it packed: eight ranks that parse Cityscapes' pictures at
    once keep eight cores and the disk busy for minutes. What is Python code is built by every rank.

    Raises ConfigError, DataError: on every rank what the main one met.
    """

    def build() -> AnyDataset:
        dataset = build_dataset(names, cfg, training)
        check_num_classes(cfg, dataset)
        return dataset

    return distributed.from_main(build) if all(map(is_sendable, names)) else build()


def test_datasets(cfg: CfgNode) -> dict[str, AnyDataset]:
    """The data sets of DATASETS.TEST by name."""
    return {name: open_dataset((name,), cfg, training=False) for name in cfg.DATASETS.TEST}


test_datasets.__test__ = False  # pytest would take it for a test
