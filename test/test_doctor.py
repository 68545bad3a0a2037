"""tools/doctor.py: a sound environment, and broken ones made for the purpose."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from conftest import ROOT

from maskrcnn_benchmark.benchmark import doctor
from maskrcnn_benchmark.benchmark.doctor import Finding

EXTENSION = next((ROOT / "maskrcnn_benchmark").glob("_C*.so"), None)
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the compiled kernels are not built")
PATH = "/usr/local/bin:/usr/bin:/bin"


def examine(root=ROOT, *options, flags=(), **environment) -> subprocess.CompletedProcess:
    """The tool of the checkout, or copy, at `root`, in an environment with no other variables."""
    command = [sys.executable, *flags, str(root / "tools" / "doctor.py"), *map(str, options)]
    environment = {"PATH": PATH, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)


def findings(file) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(file.read_text())["findings"]}


@pytest.fixture
def copy(tmp_path):
    """The package and the tools without compiled kernels."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "maskrcnn_benchmark", tmp_path / "maskrcnn_benchmark", ignore=ignored)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    file = tmp_path_factory.mktemp("doctor") / "doctor.json"
    return examine(ROOT, "--json", file), file


def test_a_sound_environment_is_healthy(sound):
    done, file = sound
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(file.read_text())["healthy"] is True
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("nothing that is needed is broken, ")
    found = findings(file)
    for name in ("operating system", "CPU", "vector instructions", "memory", "disk here", "Python", "torch", "cpu"):
        assert found[name]["status"] in ("ok", "missing"), found[name]
    # As pip counts, which for CUDA's wheels may leave the +cu130 out
    assert found["torch"]["value"].startswith(__import__("torch").__version__.split("+")[0])
    assert "gloo" in found["distributed"]["value"]


@needs_extension
def test_it_says_which_kernels_serve(sound):
    found = findings(sound[1])
    assert found["extension"]["value"].endswith(f"{EXTENSION.name} loads")
    assert found["on cpu"]["value"].startswith("native: ") and " roi_align," in found["on cpu"]["value"]


def test_what_is_missing_comes_with_its_cost_and_a_command(sound):
    for finding in findings(sound[1]).values():
        if finding["status"] in ("missing", "broken"):
            assert finding["cost"] and finding["fix"], finding
        if finding["status"] == "absent":
            assert finding["cost"], finding
    # Every device that is not here says what it would take, in the device layer's own words.
    absent = [f for f in findings(sound[1]).values() if f["section"] == "devices" and f["status"] == "absent"]
    assert all("install" in f["cost"] or "look at" in f["cost"] for f in absent)


def test_an_interpreter_without_any_package_still_gets_an_answer(tmp_path):
    file = tmp_path / "doctor.json"
    done = examine(ROOT, "--json", file, flags=["-S"])  # -S: no site-packages
    assert done.returncode == 1
    assert done.stderr == ""
    found = findings(file)
    assert (found["torch"]["status"], found["torch"]["value"][:13]) == ("broken", "not installed")
    assert 'pip install "torch>=2.8"' in found["torch"]["fix"]
    assert found["opencv-python-headless"]["status"] == "broken"
    assert "cpu" not in found  # nothing to ask


