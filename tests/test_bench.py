"""The benchmark: its keys, its arithmetic against the raw samples, its errors; and what is read of the machine."""

from __future__ import annotations

import dataclasses
import io
import json

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from moedge.bundle import Bundle
from moedge.errors import BundleError, EngineError, UsageError
from moedge.profiles.device import load_profile
from moedge.profiles.shape import ModelShape, bytes_per_token, cache_element_bytes
from moedge.runtime import bench as bench_module
from moedge.runtime import bench_runs, machine
from moedge.runtime.bench import bench, bench_sweep
from moedge.runtime.bench_breakdown import summarize
from moedge.runtime.bench_commands import bench_command
from moedge.runtime.report import check_result, load_results, write_report
from moedge.runtime.sessions._ort_lanes import LaneRunner
from moedge.runtime.tables import bench_table

CONTRACT_KEYS = (
    "schema model profile backend device weights group_size batch prompt_tokens new_tokens threads repeat load_s "
    "ttft_ms itl_ms prefill_tokens_per_s decode_tokens_per_s peak_memory_bytes bundle_bytes bytes_per_token "
    "bandwidth_bytes_per_s bandwidth_limit_bytes_per_s fraction_of_limit energy_j_per_token measured"
).split()


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory):
    return fake_engine.write_bundle(tmp_path_factory.mktemp("bench") / "bundle")


@pytest.fixture(scope="session")
def result(fake_bundle):
    return bench(fake_bundle, prompt_tokens=20, new_tokens=12, repeat=3, threads=1, samples=True)


def test_keys_of_the_contract(result):
    assert list(result)[: len(CONTRACT_KEYS)] == CONTRACT_KEYS
    assert result["bandwidth_limit_source"] == "measured here" and result["device_memory_bytes"] is None
    assert result["measured"] is True and result["schema"] == 1 and result["threads"] == 1
    json.dumps(result, allow_nan=False)


def test_on_a_gpu_the_data_sheet_is_the_limit_and_the_gpu_has_the_name(fake_bundle, monkeypatch):
    """An engine for SM89: nothing of it runs here, so only what the result says of the device is looked at."""
    real = bench_module.read_engine

    def for_gpu(*given):
        return dataclasses.replace(real(*given), compute_capability=(8, 9), profile="rtx4090")

    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("a GPU", (8, 9), 24 << 30)])
    info = for_gpu(Bundle.open(fake_bundle), "cpu")
    assert machine.name_of(info.compute_capability) == "a GPU" and machine.name_of(None) == machine.cpu_name()
    assert bench_module._find_limit(info, 1) == (load_profile("rtx4090").bandwidth_bytes_per_s, "data sheet")
    assert bench_module._price_usd_per_hour(info) == load_profile("rtx4090").price_usd_per_hour
    elsewhere = dataclasses.replace(info, profile="my-box")
    limit, why = bench_module._find_limit(elsewhere, 1)
    assert limit is None and why.startswith("not known: no profile has the name my-box; put its file into ")
    assert bench_module._price_usd_per_hour(elsewhere) is None


def test_a_price_in_the_profile_makes_a_cost(fake_bundle, tmp_path, monkeypatch):
    """And the table and the report do without a limit that nobody knows."""
    monkeypatch.setattr(bench_module, "_price_usd_per_hour", lambda info: 0.36)
    monkeypatch.setattr(bench_module, "_find_limit", lambda info, threads: (None, "not known: a test"))
    result = bench(fake_bundle, prompt_tokens=4, new_tokens=3, repeat=1, threads=1)
    assert result["usd_per_million_tokens"] == pytest.approx(100 / result["decode_tokens_per_s"])
    assert result["fraction_of_limit"] is None and result["bandwidth_limit_bytes_per_s"] is None
    out = io.StringIO()
    Console(file=out, width=200).print(bench_table(result))
    assert "limit not known: a test" in out.getvalue() and "over the repeats" in out.getvalue()
    write_report([result], tmp_path / "r.html")


