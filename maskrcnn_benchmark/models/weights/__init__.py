"""Weights of this project and of others: reading files safely, names and tensors both ways, published files."""

from .catalog import CATALOG, cache_dir, fetch, resolve
from .changes import Conventions
from .convert import DERIVED, LAYOUTS, Conversion, convert, from_ours, to_ours, without_derived
from .files import check_suffix, content_of, load_plain, read, write
from .load import check_match, conventions_of, inflate, load_weights

__all__ = [
    "CATALOG",
    "DERIVED",
    "LAYOUTS",
    "Conventions",
    "Conversion",
    "cache_dir",
    "check_match",
    "check_suffix",
    "content_of",
    "conventions_of",
    "convert",
    "fetch",
    "from_ours",
    "inflate",
    "load_plain",
    "load_weights",
    "read",
    "resolve",
    "to_ours",
    "without_derived",
    "write",
]
