"""The README's commands and its Python, run as they stand there."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import edit_config

from moedge.export.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture(scope="module")
def newcomer(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint named as in the README."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(tiny_checkpoint, folder / "sample")
    edit_config(folder / "sample", max_position_embeddings=1024)  # `bench` asks for 512 tokens and more
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def test_commands_of_the_readme(newcomer: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the README builds an RTX 4090 engine")
    (script,) = [block for block in blocks("sh") if block.startswith("moedge ")]
    commands = script.replace("moedge ", f"{sys.executable} -m moedge ")
    result = run(["bash", "-euo", "pipefail", "-c", commands], newcomer)
    assert result.returncode == 0, result.stderr + result.stdout
    assert (newcomer / "bundle" / "engines" / "rtx4090" / "engine.plan").stat().st_size > 10_000
    assert "<html" in (newcomer / "report.html").read_text()


def test_python_of_the_readme(newcomer: Path) -> None:
    (script,) = blocks("python")
    result = run([sys.executable, "-c", script], newcomer)
    assert result.returncode == 0, result.stderr + result.stdout
    assert (newcomer / "bundle-int8" / "engines" / "cpu" / "engine.json").is_file()


def test_every_link_of_the_documents_leads_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("sample/*.md")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_page_on_quantization_is_made_from_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they say meets the bar."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_quantization

    document = json.loads((ROOT / "docs" / "quantization.json").read_text(encoding="utf-8"))
    assert bench_quantization.make_page(document) == (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert [met for _, met in bench_quantization.check_bars(document["results"])] == [True] * 3
    worse = [{**result, "bits_per_byte": 1 + (result["weights"] != "fp32")} for result in document["results"]]
    assert [met for _, met in bench_quantization.check_bars(worse)] == [False] * 3


def test_the_samples_card_is_made_from_its_training_and_counts_every_stored_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import distill_card

    facts = json.loads((ROOT / "sample" / "training.json").read_text(encoding="utf-8"))
    assert distill_card.card(facts) == (ROOT / "sample" / "README.md").read_text(encoding="utf-8")
    stored = sum(math.prod(entry.shape) for entry in Checkpoint.open(ROOT / "sample").entries.values())
    assert facts["models"]["student"]["parameters"] == stored


def test_checking_a_gpu_where_there_is_none_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_gpu

    monkeypatch.setattr(check_gpu.machine, "gpus", list)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--out", str(tmp_path / "page.md")])
    assert check_gpu.main() == 1 and not list(tmp_path.iterdir())
    looked = "a CUDA device that the NVIDIA driver (libcuda) shows was looked for"
    assert capsys.readouterr().err == f"error: no GPU here: {looked}; nothing was run or written\n"
