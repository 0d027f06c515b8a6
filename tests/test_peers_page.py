"""docs/performance.md: made of its measurements by the script, whatever parts of it were run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "performance.json"


@pytest.fixture
def peers_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import peers_page

    return peers_page


def measured() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def test_the_page_is_made_from_its_measurements(peers_page: Any) -> None:
    assert peers_page.render(measured(), "performance.svg") == (ROOT / "docs" / "performance.md").read_text("utf-8")


def test_each_part_has_its_table_where_it_was_run(peers_page: Any) -> None:
    plain = {key: value for key, value in measured()[0].items() if key not in ("genai", "batch", "optimum")}
    assert "genai" not in peers_page.render([plain], None)
    times = {"prefill_s": [2.0, 4.0], "decode_s": [0.5, 0.5]}
    about = {"about": {"load_s": 9.0, "version": "onnxruntime-genai 0.18"}, "memory": {"private_bytes": 3 << 30}}
    full = copy.deepcopy(plain) | {
        "genai": {"peers": {"moedge": {"prefill_s": [1.0, 1.0], "decode_s": [0.25, 0.125]}, "genai": times | about}},
        "batch": {
            "lanes": 8, "expected_distinct_experts": 41.98, "experts": 64, "bytes_per_step": 1 << 30,
            "decode_s": [0.1, 0.1], "step_s": [0.4, 0.4], "bandwidth_bytes_per_s": [4e9, 4e9],
        },
        "optimum": {
            "family": "qwen3_moe", "exported": True, "export_s": 19.6, "largest_difference": 1.8e-6,
            "versions": {"optimum-onnx": "0.1.0"}, "prompt_tokens": 100,
            "peers": {name: {"prefill_s": [0.5], "decode_s": [each]} for name, each in
                      (("optimum", 0.04), ("moedge fp32", 0.02), ("moedge int4", 0.001))},
        },
    }  # fmt: skip
    page = peers_page.render([full], None)
    name, prompt = full["shape"], full["prompt_tokens"]
    first = f"| {name} | prefill | {prompt:.1f} | {prompt / 3:.1f} | 3.00 | 2.00 to 4.00 | 9.0 s | 3.0 GiB |"
    assert first in page and f"| {name} | decode | 5.3 | 2.0 | 3.00 | 2.00 to 4.00 |" in page
    assert f"| {name} | 8 | 10.0 | 20.0 | 2.00 | 42.0 of 64 | 1.00 GiB | 67% | not met |" in page
    assert "| qwen3_moe | in 20 s | 1.8e-06 | decode | 25.0 | 50.0 | 1000.0 |" in page
    refused = copy.deepcopy(plain) | {
        "genai": {"reason": "no | memory\nat all"},
        "optimum": {"family": "olmoe", "exported": False, "reason": "ValueError: a custom architecture"},
    }
    page = peers_page.render([refused], None)
    assert f"| {name} | does not run: no / memory at all | | | | | | |" in page
    assert "| olmoe | no |  | ValueError: a custom architecture | | | |" in page


def test_what_a_part_found_is_kept_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_peers

    path = tmp_path / "performance.json"
    path.write_text(json.dumps(measured()))
    name = measured()[0]["shape"]
    bench_peers.keep(path, name, {"genai": {"reason": "a test"}})
    found = {each["shape"]: each for each in json.loads(path.read_text())}
    assert found.pop(name) == measured()[0] | {"genai": {"reason": "a test"}}
    assert list(found.values()) == [each for each in measured() if each["shape"] != name]
    assert "does not run: a test" in path.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        bench_peers.main(["--work", str(tmp_path), "--shape", "no-such-shape"])


def test_a_worker_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import sys

    import bench_peers

    with pytest.raises(bench_peers.WorkerError, match="^no such model$"):
        bench_peers.Worker([sys.executable, "-c", "import sys; sys.exit('no such model')"])
