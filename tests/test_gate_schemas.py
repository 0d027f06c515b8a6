"""onnx knows the gates without their bodies: the checker checks calls, shape inference goes through them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from moedge.bundle import MODEL, Bundle
from moedge.errors import BundleError
from moedge.export.gating import list_gates
from moedge.export.gating._schemas import register_schemas
from moedge.profiles.targets._canonical import load_canonical
from moedge.runtime.commands import inspect_command

register_schemas()
OPS = sorted(list_gates())


def make_call(op: str, **changes: Any) -> onnx.ModelProto:
    """A model that calls the gate and carries no body."""
    schema = onnx.defs.get_schema(op, 1, "moedge")
    values = {name: 1 if str(each.type).endswith("INT") else 1.0 for name, each in schema.attributes.items()}
    attributes = {**values, "top_k": 2, **({"bits": 3} if "bits" in values else {}), **changes}
    shapes, width = {"bias": [8], "load": [8]}, attributes.get("bits", 8) if "bits" not in changes else 8
    inputs = [
        helper.make_tensor_value_info(each.name, TensorProto.FLOAT, shapes.get(each.name, ["T", width]))
        for each in schema.inputs
    ]
    outputs = [
        helper.make_tensor_value_info(name, kind, ["a", "b"])
        for name, kind in (("experts", TensorProto.INT64), ("weights", TensorProto.FLOAT))
    ]
    names = [each.name for each in schema.inputs], [each.name for each in schema.outputs]
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node(op, *names, domain="moedge", **attributes)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    return helper.make_model(helper.make_graph([node], "gate", inputs, outputs), opset_imports=opsets, ir_version=11)


@pytest.mark.parametrize("op", OPS)
def test_every_gate_has_a_schema_of_its_own_attributes(op: str) -> None:
    gate, schema = list_gates()[op], onnx.defs.get_schema(op, 1, "moedge")
    assert set(schema.attributes) == set(gate.ATTRIBUTES)
    function = onnx.parser.parse_function(gate.FUNCTION)
    assert [each.name for each in schema.inputs] == list(function.input)
    assert [each.name for each in schema.outputs] == list(function.output)


@pytest.mark.parametrize("op", OPS)
def test_types_and_shapes_are_inferred_without_a_body(op: str) -> None:
    model = make_call(op)
    del model.graph.output[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {}
    for value in inferred.graph.value_info:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        found[value.name] = (value.type.tensor_type.elem_type, dims)
    assert found["experts"] == (TensorProto.INT64, ["T", 2])
    assert found["weights"] == (TensorProto.FLOAT, ["T", 2])
    assert found.get("new_load", (TensorProto.FLOAT, [8])) == (TensorProto.FLOAT, [8])
    assert set(found) == {each.name for each in onnx.defs.get_schema(op, 1, "moedge").outputs}


@pytest.mark.parametrize("op", OPS)
def test_the_checker_takes_a_call_and_refuses_a_wrong_one(op: str) -> None:
    onnx.checker.check_model(make_call(op))
    with pytest.raises(onnx.checker.ValidationError, match="top_k"):
        onnx.checker.check_model(make_call(op, top_k=None))
    with pytest.raises(onnx.checker.ValidationError, match="top_k"):
        onnx.checker.check_model(make_call(op, top_k=2.0))
    with pytest.raises(onnx.checker.ValidationError, match="colour"):
        onnx.checker.check_model(make_call(op, colour=3))


@pytest.mark.parametrize(
    ("op", "changes", "fault"),
    [
        ("SoftmaxTopKGate", {"top_k": 9}, "num_experts_per_tok 9 exceeds the 8 experts"),
        ("SigmoidTopKGate", {"n_group": 3}, "n_group 3 does not divide the 8 experts"),
        ("BinaryCodeGate", {"bits": 4}, "8 experts are not the 16 that codes of 4 bits name"),
        ("LoadAwareGate", {"capacity_factor": -2.0}, "capacity_factor -2 is below 1: 8 experts would have room for -4"),
    ],
)
def test_shape_inference_refuses_contradicting_attributes(op: str, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match=re.escape(f"moedge.{op}: {fault}")):
        onnx.shape_inference.infer_shapes(make_call(op, **changes), strict_mode=True)


def edit_gate(bundle: Path, **changes: Any) -> Bundle:
    model = onnx.load(bundle / MODEL, load_external_data=False)
    gate = next(node for node in model.graph.node if node.op_type == "SigmoidTopKGate")
    kept = [each for each in gate.attribute if each.name not in changes]
    del gate.attribute[:]
    gate.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in changes.items())])
    (bundle / MODEL).write_bytes(model.SerializeToString())
    return Bundle.open(bundle)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"colour": 3}, "Unrecognized attribute: colour for operator SigmoidTopKGate"),
        ({"top_k": 9}, "moedge.SigmoidTopKGate: num_experts_per_tok 9 exceeds the 8 experts"),
        ({"topk_group": 3}, "moedge.SigmoidTopKGate: topk_group 3 exceeds n_group 2"),
        ({"top_k": 2.0}, "Mismatched attribute type in 'layers.1.gate.experts : top_k'"),
    ],
)
def test_a_graph_with_a_wrong_gate_is_not_loaded(
    tiny_bundle: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    bundle = edit_gate(shutil.copytree(tiny_bundle, tmp_path / "bundle"), **changes)
    with pytest.raises(BundleError, match=re.escape(f"model.onnx: cannot be loaded ({fault}")) as caught:
        load_canonical(bundle)
    assert str(caught.value).endswith("export the bundle again")


def test_inspect_shows_the_gates_with_their_attributes(tiny_bundle: Path) -> None:
    shown = " ".join(CliRunner().invoke(inspect_command, [str(tiny_bundle)], env={"COLUMNS": "200"}).stdout.split())
    given = "top_k 2, n_group 2, topk_group 1, norm_topk_prob 1, routed_scaling_factor 1.5"
    assert f"gate moedge.SigmoidTopKGate ({given})" in shown
    document = json.loads(CliRunner().invoke(inspect_command, [str(tiny_bundle), "--json"]).stdout)
    (gate,) = document["gating"]
    assert set(gate["attributes"]) == set(list_gates()["SigmoidTopKGate"].ATTRIBUTES)


def test_experts_have_a_schema_and_a_second_registration_changes_nothing() -> None:
    assert onnx.defs.has("Experts", "moedge")
    assert register_schemas() == sorted([*OPS, "Experts"])


def test_whoever_lists_the_gates_has_their_schemas() -> None:
    """In a process of its own, in which nothing else has registered them."""
    code = "from moedge.export.gating import list_gates; gates = list_gates(); import onnx; "
    code += "print(sorted(gates) == sorted(op for op in gates if onnx.defs.has(op, 'moedge')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
