"""What an application installs, judged: exit code 1 where a bar is missed. Not part of the tests; it runs pip.

    python scripts/check_install.py

Installs the extra `cpu` into a new virtual environment and adds up its files, without pip and setuptools themselves and
without bytecode, which Python makes anew anywhere.
"""

from __future__ import annotations

import subprocess
import tempfile
import venv
from pathlib import Path

from verdicts import Verdict, leave, show

ROOT = Path(__file__).resolve().parent.parent
ALL_MB, OURS_MB, IMPORT_S = 220, 2, 0.2
RUNS = 5
IMPORT = "import time; began = time.perf_counter(); import moedge; print(time.perf_counter() - began)"


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return sum(path.stat().st_size for path in files)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "venv"
        venv.create(folder, with_pip=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        python = folder / "bin" / "python"
        before = size(packages)
        constraints = str(ROOT / "constraints.txt")
        pip = [str(python), "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", constraints, f"{ROOT}[cpu]"], check=True)
        total = size(packages) - before
        sample = size(packages / "moedge" / "sample")
        ours = size(packages / "moedge") - sample
        times = []
        for _ in range(RUNS):
            run = subprocess.run([python, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=place)
            times.append(float(run.stdout))
    found = f"{total / 1e6:.0f} MB, of which the sample {sample / 1e6:.0f}"
    verdicts = [
        Verdict(f"the extra cpu below {ALL_MB} MB", found, total < ALL_MB * 1e6),
        Verdict(f"ours below {OURS_MB} MB, without the sample", f"{ours / 1e6:.2f} MB", ours < OURS_MB * 1e6),
        Verdict(f"import moedge within {IMPORT_S} s", f"{min(times):.3f} to {max(times):.3f} s", min(times) < IMPORT_S),
    ]
    show(verdicts)
    leave(verdicts)


if __name__ == "__main__":
    main()
