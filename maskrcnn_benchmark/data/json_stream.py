"""A large JSON file, one element of its lists at a time: COCO's annotations as Python objects take 3 GB at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import orjson

from ..errors import DataError

CHUNK = 1 << 20  # characters
_NUMBER = ("", *"0123456789.eE+-")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_elements(path: str | Path) -> Iterator[tuple[str, int | None, Any]]:
    """(key, place, element) of every list in the JSON object that the file holds, in the file's order. A value that is
    no list, or an empty one, comes whole, and its place is None. Of a file that holds something else nothing comes.

    Raises DataError: not readable, not JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _elements(_Window(file))
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid JSON: {error}") from error


def _elements(window: _Window) -> Iterator[tuple[str, int | None, Any]]:
    if window.peek() != "{":  # some other value, in which there are no lists by name
        window.value()
        return
    window.take("{")
    more = window.peek() != "}"
    while more:
        key = window.value()
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is where a name should be")
        window.take(":")
        if window.peek() == "[":
            yield from ((key, place, element) for place, element in _list(window))
        else:
            yield key, None, window.value()
        more = window.comes(",")
    window.take("}")
    if window.peek():
        raise ValueError(f"{window.peek()!r} follows its end")


def _list(window: _Window) -> Iterator[tuple[int | None, Any]]:
    window.take("[")
    if window.comes("]"):
        yield None, []
        return
    yield 0, window.value()
    place = 1
    while window.comes(","):
        yield place, window.value()
        place += 1
    window.take("]")


class _Window:
    """The part of a text file that is being read."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on(CHUNK):
                return ""

    def comes(self, character: str) -> bool:
        """Whether this is the next character, which is taken then."""
        comes = self.peek() == character
        self.at += comes
        return comes

    def take(self, character: str) -> None:
        if not self.comes(character):
            raise ValueError(f"{self.peek()!r} is where {character!r} should be")

    def value(self) -> Any:
        """The next value, whole. Near the end of the window more is read, twice as much each time: so a broken value
        is not decoded over and over."""
        if self.peek() == "{" and (found := self._object()) is not None:
            return found
        chunk = CHUNK
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._read_on(chunk):
                    raise
            else:
                cut_off = self.text[end : end + 1] in _NUMBER  # a number may go on, as 1 in 1.5 or in 12
                if not cut_off or not self._read_on(chunk):
                    self.at = end
                    return value
            chunk *= 2

    def _object(self) -> dict[str, Any] | None:
        """The object here by orjson, three times as fast, if it holds no more than one other object (an RLE) and
        nothing that orjson refuses: NaN, lone surrogates. Integers of more than 64 bits become floats."""
        end = self.at
        for _ in range(2):
            end = self.text.find("}", end) + 1
            try:
                found = orjson.loads(self.text[self.at : end])
            except ValueError:
                continue
            self.at = end
            return found
        return None

    def _read_on(self, characters: int) -> bool:
        """Whether there was more."""
        piece = self.file.read(characters)
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)
