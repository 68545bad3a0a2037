"""get_config: defaults, then `_BASE_` files, then the file, then overrides; checked, frozen, never global."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import logging
from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from ..errors import ConfigError
from ..places import find_recipe
from .checks import check
from .defaults import get_defaults
from .legacy import UPSTREAM, is_upstreams, translate

BASE_KEY = "_BASE_"
# Of a yaml file; all keys there are, dumped, take about 700 values and 6,000 characters.
_MOST_NODES, _MOST_CHARACTERS = 100_000, 1_000_000
# That one file leads to; a file that names another one twice, and so on, is read 2^n times at depth n.
_MOST_FILES = 100
logger = logging.getLogger(__name__)


def get_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """The resolved configuration.

    Args:
        file: a yaml file, or the name of one of configs/, such as quickstart.yaml. Its `_BASE_` (a path or a list of
            paths, relative to the file) is merged first. A file of upstream maskrcnn-benchmark's, without `_BASE_`,
            brings upstream's conventions with it (config/legacy.py); `_BASE_: []` keeps ours.
        overrides: `KEY VALUE KEY VALUE ...`, as on the command line; `_BASE_ FILE` merges a file before the others.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, keys that contradict each other.
    """
    cfg = get_defaults()
    if file is not None:
        for source, values in _read(find_recipe(file)):
            merge(cfg, values, str(source))
    return _finish(cfg, overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The configuration that a checkpoint carries as yaml text."""
    cfg = get_defaults()
    merge(cfg, _parse(text, source), source)
    return _finish(cfg, overrides)


def merge(cfg: CfgNode, values: dict[str, Any], source: str) -> None:
    """Write nested `values` into `cfg`; `source` names them in errors."""
    for key, value in translate(dict(flatten(values)), source).items():
        _set(cfg, key, value, source)


def _finish(cfg: CfgNode, overrides: Sequence[str]) -> CfgNode:
    if len(overrides) % 2:
        raise ConfigError(f"overrides come in pairs KEY VALUE, but {overrides[-1]!r} stands alone")
    pairs = dict(zip(overrides[::2], overrides[1::2]))
    if BASE_KEY in pairs:
        for source, values in _read(find_recipe(pairs.pop(BASE_KEY))):
            merge(cfg, values, str(source))
    for key, value in translate(pairs, "command line").items():
        _set(cfg, key, value, "command line")
    check(cfg)
    cfg.freeze()
    return cfg


def _read(path: Path, above: tuple[Path, ...] = (), count: Iterator[int] | None = None) -> Iterator[tuple[Path, dict]]:
    """The file's bases, depth first, then the file: each with its own values. count: of the files read so far."""
    count = count or itertools.count(1)
    if next(count) > _MOST_FILES:
        raise ConfigError(f"{above[0]}: {BASE_KEY} leads to more than {_MOST_FILES} files; the last in {above[-1]}")
    try:
        path = (above[-1].parent if above else Path()).joinpath(path.expanduser()).resolve()
    except (ValueError, RuntimeError) as error:  # what no name can hold; the home of nobody
        raise ConfigError(f"cannot read config file {str(path)!r}: {error}") from error
    if path in above:
        raise ConfigError(f"{path}: {BASE_KEY} runs in a circle: {' -> '.join(p.name for p in (*above, path))}")
    try:
        if above and path.exists() and not path.is_file():  # a pipe or a terminal would be waited for
            raise ConfigError(f"{above[-1]}: {BASE_KEY} names {path}, which is no file")
        values = _parse(_text_of(path), str(path))
    except OSError as error:
        by = f" (named by {BASE_KEY} in {above[-1]})" if above else ""
        raise ConfigError(f"cannot read config file {path}{by}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a UTF-8 text file") from error
    if BASE_KEY not in values and is_upstreams(dict(flatten(values))):
        logger.info(
            "%s is upstream's: its conventions come with it (docs/conventions.md); `_BASE_: []` keeps ours", path
        )
        yield path, UPSTREAM
    bases = values.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: {BASE_KEY} must be a path or a list of paths, not {bases!r}")
    for base in bases:
        yield from _read(Path(base), (*above, path), count)
    yield path, values


def _text_of(path: Path) -> str:
    """Of a file, or of what a shell's <(...) gives; no more than _parse takes, for /dev/zero has no end."""
    with open(path, encoding="utf-8") as file:
        return file.read(_MOST_CHARACTERS + 1)


def _parse(text: str, source: str) -> dict[str, Any]:
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{source} has more than {_MOST_CHARACTERS:,} characters; no config file needs so many")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if _has_more_nodes(node, _MOST_NODES):
            raise ConfigError(f"{source} has more than {_MOST_NODES:,} values, once its aliases (*name) are replaced")
        values = loader.construct_document(node) or {} if node else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid yaml: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:  # of !!bool x, 2001-99-99
        raise ConfigError(f"{source} has a value that yaml cannot read: {type(error).__name__} {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}; a config file is a mapping of keys to values")
    return values


def _has_more_nodes(node: yaml.Node | None, most: int) -> bool:
    """Whether these are more nodes than that. An alias counts as what it stands for: ten lines of aliases to the lines
    above, ten each, are 10^10 values."""
    waiting, seen = [node], 0
    while waiting and seen + len(waiting) <= most:
        node, seen = waiting.pop(), seen + 1
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return bool(waiting)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys such as SOLVER.BASE_LR and their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    *path, name = key.split(".")
    node = cfg
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or name not in node:
        known = [name for name, _ in flatten(cfg)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{source}: unknown key {key}; did you mean {near}?")
    node[name] = _coerce(node[name], value, key, source)


def _coerce(default: Any, value: Any, key: str, source: str) -> Any:
    """`value` with the default's type. Text is read as a Python literal first: yaml knows no tuples, and reads
    1e-3 as text."""
    if isinstance(default, CfgNode):
        raise ConfigError(f"{source}: {key} is a section, not a key")
    if isinstance(value, str) and not isinstance(default, str):
        # reported below, as a value of the wrong type; nesting without end is a MemoryError or a RecursionError
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = literal_eval(value)
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # e.g. DATA.PATH 2017 on the command line
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer of hundreds of digits stays one, and is refused
            value = float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(default)(value)
    if type(value) is not type(default):
        wanted = type(default).__name__
        raise ConfigError(f"{source}: {key} must be a {wanted}, but {value!r} is a {type(value).__name__}")
    return value


def dump(cfg: CfgNode) -> str:
    """The configuration as yaml text; parse_config reads it back."""
    return yaml.safe_dump(_plain(cfg), allow_unicode=True, sort_keys=True, default_flow_style=None)


def sha256(cfg: CfgNode) -> str:
    """Of the configuration without the place it is written to: equal for runs that do the same."""
    values = _plain(cfg)
    del values["OUTPUT_DIR"]
    return hashlib.sha256(yaml.safe_dump(values, sort_keys=True).encode()).hexdigest()


def flat(cfg: CfgNode) -> dict[str, Any]:
    """Every key, such as SOLVER.BASE_LR, with its value as JSON knows it; without the place the run is written to."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return {key: value for key, value in walk(_plain(cfg), "") if key != "OUTPUT_DIR"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
