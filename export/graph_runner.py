"""Running parts of the canonical graph on onnxruntime without ever holding more of its weights than a given budget.

The graph is cut into steps: a node that computes on activations, with the nodes that make its weights out of
initializers (dequantize, cast, transpose). Steps that fit the budget together run as one session. One that does not
fit alone runs in parts, each on a slice of its initializers' first axis: a linear by output rows, `moedge.Experts`
by experts, a table by its rows. The nodes and the bytes of weights.bin are the graph's own in each case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import require
from .memory import give_back
from .quantization import slice_int6

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
RunMixture = Callable[["Step", Values], Values]
_FLOAT = 4
# What the body of a function holds of the size of its weights in float32, those themselves included (measured with
# onnxruntime 1.31: 1.1 for mixtures from int4, fp16 and fp32; no more than 2 for attention).
_MIXTURE, _FUNCTION = 1.25, 2.0
_ACTIVATIONS = 5  # arrays of a mixture's inner width that its body holds for each token and expert
_HELD = 8  # copies of codes that a part of the graph holds itself, until onnxruntime has read it


@dataclass(frozen=True)
class Step:
    """`node`, the nodes that make its weights from `initializers` alone, and the bytes it needs at once.

    `split`: what its parts are, of `rows` slices that come in multiples of `multiple`; None: it runs whole only.
    A mixture copies the experts of few choices: `copied` bytes for each, beside `made` bytes of all weights.
    """

    node: ir.Node
    constants: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]
    cost: int
    split: Literal["rows", "experts", "table"] | None = None
    rows: int = 1
    multiple: int = 1
    made: int = 0
    copied: int = 0

    @property
    def smallest(self) -> int:
        if self.split is None:
            return self.cost
        least = min(self.multiple, self.rows)
        return max(-(-self.cost * least // self.rows), -(-self.made * least // self.rows) + self.copied)

    def cost_of(self, choices: int) -> int:
        """Bytes for one token that makes so many choices."""
        return max(self.cost, self.made + choices * self.copied)


class GraphRunner:
    """Runs what lies between given values and wanted ones; `budget` in bytes, `tokens`: at most so many at once."""

    def __init__(self, model: ir.Model, folder: Path, tokens: int, budget: int | None = None) -> None:
        self.model = model
        self.folder = folder
        self.steps = list(_find_steps(model.graph, tokens))
        self.budget = self.smallest_budget() if budget is None else budget
        self._functions = {key: ir.serde.serialize_function(function) for key, function in model.functions.items()}
        self._makers = {name: place for place, step in enumerate(self.steps) for name in _names(step.node.outputs)}

    def smallest_budget(self) -> int:
        """The bytes below which some step cannot run."""
        return max(step.smallest for step in self.steps)

    def run(self, known: Values, wanted: list[str], mixture: RunMixture | None = None) -> Values:
        """The `wanted` values, computed from those in `known`, by name. `mixture` runs calls of Experts instead."""
        steps = self._needed(known, wanted)
        uses = [set(_names(step.node.inputs)) for step in steps]
        values = dict(known)
        start = 0
        for stop in self._group(steps):
            later = set(wanted).union(*uses[stop:])
            group = steps[start:stop]
            if mixture is not None and group[0].split == "experts":
                values.update(mixture(group[0], values))
            elif len(group) == 1:
                values.update(self.run_step(group[0], values))
            else:
                made = [name for step in group for name in _names(step.node.outputs) if name in later]
                values.update(self._session_run(group, values, made))
            values = {name: value for name, value in values.items() if name in later}
            start = stop
        return {name: values[name] for name in wanted}

    def run_step(self, step: Step, values: Values) -> Values:
        """One step by its outputs' names, in parts where it does not fit."""
        if step.cost <= self.budget or step.split is None:
            return self._session_run([step], values, _names(step.node.outputs))
        size = max(1, self.budget * step.rows // step.cost // step.multiple) * step.multiple
        parts = ((start, min(start + size, step.rows)) for start in range(0, step.rows, size))
        (name,) = _names(step.node.outputs)
        if step.split == "rows":
            made = [self._session_run([step], values, [name], part)[name] for part in parts]
            return {name: np.concatenate(made, axis=-1)}
        indices = step.node.inputs[1]
        assert indices is not None and indices.name is not None
        if step.split == "table":
            return {name: self._run_table(step, values, indices.name, name, parts)}
        return {name: sum(self.run_experts(step, values, *part) for part in parts)}  # type: ignore[dict-item]

    def run_experts(self, step: Step, values: Values, start: int, stop: int) -> Array:
        """What experts `start` to `stop` of a mixture add to it; choices of others count with weight 0."""
        choices, weights = step.node.inputs[1:3]
        assert choices is not None and choices.name and weights is not None and weights.name
        (name,) = _names(step.node.outputs)
        inside = (values[choices.name] >= start) & (values[choices.name] < stop)
        part = {
            **values,
            choices.name: np.where(inside, values[choices.name] - start, 0),
            weights.name: np.where(inside, values[weights.name], np.float32(0)),
        }
        return self._session_run([step], part, [name], (start, stop))[name]

    def _run_table(
        self, step: Step, values: Values, indices: str, name: str, parts: Iterator[tuple[int, int]]
    ) -> Array:
        """Rows of a table that is looked up in slices."""
        wanted, result = values[indices], None
        for start, stop in parts:
            inside = (wanted >= start) & (wanted < stop)
            if inside.any():
                part = {**values, indices: np.where(inside, wanted - start, 0)}
                rows = self._session_run([step], part, [name], (start, stop))[name]
                result = np.zeros_like(rows) if result is None else result
                result[inside] = rows[inside]
        assert result is not None, "no index lies within the table"
        return result

    def _needed(self, known: Iterable[str], wanted: list[str]) -> list[Step]:
        """What must run, in the graph's order."""
        places: set[int] = set()
        open_names = [name for name in wanted if name not in known]
        while open_names:
            place = self._makers.get(open_names.pop())
            if place is not None and place not in places:
                places.add(place)
                open_names += [name for name in _names(self.steps[place].node.inputs) if name not in known]
        return [self.steps[place] for place in sorted(places)]

    def _group(self, steps: list[Step]) -> Iterator[int]:
        """Ends of the runs of steps that fit the budget together."""
        start = held = 0
        for place, step in enumerate(steps):
            alone = "experts" in (step.split, steps[place - 1].split)
            if place > start and (alone or held + step.cost > self.budget):
                yield place
                start, held = place, 0
            held += step.cost
        yield len(steps)

    def _session_run(
        self, steps: list[Step], values: Values, wanted: list[str], part: tuple[int, int] | None = None
    ) -> Values:
        nodes = list({id(node): node for step in steps for node in (*step.constants, step.node)}.values())
        made = {name for node in nodes for name in _names(node.outputs)}
        initializers = {value.name: value for step in steps for value in step.initializers}
        inputs = {name for node in nodes for name in _names(node.inputs)} - made - set(initializers)
        graph = onnx.GraphProto(name="part")
        graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
        planes = _find_planes(nodes)
        for name, value in initializers.items():
            if name in planes and part is not None:
                graph.initializer.append(_slice_planes(value, part, self.folder))
            else:
                graph.initializer.append(_slice_tensor(value, part))
        for name in sorted(inputs):
            kind = onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, values[name].shape))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        used = {node.op_identifier() for node in nodes}
        model = onnx.ModelProto(ir_version=self.model.ir_version, graph=graph)
        model.functions.extend(function for key, function in self._functions.items() if key in used)
        for domain, version in self.model.graph.opset_imports.items():
            model.opset_import.add(domain=domain, version=version)
        session = _open_session(model.SerializeToString(), self.folder)
        feeds = {name: np.ascontiguousarray(values[name]) for name in inputs}
        found = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        del session, model, graph
        give_back()  # or the next part's weights come on top of this one's
        return found


