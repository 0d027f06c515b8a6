"""The phases of an op, which share one parallel region, on pools of every kind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moedge.runtime.kernels import compiling

SOURCE = Path(__file__).parents[1] / "scripts" / "check_phases.cpp"


@pytest.mark.parametrize("sanitizer", ["", "-fsanitize=thread"])
def test_units_are_done_once_and_after_the_phase_before(sanitizer: str, tmp_path: Path) -> None:
    """Pools of 1 to 8 threads, late ones, and such as run tasks one after the other, from either end."""
    compiler = compiling.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    program = tmp_path / "program"
    flags = ["-std=c++17", "-O1", "-fno-exceptions", "-fno-rtti", *([sanitizer] if sanitizer else [])]
    built = subprocess.run(
        [*compiler, *flags, str(SOURCE), "-lpthread", "-o", str(program)], capture_output=True, check=False
    )
    if sanitizer and built.returncode:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0
    done = subprocess.run([str(program), "5"], capture_output=True, text=True, check=False, timeout=120)
    if sanitizer and "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert (done.returncode, done.stdout) == (0, "phases right\n"), done.stderr
