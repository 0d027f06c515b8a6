"""Builds for several devices at once, within a memory, and on the device itself; what they say before and after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from small_process import small_process
from test_tensorrt import fake_builder as fake_builder
from test_tensorrt import needs_rtx, pretend_package
from test_tensorrt_families import export

from moedge.bundle import Bundle
from moedge.errors import BuildError
from moedge.profiles.build import BuildOptions, build, build_portable, finish_build
from moedge.profiles.commands import build_command
from moedge.profiles.device import load_profile
from moedge.profiles.targets import _trt_build, tensorrt
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import check_numerics
from moedge.profiles.targets._trt_parts import (
    BUILDER_BYTES,
    BUILDER_TIMES,
    NetworkSizes,
    Part,
    estimate_build_bytes,
    measure_sizes,
    plan_parts,
)
from moedge.profiles.targets.tensorrt_network import lower_network

JETSON = "jetson-orin-nano-8gb"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny")
    return export("qwen2_moe", "one_layer_dense", folder, num_hidden_layers=4, hidden_size=128, vocab_size=512)


@pytest.fixture(name="small_process")
def keep_process_small() -> Iterator[None]:
    with small_process():
        yield


def sizes_of(bundle: Bundle) -> NetworkSizes:
    model, config = load_canonical(bundle)
    network = lower_network(model, config, 32, real=ir.DataType.FLOAT16)
    sizes = measure_sizes(network.weights, config.num_hidden_layers)
    written = sum(tensor.nbytes for tensor in network.weights.tensors)
    assert sum(sizes.layers) + sizes.before + sizes.behind == written
    return sizes


def engine_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return document


# one engine for several devices


@needs_rtx
def test_portable_is_one_file_that_each_device_finds_under_its_name(tiny: Bundle) -> None:
    first, second = build_portable(tiny.path, ["rtx4090", "a100-80gb"], BuildOptions(max_seq_len=64))
    engines = [engine_of(first), engine_of(second)]
    assert [engine["profile"] for engine in engines] == ["rtx4090", "a100-80gb"]
    assert [engine["compute_capability"] for engine in engines] == [[8, 9], [8, 0]]
    assert engines[0]["session"]["compute_capabilities"] == [[8, 9], [8, 0]]
    assert engines[0]["files"] == engines[1]["files"] and engines[0]["session"] == engines[1]["session"]
    plans = [(folder / "engine.plan").stat() for folder in (first, second)]
    assert plans[0].st_ino == plans[1].st_ino and plans[0].st_nlink == 2
    alone = engine_of(build(tiny.path, "rtx4090", max_seq_len=64))
    planned = alone["session"]["memory"]["weights_bytes"]
    assert engines[0]["session"]["memory"]["weights_bytes"] == planned
    assert engines[1]["fit"]["available_bytes"] > engines[0]["fit"]["available_bytes"]


def test_portable_is_refused_where_another_target_builds(tiny: Bundle) -> None:
    with pytest.raises(BuildError, match=r"^--portable makes one engine of target tensorrt_rtx, and cpu is built by o"):
        build_portable(tiny.path, ["rtx4090", "cpu"], BuildOptions())


# before and after


def dry_run(bundle: Bundle, *options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(build_command, [str(bundle.path), "--dry-run", "--json", *options])
    assert result.exit_code == 0, result.output
    documents: list[dict[str, Any]] = json.loads(result.stdout)
    return documents


def test_dry_run_is_the_arithmetic_by_hand(tiny: Bundle) -> None:
    (fit,) = dry_run(tiny, "--profile", "l4", "--max-seq-len", "96", "--max-batch", "1")
    device, config = load_profile("l4"), tiny.config
    cache = 2 * 96 * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"]
    moe = config["moe"]
    widest = max(
        3 * (moe["num_experts"] * moe["intermediate_size"] + moe["shared_intermediate_size"]),
        3 * config["intermediate_size"],
        4 * config["hidden_size"],
    )
    scores, logits = 2 * config["num_attention_heads"] * 96 * 96 * 2, config["vocab_size"] * 4
    workspace = round(1.04 * 96 * widest * 2) + scores + logits + (8 << 20)
    weights = sum(tiny.sizes.values()) + config["vocab_size"] * config["hidden_size"] // 4  # the head: 8 bits, not 6
    weights += sum(entry.get("float8_scales", 0) for entry in tiny.manifest["quantization"]["classes"].values())
    assert fit["weight_bytes"] == weights
    assert fit["cache_bytes"] == cache
    assert fit["workspace_bytes"] == workspace
    assert fit["total_bytes"] == weights + cache + workspace + (600 << 20)
    assert fit["available_bytes"] == device.memory_bytes - device.memory_reserved_bytes
    assert fit["fits"] and fit["built"] is None


@pytest.mark.usefixtures("small_process")
def test_dry_run_plans_the_engines_by_hand(tiny: Bundle) -> None:
    """Whole and cut in two: 400 MiB and four times the weights each, the process's own share beside."""
    (whole,) = dry_run(tiny, "--profile", "l4", "--max-seq-len", "96")
    network = lower_network(*load_canonical(tiny), 96, real=ir.DataType.FLOAT16)
    written = sum(tensor.nbytes for tensor in network.weights.tensors)
    config = tiny.config
    cache = 2 * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"]
    memory = (400 << 20) + 4 * written
    assert whole["parts"] == [
        {"layers": [0, 4], "cache_bytes_per_token": cache, "weights_bytes": written, "build_memory_bytes": memory}
    ]
    assert (whole["target"], whole["max_memory_bytes"]) == ("tensorrt_rtx", None)
    bound = (400 << 20) + 4 * written - 1
    (cut,) = dry_run(tiny, "--profile", "l4", "--max-seq-len", "96", "--max-memory", str(bound))
    assert [part["layers"] for part in cut["parts"]] == [[0, 2], [2, 4]]
    assert sum(part["weights_bytes"] for part in cut["parts"]) == written
    assert all(part["build_memory_bytes"] <= bound for part in cut["parts"])
    assert cut["workspace_bytes"] == 2 * whole["workspace_bytes"]  # each engine has its own
    assert cut["total_bytes"] - whole["total_bytes"] == whole["workspace_bytes"]
    (plain,) = dry_run(tiny, "--profile", "l4", "--max-seq-len", "96", "--backend", "onnxruntime")
    assert plain["parts"] == []
    options = [str(tiny.path), "--profile", "l4", "--dry-run", "--max-memory"]
    shown = CliRunner().invoke(build_command, [*options, str(bound)])
    assert "2 to 3" in shown.stdout and "l4: 2 engines, built in at most" in shown.stdout
    refused = CliRunner().invoke(build_command, [*options, "1MiB"])
    assert "building one layer's engine takes about" in str(refused.exception)
    assert not tiny.engine_dir("l4").exists()


