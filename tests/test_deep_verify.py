"""`moedge verify --deep` finds planted faults of routing by name, and takes no rounding for one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import make_model, save_model
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

import moedge
from moedge.bundle import ENGINE_MANIFEST, MODEL, Bundle, read_json
from moedge.errors import BundleError
from moedge.export.gating import list_gates, sigmoid_topk
from moedge.export.gating._compare import compare_choices
from moedge.profiles.build import write_engine_manifest
from moedge.profiles.targets import _routes, onnxruntime
from moedge.profiles.verify_commands import verify_command
from moedge.runtime import kernels
from moedge.runtime.preflight import read_engine
from moedge.runtime.sessions.onnxruntime_cpu import LANES_MODEL

Lower = Callable[[Any, Any, dict[str, Any]], tuple[Any, Any]]
right = sigmoid_topk.lower


def run_deep(bundle: Path, *options: str) -> Result:
    return CliRunner().invoke(verify_command, [str(bundle), "--deep", *options])


def faults_of(bundle: Path) -> list[str]:
    result = run_deep(bundle, "--json")
    assert isinstance(result.exception, BundleError), result.output
    document = json.loads(result.stdout)
    assert not document["ok"]
    return [fault.replace(str(bundle), "BUNDLE") for fault in document["faults"]]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def prepared_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the folder for a Jetson in place of the CPU's engine."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("deep") / "bundle")
    shutil.rmtree(folder / "engines")
    moedge.build(folder, "jetson-agx-orin-64gb", max_seq_len=48)
    return folder


def edit_engine(bundle: Path, profile: str, edit: Callable[[onnx.ModelProto], None], graph: str = MODEL) -> None:
    """Change an engine's graph, and the one of our own kernels beside it, checksums and all."""
    folder = bundle / "engines" / profile
    for path in (folder / graph, folder / kernels.own_name(graph)):
        if path.is_file():
            model = onnx.load(path, load_external_data=False)
            edit(model)
            path.write_bytes(model.SerializeToString())
    write_engine_manifest(folder, read_json(folder / ENGINE_MANIFEST))


def test_a_sound_engine_passes_and_says_what_was_compared(bundle: Path) -> None:
    result = run_deep(bundle)
    assert result.exit_code == 0, result.output
    assert "routes: 24 random tokens through 3 of 3 layers of the canonical graph and of each engine" in result.stdout
    told = "48 choices in 2 layers, by its own session, compared with the gate's reference on its own logits: all alike"
    assert f"routes of cpu: {told}, " in result.stdout
    assert "routes: each engine takes the model's routes" in result.stdout
    document = json.loads(run_deep(bundle, "--json").stdout)
    deep = document["deep"]
    assert (deep["tokens"], deep["layers"], deep["of_layers"], document["ok"]) == (24, 3, 3, True)
    assert [layer["layer"] for layer in deep["engines"]["cpu"]["layers"]] == [1, 2]
    for layer in deep["engines"]["cpu"]["layers"]:
        assert (layer["gate"], layer["compared"]) == ("moedge.SigmoidTopKGate", "on its own logits")
        assert 0 < layer["logits_drift"] < 0.2 and layer["fault"] is None
    assert "deep" not in json.loads(CliRunner().invoke(verify_command, [str(bundle), "--json"]).stdout)


# planted in the gate


def next_best_in_place_of_the_last(build: Any, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, Any]:
    top_k = attributes["top_k"]
    experts, weights = right(build, inputs, {**attributes, "top_k": top_k + 1})
    columns = build.ints(*range(top_k - 1), top_k)
    return tuple(build.op("Gather", [value, columns], axis=1) for value in (experts, weights))  # type: ignore[return-value]


def bias_lost(build: Any, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, Any]:
    nothing = build.constant("planted.zero", np.array(0, np.float32))
    return right(build, [inputs[0], build.op("Mul", [inputs[1], nothing])], attributes)


def not_renormalized(build: Any, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, Any]:
    return right(build, inputs, {**attributes, "norm_topk_prob": 0})


def groups_dropped(build: Any, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, Any]:
    return right(build, inputs, {**attributes, "topk_group": attributes["n_group"]})


def not_scaled(build: Any, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, Any]:
    return right(build, inputs, {**attributes, "routed_scaling_factor": 1.0})


