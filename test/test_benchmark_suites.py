"""Suites and the gate, on a checkout whose benchmark is a stub: its speed is a number in a file."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from gate_reliability import SLOWED, WRAPPER

from maskrcnn_benchmark import command
from maskrcnn_benchmark.benchmark import results, suites
from maskrcnn_benchmark.errors import UserError

# Writes what the real tool writes, without importing torch. Two processes differ by up to 1%.
STUB = """
import json, os, random, subprocess, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
speed = json.loads((root / "speed.json").read_text())
kind, *arguments = sys.argv[1:]
name, out = arguments[arguments.index("--only") + 1], arguments[-1]
with open(os.environ["ORDER"], "a+") as file:
    file.seek(0)
    turn = sum(line.startswith(f"{root.name} {name} ") for line in file)
    file.write(f"{root.name} {name} {' '.join(arguments[:-2])}\\n")
if speed.get("broken") == name:
    sys.exit("error: the kernel is broken")
commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
middle = (speed["ms"] if turn % 6 else speed.get("every_sixth", speed["ms"])) * random.uniform(0.995, 1.005)
samples = [middle * (1 + 0.001 * n) for n in range(-3, 4)]
metric = {"unit": "ms", "better": "lower", "gate": True, "samples": samples}
case = {"name": name, "kind": kind, "dtype": "float32", "config_sha256": None, "warmup": 2,
        "work": {"batch": speed.get("batch", 2)}, "metrics": {"step_ms": metric}}
environment = {"device": "cpu", "commit": commit, "built": (root / "built").exists(), "python": sys.prefix}
Path(out).write_text(json.dumps({"format": 1, "environment": environment, "started": "now", "cases": [case]}))
"""
SUITE = """
processes: 6
threshold: 5%
cases:
  - ops --only first
  - ops --only "the second"
"""


@pytest.fixture
def call(benchmark_tool, monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command.run(benchmark_tool.main)
        return stop.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with the stub, 100 ms fast, in place of this one."""
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    (root / "tools" / "benchmark.py").write_text(STUB)
    (root / "setup.py").write_text("open('built', 'w').close()\n")
    (root / "requirements.txt").write_text("")
    (root / "speed.json").write_text('{"ms": 100}')
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for arguments in ("init --quiet", "add .", "commit --quiet -m first"):
        subprocess.run([*git, *arguments.split()], check=True)
    monkeypatch.setenv("ORDER", str(tmp_path / "order.txt"))
    monkeypatch.setattr(suites, "ROOT", root)
    monkeypatch.setattr(suites, "BUSY", 1.0)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return root


def order(checkout):
    return [line.split()[:2] for line in (checkout.parent / "order.txt").read_text().splitlines()]


# ---- run


def test_run_takes_fresh_processes_in_turns(call, checkout, tmp_path):
    out, past = tmp_path / "new.json", tmp_path / "history.jsonl"
    code, stdout, _ = call("run", tmp_path / "suite.yaml", "--out", out, "--device", "cpu", "--history", past)
    assert (code, stdout) == (0, f"wrote {out}\n")
    assert order(checkout) == [["checkout", "first"], ["checkout", "the"]] * 6
    assert "first --device cpu --only first" in (tmp_path / "order.txt").read_text()
    merged = results.read(out)
    assert [case["name"] for case in merged["cases"]] == ["first", "the second"]
    assert all(case["metrics"]["step_ms"]["process_samples"] == [7] * 6 for case in merged["cases"])
    assert len(past.read_text().splitlines()) == 1
    code, stdout, _ = call("history", past, "--only", "second")
    assert code == 0 and "the second" in stdout and "first" not in stdout and "1 runs" in stdout


def test_run_keeps_what_ran(call, checkout, tmp_path):
    (checkout / "speed.json").write_text('{"ms": 100, "broken": "first"}')
    code, _, stderr = call("run", tmp_path / "suite.yaml", "--out", tmp_path / "new.json", "--processes", 2)
    assert code == 2 and "the kernel is broken" in stderr and "lacks what failed: ops --only first" in stderr
    (case,) = results.read(tmp_path / "new.json")["cases"]
    assert case["name"] == "the second" and case["metrics"]["step_ms"]["process_samples"] == [7, 7]
    assert order(checkout).count(["checkout", "first"]) == 1  # it is not tried again


