"""Weights of this project and of others: reading files safely, names and tensors both ways, published files."""

from .catalog import CATALOG, cache_dir, resolve
from .changes import Conventions
from .convert import DERIVED, LAYOUTS, Conversion, convert, from_ours, to_ours
from .files import content_of, read, write
from .load import check_match, inflate, load_weights

__all__ = [
    "CATALOG",
    "DERIVED",
    "LAYOUTS",
    "Conventions",
    "Conversion",
    "cache_dir",
    "check_match",
    "content_of",
    "convert",
    "from_ours",
    "inflate",
    "load_weights",
    "read",
    "resolve",
    "to_ours",
    "write",
]