@needs_rtx
def test_what_the_log_says_is_shown_beside_the_estimate(tiny: Bundle) -> None:
    runner = CliRunner()
    options = [str(tiny.path), "--profile", "rtx3090", "--max-seq-len", "64"]
    built = runner.invoke(build_command, options)
    assert built.exit_code == 0, built.output
    assert "has workspace" in built.stdout and "by its build log" in built.stdout
    engine = engine_of(tiny.engine_dir("rtx3090"))
    scratch = max(engine["session"]["memory"]["activation_bytes"])
    assert engine["fit_built"]["workspace_bytes"] == scratch
    assert engine["fit_built"]["weight_bytes"] == engine["session"]["memory"]["weights_bytes"]
    (fit,) = dry_run(tiny, "--profile", "rtx3090", "--max-seq-len", "64")
    assert fit["built"]["workspace_bytes"] == scratch != fit["workspace_bytes"]
    (other,) = dry_run(tiny, "--profile", "rtx3090", "--max-seq-len", "65")
    assert other["built"] is None  # that engine was built for another length
    assert "the engine that is there has workspace" in runner.invoke(build_command, [*options, "--dry-run"]).stdout


# within a memory


def test_parts_are_few_about_alike_and_within_the_bound() -> None:
    sizes = NetworkSizes((10, 10, 10, 30, 10, 10, 10, 10), before=5, behind=15)
    assert plan_parts(sizes, None) == [Part(0, 8, 8)]
    everything = BUILDER_BYTES + round(BUILDER_TIMES * 120)
    assert plan_parts(sizes, everything) == [Part(0, 8, 8)]
    halves = plan_parts(sizes, everything - 1)
    assert [(part.start, part.stop) for part in halves] == [(0, 4), (4, 8)]
    least = estimate_build_bytes(30)
    for bound in range(least, everything):
        parts = plan_parts(sizes, bound)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, 8)
        assert all(estimate_build_bytes(sizes.of(part)) <= bound for part in parts)
    with pytest.raises(BuildError, match=r"^--max-memory 400 MiB: building one layer's engine takes about .*use --max"):
        plan_parts(sizes, least - 1)
    held = 100 << 20  # of the process that waits
    assert plan_parts(sizes, everything + held, held) == plan_parts(sizes, everything)
    assert plan_parts(sizes, everything + held - 1, held) == halves
    with pytest.raises(BuildError, match=r"takes about 500 MiB, 100 MiB of it this process; use --max-memory 509MiB"):
        plan_parts(sizes, least + held - 1, held)


