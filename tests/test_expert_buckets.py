"""A chunk's experts in static buckets: nothing dropped, and less memory than where nothing bounds their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import make_model, save_model
from family_cases import make_model as make_family_model
from family_cases import save_model as save_family_model
from test_tensorrt import needs_rtx

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError
from moedge.export.options import LoadAware
from moedge.profiles.build import build
from moedge.profiles.targets import _trt_gates
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_build import BuildJob, run_builder
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits
from moedge.profiles.targets._trt_log import BuildLog, read_build_log
from moedge.profiles.targets._trt_network_files import SETTINGS, shape_profiles
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, LoweredNetwork, NetworkForm, lower_network

TIGHT = LoadAware(penalty=0.3, capacity_factor=1.0)
CHUNK = 40


def export(folder: Path, weights: str, setting: LoadAware = TIGHT, **changes: Any) -> Bundle:
    checkpoint = save_model(make_model(21, **changes), folder / "checkpoint")
    options: dict[str, Any] = {"weights": weights, "group_size": 32, "verify": False}
    return moedge.export(checkpoint, folder / "bundle", load_aware=setting, **options)


def lower(bundle: Bundle, folder: Path, form: NetworkForm, slots: int, real: ir.DataType) -> LoweredNetwork:
    model, config = load_canonical(bundle)
    network = lower_network(model, config, slots, real=real, form=form)
    network.weights.write(folder / WEIGHTS_FILE)
    network.save(folder, MODEL)
    return network


def compare(bundle: Bundle, folder: Path, seed: int = 2) -> None:
    """One call of CHUNK tokens on loads that make some experts everybody's choice, and a call of one token.

    `seed`: of tokens whose choices are settled in as many rounds as the network has.
    """
    lower(bundle, folder, NetworkForm(chunk=CHUNK, buckets=True), CHUNK + 8, ir.DataType.FLOAT)
    ids = np.random.default_rng(seed).integers(0, bundle.config["vocab_size"], CHUNK)
    for count in (CHUNK, 1):
        runner = NetworkRunner(folder / MODEL)
        for load in runner.loads.values():
            load[:2] = 0.0
        found = runner.step(ids[:count].tolist())
        expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids[:count], runner.loads)
        np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-4)
        for layer in bundle.config["moe"]["layers"]:
            counts = np.bincount(found[f"experts.{layer}"].ravel())
            assert count == 1 or counts.max() == -(-CHUNK * found[f"experts.{layer}"].shape[1] // len(counts))


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_in_buckets_it_equals_the_canonical_graph_to_the_last_token(weights: str, tmp_path: Path) -> None:
    compare(export(tmp_path, weights), tmp_path)


def test_zero_points_and_one_choice_of_an_odd_number(tmp_path: Path) -> None:
    changes = {"n_group": 1, "topk_group": 1, "n_routed_experts": 5, "num_experts_per_tok": 1, "n_shared_experts": 0}
    checkpoint = save_model(make_model(21, **changes), tmp_path / "checkpoint")
    options: dict[str, Any] = {"group_size": 32, "verify": False, "zero_points": True}
    compare(moedge.export(checkpoint, tmp_path / "bundle", load_aware=TIGHT, **options), tmp_path)


def test_experts_with_biases(tmp_path: Path) -> None:
    save_family_model(make_family_model("gpt_oss", "alternate_windows"), "gpt_oss", tmp_path / "checkpoint")
    options: dict[str, Any] = {"group_size": 16, "verify": False}
    compare(moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", load_aware=TIGHT, **options), tmp_path, seed=13)


def test_without_a_bound_there_are_no_buckets(tmp_path: Path) -> None:
    moedge.export(save_model(make_model(21), tmp_path / "c"), tmp_path / "b", verify=False)
    with pytest.raises(BuildError, match=r"^--expert-buckets: SigmoidTopKGate does not bound .* with --load-aware, or"):
        build(tmp_path / "b", "rtx4090", expert_buckets=True)
    with pytest.raises(BuildError, match=r"are TensorRT's: .* leave them out$"):
        build(tmp_path / "b", "cpu", expert_buckets=True)
    with pytest.raises(BuildError, match=r"^prefill_chunk 500: 2 to max_seq_len 256 tokens can be one; mend it$"):
        build(tmp_path / "b", "rtx4090", prefill_chunk=500)


@needs_rtx
def test_activation_memory_falls_against_buckets_of_the_worst_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines' build logs: an even load may fill an expert with a few tokens, an uneven one with the chunk."""
    monkeypatch.setattr(_trt_gates, "ROUNDS", 1)  # what the rounds hold is the same in both
    changes = {"n_group": 1, "topk_group": 1, "n_routed_experts": 32, "num_hidden_layers": 1, "n_shared_experts": 0}
    changes |= {"first_k_dense_replace": 0, "hidden_size": 256, "moe_intermediate_size": 128}
    # Room for an even load and a quarter; room for every token (32 experts, 2 choices); every expert over every token.
    forms = {"bounded": (1.25, True), "unbounded": (16.0, True), "dense": (1.25, False)}
    logs: dict[str, BuildLog] = {}
    for name, (factor, buckets) in forms.items():
        folder = tmp_path / name
        bundle = export(folder, "int4", LoadAware(capacity_factor=factor), **changes)
        network = lower(bundle, folder, NetworkForm(chunk=256, buckets=buckets), 256, ir.DataType.FLOAT16)
        profiles = shape_profiles(network, 256)
        job = BuildJob("tensorrt_rtx", folder / MODEL, folder, ((8, 9),), profiles, SETTINGS, folder / "failed.log")
        run_builder(job, "building", None)
        logs[name] = read_build_log(folder / job.log_name)
        stored = logs[name].weights_bytes
        assert name == "unbounded" or (stored is not None and stored < 1.03 * network.weights.nbytes)
    activations = {name: log.activation_bytes for name, log in logs.items()}
    assert len({each[0] for each in activations.values()}) == 1  # one token has no buckets
    slots = 32 * (256 - 20)  # what the bound saves, each of a row of H in half precision at least
    assert activations["unbounded"][1] - activations["bounded"][1] > slots * 256 * 2
    assert activations["bounded"][1] < activations["dense"][1]
    one_token = {sum(each.profile == 0 for each in log.kernels) for log in logs.values()}
    assert len(one_token) == 1 and one_token != {0}