def test_of_processes_that_shared_their_cores_the_least_disturbed_is_kept(call, checkout, tmp_path, monkeypatch):
    shares = iter([0.6, 0.3, 0.4, 0.9, 0.1])  # of the first case three attempts, of the second two
    process = suites._process
    monkeypatch.setattr(suites, "BUSY", 0.15)
    monkeypatch.setattr(suites, "SPARE", 1.5)  # three more attempts for two processes
    monkeypatch.setattr(suites, "_process", lambda *arguments: (process(*arguments)[0], next(shares)))
    kept = []
    monkeypatch.setattr(suites.results, "read", lambda path, read=results.read: kept.append(read(path)) or kept[-1])
    code, _, stderr = call("run", tmp_path / "suite.yaml", "--out", tmp_path / "new.json", "--processes", 1)
    assert code == 0 and stderr.count("busy machine") == 3 and len(order(checkout)) == 5
    first, second = json.loads((tmp_path / "new.json").read_text())["cases"]
    samples = [one["cases"][0]["metrics"]["step_ms"]["samples"] for one in kept]  # of those that were the best so far
    assert len(samples) == 4
    assert first["metrics"]["step_ms"]["samples"] == samples[1]
    assert second["metrics"]["step_ms"]["samples"] == samples[3]


def test_a_machine_that_is_always_busy_does_not_triple_the_time(call, checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "BUSY", -1.0)
    assert call("run", tmp_path / "suite.yaml", "--out", tmp_path / "new.json", "--processes", 4)[0] == 0
    assert len(order(checkout)) == 4 * 2 * (1 + suites.SPARE)


def test_what_others_use_of_the_machine_is_told(tmp_path):
    """A process that sleeps, and one that does nothing but work, while another works all the time."""
    work = "import time; end = time.time() + {}\nwhile time.time() < end: pass"
    rival = subprocess.Popen([sys.executable, "-c", work.format(60)])
    try:
        shares = [
            suites._process([sys.executable, "-c", script], tmp_path)[1] * os.cpu_count()
            for script in ("import time; time.sleep(2)", work.format(2))
        ]
    finally:
        rival.kill()
        rival.wait()
    assert all(0.4 < share < os.cpu_count() for share in shares), shares  # a core of theirs, or half of a shared one


# ---- gate


@pytest.mark.parametrize(
    ("speed", "code", "words"),
    [
        ({"ms": 100}, 0, "FINE"),
        ({"ms": 103.5}, 0, "FINE"),  # certain, but below the suite's 5%
        ({"ms": 120}, 1, "REGRESSION: 2 of 2"),
        ({"ms": 80}, 0, "faster"),
        ({"ms": 100, "batch": 4}, 2, "work differs: batch was 2, is 4"),
        ({"ms": 100, "broken": "first"}, 1, "missing"),
    ],
)
def test_gate_against_saved_results(call, checkout, tmp_path, speed, code, words):
    base = tmp_path / "base.json"
    assert call("run", tmp_path / "suite.yaml", "--out", base)[0] == 0
    (checkout / "speed.json").write_text(json.dumps(speed))
    got, stdout, _ = call("gate", tmp_path / "suite.yaml", base, "--report", tmp_path / "gate.json")
    assert got == code and words in stdout
    report = json.loads((tmp_path / "gate.json").read_text())
    assert report["exit_code"] == code and report["limits"]["threshold"] == 0.05


def test_gate_against_another_revision(call, checkout, tmp_path):
    (checkout / "speed.json").write_text('{"ms": 120}')  # what is measured is the working tree, committed or not
    new, base = tmp_path / "new.json", tmp_path / "base.json"
    code, stdout, stderr = call("gate", tmp_path / "suite.yaml", "--base-ref", "HEAD", "--out", new, "--base-out", base)
    assert code == 1 and "REGRESSION: 2 of 2" in stdout, stderr
    turns = order(checkout)
    assert turns == [["source", "first"], ["checkout", "first"], ["source", "the"], ["checkout", "the"]] * 6
    old, now = (results.read(path)["environment"] for path in (base, new))
    assert old["built"] and not now["built"] and old["commit"] == now["commit"]
    assert old["python"] != now["python"] == sys.prefix  # an environment of its own
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1  # nothing is left behind
    assert call("gate", tmp_path / "suite.yaml", "--base-ref", "HEAD", "--threshold", "30%")[0] == 0


