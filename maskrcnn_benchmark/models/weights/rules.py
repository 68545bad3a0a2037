"""Names there <-> names here: templates that are read in both directions.

A template is a name with fields in braces, and `*` for the rest of the name:

  {level}  {level-1}  {2*n+1}      a number, and numbers that follow from it
  {n@abc}                          a letter: the first for 1
  {leaf:weight|bias}               one of these words; the other side's word at the same place stands for it
  {first}  {level-first}           with a number that the model's names tell (`facts_of`)

Fields of the same name on both sides have the same value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

Facts = dict[str, int]
# (ours, theirs, conditions ...): each a fact, or "not " and a fact
Row = tuple[str, ...]

_FIELD = re.compile(r"\{(?:(\w+)\*)?(\w+?)([+-]\w+)?(?:@(\w+)|:([\w|]+))?\}|(\*)")

# What a table needs to know of the whole model, from its names in any layout.
_SIGNS = {
    "retinanet": r"cls_tower|classification_head|cls_subnet|retina_cls|retnet_",
    "pyramid": r"fpn|^neck\.",
    "deep": r"stem\.conv3\.|^conv1\.6\.|^backbone\.stem\.6\.|conv1_3\.",
    "normed_box_convs": r"xconvs\.1\.|box_head\.(conv1\.norm|0\.1\.)|shared_convs\.0\.gn|head_conv1_gn",
    "box_convs": r"xconvs\.0\.|roi_heads\.box_head\.0\.0\.",
    "normed_towers": r"_tower\.1\.|_head\.conv\.0\.1\.|_subnet\.1\.|(cls|reg)_convs\.0\.gn\.",
    "deep_rpn": r"rpn\.head\.conv\.1\.|rpn_head\.conv\.conv1\.|rpn_conv\.1\.",
    "cascade": r"predictor\.\d+\.|box_head\.\d+\.fc|bbox_head\.\d+\.",
    "long_res4": r"layer3\.10\.|res4b10\.",
}
_BOX_CONV = re.compile(r"roi_heads\.(?:box_head\.(\d+)\.0|box\.feature_extractor\.xconvs\.(\d+))\.weight$")
_FIRST_NORM = r"(^|\.)layer1\.0\.bn1\."
_THEIR_GROUP_NORM = r"layer1\.0\.gn1\.|branch2a_gn_"
_BLOCK = re.compile(r"(?:layer(\d)\.(\d+)\.|res(\d)_(\d+)_branch)")


def facts_of(names: Collection[str]) -> Facts:
    """What conditions and fields of a table may name: 0 or 1 for a sign, `first`, `step`, `tower_step`, `box_fc`, and
    `last2` .. `last5`, the number of the last block of res2 .. res5."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    facts = {fact: int(has(pattern)) for fact, pattern in _SIGNS.items()}
    facts["first"] = 1 + facts["retinanet"]  # the number of the pyramid's first level in our names
    facts["step"] = 2 + facts["normed_box_convs"]  # layers from one convolution of `xconvs` to the next
    facts["tower_step"] = 2 + facts["normed_towers"]
    convs = [int(found[1] or int(found[2]) // facts["step"]) for found in map(_BOX_CONV.search, names) if found]
    facts["box_fc"] = max(convs, default=0) + 2  # torchvision counts the layers: after the last of those, a flattening
    facts["c4"] = int(has(r"cls_score|fc_cls") and not facts["pyramid"] and not has(r"fc6|box_head\.fc1|shared_fcs"))
    counted = has(_FIRST_NORM) and not has(_FIRST_NORM + "running_")
    facts["group_norm"] = int(has(_THEIR_GROUP_NORM) or counted)
    for name in names:
        if found := _BLOCK.search(name):
            stage = int(found[1]) + 1 if found[1] else int(found[3])
            block = int(found[2] or found[4])
            facts[f"last{stage}"] = max(block, facts.get(f"last{stage}", 0))
    return facts


class _Field(NamedTuple):
    name: str
    factor: int
    offset: int
    words: Sequence[str] | None

    @property
    def pattern(self) -> str:
        if self.name == "*":
            return "(.+)"
        return rf"({'|'.join(map(re.escape, self.words))})" if self.words else r"(\d+)"

    def read(self, text: str) -> int | str | None:
        """None where no value gives this text."""
        if self.name == "*":
            return text
        value, rest = divmod((self.words.index(text) if self.words else int(text)) - self.offset, self.factor)
        return None if rest or value < 0 else value

    def write(self, value: int | str) -> str | None:
        if self.name == "*":
            return value
        number = value * self.factor + self.offset
        if number < 0 or (self.words and number >= len(self.words)):
            return None
        return self.words[number] if self.words else str(number)


class _Template:
    def __init__(self, text: str, facts: Facts) -> None:
        self.parts: list[str | _Field] = []
        end = 0
        for found in _FIELD.finditer(text):
            self.parts += [text[end : found.start()], _field(found, facts)]
            end = found.end()
        self.parts.append(text[end:])
        self.pattern = re.compile("".join(re.escape(p) if isinstance(p, str) else p.pattern for p in self.parts))
        self.fields = [part for part in self.parts if isinstance(part, _Field)]

    def read(self, name: str) -> dict[str, int | str] | None:
        found = self.pattern.fullmatch(name)
        values: dict[str, int | str] = {}
        for field, text in zip(self.fields, found.groups() if found else ()):
            value = field.read(text)
            if value is None or values.setdefault(field.name, value) != value:
                return None
        return values if found else None

    def write(self, values: dict[str, int | str]) -> str | None:
        texts = [part if isinstance(part, str) else part.write(values[part.name]) for part in self.parts]
        return None if None in texts else "".join(texts)


def _field(found: re.Match, facts: Facts) -> str | _Field:
    factor, name, offset, letters, words, rest = found.groups()
    if rest:
        return _Field("*", 1, 0, None)
    if name in facts:
        return str(facts[name])

    def number(text: str) -> int:
        return facts[text] if text in facts else int(text)

    shift = number(offset[1:]) * (1 if offset[0] == "+" else -1) if offset else 0
    if letters:
        return _Field(name, number(factor or "1"), shift - 1, letters)
    return _Field(name, number(factor or "1"), shift, words.split("|") if words else None)


class Rules:
    """A table for one model."""

    def __init__(self, table: Iterable[Row], facts: Facts) -> None:
        rows = [(ours, theirs) for ours, theirs, *needed in table if all(_holds(fact, facts) for fact in needed)]
        # A row about a stage that the model does not have cannot be spelled out.
        rows = [row for row in rows if facts.keys() >= set(re.findall(r"last\d", row[1]))]
        self.rows = [(_Template(ours, facts), _Template(theirs, facts)) for ours, theirs in rows]

    def to_ours(self, name: str) -> str | None:
        """Our name of theirs, by the first row that fits; None where none does."""
        return next(filter(None, (_through(theirs, ours, name) for ours, theirs in self.rows)), None)

    def to_theirs(self, name: str) -> str | None:
        return next(filter(None, (_through(ours, theirs, name) for ours, theirs in self.rows)), None)


def _through(source: _Template, target: _Template, name: str) -> str | None:
    values = source.read(name)
    return None if values is None else target.write(values)


def _holds(condition: str, facts: Facts) -> bool:
    return bool(facts[condition.removeprefix("not ")]) != condition.startswith("not ")