def test_figures_follow_from_the_samples(result, fake_bundle):
    ttft, itl = result["samples"]["ttft_ms"], result["samples"]["itl_ms"]
    assert len(ttft) == 3 and [len(row) for row in itl] == [11, 11, 11]
    for name, values in (("ttft_ms", ttft), ("itl_ms", np.concatenate(itl))):
        wanted = np.percentile(values, [50, 90, 99])
        np.testing.assert_allclose([result[name][key] for key in ("p50", "p90", "p99")], wanted)
    np.testing.assert_allclose(result["decode_tokens_per_s"], 1e3 / np.mean(itl))
    np.testing.assert_allclose(result["prefill_tokens_per_s"], 20e3 / np.median(ttft))
    manifest = Bundle.open(fake_bundle).manifest
    assert result["bytes_per_token"] == bytes_per_token(manifest, 26, 1, 4)
    achieved = result["bytes_per_token"] * result["decode_tokens_per_s"]
    np.testing.assert_allclose(result["bandwidth_bytes_per_s"], achieved)
    np.testing.assert_allclose(result["fraction_of_limit"], achieved / result["bandwidth_limit_bytes_per_s"])
    assert result["bundle_bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "family 25 model 17"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nmodel name\t: of another kind\n", None),
        (None, None),
    ],
)
def test_a_processor_is_told_by_its_numbers_too(text, model, monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: text)
    assert machine.cpu_model() == model


def test_memory_bandwidth_and_machine_are_plausible(result):
    assert 1e9 < result["bandwidth_limit_bytes_per_s"] < 1e13
    assert 10 << 20 < result["peak_memory_bytes"] < machine.memory_bytes()
    assert result["machine"]["cpu"] == machine.cpu_name() == result["device"]
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["cpu_model"] == machine.cpu_model()
    assert "fit into the last-level cache" in (result["limit_note"] or "fit into the last-level cache")
    assert (result["energy_j_per_token"] is None) == bool(result["energy_reason"])


def test_errors(fake_bundle):
    with pytest.raises(EngineError) as caught:
        bench(fake_bundle, prompt_tokens=60, new_tokens=10)
    assert str(caught.value) == (
        "context is full: 60 prompt and 10 new tokens need room for 69, engine 'cpu' has 64; use a smaller "
        "--prompt-tokens or --new-tokens, or build it for more: "
        f"moedge build {fake_bundle} --profile cpu --max-seq-len 69"
    )
    with pytest.raises(EngineError, match="'cpu' steps 1 sequences together at most and cannot run 2; use --batch 1, "):
        bench(fake_bundle, batch=2)
    with pytest.raises(EngineError, match="full: 50 tokens of context, 10 prompt and 10 new tokens need room for 69"):
        bench(fake_bundle, context=50, prompt_tokens=10, new_tokens=10)
    with pytest.raises(UsageError, match="single-stream is one sequence at a time, not 2; use --batch 1, or offline"):
        bench(fake_bundle, batch=2, scenario="single-stream")
    with pytest.raises(UsageError, match="new_tokens is 1; it must be at least 2"):
        bench(fake_bundle, new_tokens=1)


def test_command(fake_bundle, tmp_path):
    options = [str(fake_bundle), "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1"]
    shown = CliRunner().invoke(bench_command, [*options, "--json"])
    assert json.loads(shown.stdout)["prompt_tokens"] == 8
    assert "samples" not in json.loads(shown.stdout)
    written = CliRunner().invoke(bench_command, [*options, "--json", str(tmp_path / "result.json"), "--samples"])
    assert written.exit_code == 0 and "inter-token latency" in written.stdout
    assert len(json.loads((tmp_path / "result.json").read_text())["samples"]["ttft_ms"]) == 1


