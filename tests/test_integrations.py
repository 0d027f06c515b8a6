"""docs/integrations.md, run as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package, reason in {
    "optimum.onnxruntime": "optimum-onnx is not installed (pip install 'moedge[optimum]')",
    "onnxruntime_genai": "onnxruntime-genai is not installed (pip install onnxruntime-genai)",
}.items():
    pytest.importorskip(package, reason=reason)

import moedge  # noqa: E402

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"


@pytest.mark.filterwarnings("ignore")
def test_the_documents_commands_and_python_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_optimum import optimum_cli

    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "python"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(DOCUMENT), "exec"), {"__name__": "document"})
            continue
        program, *words = block.split()
        if program == "optimum-cli":
            done = optimum_cli(tmp_path, *words)
        else:
            command = [sys.executable, "-m", program, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert moedge.Bundle.open("bundle").manifest["quantization"]["weights"] == "int8"
    assert capsys.readouterr().out.count("def read(self") == 2
