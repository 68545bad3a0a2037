"""What the tests share: where the reference material lies, and models with the peers' weights."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference material {SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def coco_mini(shared: Path) -> Path:
    """159 real COCO images in COCO's own layout."""
    return shared / "data" / "coco_mini"
