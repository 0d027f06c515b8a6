"""The CPU kernels under sanitizers, and on other processors: every instruction set must give the same bits.

    python scripts/check_kernels.py [--sanitize] [--cross aarch64-linux-gnu-g++ --run qemu-aarch64]

Compiles scripts/check_kernels.cpp with the kernels, runs it and compares the digests it prints; and check_phases.cpp,
which says whether threads wait as they must. With --sanitize also under the address and undefined-behaviour sanitizers,
and the phases under the thread sanitizer; with --cross also for ARM, run by an emulator or on a device.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import explain_missing  # noqa: F401

from moedge.runtime.kernels import compiling

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
PHASES = Path(__file__).with_name("check_phases.cpp")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--cross", default="", help="a compiler for 64-bit ARM")
    parser.add_argument("--run", default="", help="what runs its programs")
    args = parser.parse_args()
    native = compiling.find_compiler()
    if native is None:
        raise SystemExit("error: no C++ compiler was found")
    host = compiling.instruction_sets() | compiling.PORTABLE
    runs = [("native", native, [], host, ())]
    if args.sanitize:
        runs.append(("sanitized", native, [], host, SANITIZERS))
    if args.cross:
        arm = compiling.ARM | compiling.PORTABLE
        runs.append(("cross", shlex.split(args.cross), shlex.split(args.run), arm, ("-static",)))
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, compiler, runner, sets, extra in runs:
            program = compile_program(Path(folder) / name, compiler, sets, extra)
            for line in run_program(name, [*runner, str(program)]):
                print(f"{name:10} {line}")
                digests[f"{name} {line.split()[0]}"] = line.split()[1]
            phases = Path(folder) / name / "phases"
            own = ("-fsanitize=thread", "-O1") if name == "sanitized" else extra
            subprocess.run(
                [*compiler, "-std=c++17", "-O2", *own, str(PHASES), "-lpthread", "-o", str(phases)], check=True
            )
            print(f"{name:10}", *run_program(name, [*runner, str(phases)]))
    if len(set(digests.values())) != 1:
        raise SystemExit("error: the digests differ")
    return 0


def run_program(name: str, command: list[str]) -> list[str]:
    """The lines it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise SystemExit(f"error: the {name} program failed with {done.returncode}")
    return done.stdout.splitlines()


def compile_program(folder: Path, compiler: list[str], sets: dict[str, str], extra: tuple[str, ...]) -> Path:
    folder.mkdir()
    flags = {file: own.split() for name, own in sets.items() for file in compiling.files_of(name)}
    flags |= {name: [] for name in compiling.COMMON if not name.endswith("ops")}
    flags["dispatch"] = [f"-DMOEDGE_HAS_{name.upper()}" for name in sets]
    sources = {compiling.FOLDER / f"{name}.cpp": own for name, own in flags.items()}
    sources[Path(__file__).with_suffix(".cpp")] = []
    objects = []
    for source, own in sources.items():
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, *compiling.FLAGS, *extra, *own, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = folder / "program"
    subprocess.run([*compiler, *extra, *objects, "-lm", "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    sys.exit(main())
