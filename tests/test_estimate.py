"""Predictions recomputed by independent arithmetic, and held against published rates."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from model_manifests import deepseek_v2_lite, olmoe

from moedge.errors import UsageError
from moedge.profiles import estimate as estimate_module
from moedge.profiles import roofline_cpu
from moedge.profiles.device import DeviceProfile, load_profile
from moedge.profiles.device_commands import estimate_command
from moedge.profiles.estimate import CPU_AT_ONCE, CPU_PREFILL_CHUNK, bytes_per_token, decode_work, estimate
from moedge.profiles.roofline_cpu import Constants, CpuRoofline, load_fit, spread_of
from moedge.profiles.shape import ModelShape
from moedge.runtime.engine import PREFILL_AT_ONCE, PREFILL_CHUNK
from moedge.runtime.report import check_result

CONTRACT_KEYS = (
    "schema model profile backend device weights group_size batch prompt_tokens new_tokens threads repeat load_s "
    "ttft_ms itl_ms prefill_tokens_per_s decode_tokens_per_s peak_memory_bytes bundle_bytes bytes_per_token "
    "bandwidth_bytes_per_s bandwidth_limit_bytes_per_s fraction_of_limit energy_j_per_token measured"
).split()


def test_bytes_of_a_step_by_hand() -> None:
    manifest = deepseek_v2_lite()
    sizes = manifest["sizes"]
    always = sum(sizes[name] for name in ("attention", "dense_mlp", "router", "norm", "shared_experts", "head"))
    one = always + sizes["experts"] * 6 / 64 + sizes["embedding"] / 102400 + 1000 * 27 * 576 * 4
    assert bytes_per_token(manifest, 1000) == round(one)
    assert bytes_per_token(manifest, 0) == round(one - 1000 * 27 * 576 * 4)
    distinct = 64 * (1 - (58 / 64) ** 5)
    five = always + sizes["experts"] * distinct / 64 + 5 * sizes["embedding"] / 102400 + 5 * 1000 * 27 * 576 * 2
    assert bytes_per_token(manifest, 1000, batch=5, cache_bytes_per_element=2) == round(five)


def test_a_tied_embedding_is_read_with_the_head() -> None:
    manifest = deepseek_v2_lite()
    untied = bytes_per_token(manifest, 0)
    manifest["sizes"]["embedding"] = 0
    assert bytes_per_token(manifest, 0) == untied  # one row of the same bytes, out of the head


def test_distinct_experts_against_chance() -> None:
    """E * (1 - (1 - k/E)^B) is what drawing k of E at random B times gives; 8 tokens of OLMoE's 8 of 64 read 42."""
    shape = ModelShape.from_manifest(olmoe())
    random = np.random.default_rng(0)
    for tokens in (1, 2, 8, 32):
        choices = [[random.choice(64, 8, replace=False) for _ in range(tokens)] for _ in range(300)]
        drawn = [len(set(np.concatenate(chosen).tolist())) for chosen in choices]
        assert shape.distinct_experts(tokens) == pytest.approx(np.mean(drawn), rel=0.03)
    assert shape.distinct_experts(1) == pytest.approx(8)
    assert round(shape.distinct_experts(8)) == 42


def test_decode_step_by_hand() -> None:
    """One token's step on an RTX 4090 is bound by bandwidth: bytes over 60% of it, 14 gaps a layer, a pass."""
    manifest = deepseek_v2_lite()
    result = estimate(manifest, load_profile("rtx4090"), prompt_tokens=512, new_tokens=64)
    count = bytes_per_token(manifest, 512 + 32, 1, 2)
    expected = count / (1008e9 * 0.6) + 27 * 14 * 2.5e-6 + 60e-6
    low = count / (1008e9 * 0.85) + 27 * 10 * 2.5e-6 + 20e-6
    high = max(count / (1008e9 * 0.3) + 27 * 28 * 2.5e-6, 27 * 28 * 10e-6) + 200e-6
    assert result["itl_ms"]["p50"] == pytest.approx(1e3 * expected, rel=1e-6)
    assert result["itl_ms"]["low"] == pytest.approx(1e3 * low, rel=1e-6)
    assert result["itl_ms"]["high"] == pytest.approx(1e3 * high, rel=1e-6)
    assert result["bytes_per_token"] == count
    assert result["decode_tokens_per_s"] == pytest.approx(1 / expected)
    assert result["bandwidth_bytes_per_s"] == pytest.approx(count / expected)
    assert result["fraction_of_limit"] == pytest.approx(count / expected / 1008e9)
    assert result["usd_per_million_tokens"] == pytest.approx(0.34 / 3600 * expected * 1e6)
    assert sum(part["bytes"] for part in result["per_op"]) == pytest.approx(count, abs=10)


