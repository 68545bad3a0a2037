"""The verdict on two benchmark results: fine, a regression, or not comparable.

A gated metric has regressed when its median is worse by more than a threshold **and** a one-sided Mann-Whitney test
finds the difference (p < .002): the first asks whether it matters, the second whether it is there. "Worse by 20%" means
that the same work takes 20% longer, so a throughput that falls to 1 / 1.2 is worse by 20% as well.

What is tested are the medians of processes, not single steps: steps of one process share its memory layout, its threads
and its moment, and are no independent samples; with hundreds of them any two runs differ "significantly". With fewer
processes than could ever reach p < .002 (6 a side can) the test is over the samples and the finding says so: it is
weaker, for it takes what differs from process to process for a difference between builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import results
from .statistics import mann_whitney, smallest_p, welch
from .timing import percentile

# Facts of the environment and of a case that must be equal.
SAME_MACHINE = ("device", "device_name", "cpu_count", "world_size", "threads")
SAME_WORK = ("work", "warmup")
# Facts that may be the very thing compared, so they are told.
TOLD = ("torch", "python", "kernels", "packages")
# Shares of the machine that others used which differ by more than this are told.
UNLIKE = 0.1
SETUP_METRICS = ("init_seconds", "compile_seconds")
ACCURACY_UNIT = "AP"
FINE, FASTER, UNCLEAR = "fine", "faster", "unclear"
REGRESSION, MISSING, NOT_COMPARABLE = "regression", "missing", "not comparable"
EXIT_CODES = {FINE: 0, REGRESSION: 1, NOT_COMPARABLE: 2}


@dataclass(frozen=True)
class Limits:
    """How much worse is too much, as shares, and how sure one must be.

    threshold: time and throughput. memory: peak memory. setup: initialisation and compilation, which are judged apart,
    loosely, and only above `setup_seconds`. accuracy: p of the t test over seeds (MLPerf's convergence points: .05).
    """

    threshold: float = 0.03
    memory: float = 0.02
    setup: float = 0.5
    setup_seconds: float = 1.0
    significance: float = 0.002
    accuracy: float = 0.05


@dataclass(frozen=True)
class Finding:
    """One metric of one case, judged. case: its label. base, new: medians; of accuracy, means. change: how much worse
    than base, as a share (negative: better). p: of the test, None where there was none. verdict: fine, faster,
    unclear (worse by more than the limit, but chance may have done it: more processes would tell), regression, missing
    or not comparable. note: what a reader has to know, in words; may be empty."""

    case: str
    metric: str
    verdict: str
    unit: str = ""
    base: float | None = None
    new: float | None = None
    change: float | None = None
    p: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All findings, remarks on the two sides, and the verdict over all: fine, regression or not comparable."""

    limits: Limits
    findings: list[Finding]
    remarks: list[str]

    @property
    def verdict(self) -> str:
        """A regression that is certain counts for more than a case that could not be compared."""
        verdicts = {finding.verdict for finding in self.findings}
        if verdicts & {REGRESSION, MISSING}:
            return REGRESSION
        return NOT_COMPARABLE if NOT_COMPARABLE in verdicts or not self.findings else FINE

    @property
    def unclear(self) -> bool:
        """Whether more processes could turn what is fine so far into a regression."""
        return self.verdict == FINE and any(finding.verdict == UNCLEAR for finding in self.findings)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "exit_code": self.exit_code, **asdict(self)}


def compare(base: dict[str, Any], new: dict[str, Any], limits: Limits | None = None) -> Comparison:
    """The verdict on `new`, measured against `base`; both of the form of results.py."""
    limits = limits or Limits()
    remarks = [*_remarks(base["environment"], new["environment"]), *_disturbance(base, new)]
    apart = differing(base["environment"], new["environment"], SAME_MACHINE)
    if apart:
        return Comparison(limits, [Finding("every case", "", NOT_COMPARABLE, note=apart)], remarks)
    old, now = results.by_key(base), results.by_key(new)
    findings = [finding for key, case in old.items() for finding in _judge_case(case, now.get(key), limits)]
    added = [results.label(key) for key in now if key not in old]
    if added:
        remarks.append(f"new, with nothing to compare with: {', '.join(added)}")
    if any(finding.verdict == FASTER for finding in findings):
        remarks.append("faster than the base: measure the base anew, or the next regression hides in the gain")
    return Comparison(limits, findings, remarks)


def differing(base: dict[str, Any], new: dict[str, Any], names: Sequence[str]) -> str:
    """The facts of `names` that differ, in words; empty where none does."""
    return "; ".join(
        f"{name} differs: {_difference(base.get(name), new.get(name))}"
        for name in names
        if not _equal(base.get(name), new.get(name))
    )