def warm_up() -> None:
    """Have numpy and onnxruntime allocate what they hold for themselves, threads and all."""
    matrix = np.ones((256, 256), np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "y"], ["z"])
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256, 256]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "warm_up", inputs, [onnx.ValueInfoProto(name="z")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = _open_session(model.SerializeToString(), Path())
    session.run(None, {"x": matrix @ matrix, "y": matrix})


def _open_session(model: bytes, folder: Path) -> Any:
    """A session that frees what it allocates, folds no constants and keeps no repacked weights."""
    ort = require("onnxruntime", purpose="check an export; or skip the check with --no-verify")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # This level reads Transpose and MatMul as one product, without a transposed copy of the weights.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers={"ConstantFolding"}
    )


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    return [value.name for value in values if value is not None and value.name]


def _shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(tensor.shape.numpy())


def _find_planes(nodes: Iterable[ir.Node]) -> set[str]:
    """Initializers whose second axis is that of rows: codes of 6 bits."""
    return {name for node in nodes if node.op_type == "SixBitPlanes" for name in _names(node.inputs)}


def _slice_planes(value: ir.Value, part: tuple[int, int], folder: Path) -> onnx.TensorProto:
    """Rows `part` of external codes of 6 bits, held in the graph: they lie in two places."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    place = {"offset": tensor.offset or 0, "shape": _shape_of(tensor)}
    held: Array = np.memmap(folder / tensor.location, np.uint8, "r", **place)  # type: ignore[call-overload]
    return ir.serde.serialize_tensor(ir.tensor(slice_int6(held, *part), name=value.name))


def _slice_tensor(value: ir.Value, part: tuple[int, int] | None) -> onnx.TensorProto:
    """An initializer, or its entries `part` along the first axis; external ones stay external."""
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    shape = list(_shape_of(tensor))
    if not isinstance(tensor, ir.ExternalTensor):
        array = tensor.numpy() if part is None else tensor.numpy()[part[0] : part[1]]
        return ir.serde.serialize_tensor(ir.tensor(array, name=value.name))
    offset, length = tensor.offset or 0, tensor.length or 0
    if part is not None:
        bits = math.prod(shape[1:]) * tensor.dtype.bitwidth
        start, stop = part[0] * bits, part[1] * bits
        assert start % 8 == 0, f"{value.name}: a slice begins within a byte"
        offset, length, shape[0] = offset + start // 8, (stop + 7) // 8 - start // 8, part[1] - part[0]
    proto = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", tensor.location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(entry))
    return proto


def _find_steps(graph: ir.Graph, tokens: int) -> Iterator[Step]:
    """The graph's nodes that compute on activations, in order, each with what makes its weights."""
    constant: dict[str, ir.Node] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value.name in graph.initializers or value.name in constant for value in inputs):
            constant.update(dict.fromkeys(_names(node.outputs), node))
            continue
        makers, initializers = _find_weights(node, constant, graph)
        yield _make_step(node, makers, initializers, tokens)