def test_what_is_worse_but_not_surely_so_is_measured_more(call, checkout, tmp_path, monkeypatch):
    """One process in six is faster than the base: by chance of 6 and 6 processes, but not of 18 and 18."""
    (checkout / "speed.json").write_text('{"ms": 120, "every_sixth": 90}')
    new = tmp_path / "new.json"
    arguments = ("gate", tmp_path / "suite.yaml", "--base-ref", "HEAD", "--base-dir", tmp_path / "kept", "--out", new)
    code, stdout, stderr = call(*arguments)
    assert code == 1 and "measuring more processes" in stderr, stdout
    assert len(results.read(new)["cases"][0]["metrics"]["step_ms"]["process_samples"]) == 18
    monkeypatch.setattr(suites, "ROUNDS", 1)
    code, stdout, stderr = call(*arguments)
    assert code == 0 and stdout.count("unclear") == 2 and "none of 2 metrics is surely worse" in stdout
    assert len(results.read(new)["cases"][0]["metrics"]["step_ms"]["process_samples"]) == 6


def test_a_kept_worktree_is_taken_to_the_revision(call, checkout, tmp_path):
    arguments = ("gate", tmp_path / "suite.yaml", "--base-dir", tmp_path / "kept", "--base-ref")
    assert call(*arguments, "HEAD")[0] == 0
    (checkout / "speed.json").write_text('{"ms": 120}')
    git = ["git", "-C", checkout, "-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run([*git, "commit", "--quiet", "-am", "slower"], check=True)
    assert call(*arguments, "HEAD")[0] == 0
    assert call(*arguments, "HEAD~1")[0] == 1


def test_the_other_environment_sees_the_packages_of_this_one(tmp_path):
    python = suites._environment(tmp_path / "environment")
    script = "import sys, torch, yaml; print(sys.prefix)"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "environment")), done.stderr


def test_kernels_older_than_their_sources_are_not_measured(checkout):
    (checkout / "maskrcnn_benchmark").mkdir()
    (checkout / "csrc").mkdir()
    kernels, source = checkout / "maskrcnn_benchmark" / "_C.so", checkout / "csrc" / "nms.cpp"
    source.touch()
    suites.check_built()  # no kernels: the composites serve
    kernels.touch()
    suites.check_built()
    os.utime(source, (2e9, 2e9))
    with pytest.raises(UserError, match=r"nms\.cpp is newer than the compiled kernels"):
        suites.check_built()


# ---- with the real benchmark


