"""Latent attention on TensorRT in both forms: equal to the canonical graph; which one is taken, and why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from test_tensorrt import needs_rtx
from test_tensorrt_families import export

from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError
from moedge.profiles.build import build
from moedge.profiles.commands import build_command
from moedge.profiles.device import load_profile
from moedge.profiles.targets import BuildRequest
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits, check_numerics
from moedge.profiles.targets._trt_form import NetworkForm, cache_bytes_per_token, choose_form
from moedge.profiles.targets._trt_log import read_build_log
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("latent")
    wide = {"hidden_size": 128, "vocab_size": 512, "v_head_dim": 20}  # a value of another size than the keys' 24
    return export("deepseek_v2", "greedy_first_dense", folder, **wide)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(("family", "name"), [("deepseek_v2", "many_groups_yarn"), ("deepseek_v3", "many_groups")])
def test_either_form_equals_the_canonical_graph(family: str, name: str, expanded: bool, tmp_path: Path) -> None:
    bundle = export(family, name, tmp_path, v_head_dim=28)  # wider than the keys' 24: then those are padded
    model, config = load_canonical(bundle)
    form = NetworkForm(expanded=expanded)
    network = lower_network(model, config, 32, real=ir.DataType.FLOAT, form=form)
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    widths = [tensor.heads * tensor.dim for tensor in network.cache]
    assert 2 * sum(widths) == cache_bytes_per_token(config, form)
    assert network.cache[0].name == ("key.0" if expanded else "latent.0")
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 20)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    for cuts in ([], [7, 8], list(range(1, 20))):
        runner = NetworkRunner(tmp_path / MODEL)
        for rows in runner.cache.values():
            rows[:] = 100.0  # leftovers of another sequence
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert check_numerics(bundle, form=dataclasses.replace(form, lanes=3))["difference"] < 1e-5


def test_expanded_is_taken_where_it_fits(latent: Bundle) -> None:
    _, config = load_canonical(latent)
    heads, size = config.attention.num_heads, 24  # a value has 20
    per_token = config.num_hidden_layers * 2 * heads * size * 2
    assert cache_bytes_per_token(config, NetworkForm(expanded=True)) == per_token
    roomy = load_profile("rtx4090")
    asked = BuildRequest(latent, roomy, 1, 128)
    assert choose_form(asked, config) == NetworkForm(expanded=True)
    assert choose_form(dataclasses.replace(asked, latent_attention="absorbed"), config) == NetworkForm()
    # A device that holds the small cache of a large batch, and not the large one.
    tight = dataclasses.replace(asked, max_batch=1 << 20)
    assert choose_form(tight, config) == NetworkForm(lanes=1 << 20)
    assert choose_form(dataclasses.replace(tight, also=(load_profile("a100-80gb"),)), config).expanded is False
    with pytest.raises(BuildError, match="^--latent-attention expanded: .* does not fit rtx4090.*-attention abs"):
        choose_form(dataclasses.replace(tight, latent_attention="expanded"), config)


def test_forms_that_there_are_not_are_refused(latent: Bundle, tmp_path: Path) -> None:
    result = CliRunner().invoke(build_command, [str(latent.path), "--profile", "rtx4090", "--latent-attention", "flat"])
    assert str(result.exception) == "latent attention 'flat' is not known; known: auto, absorbed, expanded"
    grouped = export("qwen3_moe", "normalized_mqa", tmp_path)
    with pytest.raises(BuildError, match=r"^--latent-attention expanded: this model \(qwen3_moe\) has no latent atten"):
        build(grouped.path, "rtx4090", max_seq_len=64, latent_attention="expanded")
    model, config = load_canonical(latent)
    wide = dataclasses.replace(config, attention=dataclasses.replace(config.attention, v_head_dim=512))
    request = BuildRequest(latent, load_profile("rtx4090"), 1, 128)
    with pytest.raises(BuildError, match="does not build it reliably for chunks of 64 tokens; use --max-seq-len"):
        choose_form(dataclasses.replace(request, max_seq_len=64, latent_attention="expanded"), config)
    assert not choose_form(dataclasses.replace(request, max_seq_len=64), config).expanded
    assert not choose_form(request, wide).expanded
    with pytest.raises(BuildError, match="heads of 512 channels are beyond the 256 that TensorRT's attention kernels"):
        choose_form(dataclasses.replace(request, latent_attention="expanded"), wide)


@needs_rtx
@pytest.mark.parametrize("form", ["absorbed", "auto"])
def test_engines_of_both_forms(form: str, latent: Bundle) -> None:
    folder = build(latent.path, "rtx4090", max_seq_len=128, latent_attention=form)
    engine = json.loads((folder / "engine.json").read_text())
    session = engine["session"]
    assert session["latent_attention"] == ("absorbed" if form == "absorbed" else "expanded")
    planned, stored = session["network_weights_bytes"], session["memory"]["weights_bytes"]
    assert abs(stored - planned) <= 0.03 * planned
    assert session["memory"]["materialized_matrices"][0] == 0 and session["numerics"]["checked"]
    kernels = read_build_log(folder / "build.log").kernels
    attention = [each.name.split("_myl")[0] for each in kernels if "_mha_" in each.name]
    layers = latent.config["num_hidden_layers"]
    assert attention == ([] if form == "absorbed" else ["_gemv_mha_v1"] * layers + ["_gemm_mha_v2"] * layers)
    per_token = 2 * sum(entry["width"] for entry in engine["cache"])
    assert engine["fit_built"]["cache_bytes"] == 128 * per_token