def test_a_place_that_no_file_can_have_is_told_before_anything_is_measured(fake_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "bench", lambda *given, **options: pytest.fail("measured"))
    with pytest.raises(BundleError, match="is a folder, not a file; name an output file"):
        CliRunner().invoke(bench_command, [str(fake_bundle), "--json", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is a file, not a folder; name another output file"):
        place = str(tmp_path / "file" / "r.json")
        CliRunner().invoke(bench_command, [str(fake_bundle), "--json", place], catch_exceptions=False)


def test_threads_count_cores_once_and_heed_the_quota(monkeypatch):
    monkeypatch.setattr(machine, "_affinity", lambda: {0, 1, 2, 3})
    texts = {"cpu0": "0,2", "cpu1": "1,3", "cpu2": "0,2", "cpu3": "1,3"}

    def read(path):
        return "150000 100000" if path.name == "cpu.max" and quota else texts.get(path.parent.parent.name)

    monkeypatch.setattr(machine, "_read", read)
    quota = False
    assert machine.default_threads() == 2
    quota = True
    assert machine.default_threads() == 1


def test_sweep(fake_bundle):
    results = bench_sweep(fake_bundle, lengths=[4, 30], new_tokens=3, repeat=2, threads=1, samples=True)
    assert [result["prompt_tokens"] for result in results] == [4, 30]
    for result in results:
        assert list(result)[: len(CONTRACT_KEYS)] == CONTRACT_KEYS
        check_result(json.loads(json.dumps(result)), "sweep")
        ttft, itl = result["samples"]["ttft_ms"], result["samples"]["itl_ms"]
        assert result["spread"]["ttft_ms"] == {"min": min(ttft), "max": max(ttft)}
        for name in (50, 90, 99):
            each = [np.percentile(row, name) for row in itl]
            np.testing.assert_allclose(list(result["spread"][f"itl_p{name}_ms"].values()), [min(each), max(each)])
        assert "scenario" not in result
    default = bench_sweep(fake_bundle, new_tokens=2, repeat=1, threads=1)
    assert [result["prompt_tokens"] for result in default] == [16]  # 64 and one more have no room in 64


def test_a_batch_is_stepped_together(tiny_bundle, monkeypatch):
    """Rates count all sequences; what must be read counts the experts that they are expected to call on."""
    together = []
    real = LaneRunner.run_together

    def run(self, caches, tokens):
        together.append(len(caches))
        return real(self, caches, tokens)

    monkeypatch.setattr(LaneRunner, "run_together", run)
    options = {"new_tokens": 5, "repeat": 2, "threads": 1, "samples": True}
    results = bench_sweep(tiny_bundle, lengths=[6], batches=[3, 1], contexts=[0, 40], **options)
    assert together == [3] * 4 * 3 * 2
    shape = ModelShape.from_manifest(Bundle.open(tiny_bundle).manifest)
    found = [(result["batch"], result["context_tokens"], result["prompt_tokens"]) for result in results]
    assert found == [(3, 0, 6), (3, 40, 6), (1, 0, 6), (1, 40, 6)]
    for result in results:
        batch, itl = result["batch"], np.concatenate(result["samples"]["itl_ms"])
        np.testing.assert_allclose(result["decode_tokens_per_s"], batch * 1e3 / itl.mean())
        ttft = np.median(result["samples"]["ttft_ms"])
        np.testing.assert_allclose(result["prefill_tokens_per_s"], batch * 6e3 / ttft)
        manifest = Bundle.open(tiny_bundle).manifest
        element = cache_element_bytes(manifest, "onnxruntime")
        read = bytes_per_token(manifest, result["context_tokens"] + 8, batch, element)
        assert result["bytes_per_token"] == read
        np.testing.assert_allclose(result["bandwidth_bytes_per_s"], read * 1e3 / itl.mean())
        assert result["expected_distinct_experts"] == shape.distinct_experts(batch)
        check_result(json.loads(json.dumps(result)), "batch")


def test_scenarios(fake_bundle, monkeypatch):
    prompts = []
    real = bench_runs.run_once
    monkeypatch.setattr(
        bench_runs, "run_once", lambda *given: (prompts.append(given[2][0].tolist()), real(*given))[1]
    )
    options = {"prompt_tokens": 6, "new_tokens": 4, "repeat": 3, "threads": 1, "samples": True}
    for scenario in bench_runs.SCENARIOS:
        prompts.clear()
        result = bench(fake_bundle, scenario=scenario, **options)
        assert len(prompts) == 4 and len(set(map(tuple, prompts))) == 4  # each query a prompt of its own
        samples = result["samples"]
        queries = [first + sum(rest) for first, rest in zip(samples["ttft_ms"], samples["itl_ms"], strict=True)]
        wanted = np.percentile(queries, [50, 90, 99])
        np.testing.assert_allclose([result["query_ms"][key] for key in ("p50", "p90", "p99")], wanted)
        assert result["queries"] == 3 and result["queries_per_s"] <= 3e3 / sum(queries)
        np.testing.assert_allclose(result["output_tokens_per_s"], 4 * result["queries_per_s"])
        np.testing.assert_allclose(result["queries_per_s"], 3 / samples["wall_s"])
        assert "3 queries, not a verified MLPerf result" in result["scenario_note"]
    prompts.clear()
    bench(fake_bundle, **options)
    assert len(set(map(tuple, prompts))) == 1
    with pytest.raises(UsageError, match="scenario is 'server'; it must be one of single-stream, offline"):
        bench(fake_bundle, scenario="server")


def test_breakdown_of_a_profile_by_hand():
    def node(op, start, took):
        return {"cat": "Node", "name": f"{op}_kernel_time", "ts": start, "dur": took, "args": {"op_name": op}}

    def run(start, took):
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": took}

    events = [run(0, 900), node("MatMul", 5, 800)]  # warm-up
    events += [run(1000, 500), node("MatMul", 1010, 300), node("Add", 1400, 50)]  # the prompt
    events += [run(2000, 100), node("MatMul", 2010, 60), node("Add", 2080, 10)]  # two steps
    events += [run(3000, 140), node("MatMul", 3010, 80)]
    found = summarize(events, 1, 2)
    assert found["prefill_ms"] == 0.5 and found["decode_ms"] == pytest.approx(0.12)
    assert found["prefill"] == [
        {"op": "MatMul", "nodes": 1, "ms": 0.3, "share": 0.6},
        {"op": "between nodes", "nodes": 0, "ms": pytest.approx(0.15), "share": pytest.approx(0.3)},
        {"op": "Add", "nodes": 1, "ms": 0.05, "share": pytest.approx(0.1)},
    ]
    assert [(row["op"], row["nodes"]) for row in found["decode"]] == [("MatMul", 1), ("between nodes", 0), ("Add", 0.5)]
    assert [row["ms"] for row in found["decode"]] == pytest.approx([0.07, 0.045, 0.005])


def test_breakdown(fake_bundle):
    result = bench(fake_bundle, prompt_tokens=5, new_tokens=4, repeat=1, threads=1, breakdown=True)
    for phase in ("prefill", "decode"):
        rows = result["breakdown"][phase]
        assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.02)
        assert {"MatMul", "TopK", "between nodes"} <= {row["op"] for row in rows}
        assert result["breakdown"][f"{phase}_ms"] == pytest.approx(sum(row["ms"] for row in rows), rel=0.02)
    routers = next(row for row in result["breakdown"]["decode"] if row["op"] == "TopK")
    assert routers["nodes"] == 1  # a step, of the one MoE layer


def test_commands_of_sweep_scenario_and_breakdown(fake_bundle, tmp_path):
    options = [str(fake_bundle), "--new-tokens", "3", "--repeat", "1", "--threads", "1"]
    swept = CliRunner().invoke(bench_command, [*options, "--sweep", "4,8", "--json", str(tmp_path / "s.json")])
    assert swept.exit_code == 0, swept.output
    assert [result["prompt_tokens"] for result in load_results([tmp_path / "s.json"])] == [4, 8]
    lines = swept.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    wrong = CliRunner().invoke(bench_command, [*options, "--sweep", "4,x"])
    assert wrong.exit_code == 2 and "'4,x' is not a whole number from 1 or a list of them" in wrong.stderr
    wrong = CliRunner().invoke(bench_command, [*options, "--batch", "1,2"])
    assert wrong.exit_code == 2 and "'1,2' is not a whole number from 1" in wrong.stderr
    both = CliRunner().invoke(bench_command, [*options, "--sweep", "--breakdown"])
    assert both.exit_code == 2 and "--sweep takes neither --scenario nor --breakdown" in both.stderr
    options += ["--prompt-tokens", "4", "--breakdown", "--scenario", "offline"]
    shown = CliRunner().invoke(bench_command, options)
    assert shown.exit_code == 0 and "scenario offline" in shown.stdout and "MatMul" in shown.stdout