def _find_weights(
    node: ir.Node, constant: dict[str, ir.Node], graph: ir.Graph
) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]]:
    makers: dict[int, ir.Node] = {}
    initializers: dict[str, ir.Value] = {}

    def visit(node: ir.Node) -> None:
        for name in _names(node.inputs):
            if name in graph.initializers:
                initializers[name] = graph.initializers[name]
            elif name in constant and id(constant[name]) not in makers:
                visit(constant[name])
                makers[id(constant[name])] = constant[name]

    visit(node)
    return tuple(makers.values()), tuple(initializers.values())


def _make_step(
    node: ir.Node, makers: tuple[ir.Node, ...], initializers: tuple[ir.Value, ...], tokens: int
) -> Step:
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    stored = sum(tensor.nbytes for tensor in tensors)
    shapes = {value.name: _shape_of(tensor) for value, tensor in zip(initializers, tensors, strict=True)}
    made = 0
    for maker in makers:
        shape = next((shapes[name] for name in _names(maker.inputs) if name in shapes), ())
        if maker.op_type == "SixBitPlanes":
            shape = (shape[1], shape[2] * 4)
        shapes.update(dict.fromkeys(_names(maker.outputs), shape))
        if maker.op_type != "Transpose":
            made += _FLOAT * math.prod(shape)
    operands = [shapes[name] for name in _names(node.inputs) if name in shapes]
    cost = stored + made
    split = _find_split(node, makers, initializers)
    if node.domain:  # a function, whose body may hold copies; what is stored as float32 is mapped, not copied
        times = (_MIXTURE if split == "experts" else _FUNCTION) - (0 if made else 1)
        cost = stored + max(made, int(times * _FLOAT * sum(math.prod(shape) for shape in operands)))
    planes = _find_planes(makers)
    named = zip(initializers, tensors, strict=True)
    leading = {_shape_of(tensor)[value.name in planes] for value, tensor in named if len(tensor.shape)}
    if split is None or len(leading) != 1:
        return Step(node, makers, initializers, cost)
    cost += _HELD * sum(each.const_value.nbytes for each in initializers if each.name in planes and each.const_value)
    copied = 0
    if split == "experts":
        stacks = [shape for shape in operands if len(shape) == 3]
        cost += tokens * _FLOAT * _ACTIVATIONS * sum(math.prod(shape[:-1]) for shape in stacks)
        copied = _FLOAT * max(math.prod(shape[1:]) for shape in stacks)
    halves = any(math.prod(_shape_of(tensor)[1:]) * tensor.dtype.bitwidth % 8 for tensor in tensors)
    multiple = 2 if halves else 1
    return Step(node, makers, initializers, cost, split, leading.pop(), multiple, stored + made, copied)


def _find_split(
    node: ir.Node, makers: tuple[ir.Node, ...], initializers: tuple[ir.Value, ...]
) -> Literal["rows", "experts", "table"] | None:
    if node.domain and node.op_type.endswith("Experts"):  # inputs: x, choices, weights, stacks of experts
        return "experts"
    if node.op_type == "Gather" and not makers and node.attributes.get_int("axis", 0) == 0:
        return "table" if node.inputs[0] in initializers else None
    if node.op_type == "MatMul" and makers and makers[-1].op_type == "Transpose":
        return "rows" if node.inputs[1] in makers[-1].outputs else None
    return None
