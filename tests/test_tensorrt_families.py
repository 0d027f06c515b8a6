"""Every family lowered for TensorRT: equal to the canonical graph on onnxruntime; real engines, read by their logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from family_cases import FAMILIES, make_model, save_model
from test_families import CASES
from test_tensorrt import needs_rtx

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError
from moedge.export.config import moe_config_from_json
from moedge.profiles.build import build
from moedge.profiles.targets._canonical import find_calls, find_matrix, load_canonical
from moedge.profiles.targets._trt_attention import MASKED_DOMAIN
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits
from moedge.profiles.targets._trt_log import read_build_log
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, LoweredNetwork, check_ops, lower_network

LENGTH = 40
# One configuration of each family, with sizes that TensorRT's kernels like, for a real engine.
BUILT = {
    "deepseek": "every_second_layer_top_1_no_shared",
    "deepseek_v2": "greedy_first_dense",
    "gpt_oss": "alternate_windows",
    "granitemoe": "multipliers",
    "mixtral": "every_expert_mha_yarn",
    "olmoe": "clipped",
    "phimoe": "plain_norms",
    "qwen2_moe": "one_layer_dense",
    "qwen3_moe": "normalized_mqa",
}


def export(
    family: str,
    name: str,
    folder: Path,
    weights: str = "int4",
    algorithm: str = "rtn",
    zero_points: bool | None = None,
    **changes: Any,
) -> Bundle:
    configurations = FAMILIES[family].configurations
    seed, settings = configurations[name]
    configurations["changed"] = (seed, {**settings, **changes})
    try:
        save_model(make_model(family, "changed"), family, folder / "checkpoint")
    finally:
        del configurations["changed"]
    options: dict[str, Any] = {"weights": weights, "algorithm": algorithm, "zero_points": zero_points}
    return moedge.export(folder / "checkpoint", folder / "bundle", group_size=16, verify=False, **options)


def lower(bundle: Bundle, folder: Path, slots: int = LENGTH + 8) -> LoweredNetwork:
    model, config = load_canonical(bundle)
    network = lower_network(model, config, slots, real=ir.DataType.FLOAT)
    network.weights.write(folder / WEIGHTS_FILE)
    network.save(folder, MODEL)
    return network


@pytest.mark.parametrize(("family", "name"), CASES)
def test_lowered_equals_canonical_in_one_chunk_in_chunks_and_by_token(family: str, name: str, tmp_path: Path) -> None:
    bundle = export(family, name, tmp_path)
    rope = moe_config_from_json(bundle.config).rope
    # Where frequencies change with the length, keys in the cache keep theirs: the same only up to there.
    length = LENGTH if rope.kind == "fixed" else min(LENGTH, rope.original_length)
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], LENGTH)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    lower(bundle, tmp_path)
    whole = NetworkRunner(tmp_path / MODEL).step(ids)["logits"]
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)
    if length < LENGTH:
        expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids[:length])
    for cuts in ([7, 15, 16], list(range(1, length))):
        runner = NetworkRunner(tmp_path / MODEL)
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids[:length], cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("family", BUILT)
def test_engine_keeps_weights_once_and_writes_no_expert_out(family: str, weights: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "vocab_size": 512}
    bundle = export(family, BUILT[family], tmp_path, weights, **wide)
    folder = build(bundle.path, "rtx4090", max_seq_len=64)
    check_engine(bundle, folder)


@needs_rtx
def test_grouped_attention_runs_on_the_cache_in_kernels_of_its_own(tmp_path: Path) -> None:
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path, hidden_size=128, vocab_size=512)
    folder = build(bundle.path, "rtx4090", max_seq_len=64)
    check_engine(bundle, folder)
    kernels = read_build_log(folder / "build.log").kernels
    for profile, kind in enumerate(("_gemv_mha", "_gemm_mha")):
        attention = [each for each in kernels if each.profile == profile and each.name.startswith(kind)]
        assert len(attention) == bundle.config["num_hidden_layers"]
    engine = json.loads((folder / "engine.json").read_text())
    width = bundle.config["num_key_value_heads"] * bundle.config["head_dim"]
    assert engine["cache"][0] == {"name": "key.0", "width": width, "dtype": "float16", "heads": 2}


def check_engine(bundle: Bundle, folder: Path) -> None:
    session = json.loads((folder / "engine.json").read_text())["session"]
    planned, stored = session["network_weights_bytes"], session["memory"]["weights_bytes"]
    assert abs(stored - planned) <= 0.03 * planned
    assert session["memory"]["materialized_matrices"][0] == 0
    assert session["numerics"]["checked"]


def test_windows_and_chunks_go_by_mask_and_one_token_by_the_length(tmp_path: Path) -> None:
    for name, by_length in (("wide_heads_llama3", 2), ("odd_experts_short_window", 0)):
        bundle = export("mixtral", name, tmp_path / name)
        model, config = load_canonical(bundle)
        network = lower_network(model, config, 32, real=ir.DataType.FLOAT16)
        domains = [node.domain for node in network.model.graph if node.op_type == "TRT_Attention"]
        assert len(domains) == 4 and domains.count("moedge") == by_length
        assert {key[0] for key in network.model.functions} == {"moedge", MASKED_DOMAIN}
        for node in network.model.graph:
            if node.op_type == "TRT_Attention":  # the length bounds what is read, whatever the mask says
                assert node.inputs[5] is not None and node.inputs[5].name == "length"


def test_what_lies_behind_the_length_is_not_read(tmp_path: Path) -> None:
    bundle = export("qwen3_moe", "normalized_mqa", tmp_path)
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 12)
    lower(bundle, tmp_path)
    runner = NetworkRunner(tmp_path / MODEL)
    for cache in runner.cache.values():
        cache[:] = 100.0  # leftovers of another sequence
    found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, [5, 6])])
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_an_op_that_is_not_lowered_is_named(tmp_path: Path) -> None:
    bundle = export("olmoe", "clipped", tmp_path)
    model, _ = load_canonical(bundle)
    check_ops(model)
    next(node for node in model.graph if node.op_type == "Experts").op_type = "NewExperts"
    with pytest.raises(BuildError, match=r"^layers.0.experts: TensorRT engines of this version do not have moedge.New"):
        check_ops(model)


# zero points


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v2", "many_groups_yarn"),  # shared experts that ride along
        ("gpt_oss", "alternate_windows"),
        ("mixtral", "wide_heads_llama3"),
        ("qwen2_moe", "one_layer_dense"),  # a gated shared expert, and q, k, v with biases
    ],
)
def test_zero_points_become_offsets(family: str, name: str, tmp_path: Path) -> None:
    even = {"intermediate_size": 64, "moe_intermediate_size": 32}  # an even number of groups, or there are none
    bundle = export(family, name, tmp_path, algorithm="hqq", zero_points=True, **even)
    model, _ = load_canonical(bundle)
    stacks = [find_matrix(call.inputs[3]) for kind in ("Experts", "BiasedExperts") for call in find_calls(model, kind)]
    assert stacks and not any(stack.symmetric for stack in stacks)
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 20)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    network = lower(bundle, tmp_path)
    assert any(name.endswith(".offsets") for name in network.model.graph.initializers)
    for cuts in ([], [9, 10], list(range(1, 20))):
        runner = NetworkRunner(tmp_path / MODEL)
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@needs_rtx
def test_engine_with_zero_points_stays_fused_and_keeps_its_weights_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "vocab_size": 512}
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path, algorithm="hqq", zero_points=True, **sizes)
    folder = build(bundle.path, "rtx4090", max_seq_len=64)
    check_engine(bundle, folder)
    session = json.loads((folder / "engine.json").read_text())["session"]
    assert session["memory"]["materialized_matrices"] == [0, 0]
    kept = [value.name for value in ir.load(folder / MODEL).graph.initializers.values()]
    assert any(name.endswith(".offsets") for name in kept)