def _differing_configuration(base: dict[str, Any], new: dict[str, Any]) -> str:
    """As `differing`, of the keys that both configurations have: a key that only one build knows is part of what is
    compared. Results without a configuration (of operators, of accuracy) have at most its hash."""
    old, now = base.get("config"), new.get("config")
    if old is None or now is None:
        return differing(base, new, ("config_sha256",))
    return differing(
        {"config": {key: old[key] for key in old if key in now}},
        {"config": {key: now[key] for key in now if key in old}},
        ("config",),
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _difference(a: Any, b: Any) -> str:
    """Of two dictionaries only what differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = [name for name in {**a, **b} if not _equal(a.get(name), b.get(name))]
        return ", ".join(f"{name} was {a.get(name)}, is {b.get(name)}" for name in names)
    return f"was {a}, is {b}"


def _remarks(base: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for side, about in (("base", base), ("new", new)):
        if about.get("dirty"):
            yield f"{side} was measured with local changes to commit {str(about.get('commit'))[:12]}"
    told = differing(base, new, TOLD)
    if told:
        yield told


def _disturbance(base: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    old, now = (side.get("others_cpu_share", 0.0) for side in (base, new))
    if abs(now - old) > UNLIKE:
        yield (
            f"not equally quiet: others used {old:.0%} of the machine's cores beside the base, {now:.0%} beside new;"
            " measure again, or in turns with gate --base-ref"
        )


def _judge_case(base: dict[str, Any], new: dict[str, Any] | None, limits: Limits) -> Iterator[Finding]:
    case = results.label(results.key(base))
    if new is None:
        yield Finding(case, "", MISSING, note="the case is not in the new result")
        return
    apart = "; ".join(filter(None, [_differing_configuration(base, new), differing(base, new, SAME_WORK)]))
    if apart:
        yield Finding(case, "", NOT_COMPARABLE, note=apart)
        return
    gated = {name: value for name, value in base["metrics"].items() if value["gate"] or name in SETUP_METRICS}
    if not gated:
        yield Finding(case, "", NOT_COMPARABLE, note="the base has no gated metric for it")
    for name, value in gated.items():
        yield _judge(case, name, value, new["metrics"].get(name), limits)


def _judge(case: str, name: str, base: dict[str, Any], new: dict[str, Any] | None, limits: Limits) -> Finding:
    if new is None:
        return Finding(case, name, MISSING, base["unit"], note="the metric is not in the new result")
    if (base["unit"], base["better"]) != (new["unit"], new["better"]):
        units = f"{base['unit']} ({base['better']} is better) and {new['unit']} ({new['better']})"
        return Finding(case, name, NOT_COMPARABLE, note=f"measured in {units}")
    if base["unit"] == ACCURACY_UNIT:
        return _judge_accuracy(case, name, base["samples"], new["samples"], limits)
    return _judge_speed(case, name, base, new, limits)


def _judge_speed(case: str, name: str, base: dict[str, Any], new: dict[str, Any], limits: Limits) -> Finding:
    """Time, throughput or memory: size and significance together."""
    olds, news, note = comparable_samples(base, new, limits.significance)
    old, now = percentile(olds, 50), percentile(news, 50)
    lower = base["better"] == "lower"
    above, below = (news, olds) if lower else (olds, news)  # above: whose larger values mean worse
    change = worsening(old, now, lower)
    enough = smallest_p(len(olds), len(news)) < limits.significance
    p_worse, p_better = mann_whitney(above, below), mann_whitney(below, above)
    figures = {"unit": base["unit"], "base": old, "new": now, "change": change}
    memory, setup = "memory" in name, name in SETUP_METRICS
    limit = limits.memory if memory else limits.setup if setup else limits.threshold
    if not enough and not memory:
        verdict = FINE if setup else NOT_COMPARABLE
        note = f"{len(olds)} and {len(news)} samples are too few to judge; 6 a side are enough"
        return Finding(case, name, verdict, **figures, note=note)
    if not enough:  # memory differs little from run to run: its size alone tells
        verdict = REGRESSION if change > limit else FASTER if _gain(change) > limit else FINE
        return Finding(case, name, verdict, **figures, note="judged by size alone: too few samples for a test")
    slower = change > limit and p_worse < limits.significance
    if slower and setup and now - old < limits.setup_seconds:
        slower, note = False, f"less than {limits.setup_seconds:g} s more"
    if slower:
        return Finding(case, name, REGRESSION, **figures, p=p_worse, note=note)
    if change > limit and not setup:
        return Finding(case, name, UNCLEAR, **figures, p=p_worse, note=note)
    faster = _gain(change) > limit and p_better < limits.significance
    return Finding(case, name, FASTER if faster else FINE, **figures, p=p_better if faster else p_worse, note=note)


def worsening(old: float, new: float, lower_is_better: bool) -> float:
    """How much worse, as a share: time per work, new over old, less one."""
    above, below = (new, old) if lower_is_better else (old, new)
    if below == 0:
        return 0.0 if above == 0 else math.inf
    return above / below - 1


def _gain(change: float) -> float:
    """A change seen from the other side: 25% less time is 33% faster."""
    return math.inf if change == -1 else -change / (1 + change)


def comparable_samples(
    base: dict[str, Any], new: dict[str, Any], significance: float
) -> tuple[list[float], list[float], str]:
    """What the test is over: medians of processes where there are enough, else the samples, with a note."""
    olds, news = results.process_medians(base), results.process_medians(new)
    if smallest_p(len(olds), len(news)) < significance:
        return olds, news, ""
    note = f"over samples of {len(olds)} and {len(news)} processes, weaker than over processes (6 a side or more)"
    return base["samples"], new["samples"], note


def _judge_accuracy(case: str, name: str, olds: list[float], news: list[float], limits: Limits) -> Finding:
    """Accuracy over seeds: worse where a one-sided t test against the base's seeds finds it so."""
    old, now = sum(olds) / len(olds), sum(news) / len(news)
    figures = {"unit": ACCURACY_UNIT, "base": old, "new": now, "change": worsening(old, now, False)}
    if min(len(olds), len(news)) < 3:
        note = f"{len(olds)} and {len(news)} seeds are too few to judge; 3 a side are enough"
        return Finding(case, name, NOT_COMPARABLE, **figures, note=note)
    p = welch(olds, news)
    note = f"t test over {len(olds)} and {len(news)} seeds"
    return Finding(case, name, REGRESSION if p < limits.accuracy else FINE, **figures, p=p, note=note)
