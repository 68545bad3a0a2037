"""FORMAT://PATH?option=value: annotations of any known format, read into COCO's form."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from ..errors import ConfigError, DataError
from . import cityscapes, coco, labelme, masks, via, voc
from .content import Source

# Format -> reader of a path, whose further parameters are the format's options
FORMATS: dict[str, Callable[..., Source]] = {
    "coco": coco.read,
    "via": via.read,
    "labelme": labelme.read,
    "voc": voc.read,
    "cityscapes": cityscapes.read,
    "penn_fudan": masks.read_penn_fudan,
    "masks": masks.read,
}


def is_address(name: str) -> bool:
    return "://" in name


def read(address: str, root: str | Path = "") -> Source:
    """What `FORMAT://PATH?option=value&option=value` names. A relative PATH is looked for in `root`.

    Raises ConfigError (unknown format or option), DataError (files).
    """
    name, _, rest = address.partition("://")
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"unknown format {name!r} in {address!r}{hint} Known are {', '.join(FORMATS)}")
    reader = FORMATS[name]
    place, _, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise ConfigError(f"{address!r}: what follows ? must be option=value&option=value") from error
    known = list(inspect.signature(reader).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"{address!r}: {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    path = Path(root).expanduser() / Path(place).expanduser()
    if not place or not path.exists():
        where = "DATA.PATH (--data_path) is what relative paths start from" if root else "DATA.PATH is empty"
        raise DataError(f"{path if place else address} does not exist; {where}")
    return reader(path, **options)
