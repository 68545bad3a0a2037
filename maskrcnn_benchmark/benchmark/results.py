"""The file that every benchmark writes: its form, reading it with errors that say what is wrong, merging processes.

    {"format": 1, "command": [...], "started": ISO time, "environment": environment.describe(device), "cases": [case]}
    case: {"name", "kind", "dtype", "warmup", "work": {facts}, "metrics": {name: metric}}, of a model or loader also
        {"config_sha256", "config": {key: value}}
    metric: {"unit", "better": "lower" or "higher", "gate": bool, "samples": [...], "p50", "p90", "p99"}

`work` are the facts that must be equal for a comparison to mean anything: image sizes, batch, proposals, RoIs. A gated
metric can fail a comparison. A merged file holds the samples of several processes, one after the other, and
`process_samples` says how many each gave; without it they are of one. Clocks are all there too; the rest of a case is
the first process's. Beside its cases, `others_cpu_share` is the share of the machine's cores that others used while its
processes ran: the median over processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.checkpoint import write_atomically
from ..errors import UserError
from .timing import percentile

FORMAT = 1
Key = tuple[str, str, str]


def metric(samples: Sequence[float], unit: str, better: str = "lower", gate: bool = True) -> dict[str, Any]:
    """One metric of a case, of one process. samples: in the order measured, finite, at least one."""
    samples = [float(sample) for sample in samples]
    quantiles = {f"p{q}": percentile(samples, q) for q in (50, 90, 99)}
    return {"unit": unit, "better": better, "gate": gate, "samples": samples, **quantiles}


def key(case: dict[str, Any]) -> Key:
    """What tells a case from the others of its file."""
    return case["kind"], case["name"], case["dtype"]


def label(of: Key) -> str:
    kind, name, dtype = of
    return " ".join([*([] if name.startswith(kind) else [kind]), name, *([] if dtype in name else [dtype])])


def by_key(result: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {key(case): case for case in result["cases"]}


def processes(metric: dict[str, Any]) -> list[list[float]]:
    """The samples, process by process."""
    counts = metric.get("process_samples", [len(metric["samples"])])
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [metric["samples"][end - count : end] for count, end in zip(counts, ends)]


def process_medians(metric: dict[str, Any]) -> list[float]:
    return [percentile(samples, 50) for samples in processes(metric)]


# ---- files


def write(path: Path, result: dict[str, Any]) -> None:
    """The whole file or none of it."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: missing, no JSON, no benchmark result, or one whose numbers cannot be judged; says which.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"cannot read benchmark result {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    try:
        check(result)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return result


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is no measurement")


def check(result: Any) -> None:
    """Raises UserError where the form is not the one above."""
    if not isinstance(result, dict) or "cases" not in result:
        raise UserError("not a benchmark result: it has no cases; write one with tools/benchmark.py run or --out")
    if result.get("format") != FORMAT:
        found = result.get("format", "none")
        raise UserError(f"its format is {found}, but this version reads {FORMAT}: measure again with this version")
    _expect(result, "the file", {"environment": dict, "cases": list})
    for number, case in enumerate(result["cases"]):
        where = f"case {case['name']!r}" if isinstance(case, dict) and "name" in case else f"case number {number + 1}"
        _expect(case, where, {"name": str, "kind": str, "dtype": str, "work": dict, "metrics": dict})
        for name, value in case["metrics"].items():
            _check_metric(value, f"{where}, metric {name}")
    keys = [key(case) for case in result["cases"]]
    for one in keys:
        if keys.count(one) > 1:
            raise UserError(f"case {label(one)!r} is there {keys.count(one)} times")


def _expect(value: Any, where: str, types: dict[str, type]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}, not an object")
    for name, kind in types.items():
        if not isinstance(value.get(name), kind):
            raise UserError(f"{where} has no {name} that is a {kind.__name__}")


def _check_metric(value: Any, where: str) -> None:
    _expect(value, where, {"unit": str, "better": str, "gate": bool, "samples": list})
    samples = value["samples"]
    if value["better"] not in ("lower", "higher"):
        raise UserError(f"{where}: better is {value['better']!r}, not lower or higher")
    numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in samples)
    if not samples or not numbers:
        raise UserError(f"{where}: samples must be finite numbers, at least one")
    counts = value.get("process_samples", [len(samples)])
    if not all(isinstance(n, int) and n > 0 for n in counts) or sum(counts) != len(samples):
        raise UserError(f"{where}: process_samples {counts} do not add up to {len(samples)} samples")


# ---- merging


def merge(parts: Sequence[dict[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """One result of several processes' results, in the order measured; `parts` is not empty.

    A metric that only some of a case's processes have is left out, so that a comparison finds it missing.

    Raises:
        UserError: processes of one run that ran on different devices or did different work.
    """
    for part in parts[1:]:
        for fact in ("device", "device_name", "world_size", "threads", "commit", "torch"):
            ours, first = part["environment"].get(fact), parts[0]["environment"].get(fact)
            if ours != first:
                raise UserError(f"processes of one run differ in {fact}: {first} and {ours}")
    busy = [part["others_cpu_share"] for part in parts if "others_cpu_share" in part]
    cases: dict[Key, list[dict[str, Any]]] = {}
    for part in parts:
        for one, case in by_key(part).items():
            cases.setdefault(one, []).append(case)
    return {
        "format": FORMAT,
        "command": list(command),
        "started": parts[0].get("started"),
        "environment": parts[0]["environment"],
        **({"others_cpu_share": percentile(busy, 50)} if busy else {}),
        "cases": [_merge_case(same) for same in cases.values()],
    }


def _merge_case(same: list[dict[str, Any]]) -> dict[str, Any]:
    for case in same[1:]:
        for fact in ("config_sha256", "work", "warmup"):
            if case.get(fact) != same[0].get(fact):
                raise UserError(
                    f"case {label(key(case))!r}: processes of one run differ in {fact}: {same[0].get(fact)} and "
                    f"{case.get(fact)}; fix the seed, the weights or the data"
                )
    shared = {name: value for name, value in same[0]["metrics"].items() if all(name in c["metrics"] for c in same)}
    facts = {field: value for field, value in same[0].items() if field not in ("metrics", "clocks")}
    if "clocks" in same[0]:
        facts["clocks"] = [ranks for case in same for ranks in case.get("clocks", [])]
    return facts | {"metrics": {name: _merge_metric([c["metrics"][name] for c in same]) for name in shared}}


def _merge_metric(same: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [samples for value in same for samples in processes(value)]
    samples = [sample for part in parts for sample in part]
    whole = metric(samples, same[0]["unit"], same[0]["better"], same[0]["gate"])
    return whole | {"process_samples": [len(samples) for samples in parts]}
