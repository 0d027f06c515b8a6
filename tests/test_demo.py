"""`moedge demo` on the sample model: every station of the path left what it should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moedge.bundle import Bundle, check_files
from moedge.demo import ENGINES, MIB, NEW_TOKENS, PROMPT, SAMPLE, SECONDS


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's output folder and what it printed."""
    pytest.importorskip("tensorrt_rtx", reason="the demo builds TensorRT-RTX engines")
    output = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "moedge", "demo", "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return output, result.stdout


@pytest.mark.slow
def test_bundles_and_engines(demo: tuple[Path, str]) -> None:
    output, _ = demo
    for weights in ("int4", "int8"):
        bundle = Bundle.open(output / f"sample-{weights}")
        check_files(bundle)
        assert bundle.manifest["quantization"]["weights"] == weights and bundle.manifest["provenance"]["verified"]
    bundle = Bundle.open(output / "sample-int4")
    assert bundle.engines() == sorted(ENGINES)
    engines = {name: json.loads((bundle.engine_dir(name) / "engine.json").read_text()) for name in ENGINES}
    assert {name: engine["status"] for name, engine in engines.items()} == {
        "cpu": "ready",
        "rtx4090": "ready",
        "a100-80gb": "ready",
        "jetson-agx-orin-64gb": "prepared",
    }
    assert engines["rtx4090"]["compute_capability"] == [8, 9] and engines["a100-80gb"]["compute_capability"] == [8, 0]
    weights = sum(bundle.sizes.values())
    for name in ("rtx4090", "a100-80gb"):
        assert (bundle.engine_dir(name) / "engine.plan").stat().st_size > weights / 2


@pytest.mark.slow
def test_report_tells_measured_from_predicted(demo: tuple[Path, str]) -> None:
    output, printed = demo
    results = json.loads((output / "results.json").read_text())
    measured = {(result["profile"], result["weights"]): result["measured"] for result in results}
    assert measured == {
        ("cpu", "int4"): True,
        ("cpu", "int8"): True,
        ("rtx4090", "int4"): False,
        ("a100-80gb", "int4"): False,
        ("jetson-agx-orin-64gb", "int4"): False,
    }
    assert all(result["new_tokens"] == NEW_TOKENS for result in results)
    assert printed.count("measured") >= 2 and printed.count("predicted") >= 3
    assert "predicted" in (output / "report.html").read_text()


@pytest.mark.slow
def test_what_it_takes_is_said_at_the_beginning(demo: tuple[Path, str]) -> None:
    output, printed = demo
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20
    assert size == pytest.approx(MIB, rel=0.2)
    first, last = f"about {SECONDS} s on two free cores, {MIB} MiB of disk", f" s, {size:.0f} MiB in {output}"
    assert first in printed.splitlines()[0] and re.search(rf"== Done in \d+{last}", printed)


@pytest.mark.slow
def test_the_sample_goes_on_as_code(demo: tuple[Path, str]) -> None:
    """What the cpu engine printed after `def __init__(self` closes the signature and goes on with an indented body."""
    text = demo[1].split(PROMPT, 1)[1]
    signature, _, body = text.partition("\n")
    assert ")" in signature
    assert re.search(r"^ {8}\S", body, flags=re.M)


def test_the_sample_is_loaded_by_transformers_unchanged() -> None:
    import torch
    from transformers import DeepseekV3ForCausalLM

    model, report = DeepseekV3ForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.n_routed_experts == 8 and model.config.num_experts_per_tok == 2
    assert (SAMPLE / "model.safetensors").stat().st_size <= 24_000_000
