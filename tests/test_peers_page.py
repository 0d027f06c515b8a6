"""docs/performance.md: made of its measurements by the script, whatever parts of it were run."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import moedge

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


@pytest.mark.parametrize("shape", json.loads((ROOT / "scripts" / "real_shapes.json").read_text()))
def test_both_sides_hold_the_same_weights(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GGUF file of a shape has as many as the checkpoint that our bundle is made of."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import peers_gguf
    import synthetic_checkpoint

    config = synthetic_checkpoint.read_shape(shape, 5)
    _, tensors, _ = peers_gguf.ARCHITECTURES[config["model_type"]](config)
    ours = sum(math.prod(source.shape) for source in synthetic_checkpoint.list_sources(config, tmp_path))
    assert sum(math.prod(tensor.shape) for tensor in tensors) == ours
    assert len({tensor.name for tensor in tensors}) == len(tensors)


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


def test_what_the_memory_allows(peers_page: Any) -> None:
    """Limit, share and best ratio out of bytes, bandwidth and times; an int4 head is measured in rounds of its own."""
    times = {"prefill_s": [1.0], "decode_s": [0.025], "decode_long_s": [0.05]}
    about = {"about": {"load_s": 1.0, "kernels": "a", "version": "b"}, "memory": {}}
    result: dict[str, Any] = {
        **{key: measured()[0][key] for key in ("date", "machine", "threads", "load_before", "backend_version")},
        "shape": "a-shape", "prompt_tokens": 512, "long_context": 4096, "bandwidth_bytes_per_s": [40e9],
        "bytes_per_token": {"decode": 500_000_000, "decode_long": 1_000_000_000}, "cache": "float16",
        "peer_bytes_per_token": {"llama.cpp": {"decode": 600_000_000, "decode_long": 800_000_000}},
        "peers": {"moedge": times | about, "llama.cpp": times | about},
        "weights": {"weights": "int4", "head": "int8", "group_size": 128},
    }  # fmt: skip
    narrow = copy.deepcopy(result)
    narrow["bytes_per_token"] = {"decode": 400_000_000, "decode_long": 900_000_000}
    narrow["peers"]["moedge"]["decode_s"] = [0.0125]
    genai = {"peers": {"moedge": times, "genai": times | about}, "bandwidth_bytes_per_s": [50e9],
             "bytes_per_token": {"decode": 500_000_000}}  # fmt: skip
    page = peers_page.render([result | {"int4_head": narrow, "genai": genai}], None)
    assert "moedge at int4 in groups of 128 (head int8, cache float16), llama.cpp at Q4_0 (head Q6_K)" in page
    for row in (
        "| a-shape | 512 | moedge | 500 MB | 80.0 | 40.0 | 50% | 2.00 | memory allows it |",
        "| a-shape | 4,096 | moedge | 1,000 MB | 40.0 | 20.0 | 50% | 2.00 | memory allows it |",
        "| a-shape | 512 | moedge, int4 head | 400 MB | 100.0 | 80.0 | 80% | 2.50 | memory allows it |",
        "| a-shape | 512 | llama.cpp | 600 MB | 66.7 | 40.0 | 60% |  |  |",
        "| a-shape | 512 | genai | 500 MB | 100.0 | 40.0 | 40% |  |  |",
        "| a-shape | 512 | 80.0 | 40.0 | 2.00 | 2.00 to 2.00 | met | 80% |",
        "| a-shape | 4,096 | 20.0 | 20.0 | 1.00 | 1.00 to 1.00 | not met | 50% | 50% | not met |",
        "| a-shape | 4,096 | 20.0 | 20.0 | 1.00 | 1.00 to 1.00 | not met | 45% | 25% | not met |",
    ):
        assert row in page.splitlines(), row
    result["bandwidth_bytes_per_s"] = [31e9]
    assert "| a-shape | 512 | moedge | 500 MB | 62.0 | 40.0 | 65% | 1.55 | beyond the memory |" in peers_page.render(
        [result], None
    )


def test_what_a_token_reads_of_the_peers_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of each kind of attention, counted by hand: Q4_0 has 18 bytes for 32 weights, Q6_K 210 for 256."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from peers_gguf import bytes_per_token

    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 512, "moe_intermediate_size": 128,
    }  # fmt: skip
    attention = 256 * 256 * 2 + 2 * 128 * 256
    experts, routers = 2 * 3 * 128 * 256, 8 * 256
    ends = 256 * 18 / 32 + 1024 * 256 * 210 / 256 + 4 * 256
    layer = (attention + experts) * 18 / 32 + 4 * (routers + 2 * 256 + 2 * 64)
    assert bytes_per_token(config, 0) == ends + 2 * layer
    assert bytes_per_token(config, 100) - bytes_per_token(config, 0) == 100 * 2 * 2 * 128 * 2
    latent = {
        "model_type": "deepseek_v2", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "intermediate_size": 512, "moe_intermediate_size": 128, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    }  # fmt: skip
    attention = 4 * 48 * 256 + 144 * 256 + 4 * 128 * 32 * 2 + 256 * 4 * 32
    dense, sparse = 3 * 512 * 256, experts + 3 * 256 * 256
    floats = 2 * (2 * 256 + 128) + routers
    assert bytes_per_token(latent, 0) == ends + (2 * attention + dense + sparse) * 18 / 32 + 4 * floats
    assert bytes_per_token(latent, 100) - bytes_per_token(latent, 0) == 100 * 2 * 144 * 2


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


def test_a_bundle_of_other_defaults_is_made_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_peers

    made = {}
    for name, options in {"usual": {}, "head": {"head": "int4"}, "narrow": {"group_size": 16}}.items():
        moedge.export(tiny_checkpoint, tmp_path / name, verify=False, **options)
        made[name] = [bench_peers.is_made(tmp_path / name, head) for head in (None, "int4")]
    assert made == {"usual": [True, False], "head": [False, True], "narrow": [False, False]}
    assert not bench_peers.is_made(tmp_path / "nothing", None)


def test_a_worker_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import sys

    import bench_peers

    with pytest.raises(bench_peers.WorkerError, match="^no such model$"):
        bench_peers.Worker([sys.executable, "-c", "import sys; sys.exit('no such model')"])
