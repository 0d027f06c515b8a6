"""Compiles the C++ beside this file into one shared library; setup.py and `python -m moedge.runtime.kernels` call it.

Imports nothing of the package: setup.py runs it before there is one. The library is no Python extension module: it
needs no Python headers, and one build serves every Python. Each instruction set is a file with its own flags; which of
them runs is chosen when the library is loaded, so that a library built here runs on other processors of the same kind.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
INSTALL = "install from a clone, which compiles them: pip install --force-reinstall --no-deps CLONE"
CALLS = ("moe", "ops", "step_ops", "moe_ops", "attention_ops")  # without a loop over numbers
SHORT = ("gate",)  # whose loops are short
COMMON = ("mixture", "planes", "step", "attention", "attention_rows", *SHORT, *CALLS)
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno "
    "-fno-asynchronous-unwind-tables "
    # No fused multiply-add but where the code says so: results must not depend on the compiler.
    "-ffp-contract=off"
).split()
# Instruction set -> the flags of its files (isa_NAME, attention_NAME), by processor. What a compiler does not know is
# left out. A processor that has none of them runs onnxruntime's own ops.
X86 = {
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mprefer-vector-width=512",
    # No loop twice, for each way that a condition may turn out: that was a twentieth of the code.
    "avxvnni": "-mavx2 -mfma -mf16c -mavxvnni -fno-unswitch-loops",
    "avx2": "-mavx2 -mfma -mf16c -fno-unswitch-loops",
}
ARM = {"neon": "-march=armv8.2-a+dotprod"}
INSTRUCTION_SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
# Plain C++, for tests and checks to compare the others with; it takes forty times as long.
PORTABLE = {"portable": "-Os"}
_SECONDS = 300  # a compiler that takes longer is taken for one that hangs


class CompileError(Exception):
    """There is no compiler, or it failed; its text is one line."""


def sources() -> list[Path]:
    """The C++ beside this file; none where the package was installed with the compiled library in its place."""
    return sorted(FOLDER.glob("*.cpp")) + sorted(FOLDER.glob("*.h"))


def library_name() -> str:
    """The library's file name. It carries a digest of the sources: one compiled from others is never loaded.

    Where there are no sources it is the name of the library that was installed.
    """
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    installed = [] if sources() else sorted(path.name for path in FOLDER.glob("libmoedge_cpu-*.so"))
    return installed[0] if installed else f"libmoedge_cpu-{digest.hexdigest()[:12]}.so"


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: the environment's CXX, else what is installed."""
    asked = os.environ.get("CXX")
    if asked:
        return shlex.split(asked)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def instruction_sets() -> dict[str, str]:
    """What is compiled for this kind of processor, and its flags."""
    return INSTRUCTION_SETS.get(platform.machine().lower(), {})


def files_of(instruction_set: str) -> list[str]:
    """The sources that are compiled for it, without their suffix."""
    names = (f"isa_{instruction_set}", f"attention_{instruction_set}")
    return [name for name in names if (FOLDER / f"{name}.cpp").is_file()]


def compile_library(folder: Path, extra: tuple[str, ...] = (), sets: dict[str, str] | None = None) -> Path:
    """Compile into `folder`; `extra` are further flags for compiler and linker. Returns the library.

    sets: instruction sets and their flags; the processor's where it is None.

    Raises:
        CompileError: no sources, no compiler or none for this processor, or it failed, or what it made does not load.
    """
    if not sources():
        raise CompileError(f"this install has no sources to compile; {INSTALL}")
    compiler = find_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler was found (c++, g++, clang++ or the variable CXX)")
    if os.name != "posix":
        raise CompileError(f"the kernels are not written for {platform.system()}")
    processor = instruction_sets() if sets is None else sets
    if not processor:
        raise CompileError(f"no kernels are written for {platform.machine()}; onnxruntime's own ops run there")
    with tempfile.TemporaryDirectory() as scratch:
        objects = Path(scratch)

        def compile_one(name: str, flags: list[str]) -> Path:
            target = objects / f"{name}.o"
            _run([*compiler, *FLAGS, *extra, *flags, "-c", str(FOLDER / f"{name}.cpp"), "-o", str(target)])
            return target

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            work = {
                name: [pool.submit(compile_one, file, flags.split()) for file in files_of(name)]
                for name, flags in processor.items()
            }
            smaller = {**dict.fromkeys(SHORT, ["-O2"]), **dict.fromkeys(CALLS, ["-Os"])}
            common = [pool.submit(compile_one, name, smaller.get(name, [])) for name in COMMON]
        known = [name for name, each in work.items() if not any(one.exception() for one in each)]
        known = known or list(work)  # whose error is then raised
        made = [one.result() for each in [*(work[name] for name in known), common] for one in each]
        made.append(compile_one("dispatch", [f"-DMOEDGE_HAS_{name.upper()}" for name in known]))
        library = objects / library_name()
        # The code uses nothing of the C++ library, which need not be where the engine runs.
        link = [] if extra or sys.platform == "darwin" else ["-s", "-Wl,-z,noseparate-code"]  # no pages of padding
        link += [] if sys.platform == "darwin" else ["-static-libgcc", "-Wl,--as-needed"]
        _run([*compiler, "-shared", *extra, *map(str, made), *link, "-lm", "-o", str(library)])
        if not extra:
            _check_loads(library)
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".{library.name}.{os.getpid()}"
        shutil.copyfile(library, staged)
        staged.replace(folder / library.name)
    for old in folder.glob("libmoedge_cpu-*.so"):
        if old.name != library.name:
            old.unlink()
    return folder / library.name


def _check_loads(library: Path) -> None:
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"what was compiled does not load: {error}") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise CompileError(f"{command[0]} failed: {told[0]}")