CHOSE = r"it chose experts \d, \d where its logits give \d, \d"
WEIGHED = r"it weighs expert \d by [\d.]+ where its logits give [\d.]+"


@pytest.mark.parametrize(
    ("lower", "what"),
    [
        (next_best_in_place_of_the_last, CHOSE),
        (bias_lost, f"{CHOSE}, as if the correction bias were lost"),
        (not_renormalized, f"{WEIGHED}, as if the weights were not divided by their sum"),
        (groups_dropped, f"{CHOSE}, as if the choice were not limited to the best groups"),
        (not_scaled, f"{WEIGHED}, as if the weights were not scaled"),
    ],
)
def test_a_wrong_gate_is_named_by_layer_and_token(
    bundle: Path, lower: Lower, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sigmoid_topk, "lower", lower)
    monkeypatch.setattr(onnxruntime, "lower_router", lambda rewriter, call: None)  # our own op has no such nodes
    moedge.build(bundle, "cpu")
    monkeypatch.undo()
    (fault,) = faults_of(bundle)
    again = "build it again: moedge build BUNDLE --profile cpu"
    assert re.fullmatch(rf"engine 'cpu': layer 1, token \d+, moedge.SigmoidTopKGate: {what}; {again}", fault), fault
    result = run_deep(bundle)
    assert result.exit_code == 1 and result.stdout.count("moedge.SigmoidTopKGate: it") == 1


@pytest.mark.parametrize(
    ("attribute", "value", "what"),
    [
        ("norm_topk_prob", 0, "as if the weights were not divided by their sum"),
        ("topk_group", 2, "as if the choice were not limited to the best groups"),
        ("routed_scaling_factor", 1.0, "as if the weights were not scaled"),
    ],
)
@pytest.mark.usefixtures("compiled")
def test_a_wrong_router_of_our_own_is_named(bundle: Path, attribute: str, value: float, what: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for held in node.attribute:
                if node.op_type == "Moe" and held.name == attribute:
                    held.CopyFrom(onnx.helper.make_attribute(attribute, value))

    edit_engine(bundle, "cpu", change)
    (fault,) = faults_of(bundle)
    assert fault.startswith("engine 'cpu': layer 1, token ") and what in fault


def test_a_wrong_gate_of_a_later_layer_is_named(bundle: Path) -> None:
    """In the finished graph, of which only layer 2 loses its bias."""

    def lose_bias(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.float32), "planted.zero"))
        (node,) = [node for node in model.graph.node if "layers.2.router.bias" in node.input]
        node.input[list(node.input).index("layers.2.router.bias")] = "planted.zero"

    edit_engine(bundle, "cpu", lose_bias)
    (fault,) = faults_of(bundle)
    assert fault.startswith("engine 'cpu': layer 2, token ") and "as if the correction bias were lost" in fault


def test_a_wrong_gate_in_the_graph_of_several_sequences_is_named(bundle: Path) -> None:
    def lose_bias(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.float32), "planted.zero"))
        (node,) = [node for node in model.graph.node if "layers.1.router.bias" in node.input]
        node.input[list(node.input).index("layers.1.router.bias")] = "planted.zero"

    edit_engine(bundle, "cpu", lose_bias, LANES_MODEL)
    (fault,) = faults_of(bundle)
    assert fault.startswith("engine 'cpu': several sequences in a step: layer 1, token ")
    assert "as if the correction bias were lost" in fault


def test_another_routers_weights_are_named(bundle: Path) -> None:
    """The gate is right and gets the logits of another layer's router."""

    def exchange(model: onnx.ModelProto) -> None:
        routers = {each.name: each for each in model.graph.initializer if each.name.endswith(".router.weight")}
        del routers["layers.1.router.weight"].external_data[:]
        routers["layers.1.router.weight"].external_data.extend(routers["layers.2.router.weight"].external_data)

    edit_engine(bundle, "cpu", exchange)
    (fault,) = faults_of(bundle)
    assert "layer 1, moedge.SigmoidTopKGate: the router's logits are not the canonical ones (off by " in fault


# planted in the experts and the devices