@pytest.mark.usefixtures("small_process")
def test_the_smallest_figure_that_is_named_works(tiny: Bundle) -> None:
    with pytest.raises(BuildError, match=r"use --max-memory (\d+)MiB or more") as caught:
        build(tiny.path, "rtx4090", max_memory=1 << 20)
    named = int(str(caught.value).split("use --max-memory ")[1].split("MiB")[0]) << 20
    assert plan_parts(sizes_of(tiny), named)
    result = CliRunner().invoke(build_command, [str(tiny.path), "--profile", "rtx4090", "--max-memory", "some"])
    assert "memory size 'some' is not understood" in str(result.exception)


def test_parts_chained_are_the_same_model(tiny: Bundle) -> None:
    whole = check_numerics(tiny)
    cut = check_numerics(tiny, parts=[Part(0, 1, 4), Part(1, 3, 4), Part(3, 4, 4)])
    assert (whole["chained"], cut["chained"]) == (1, 3)
    assert cut["difference"] == pytest.approx(whole["difference"], abs=1e-6) and cut["difference"] < 1e-5


def test_a_part_may_be_without_experts(tmp_path: Path) -> None:
    bundle = export("deepseek_v2", "greedy_first_dense", tmp_path)
    assert check_numerics(bundle, parts=[Part(0, 1, 2), Part(1, 2, 2)])["difference"] < 1e-5


@needs_rtx
@pytest.mark.usefixtures("small_process")
def test_engines_by_range_are_built_one_after_the_other(tiny: Bundle) -> None:
    sizes = sizes_of(tiny)
    bound = estimate_build_bytes(max(sizes.of(Part(0, 2, 4)), sizes.of(Part(2, 4, 4))))
    said: list[str] = []
    folder = build(
        tiny.path, "rtx4090", max_seq_len=64, max_memory=bound, progress=lambda what, done, total: said.append(what)
    )
    engine = engine_of(folder)
    parts = engine["session"]["parts"]
    assert [part["layers"] for part in parts] == [[0, 2], [2, 4]]
    assert sorted(engine["files"]) == sorted(
        f"{name}.{span}.{end}" for span in ("0-1", "2-3") for name, end in zip(*FILES, strict=True)
    )
    assert parts[0]["outputs"][0] == "hidden.next" and parts[1]["inputs"][:3] == ["hidden", "start", "rows"]
    assert parts[1]["profiles"][1]["hidden"] == [[2, 128], [64, 128], [64, 128]]
    assert all(part["peak_build_memory_bytes"] <= bound for part in parts)
    assert engine["peak_build_memory_bytes"] == max(part["peak_build_memory_bytes"] for part in parts)
    assert engine["session"]["numerics"]["chained"] == 2
    planned, stored = engine["session"]["network_weights_bytes"], engine["session"]["memory"]["weights_bytes"]
    assert abs(stored - planned) <= 0.03 * planned
    assert engine["session"]["memory"]["materialized_matrices"][0] == 0
    assert any(what.endswith("layers 2 to 3") for what in said)


