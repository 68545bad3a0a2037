"""Installs maskrcnn_benchmark and builds its compiled kernels, when a C++ compiler and torch are there.

    pip install --no-build-isolation -e .     with the torch of this environment: builds the kernels
    python setup.py build_ext --inplace       builds the kernels alone

Without the kernels the package works through slower composites. MASKRCNN_REQUIRE_EXT=1 makes a failure to build them
stop the build. CUDA sources are compiled where torch is a CUDA build and a CUDA toolkit is found, for the GPUs of
TORCH_CUDA_ARCH_LIST or else of this machine or else all common ones; FORCE_CUDA=1 stops the build where they are not.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
CXX_STANDARD = "-std=c++20"  # torch's own default up to 2.11 is C++17


def set_cuda_home() -> None:
    """Ask nvcc for its toolkit: torch takes it to lie around nvcc, which may be a link or a script that calls it."""
    nvcc = shutil.which("nvcc")
    if nvcc and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])


def find_ninja() -> None:
    """torch looks for it on PATH alone, where an environment that is not active has none of its programs. Without it
    the files are compiled one by one: CUDA's took 7 minutes on a core."""
    os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), sysconfig.get_path("scripts")]))


try:
    import torch

    set_cuda_home()
    find_ninja()
    from torch.utils import cpp_extension
except ImportError:  # an isolated build environment holds what pyproject.toml requires, and torch is not in it
    torch = None


def version() -> str:
    text = (ROOT / "maskrcnn_benchmark" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def give_up(reason: str) -> None:
    """Go on without the kernels, or stop if they are required."""
    if os.environ.get("MASKRCNN_REQUIRE_EXT") == "1":
        sys.exit(f"error: maskrcnn_benchmark: the compiled kernels are required, but {reason}")
    print(f"warning: maskrcnn_benchmark: no compiled kernels, slower composites will serve: {reason}", file=sys.stderr)


def sources(pattern: str) -> list[str]:
    """Relative to setup.py, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def compile_flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2", "/std:c++20", "/fp:precise", "/openmp"]
    # No contraction: kernels and composites must round alike, and a fused multiply-add rounds once instead of twice.
    # The next two let the compiler turn comparisons of floats into vector instructions. GCC's unroll-and-jam takes sums
    # that should stay in vector registers apart into scalars: RoIAlign was three times slower with it.
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-loop-unroll-and-jam"]
    # GCC 12 finds 900 lines of fault with its own AVX-512 header, and an error among them went unseen.
    flags += ["-Wno-maybe-uninitialized", "-Wno-ignored-attributes"]
    return [CXX_STANDARD, *flags] + (["-fopenmp"] if sys.platform == "linux" else [])


def nvcc_version() -> tuple[int, int]:
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))


def architectures() -> str:
    """The GPUs to compile for where none is visible: torch would ask the machine's own, and stumble."""
    version = nvcc_version()
    names = ["7.0"] if version < (13, 0) else []
    names += ["7.5", "8.0", "8.6", "9.0"]
    names += ["10.0"] if version >= (12, 8) else []
    return ";".join(names) + "+PTX"  # which the driver compiles for GPUs newer than nvcc


def obstacle_to_cuda() -> str | None:
    """Why no CUDA kernels can be compiled here."""
    if torch.version.cuda is None:
        return "torch is a build without CUDA; install a CUDA build of torch"
    if cpp_extension.CUDA_HOME is None:
        return f"torch is built for CUDA {torch.version.cuda}, and no toolkit is found; install one and set CUDA_HOME"
    found = nvcc_version()
    if found[0] != int(torch.version.cuda.split(".")[0]):  # torch refuses to compile, CPU kernels too
        return (
            f"torch is built for CUDA {torch.version.cuda}, and the toolkit at {cpp_extension.CUDA_HOME} is "
            f"{found[0]}.{found[1]}; set CUDA_HOME to one of the same major version"
        )
    return None


def wants_cuda() -> bool:
    obstacle = obstacle_to_cuda()
    if obstacle and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"error: maskrcnn_benchmark: FORCE_CUDA=1, but {obstacle}")
    if obstacle and torch.version.cuda and cpp_extension.CUDA_HOME:
        print(f"warning: maskrcnn_benchmark: no CUDA kernels: {obstacle}", file=sys.stderr)
    return obstacle is None


def extensions() -> list:
    os.chdir(ROOT)
    if torch is None:
        give_up("torch cannot be imported here; `pip install --no-build-isolation .` builds them with your torch")
        return []
    cuda = sources("cuda/*.cu") if wants_cuda() else []
    if cuda:
        # -fmad=false as -ffp-contract=off above.
        kind, flags = (
            cpp_extension.CUDAExtension,
            {"cxx": compile_flags(), "nvcc": [CXX_STANDARD, "-O3", "-fmad=false"]},
        )
        if torch.cuda.device_count() == 0:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    else:
        kind, flags = cpp_extension.CppExtension, {"cxx": compile_flags()}
    link_flags = ["-fopenmp"] if sys.platform == "linux" else []
    files = sources("*.cpp") + sources("cpu/*.cpp") + cuda
    headers = sources("*.h") + sources("cuda/*.cuh")
    return [kind("maskrcnn_benchmark._C", files, depends=headers, extra_compile_args=flags, extra_link_args=link_flags)]


class BuildPython(build_py):
    """An installed package carries tools/ and configs/ along, for the command maskrcnn-benchmark (places.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ("tools", "configs"):
                target = Path(self.build_lib) / "maskrcnn_benchmark" / "share" / name
                shutil.rmtree(target, ignore_errors=True)  # an earlier build's files must not pass for this one's
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))


def build_commands() -> dict:
    if torch is None:
        return {"build_py": BuildPython}

    class BuildKernels(cpp_extension.BuildExtension):
        def run(self) -> None:
            inplace = self.inplace
            try:
                super().run()
            except (BaseError, CCompilerError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                give_up(f"compiling them failed ({error})")
                for self.inplace in (False, inplace):  # an earlier build's kernels must not pass for this one's
                    Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)
                self.extensions = []  # or installing would look for the file

    return {"build_py": BuildPython, "build_ext": BuildKernels}


setup(
    name="maskrcnn_benchmark",
    version=version(),
    description="Mask R-CNN and its relatives for CPU, CUDA, NPU and other accelerators",
    python_requires=">=3.10",
    packages=find_packages(include=["maskrcnn_benchmark", "maskrcnn_benchmark.*"]),
    install_requires=[
        "torch>=2.8",
        "numpy",
        "yacs",
        "PyYAML",
        "opencv-python-headless",
        "pillow",
        "pycocotools",
        "hotcoco",
        "orjson",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff"],
        "compare": ["torchvision"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
    },
    ext_modules=extensions(),
    cmdclass=build_commands(),
    entry_points={"console_scripts": ["maskrcnn-benchmark = maskrcnn_benchmark.__main__:main"]},
)