def test_a_torch_that_does_not_import_is_told_in_a_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file\\nmore')")
    file = tmp_path / "doctor.json"
    done = examine(ROOT, "--json", file, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    torch = findings(file)["torch"]
    wanted = "cannot be imported: ImportError: libtorch_cpu.so: cannot open shared object file"
    assert (torch["status"], torch["value"]) == ("broken", wanted)
    assert torch["fix"].endswith("--force-reinstall")
    assert "extension" not in findings(file)


def test_a_device_plug_in_that_breaks_torch_is_not_torchs_fault(tmp_path, monkeypatch):
    (tmp_path / "brokentorch.py").write_text("raise RuntimeError('Failed to load the backend extension: torch_npu')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.package("brokentorch", {})
    assert finding.status == "broken" and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in finding.fix


@needs_extension
def test_a_broken_extension_is_broken(copy, tmp_path):
    # As if built for another torch: the names of its functions are not those of this one.
    foreign = EXTENSION.read_bytes().replace(b"_ZN3c10", b"_ZN9c10")
    (copy / "maskrcnn_benchmark" / EXTENSION.name).write_bytes(foreign)
    file = tmp_path / "doctor.json"
    done = examine(copy, "--json", file)
    assert done.returncode == 1, done.stdout
    extension = findings(file)["extension"]
    assert extension["status"] == "broken" and extension["fix"] == "pip install --no-build-isolation -e ."
    assert extension["value"].startswith(f"{EXTENSION.name} does not load: ImportError: ")
    assert extension["value"].endswith("(built for another torch)")
    assert "X extension" in done.stdout and "Traceback" not in done.stderr


def test_no_extension_costs_speed_but_works_unless_native_is_asked_for(copy, tmp_path):
    file = tmp_path / "doctor.json"
    assert examine(copy, "--json", file).returncode == 0
    found = findings(file)
    assert (found["extension"]["status"], found["extension"]["value"]) == ("missing", "not built")
    assert "slower" in found["extension"]["cost"]
    assert found["on cpu"]["value"].startswith("composite: ")
    done = examine(copy, "--json", file, MASKRCNN_KERNELS="native")
    assert done.returncode == 1
    assert findings(file)["extension"]["status"] == "broken"


def extension_in(copy, mode="auto") -> Finding:
    code = (
        f"from maskrcnn_benchmark.benchmark.doctor import *; f = extension_finding({mode!r}); print(f.status, f.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=copy, timeout=60)
    return done.stdout.strip()


def test_an_extension_for_another_python_is_broken(copy):
    name = "_C.cpython-39-x86_64-linux-gnu.so"
    (copy / "maskrcnn_benchmark" / name).write_bytes(b"")
    assert extension_in(copy) == f"broken {name} is for another Python"


def test_an_extension_that_crashes_is_broken(copy, monkeypatch):
    crash = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *x, **y: crash)
    assert doctor.load_error(copy) == "it crashes with signal 11; built for another torch?"


def test_an_unknown_kernel_mode_is_broken(monkeypatch):
    monkeypatch.setenv("MASKRCNN_KERNELS", "fast")
    monkeypatch.setattr(doctor, "load_error", lambda path: "")
    (mode,) = (finding for finding in doctor.kernels() if finding.name == "MASKRCNN_KERNELS")
    assert (mode.status, mode.value, mode.fix) == ("broken", "fast", "unset MASKRCNN_KERNELS")


def test_packages_are_held_against_what_is_needed_and_tested():
    assert {"torch>=2.8", "numpy", "PyYAML"} <= set(doctor.requirements())
    assert doctor.tested_versions()["PyYAML"].count(".") == 2
    old = doctor.package("torch>=99.1", {"torch": "99.2"})
    assert old.status == "broken" and "older than 99.1" in old.cost and old.value.endswith("(tested with 99.2)")
    assert '"torch>=99.1" --upgrade' in old.fix
    absent = doctor.package("no-such-distribution", {})
    assert (absent.status, absent.value) == ("broken", "not installed")


@pytest.mark.parametrize(
    ("version", "parts"), [("2.13.0+cpu", (2, 13, 0)), ("2.8", (2, 8)), ("2.10.0a0+git12", (2, 10, 0))]
)
def test_versions_are_numbers(version, parts):
    assert doctor.numbers(version) == parts
    assert doctor.numbers("2.9.1") < doctor.numbers("2.10")


def test_little_shared_memory_and_disk_are_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    found = {finding.name: finding for finding in doctor.room()}
    assert found["disk here"].status == "missing"
    if "/dev/shm" in found:
        assert found["/dev/shm"].status == "missing" and "--shm-size" in found["/dev/shm"].fix


def test_a_plug_in_that_raises_is_broken_and_the_others_are_examined(tmp_path, monkeypatch):
    (tmp_path / "plug_in_device.py").write_text("def create(index):\n    raise OSError('libabacus.so is missing')\n")
    information = tmp_path / "plug_in-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[maskrcnn_benchmark.devices]\nabacus = plug_in_device:create\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.name: finding for finding in doctor.devices()}
    assert (found["abacus"].status, found["abacus"].value) == ("broken", "OSError: libabacus.so is missing")
    assert found["cpu"].status == "ok"


def test_a_section_that_fails_does_not_silence_the_others(monkeypatch):
    def failing():
        raise KeyError("cpuinfo")

    monkeypatch.setattr(doctor, "system", failing)
    for name in ("python", "torch_build", "devices", "kernels", "fonts"):
        monkeypatch.setattr(doctor, name, list)
    found = doctor.examine()
    assert found[0].status == "broken" and "KeyError: 'cpuinfo'" in found[0].value
    assert any(finding.section == "tools" for finding in found)


def test_the_report_lists_what_is_broken_with_cost_and_fix():
    text = doctor.format_findings(
        [
            Finding("system", "CPU", "fast"),
            Finding("python", "torch", "not installed", "broken", "nothing works", "pip install torch"),
            Finding("python", "apex", "not installed", "absent", "only needed for speed"),
        ]
    ).splitlines()
    assert text == [
        "system",
        "    CPU    fast",
        "python",
        "  X torch  not installed",
        "  - apex   not installed (only needed for speed)",
        "broken",
        "  X torch: not installed",
        "      cost: nothing works",
        "      fix:  pip install torch",
        "1 broken, 0 missing",
    ]


def test_no_compiler_is_told_with_the_systems_command(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    there = {"apt-get": "/usr/bin/apt-get"}
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: there.get(name))
    found = {finding.name: finding for finding in doctor.tools()}
    assert (found["C++ compiler"].status, found["C++ compiler"].fix) == ("missing", "sudo apt-get install g++")


@pytest.mark.parametrize("arguments", [["--bogus"], ["--json", "/dev/null/doctor.json"]])
def test_wrong_usage_is_one_line_and_exit_2(arguments):
    done = examine(ROOT, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