FILES = (("model", "engine", "build"), ("onnx", "plan", "log"))
_BUILT = (
    "log('');open(job['engine'], 'w').write('plan');"
    "say(result={{'version': '1.0', 'validity': None, 'seconds': 1.0, 'peak_bytes': {peak}}})"
)


@needs_rtx
@pytest.mark.usefixtures("small_process")
def test_a_part_that_took_more_than_the_bound_is_cut_again(tiny: Bundle, fake_builder: Any) -> None:
    fake_builder(_BUILT.format(peak="(1 << 40) if job['model'].endswith(('model.onnx', '0-1.onnx')) else 1000"))
    folder = build(tiny.path, "rtx5090", max_seq_len=64, max_memory=1 << 30)
    engine = engine_of(folder)
    assert [part["layers"] for part in engine["session"]["parts"]] == [[0, 1], [1, 2], [2, 4]]
    assert engine["session"]["numerics"]["chained"] == 3  # checked again, as it was built
    assert len(engine["files"]) == 9
    fake_builder(_BUILT.format(peak="1 << 30"))
    with pytest.raises(BuildError, match=r"^--max-memory 900 MiB: building one layer.* 1.0 GiB, .*-memory 1032MiB"):
        build(tiny.path, "rtx5090", max_seq_len=64, max_memory=900 << 20)


# on the device


@pytest.mark.usefixtures("small_process")
def test_a_folder_is_finished_part_by_part_and_goes_on_where_it_stopped(
    tiny: Bundle, fake_builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sizes_of(tiny)
    bound = estimate_build_bytes(max(sizes.of(Part(layer, layer + 1, 4)) for layer in range(4)))
    folder = build(tiny.path, JETSON, max_seq_len=64, max_memory=bound)
    manifest = json.loads((folder / "build.json").read_text())
    assert [part["layers"] for part in manifest["parts"]] == [[0, 1], [1, 3], [3, 4]]
    assert len(manifest["files"]) == 6 and manifest["session"]["numerics"]["chained"] == 3
    pretend_package(folder, package="numpy", package_minimum="1.0")
    monkeypatch.setattr(tensorrt, "_is_here", lambda capability: True)
    fake_builder("sys.exit(3) if job['model'].endswith('3-3.onnx') else 0;" + _BUILT.format(peak="1000"))
    with pytest.raises(BuildError, match="built no engine: the builder ended with status 3"):
        finish_build(folder)
    built = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.plan")}
    assert sorted(built) == ["engine.0-0.plan", "engine.1-2.plan"]
    (folder / "engine.1-2.plan").write_text("half writ")  # and a power cut in the middle of one
    asked: list[str] = []
    run_builder = _trt_build.run_builder
    fake_builder(_BUILT.format(peak="1000"))
    monkeypatch.setattr(
        tensorrt, "run_builder", lambda job, *rest: asked.append(job.plan_name) or run_builder(job, *rest)
    )
    finish_build(folder)
    assert asked == ["engine.1-2.plan", "engine.3-3.plan"]
    engine = engine_of(folder)
    assert engine["status"] == "ready" and engine["backend_version"] == "1.0"
    assert (folder / "engine.0-0.plan").stat().st_mtime_ns == built["engine.0-0.plan"]
    finish_build(folder)
    assert len(asked) == 2  # nothing was left to do


def test_a_jetsons_own_memory_is_the_bound_where_none_is_given(tiny: Bundle) -> None:
    folder = build(tiny.path, JETSON, max_seq_len=64)
    session = engine_of(folder)["session"]
    assert session["max_build_memory_bytes"] == load_profile(JETSON).available_bytes
    assert len(session["parts"]) == 1
