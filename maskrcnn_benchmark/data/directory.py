"""A data set's directory appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory beside `output` to write into: it takes that name when the block ends, and is gone when it fails.

    Raises:
        DataError: `output` is a file or not empty, or something cannot be written; names it.
    """
    unfinished = None
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output} exists already and is not an empty directory: choose another or remove it")
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's are for the owner alone
        os.replace(unfinished, output)
    except OSError as error:
        where = error.filename2 or error.filename
        raise DataError(f"cannot write to {output}: {where}: {error.strerror}") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
