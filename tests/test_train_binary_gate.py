"""scripts/train_binary_gate.py with a few steps: both gates train, the page is made from what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")
ROOT = Path(__file__).resolve().parent.parent
SMALL = "--steps 3 --seeds 4 --hidden 16 --inner 8 --experts 8 --top-k 2 --window 32 --held-windows 8".split()


def test_the_script_trains_both_gates_and_writes_its_page(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "scripts" / "train_binary_gate.py"), *SMALL]
    command += ["--results", str(results), "--page", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    linear, binary = document["runs"]
    assert [run["gate"] for run in document["runs"]] == ["softmax", "binary"]
    assert (linear["router_bytes"], binary["router_bytes"]) == (2 * 8 * 16 * 4, 2 * 3 * 16 * 4)
    assert 4 < linear["held_out_loss"] < 6 and 4 < binary["held_out_loss"] < 6  # about log(256): hardly trained
    gap = 100 * (binary["held_out_loss"] / linear["held_out_loss"] - 1)
    losses = f"| 4 | {linear['held_out_loss']:.4f} | {binary['held_out_loss']:.4f} | {gap:+.2f}% |"
    assert losses in page.read_text()
    assert document["command"].endswith("--steps 3") or "--steps 3 " in document["command"]


def test_the_document_is_the_page_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_binary_gate

    document = json.loads((ROOT / "docs" / "binary-gate.json").read_text())
    assert (ROOT / "docs" / "binary-gate.md").read_text() == train_binary_gate.make_page(document)
    assert len({run["seed"] for run in document["runs"]}) >= 3
    (said,) = re.findall(r"The gap is ([+-][\d.]+)% on average", (ROOT / "docs" / "binary-gate.md").read_text())
    gaps = list(train_binary_gate.find_gaps(document["runs"]).values())
    assert float(said) == pytest.approx(100 * sum(gaps) / len(gaps), abs=0.006)