def test_experts_that_run_densely_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A function whose body is the branch for many tokens alone: for one token too every expert runs."""
    bundle = tmp_path / "bundle"
    moedge.export(tiny_checkpoint, bundle, weights="fp32", verify=False)
    moedge.build(bundle, "cpu")
    document = json.loads(run_deep(bundle, "--json").stdout)
    (layer, _) = document["deep"]["engines"]["cpu"]["layers"]
    assert layer["experts"] == "one token its own, several tokens every expert"

    def make_dense(model: onnx.ModelProto) -> None:
        (function,) = [function for function in model.functions if function.name == "Experts"]
        (choice,) = [node for node in function.node if node.op_type == "If"]
        dense = next(each.g for each in choice.attribute if each.name == "else_branch")
        rest = [node for node in function.node if node.op_type != "If"]
        last = helper.make_node("Identity", [dense.output[0].name], [choice.output[0]])
        function.ClearField("node")
        function.node.extend([*rest, *dense.node, last])

    edit_engine(bundle, "cpu", make_dense)
    faults = faults_of(bundle)
    for layer, fault in zip((1, 2), faults, strict=True):
        what = "every expert for every token: none of its forms runs the chosen experts alone"
        assert f"engine 'cpu': layer {layer} runs {what}; build it again" in fault


def test_a_kernel_that_takes_every_expert_is_named(bundle: Path) -> None:
    def take_all(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "k" and any("experts" in name for name in node.input):
                    attribute.i = 8

    graph = onnx.load(bundle / "engines/cpu" / MODEL, load_external_data=False).graph
    if not any(node.op_type == "QMoE" for node in graph.node):
        pytest.skip("this onnxruntime's QMoE is not used")
    edit_engine(bundle, "cpu", take_all)
    assert "layer 1 runs every expert for every token" in faults_of(bundle)[0]


def test_nodes_on_another_device_are_named(bundle: Path) -> None:
    """An engine that asks for CUDA and gets the CPU, as onnxruntime does without a word."""
    folder = bundle / "engines/cpu"
    document = read_json(folder / ENGINE_MANIFEST)
    document["session"]["provider"] = "CUDAExecutionProvider"
    write_engine_manifest(folder, document)
    (fault,) = faults_of(bundle)
    stray = r"\d+ nodes run elsewhere than on CUDAExecutionProvider, the first: .+ \(\w+ on CPUExecutionProvider\)"
    assert re.match(f"engine 'cpu': {stray}; build it again", fault), fault


# TensorRT's network


def test_the_network_for_tensorrt_is_compared_and_says_where_it_is_dense(prepared_bundle: Path) -> None:
    document = json.loads(run_deep(prepared_bundle, "--json").stdout)
    found = document["deep"]["engines"]["jetson-agx-orin-64gb"]
    assert found["how"] == "its folder's network, on onnxruntime" and found["faults"] == []
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert {layer["experts"] for layer in found["layers"]} == {"one token its own, several tokens every expert"}
    info = read_engine(Bundle.open(prepared_bundle), "jetson-agx-orin-64gb")
    tokens = np.arange(12)
    again = _routes._trace_parts(Bundle.open(prepared_bundle), info, [_routes.Part(0, 3, 3)], tokens, 2, None)
    assert again.how == "the network lowered again (2 of 3 layers), on onnxruntime" and set(again.routes) == {1}


@pytest.mark.parametrize("experts", [1, 7])
def test_any_number_of_experts_is_compared(experts: int, tmp_path: Path) -> None:
    """Where TensorRT's router has rows of padding, and where a single logit has no spread."""
    changes = {"n_routed_experts": experts, "num_experts_per_tok": 1, "n_group": 1, "num_hidden_layers": 2}
    checkpoint = save_model(make_model(seed=4, **changes), tmp_path / "checkpoint")
    moedge.export(checkpoint, tmp_path / "b", weights="int8", group_size=32, verify=False)
    for profile in ("cpu", "jetson-agx-orin-64gb"):
        moedge.build(tmp_path / "b", profile, max_seq_len=48)
    result = run_deep(tmp_path / "b", "--json")
    assert result.exit_code == 0, result.output
    for found in json.loads(result.stdout)["deep"]["engines"].values():
        assert [layer["compared"] for layer in found["layers"]] == ["on its own logits"]


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_fault_in_the_network_for_tensorrt_is_named(prepared_bundle: Path, tmp_path: Path, lanes: int) -> None:
    """Of several lanes too, which are sound before."""
    bundle = shutil.copytree(prepared_bundle, tmp_path / "bundle")
    if lanes > 1:
        moedge.build(bundle, "jetson-agx-orin-64gb", max_seq_len=48, max_batch=lanes)
        found = json.loads(run_deep(bundle, "--json").stdout)["deep"]["engines"]["jetson-agx-orin-64gb"]
        assert found["faults"] == [] and [layer["layer"] for layer in found["layers"]] == [1, 2]

    def lose_groups(model: onnx.ModelProto) -> None:
        """The group mask of layer 1 keeps everything: what is 0 outside becomes the scores themselves."""
        producers = {name: node for node in model.graph.node for name in node.output}
        node = producers["experts.1"]
        while node.op_type != "Where":
            node = producers[node.input[0]]
        node.input[2] = node.input[1]

    edit_engine(bundle, "jetson-agx-orin-64gb", lose_groups)
    (fault,) = faults_of(bundle)
    assert fault.startswith("engine 'jetson-agx-orin-64gb': layer 1, token ")
    assert "as if the choice were not limited to the best groups" in fault