def tiny() -> dict[str, Any]:
    """Two layers of a hundredth of DeepSeek-V2-Lite's bytes: what bounds it is anything but bandwidth."""
    manifest = deepseek_v2_lite()
    manifest["config"] |= {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 3072}
    manifest["config"]["moe"] |= {"layers": [1], "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256}
    manifest["config"]["moe"]["shared_intermediate_size"] = 256
    manifest["config"]["attention"] |= {"num_heads": 2, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "v_head_dim": 64}
    manifest["sizes"] = dict.fromkeys(manifest["sizes"], 50_000)
    manifest["cache"] = manifest["cache"][:4]
    return manifest


@pytest.mark.parametrize(
    ("profile", "launch", "overhead"), [("jetson-agx-orin-64gb", 10e-6, 150e-6), ("rtx4090", 5e-6, 60e-6)]
)
def test_a_tiny_model_is_bound_by_launches(profile: str, launch: float, overhead: float) -> None:
    """14 launches a layer without a CUDA graph and a pass's fixed cost: for a prompt's chunk as for a token."""
    result = estimate(tiny(), load_profile(profile), prompt_tokens=256, new_tokens=8)
    floor = 2 * 14 * launch + overhead
    assert result["itl_ms"]["p50"] == pytest.approx(1e3 * floor)
    assert 0.999 * floor <= result["ttft_ms"]["p50"] / 1e3 < 1.5 * floor
    two_chunks = estimate(tiny(), load_profile(profile), prompt_tokens=512, new_tokens=8)
    assert two_chunks["ttft_ms"]["p50"] >= 1.999e3 * floor
    for times in (result["ttft_ms"], result["itl_ms"]):
        device = load_profile(profile)
        assert times["low"] >= 1e3 * 2 * 10 * device.launch_overhead_us * 1e-6  # even with a graph: the gaps
    assert result["prefill_tokens_per_s"] < 1.5e6


CONSTANTS = Constants(
    pass_us=50, layer_us=30, latent_us=11, mixture_us=7, lane_us=5, channel_ns=2, bandwidth_share=0.9, cached_speed=4,
    int8_share=0.8, fp32_share=0.5, unpack4=7, unpack8=3,
)  # fmt: skip


def laptop(**changes: Any) -> DeviceProfile:
    """Two cores of 1e12 int8 and 1e11 fp32 operations, 40 GB/s, launches as the fit had them."""
    flops = {"fp32": 1e11, "int8": 1e12}
    plain: dict[str, Any] = {"cores": 2, "flops": flops, "bandwidth_bytes_per_s": 40e9, "launch_overhead_us": 3.0}
    return dataclasses.replace(load_profile("x86-laptop"), **plain | {"cache_bytes": None} | changes)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_on_a_cpu_by_hand(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of operation takes the longer of its bytes and of its arithmetic with the unpacking of its weights."""
    monkeypatch.setattr(estimate_module, "load_fit", lambda: CpuRoofline(CONSTANTS, 1.3, "a test"))
    manifest = deepseek_v2_lite()
    result = estimate(manifest, laptop(), prompt_tokens=512, new_tokens=64, batch=batch)
    sizes, distinct = manifest["sizes"], 64 * (1 - (58 / 64) ** batch)
    parameters = {
        "attention": 27 * (2048 * 16 * 192 + 2048 * 576 + 16 * 512 * 256 + 16 * 128 * 2048),
        "dense_mlp": 3 * 2048 * 10944,
        "shared_experts": 26 * 3 * 2048 * 2816,
        "head": 102400 * 2048,
        "experts": 26 * 6 * 3 * 2048 * 1408,
    }
    read = {**sizes, "experts": sizes["experts"] * distinct / 64}
    work = {
        name: max(
            read[name] / 36e9, (2 * batch * count + {"head": 3}.get(name, 7) * read[name]) / (0.8 * 1e12)
        )
        for name, count in parameters.items()
    }
    work["router"] = max(sizes["router"] / 36e9, 2 * batch * 26 * 64 * 2048 / (0.5 * 1e11))
    work["norm"], work["embedding"] = sizes["norm"] / 36e9, batch * sizes["embedding"] / 102400 / 36e9
    pairs = batch * 544 * 27
    work["attention over the cache"] = max(pairs * 576 * 4 / 36e9, pairs * 2 * 16 * (2 * 512 + 64) / (0.5 * 1e11))
    fixed = 50e-6 + 27 * (30 + 11 + 5 * (batch - 1)) * 1e-6 + 26 * 7e-6 + batch * 27 * 2048 * 2e-9 / 2
    assert result["itl_ms"]["p50"] == pytest.approx(1e3 * (sum(work.values()) + fixed), rel=1e-6)
    assert {row["op"]: row["ms"] for row in result["per_op"]} == pytest.approx(
        {**{name: 1e3 * seconds for name, seconds in work.items()}, "launches and fixed costs": 1e3 * fixed}, rel=1e-4
    )
    for key, factor in (("low", 1 / 1.3 / 1.5), ("high", 1.3 * 1.5)):  # another machine than the fit's
        assert result["itl_ms"][key] == pytest.approx(factor * result["itl_ms"]["p50"])


def test_a_model_in_the_cache_is_not_bound_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read four times as fast where all of it fits, as from memory from twice the cache on, in between in between."""
    monkeypatch.setattr(estimate_module, "load_fit", lambda: CpuRoofline(CONSTANTS, 1.3, "a test"))
    weights = sum(deepseek_v2_lite()["sizes"].values())

    def norms(cache_bytes: int | None) -> float:
        rows = estimate(deepseek_v2_lite(), laptop(cache_bytes=cache_bytes))["per_op"]
        return float(next(row["ms"] for row in rows if row["op"] == "norm"))

    plain = norms(None)
    assert norms(weights) == pytest.approx(plain / 4) and norms(weights // 2) == pytest.approx(plain)
    assert norms(round(weights / 1.5)) == pytest.approx(plain * (0.5 + 0.5 / 4), rel=1e-3)


def test_what_was_fitted_is_stated_and_leaves_the_truth_in_its_band() -> None:
    fitted = json.loads(roofline_cpu.FILE.read_text())
    made = fitted["made"]
    assert f"{made['measurements']} measurements of {made['shapes']} shapes" in load_fit().source
    assert made["date"] in load_fit().source and estimate(olmoe(), laptop())["assumptions"] == load_fit().source
    errors = [row[key] for row in fitted["measurements"] for key in ("itl_error", "ttft_error") if row[key] is not None]
    assert len(errors) == made["measurements"] and spread_of([0.1, 0.1]) == 1.4
    assert fitted["spread"] == pytest.approx(spread_of([math.log1p(error) for error in errors]), abs=0.01)


def test_the_fit_finds_constants_that_made_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a CPU of known constants would take are predicted again within a few percent (seed 0, few steps)."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    import fit_estimate

    truth, samples = CpuRoofline(CONSTANTS, 1.0, "a test"), []
    for manifest in (deepseek_v2_lite(), olmoe()):
        shape = ModelShape.from_manifest(manifest)
        for device in (laptop(), laptop(bandwidth_bytes_per_s=1e12)):
            for tokens in (1, 64):
                step = decode_work(shape, device, tokens, 100, 4, 4)
                seconds = truth.pass_seconds(step, shape, device)
                samples.append(fit_estimate.Measured(seconds, [step], shape, device, 1.0))
    _, errors = fit_estimate.fit(samples, steps=400)
    assert max(map(abs, errors)) < 0.1 < max(map(abs, fit_estimate.errors(fit_estimate.START, samples)))


def test_the_cpus_prompt_chunk_is_the_engines() -> None:
    assert (CPU_PREFILL_CHUNK, CPU_AT_ONCE) == (PREFILL_CHUNK, PREFILL_AT_ONCE)


def test_prompt_by_hand() -> None:
    """On TensorRT all experts are evaluated for each token, bound by arithmetic; the rest by its own bound."""
    result = estimate(deepseek_v2_lite(), load_profile("rtx4090"), prompt_tokens=256, new_tokens=1)
    sizes = deepseek_v2_lite()["sizes"]
    peak, bandwidth = 165.2e12 * 0.4, 1008e9 * 0.6
    attention = 2048 * 16 * 192 + 2048 * 576 + 16 * 512 * 256 + 16 * 128 * 2048
    seconds = [
        2 * 256 * 26 * 64 * 3 * 2048 * 1408 / peak,
        max(2 * 256 * 27 * attention / peak, sizes["attention"] / bandwidth),
        max(2 * 256 * 26 * 3 * 2048 * 2816 / peak, sizes["shared_experts"] / bandwidth),
        max(2 * 256 * 3 * 2048 * 10944 / peak, sizes["dense_mlp"] / bandwidth),
        max(2 * 256 * 26 * 64 * 2048 / (82.6e12 * 0.4), sizes["router"] / bandwidth),
        max(256 * 257 / 2 * 27 * 2 * 16 * (2 * 512 + 64) / peak, 256 * 27 * 576 * 2 / bandwidth),
        (sizes["norm"] + sizes["head"] + 256 * sizes["embedding"] / 102400) / bandwidth,
        27 * 14 * 2.5e-6,
        60e-6,
    ]
    assert result["ttft_ms"]["p50"] == pytest.approx(1e3 * sum(seconds), rel=1e-6)
    assert result["prefill_tokens_per_s"] == pytest.approx(256 / sum(seconds), rel=1e-6)


def test_onnxruntime_evaluates_the_chosen_experts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a prompt token goes through k experts a layer, not E."""
    monkeypatch.setattr(estimate_module, "load_fit", lambda: CpuRoofline(CONSTANTS, 1.3, "a test"))
    result = estimate(olmoe(), laptop(), prompt_tokens=256, new_tokens=1)
    experts = 2 * 256 * 16 * 8 * 3 * 2048 * 1024 / (1e12 * 0.8)
    others = 2 * 256 * 16 * 4 * 2048 * 2048 / (1e12 * 0.8)
    assert 1e3 * (experts + others) < result["ttft_ms"]["p50"] < 1.6e3 * (experts + others)


def test_batch_reuses_experts_and_no_more() -> None:
    """OLMoE at batch 8 reads 42 of 64 experts a layer instead of 8: the rate at most doubles or so on a CPU."""
    device = load_profile("cpu").with_bandwidth(28.5e9, "a test")
    one, eight = (estimate(olmoe(), device, prompt_tokens=1, new_tokens=1, batch=batch) for batch in (1, 8))
    assert 1.3 < eight["decode_tokens_per_s"] / one["decode_tokens_per_s"] < 2.6
    assert eight["itl_ms"]["p50"] > one["itl_ms"]["p50"]


@pytest.mark.parametrize("profile", ["cpu", "rtx4090", "a100-80gb", "jetson-agx-orin-64gb", "jetson-orin-nano-8gb"])
def test_result_is_a_bench_result_that_says_it_is_predicted(profile: str) -> None:
    result = estimate(deepseek_v2_lite(), load_profile(profile), prompt_tokens=128, new_tokens=32)
    assert list(result)[:6] == CONTRACT_KEYS[:6] and set(CONTRACT_KEYS) <= set(result)
    assert result["measured"] is False
    assert [key for key in CONTRACT_KEYS if result[key] is None and key != "threads"] == [
        "repeat", "load_s", "energy_j_per_token",
    ]  # fmt: skip
    for times in (result["ttft_ms"], result["itl_ms"]):
        assert times["low"] < times["p50"] < times["high"] and times["p90"] is times["p99"] is None
    assert result["fits"] == (profile != "jetson-orin-nano-8gb")
    assert result["peak_memory_bytes"] == result["fit"]["total_bytes"]
    check_result(json.loads(json.dumps(result)), "estimate")


def test_a_published_rate_lies_in_the_band() -> None:
    """RTX 3090, DeepSeek-V2-Lite Q4_0 under llama.cpp: about 180 tokens/s (another engine: the band)."""
    times = estimate(deepseek_v2_lite(), load_profile("rtx3090"), prompt_tokens=128, new_tokens=64)["itl_ms"]
    assert times["low"] < 1e3 / 180 < times["high"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt_tokens": 0}, "prompt tokens is 0; at least 1 is needed"),
        ({"batch": -1}, "batch is -1; at least 1 is needed"),
        (
            {"prompt_tokens": 512, "max_seq_len": 100},
            "max_seq_len is 100, less than 512 prompt and 64 new tokens; ask for at least 576",
        ),
        (
            {"prompt_tokens": 4090},
            "4154 tokens are more than OLMoE-1B-7B has positions (4096); ask for fewer prompt or new tokens, or a "
            "smaller --max-seq-len",
        ),
    ],
)
def test_counts_out_of_range(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as raised:
        estimate(olmoe(), load_profile("rtx4090"), **asked)
    assert str(raised.value) == told


def test_command(tmp_path: Path) -> None:
    (tmp_path / "moedge.json").write_text(json.dumps(deepseek_v2_lite()))
    one = json.loads(CliRunner().invoke(estimate_command, [str(tmp_path), "--profile", "rtx4090", "--json"]).stdout)
    assert one["profile"] == "rtx4090" and one["measured"] is False
    arguments = [str(tmp_path), "--profile", "rtx4090", "--profile", "jetson-orin-nano-8gb"]
    two = json.loads(CliRunner().invoke(estimate_command, [*arguments, "--json"]).stdout)
    assert [result["profile"] for result in two] == ["rtx4090", "jetson-orin-nano-8gb"]
    shown = CliRunner().invoke(estimate_command, arguments, env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert "predicted: no fit" in shown.stdout and "KV cache" in shown.stdout
    assert "DeepSeek-V2-Lite does not fit jetson-orin-nano-8gb: it needs" in shown.stdout
    shown = CliRunner().invoke(estimate_command, arguments, env={"COLUMNS": "80"})
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.stdout and max(map(len, shown.stdout.splitlines()[:16])) <= 80


def test_what_the_fit_check_advises_can_be_asked_of_the_command(tmp_path: Path) -> None:
    """A context shorter than the usual prompt, and the batch by the name that `moedge build` has for it."""
    (tmp_path / "moedge.json").write_text(json.dumps(deepseek_v2_lite()))
    ask = [str(tmp_path), "--profile", "jetson-orin-nx-16gb", "--json"]
    wide = json.loads(CliRunner().invoke(estimate_command, [*ask, "--batch", "8", "--max-seq-len", "40000"]).stdout)
    assert not wide["fits"]
    for advice in wide["fit"]["suggestions"]:
        options = {"--batch": "8", "--max-seq-len": "40000"}
        option, value = advice["option"].split()
        options["--batch" if option == "--max-batch" else option] = value
        again = CliRunner().invoke(estimate_command, [*ask, *(word for pair in options.items() for word in pair)])
        found = json.loads(again.stdout)["fit"]
        assert found["fits"] and found["total_bytes"] == advice["total_bytes"]
    short = json.loads(CliRunner().invoke(estimate_command, [*ask, "--max-batch", "2", "--max-seq-len", "256"]).stdout)
    assert (short["prompt_tokens"], short["new_tokens"], short["batch"]) == (192, 64, 2)


def test_a_batch_beyond_reason_is_told_as_quickly() -> None:
    one, many = (estimate(olmoe(), load_profile("rtx4090"), batch=batch) for batch in (1, 10**9))
    assert many["ttft_ms"]["p50"] == pytest.approx(1e9 * one["ttft_ms"]["p50"]) and not many["fits"]


def test_the_check_plans_a_manifest_as_export_would(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/check_estimate.py predicts published shapes without exporting them."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    import check_estimate

    config = json.loads((tiny_checkpoint / "config.json").read_text())
    planned = check_estimate.plan_manifest("tiny", config)
    real = json.loads((tiny_bundle / "moedge.json").read_text())
    assert planned["cache"] == [{"name": entry["name"], "width": entry["width"]} for entry in real["cache"]]
    device = load_profile("rtx4090")
    asked = {"prompt_tokens": 16, "new_tokens": 4}
    one, two = (estimate(manifest, device, **asked) for manifest in (planned, real))
    assert one["itl_ms"]["p50"] == pytest.approx(two["itl_ms"]["p50"], rel=1e-3)


def test_the_checks_page_follows_from_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    import check_estimate

    guess = estimate(olmoe(), load_profile("x86-laptop"))
    itl = guess["itl_ms"]["p50"]
    real = {"itl_ms": 1.2 * itl, "ttft_ms": 1.0, "bandwidth": 1e10, "threads": 2, "batch": 1, "context_tokens": 0}
    row = {"name": "some shape", "weights": "int4", "measured": real, "predicted": guess}
    far = {**row, "measured": {**real, "itl_ms": itl / 9}}
    other = {**row, "measured": {**real, "batch": 4}}
    page = check_estimate.render([row, far, other], "in a test")
    assert "1 of 2 decode rates are predicted within 25%" in page
    fitted = json.loads(roofline_cpu.FILE.read_text())
    assert all(f"| {each['name']} | {each['weights']} |" in page for each in fitted["measurements"])
    assert "| some shape | int4 | 0 | 4 |" in page and fitted["made"]["date"] in page
    told = [each for each in check_estimate.PUBLISHED if each.told == "81"]
    rate, low, high = check_estimate.predict(told[0])
    assert f"| 81 | TensorRT Edge-LLM 0.7, int4 | {rate:.3g} | {low:.0f} to {high:.0f} | {rate / 81 - 1:+.0%} |" in page
    assert page.count("Qwen3.5-35B-A3B, as qwen3-30b-a3b") == 2
    assert "| +20% | yes |" in page and "| -89% | no |" in page
