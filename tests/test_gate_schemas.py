"""onnx knows the gates without their bodies: the checker checks calls, shape inference goes through them."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from moedge.export.gating import list_gates
from moedge.export.gating._schemas import register_schemas

register_schemas()
OPS = sorted(list_gates())


def make_call(op: str, **changes: Any) -> onnx.ModelProto:
    """A model that calls the gate and carries no body."""
    schema = onnx.defs.get_schema(op, 1, "moedge")
    values = {name: 1 if str(each.type).endswith("INT") else 1.0 for name, each in schema.attributes.items()}
    attributes = {**values, "top_k": 2, **changes}
    shapes = {"bias": [8], "load": [8]}
    inputs = [
        helper.make_tensor_value_info(each.name, TensorProto.FLOAT, shapes.get(each.name, ["T", 8]))
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


def test_experts_have_a_schema_and_a_second_registration_changes_nothing() -> None:
    assert onnx.defs.has("Experts", "moedge")
    assert register_schemas() == sorted([*OPS, "Experts"])