# rounding


def test_what_rounding_sends_elsewhere_is_no_fault(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many tokens some are as near to two experts as int8 activations differ; of one choice each, it counts."""
    monkeypatch.setattr("moedge.profiles.deep.TOKENS", 480)
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"num_experts_per_tok": 1, "max_position_embeddings": 512}
    (checkpoint / "config.json").write_text(json.dumps(config))
    moedge.export(checkpoint, tmp_path / "bundle", weights="int4", group_size=32, verify=False)
    moedge.build(tmp_path / "bundle", "cpu")
    result = run_deep(tmp_path / "bundle", "--json")
    assert result.exit_code == 0, result.output
    layers = json.loads(result.stdout)["deep"]["engines"]["cpu"]["layers"]
    assert sum(layer["tokens_elsewhere"] for layer in layers) > 0


ATTRIBUTES = {"top_k": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 1.0}


def compare_swapped(op: str, inputs: list[Any], attributes: dict[str, Any], **options: float) -> Any:
    """Comparison where the next best expert was taken in place of the last."""
    more, shares = list_gates()[op].reference(*inputs, **{**attributes, "top_k": 3})[:2]
    return compare_choices(op, inputs, attributes, more[:, [0, 2]], shares[:, [0, 2]], tolerance=10, **options)


@pytest.mark.parametrize(("gap", "is_fault"), [(0.0, False), (1e-6, False), (1e-3, True)])
def test_the_gap_between_scores_tells_a_tie_from_a_fault(gap: float, is_fault: bool) -> None:
    logits = np.array([[3.0, 1.0 + gap, 1.0, -2.0]], np.float32)
    sigmoid = [logits, np.zeros(4, np.float32)]
    for op, inputs in (("SoftmaxTopKGate", [logits]), ("SigmoidTopKGate", sigmoid)):
        compared = compare_swapped(op, inputs, ATTRIBUTES)
        assert (compared.token == 0) == is_fault and len(compared.near_ties) == (not is_fault)
        assert compare_swapped(op, inputs, ATTRIBUTES, slack=1e-3).token is None


def test_a_tie_between_groups_or_codes_is_no_fault_either() -> None:
    """Where two groups count the same but for rounding, all choices change at once."""
    grouped = {**ATTRIBUTES, "n_group": 2}
    logits = np.array([[2.0, 1.0, 2.0 - 1e-6, 0.5]], np.float32)
    assert compare_choices("SoftmaxTopKGate", [logits], grouped, np.array([[2, 3]]), np.ones((1, 2))).near_ties == [0]
    logits[0, 2] = 1.9
    assert compare_choices("SoftmaxTopKGate", [logits], grouped, np.array([[2, 3]]), np.ones((1, 2))).token == 0
    codes = {"top_k": 2, "bits": 3, "norm_topk_prob": 1, "routed_scaling_factor": 1.0}
    assert compare_swapped("BinaryCodeGate", [np.array([[3.0, 1.0, -1.000001]], np.float32)], codes).near_ties == [0]
    assert compare_swapped("BinaryCodeGate", [np.array([[3.0, 1.0, -1.1]], np.float32)], codes).token == 0


def test_an_expert_taken_twice_or_from_nowhere_is_a_fault() -> None:
    logits = np.zeros((1, 4), np.float32)
    for experts in ([1, 1], [0, 9]):
        chosen = np.array([experts])
        assert compare_choices("SoftmaxTopKGate", [logits], ATTRIBUTES, chosen, np.full((1, 2), 0.5)).token == 0
