"""ONNX schemas of the gates and of `moedge.Experts`, made from their function bodies and registered with onnx.

A model that has a call but no body is then still checked (attributes, types) and its shapes are inferred; attributes
that contradict each other, or the width of the logits, are refused with both figures.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from typing import Any

import onnx
from onnx.defs import OpSchema

from ..functions import DOMAIN, FUNCTIONS, VERSION
from . import Gate, find_gates
from ._checked import count_experts

_FLOAT, _INT = "tensor(float)", "tensor(int64)"
_KINDS = {onnx.AttributeProto.INT: OpSchema.AttrType.INT, onnx.AttributeProto.FLOAT: OpSchema.AttrType.FLOAT}


def register_schemas() -> list[str]:
    """Make onnx know the ops; those it knows already stay. Returns the names of all."""
    gates = find_gates()
    texts = {op: gate.FUNCTION for op, gate in gates.items()} | {"Experts": FUNCTIONS["Experts"]}
    for op, text in texts.items():
        if not onnx.defs.has(op, DOMAIN):
            infer = functools.partial(_infer_gate, gates[op]) if op in gates else _infer_experts
            onnx.defs.register_schema(_schema_from_function(onnx.parser.parse_function(text), infer))
            # Else onnx frees `infer` after the interpreter has ended, and 1.19 then waits forever for its lock.
            atexit.register(onnx.defs.deregister_schema, op, VERSION, DOMAIN)
    return sorted(texts)


def attribute_kinds(function: onnx.FunctionProto) -> dict[str, Any]:
    """Type of each attribute, in the function's order, as the body's constants take it."""
    kinds = {
        attribute.ref_attr_name: _KINDS[attribute.type]
        for node in function.node
        for attribute in node.attribute
        if attribute.ref_attr_name
    }
    return {name: kinds[name] for name in function.attribute}


def _schema_from_function(function: onnx.FunctionProto, infer: Callable[[Any], None]) -> OpSchema:
    def parameter(name: str) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(name, _INT if name == "experts" else _FLOAT)

    schema = OpSchema(
        function.name,
        DOMAIN,
        VERSION,
        f"moedge.{function.name}; see moedge/export",
        inputs=[parameter(name) for name in function.input],
        outputs=[parameter(name) for name in function.output],
        attributes=[
            OpSchema.Attribute(name, kind, name.replace("_", " "), required=True)
            for name, kind in attribute_kinds(function).items()
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


def _infer_gate(gate: Gate, context: Any) -> None:
    """logits [T, n] -> experts int64 [T, k], weights float32 [T, k]; further outputs are as the last inputs, which they
    continue.

    Raises:
        InferenceError: what contradicts itself in the attributes.
    """
    top_k = context.get_attribute("top_k").i
    dims = _dims_of(context.get_input_type(0))
    tokens = dims[:1]
    if len(dims) == 2 and dims[1].dim_value:
        _refuse_faults(gate, context, dims[1].dim_value)
    for index, kind in enumerate((onnx.TensorProto.INT64, onnx.TensorProto.FLOAT)):
        output = onnx.TypeProto()
        output.tensor_type.elem_type = kind
        if tokens:
            output.tensor_type.shape.dim.add().CopyFrom(tokens[0])
            output.tensor_type.shape.dim.add().dim_value = top_k
        context.set_output_type(index, output)
    for index in range(2, context.get_num_outputs()):
        state = context.get_input_type(context.get_num_inputs() - context.get_num_outputs() + index)
        context.set_output_type(index, state)


def _refuse_faults(gate: Gate, context: Any, width: int) -> None:
    given = {name: context.get_attribute(name) for name in gate.ATTRIBUTES}
    values = {name: each.f if each.type == onnx.AttributeProto.FLOAT else each.i for name, each in given.items()}
    fault = gate.find_fault(values, count_experts(values, width))
    if fault:
        raise onnx.shape_inference.InferenceError(f"moedge.{gate.OP}: {fault}")


def _infer_experts(context: Any) -> None:
    """x [T, H] -> y [T, H]."""
    context.set_output_type(0, context.get_input_type(0))


def _dims_of(kind: onnx.TypeProto) -> list[Any]:
    return list(kind.tensor_type.shape.dim)
