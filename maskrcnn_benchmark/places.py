"""Where tools/ and configs/ lie: in the checkout, or where an installation put a copy of them."""

from __future__ import annotations

import os.path
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "share"  # setup.py writes it into an installed package; a checkout has none
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


def find_recipe(path: str | Path) -> Path:
    """`path` where it exists, else the file that comes with the package by that name: quickstart.yaml or
    configs/quickstart.yaml. What is neither comes back as it is."""
    path = Path(path)
    ours = [ROOT / path, ROOT / "configs" / path] if path.parts[:1] == ("configs",) or len(path.parts) == 1 else []
    return next(
        (place for place in (path, *ours) if os.path.isfile(place)), path
    )  # Path.is_file raises where a name is too long
