"""The scripts that the documents name, where an optional dependency is missing: one line, as the command line's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
SCRIPTS = {path.stem: path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py")}
NAMED = sorted({name for path in DOCUMENTS for name in re.findall(r"scripts/(\w+)\.py", path.read_text("utf-8"))})
NAMED = [name for name in NAMED if "ArgumentParser" in SCRIPTS[name]]  # the others have no --help
OPTIONAL = ["torch", "transformers", "tensorrt", "tensorrt_rtx", "matplotlib", "fastapi", "httpx", "hypothesis"]
OPTIONAL += ["onnx", "onnx_ir", "onnxruntime", "safetensors", "ml_dtypes"]
BLOCK = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {folder!r})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name: str, *arguments: str, blocked: list[str]) -> subprocess.CompletedProcess[str]:
    """A script in an interpreter where the blocked modules are not installed."""
    argv = [str(ROOT / "scripts" / f"{name}.py"), *arguments]
    code = BLOCK.format(blocked=blocked, folder=str(ROOT / "scripts"), argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMED)
def test_a_script_without_the_extras_is_one_line_or_its_help(name: str) -> None:
    done = run(name, "--help", blocked=OPTIONAL)
    told = re.fullmatch(r"error: \w+ is not installed; install it: pip install 'moedge\[\w+\]'\n", done.stderr)
    assert (done.returncode, bool(told)) in ((0, False), (1, True)), done.stderr
    assert told or done.stdout.startswith("usage: ") and not done.stderr


@pytest.mark.parametrize(
    ("script", "blocked", "text"),
    [
        ("check_engines", "torch", "torch is not installed; install it: pip install 'moedge[eval]'"),
        ("check_engines", "transformers", "transformers is not installed; install it: pip install 'moedge[eval]'"),
        ("check_engines", "tensorrt_rtx", "tensorrt_rtx is not installed; install it: pip install 'moedge[rtx]'"),
        ("load_balance", "torch", "torch is not installed; install it: pip install 'moedge[eval]'"),
        (
            "check_engines",
            "moedge",
            f"moedge is not installed for {sys.executable}; "
            "run the script with .venv/bin/python, which `make demo` makes",
        ),
    ],
)
def test_what_is_missing_is_told_before_the_work(script: str, blocked: str, text: str) -> None:
    for module in ("torch", "transformers", "tensorrt_rtx"):
        if module != blocked:
            pytest.importorskip(module)
    done = run(script, blocked=[blocked])
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {text}\n")


def test_a_bug_in_a_script_keeps_its_traceback() -> None:
    done = run("check_engines", blocked=["family_cases"])
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'family_cases'\n")