@pytest.fixture
def copy(tmp_path):
    """What a gate needs of this checkout, kernels included, to be changed."""
    for part in ("maskrcnn_benchmark", "tools", "configs"):
        shutil.copytree(ROOT / part, tmp_path / "copy" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def benchmark(root, *arguments):
    command = [sys.executable, root / "tools" / "benchmark.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_slowed_kernel_is_caught(copy, tmp_path):
    """A sleep four times as long as the kernel takes: a fifth needs more processes, see gate_reliability.py."""
    suite, base = tmp_path / "suite.yaml", tmp_path / "base.json"
    suite.write_text("processes: 6\ncases: [ops --device cpu --threads 1 --scale 0.2 --repeats 7 --only match]")
    assert benchmark(ROOT, "run", suite, "--out", base).returncode == 0
    with (copy / WRAPPER).open("a") as file:
        file.write(SLOWED.replace("0.2", "4.0"))
    done = benchmark(copy, "gate", suite, base)
    assert done.returncode == 1 and "REGRESSION: 1 of 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_gate_leaves_no_worktree(copy, tmp_path, signal_, code):
    for part in ("setup.py", "requirements.txt"):
        shutil.copy(ROOT / part, copy)
    (copy / "csrc").mkdir()
    for source in ("extension.cpp", "common.h"):  # all kernels would go on compiling for a minute after the signal
        shutil.copy(ROOT / "csrc" / source, copy / "csrc")
    git = ["git", "-C", copy, "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for arguments in ("init --quiet", "add .", "commit --quiet -m first"):
        subprocess.run([*git, *arguments.split()], check=True)
    for kernels in (copy / "maskrcnn_benchmark").glob("_C*.so"):
        kernels.touch()  # newer than the sources
    suite = copy / "configs" / "benchmark" / "ops.yaml"
    command = [sys.executable, copy / "tools" / "benchmark.py", "gate", suite, "--base-ref", "HEAD"]
    places = tmp_path / "places"
    places.mkdir()
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(places)},
        # A shell's background jobs ignore the interrupt, and all that they start, if they are not told otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as gate:
        said = gate.stderr.readline()
        assert said.startswith("building HEAD") and any(places.iterdir()), said + gate.stderr.read()
        if signal_ == signal.SIGINT:
            os.killpg(gate.pid, signal_)  # as the terminal does
        else:
            gate.send_signal(signal_)
        gate.communicate(timeout=60)
    assert gate.returncode == code
    worktrees = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1 and not any(places.glob("benchmark-base-*"))


def test_another_configuration_is_not_judged(tmp_path):
    suite, base = tmp_path / "suite.yaml", tmp_path / "base.json"
    case = "data --data synthetic --device cpu --config-file configs/quickstart.yaml --images 4 --batch 2 --steps 1"
    suite.write_text(f"cases: [{case}]")
    assert benchmark(ROOT, "run", suite, "--processes", 1, "--out", base).returncode == 0
    suite.write_text(f"cases: [{case} INPUT.HORIZONTAL_FLIP_PROB_TRAIN 0.25]")
    done = benchmark(ROOT, "gate", suite, base, "--processes", 1)
    assert done.returncode == 2 and "INPUT.HORIZONTAL_FLIP_PROB_TRAIN was 0.5, is 0.25" in done.stdout, (
        done.stdout + done.stderr
    )


# ---- words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("gate suite.yaml", "needs either BASE.json or --base-ref"),
        ("gate suite.yaml base.json --base-ref HEAD", "needs either BASE.json or --base-ref"),
        ("gate suite.yaml base.json --base-dir d", "go with --base-ref"),
        ("gate suite.yaml base.json", "cannot read benchmark result base.json"),
        ("gate suite.yaml --base-ref no-such-ref", "no-such-ref"),
        ("gate suite.yaml base.json --report page.pdf", ".md, .html or .json"),
        ("gate suite.yaml base.json --threshold fast", "not a share such as 3%"),
        ("run none.yaml --out new.json", "cannot read suite none.yaml"),
        ("run suite.yaml --out none/new.json", "there is no directory none"),
        ("run suite.yaml", "--out"),
        ("compare base.json", "NEW.json"),
        ("history none.jsonl", "cannot read history none.jsonl"),
        ("report none.json --out page.html", "cannot read benchmark result none.json"),
        ("accuracy none --out a.json", "not a finished run"),
    ],
)
def test_wrong_arguments_are_one_line(call, checkout, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = call(*shlex.split(arguments))
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1 and words in stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cases: [", "not valid yaml"),
        ("[]", "not a suite"),
        ("cases: []", "not a suite"),
        ("cases: [ops]\nrepeat: 3", "unknown key repeat"),
        ("cases: [fly]", "does not begin with one of ops, train"),
        ("cases: [{ops: x}]", "does not begin with"),
        ("cases: ['ops \"']", "No closing quotation"),
        ("cases: [ops]\nprocesses: 0", "at least 1"),
        ("cases: [ops]\nprocesses: many", "processes cannot be 'many'"),
        ("cases: [ops]\nthreshold: much", "not a share"),
    ],
)
def test_a_suite_that_cannot_be_run(tmp_path, text, words):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        suites.read(path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "benchmark").glob("*.yaml")), ids=lambda path: path.name)
def test_our_suites_are_read_and_their_arguments_parsed(benchmark_tool, path, monkeypatch):
    suite = suites.read(path)
    assert suite.description and suite.processes >= 6
    for case in suite.cases:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *case, "--out", "new.json"])
        assert benchmark_tool.parse().function
