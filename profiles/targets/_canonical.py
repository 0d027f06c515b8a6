"""What every target does with a canonical graph: load it, see how its matrices are stored, replace its calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import MODEL, Bundle
from ...errors import BuildError, BundleError
from ...export.config import MoEConfig, moe_config_from_json
from ...export.functions import DOMAIN
from ...export.graph import check_graph
from ...export.load_balance import start_load
from . import BuildRequest

Array = np.ndarray[Any, Any]
SIX_BITS, SIX_BITS_BEFORE = "SixBitPlanes", "SixBitCodes"  # functions that make 8-bit codes of 6-bit ones


@dataclass(frozen=True)
class Matrix:
    """How a weight [..., out, in] reaches the node that multiplies by it: codes with scales, or floating point.

    `six_bits`: `data` is the bytes of codes of 6 bits, of which this function of the graph makes 8-bit ones: SIX_BITS,
    or in bundles of before another, of other bytes. `scales`: float32, float16 or, as bytes, float8
    (`export.quantization.FLOAT8`), as they are stored.
    """

    data: ir.Value
    scales: ir.Value | None = None
    zero_points: ir.Value | None = None
    block_size: int = 0
    six_bits: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.data.shape is not None
        shape = self.data.shape.numpy()
        if self.six_bits:
            return (shape[1], shape[2] * 4) if self.six_bits == SIX_BITS else (shape[0], shape[1] * 4 // 3)
        return shape

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floating point."""
        if self.six_bits:
            return 6
        return {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8}.get(self.data.dtype or ir.DataType.FLOAT, 0)

    @property
    def symmetric(self) -> bool:
        """Its zero points are the constant middle that all symmetric matrices share."""
        if self.zero_points is None or self.zero_points.const_value is None:
            return True
        tensor = self.zero_points.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.length is None:
            return False
        middle = {4: 0x88, 6: 0x80, 8: 0x80}[self.bits]
        content = tensor.tobytes()
        return content.count(middle) == len(content)


def load_canonical(bundle: Bundle) -> tuple[ir.Model, MoEConfig]:
    """The canonical model, checked, its tensors still external and unread, and the config it was made from.

    Raises:
        BundleError: not readable, or not what onnx and the schemas of moedge's ops allow.
    """
    with _loading(bundle):
        model, config = ir.load(bundle.file(MODEL)), moe_config_from_json(bundle.config)
        shape = model.graph.outputs[0].shape
        if shape is not None and shape[-1] != config.vocab_size:
            raise ValueError(f"it has {shape[-1]} tokens, moedge.json says {config.vocab_size}")
        return model, config


def load_torch_graph(bundle: Bundle) -> ir.Model:
    """The graph of a user's own torch model, checked, its tensors still external and unread."""
    with _loading(bundle):
        return ir.load(bundle.file(MODEL))


def holds_torch_graph(bundle: Bundle) -> bool:
    """Whether the bundle was exported from a user's own torch model, without a config that families share."""
    return bool(bundle.config.get("family") == "torch")


@contextlib.contextmanager
def _loading(bundle: Bundle) -> Iterator[None]:
    try:
        check_graph(bundle.file(MODEL))
        yield
    except Exception as cause:
        raise BundleError(
            f"{bundle.file(MODEL)}: cannot be loaded ({str(cause).splitlines()[0]}); export the bundle again"
        ) from cause


def take_loads(model: ir.Model) -> list[ir.Value]:
    """Take the load-aware gates' loads, which have a default, out of the inputs: a lowered graph must be given them.

    It gives no new ones: a session makes them from the routes, which are right also when a sequence was cut or
    continues another's.
    """
    graph = model.graph
    graph.outputs[:] = [value for value in graph.outputs if not str(value.name).startswith("new_load.")]
    loads = [value for value in graph.inputs if str(value.name).startswith("load.")]
    for load in loads:
        graph.initializers.pop(str(load.name))
        graph.inputs.remove(load)
    return loads


def describe_load(config: MoEConfig) -> dict[str, Any]:
    """What engine.json's `session` says where gates are load-aware."""
    gate = config.moe.gate
    return {} if gate.base is None else {"load_decay": gate.attributes["decay"], "load_start": start_load(config)}


def refuse_chunks(request: BuildRequest) -> None:
    """For targets whose runs take any number of tokens.

    Raises:
        BuildError: a chunk's size or form is asked for.
    """
    if request.expert_buckets or request.prefill_chunk is not None:
        raise BuildError(
            "--expert-buckets and --prefill-chunk are TensorRT's: here each token runs its own experts, and "
            "moedge.load(prefill_chunk=N) says how many tokens at once; leave them out"
        )


def is_load_aware(bundle: Bundle) -> bool:
    return bool((bundle.config["moe"].get("gate") or {}).get("base"))


def check_one_sequence(max_batch: int) -> None:
    """A load-aware engine steps one sequence a run.

    Raises:
        BuildError: several are asked for.
    """
    if max_batch > 1:
        raise BuildError(
            f"max_batch {max_batch}: a load-aware gate's load is one sequence's; use --max-batch 1, or export without "
            "--load-aware"
        )


def find_matrix(value: ir.Value | None) -> Matrix:
    """The stored matrix behind a value: through DequantizeLinear or Cast to the initializer."""
    assert value is not None
    node = value.producer()
    if node is None:
        return Matrix(value)
    source = node.inputs[0]
    codes = None if source is None else source.producer()
    six_bits = ""
    if codes is not None and codes.op_type in (SIX_BITS, SIX_BITS_BEFORE):
        source, six_bits = codes.inputs[0], codes.op_type
    assert source is not None and source.producer() is None, f"{node.op_type} of {source} is no stored matrix"
    if node.op_type == "Cast":
        return Matrix(source)
    assert node.op_type == "DequantizeLinear", f"{value} comes from {node.op_type}"
    scales = node.inputs[1]
    cast = None if scales is None else scales.producer()
    if cast is not None:
        scales = cast.inputs[0]
    return Matrix(source, scales, node.inputs[2], node.attributes["block_size"].as_int(), six_bits)


def find_calls(model: ir.Model, kind: str) -> list[ir.Node]:
    """Every call of a moedge function, in order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == kind]


def find_linears(model: ir.Model) -> list[ir.Node]:
    """Every MatMul by a transposed stored matrix."""
    linears = []
    for node in model.graph:
        if node.op_type == "MatMul" and node.domain == "" and node.inputs[1] is not None:
            producer = node.inputs[1].producer()
            if producer is not None and producer.op_type == "Transpose":
                linears.append(node)
    return linears


def linear_matrix(node: ir.Node) -> Matrix:
    """The stored matrix [out, in] of a node that `find_linears` gave."""
    assert node.inputs[1] is not None
    transpose = node.inputs[1].producer()
    assert transpose is not None
    return find_matrix(transpose.inputs[0])


def gate_of(experts: ir.Value | None) -> ir.Node:
    """The gate that chose `experts`, whatever was done to their numbers since."""
    assert experts is not None
    node = experts.producer()
    while node is not None and node.domain != DOMAIN and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    assert node is not None, f"{experts} comes from no gate"
    return node


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as plain values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


class Rewriter:
    """Builds the nodes that take a call's place, and puts them there."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.tape = ir.tape.Tape()
        self.loops = 0

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """One node of one output, `name`d where given."""
        value = self.tape.op(kind, inputs, attributes, domain=domain)
        if name is not None:
            value.name = name
        return value

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, *, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        return list(self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain))

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer, made once for a name."""
        existing = self.model.graph.initializers.get(name)
        if existing is not None:
            return existing
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def ints(self, *values: int) -> ir.Value:
        """int64 [n]."""
        name = "ints." + "_".join(str(value) for value in values)
        return self.constant(name, np.array(values, np.int64))

    def reshaped(self, value: ir.Value, shape: list[int]) -> ir.Value:
        """A stored tensor under another shape: the same bytes."""
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor) and value.name is not None
        name = f"{value.name}.{'x'.join(str(size) for size in shape)}"
        existing = self.model.graph.initializers.get(name)
        if existing is not None:
            return existing
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        view = ir.ExternalTensor(*place, shape=ir.Shape(shape), name=name, base_dir=tensor.base_dir)
        new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=view)
        self.model.graph.register_initializer(new)
        return new

    def part_rows(self, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        """One form for any number of tokens."""
        return [], list(values)

    def loop(self, most: ir.Value, go: ir.Value, carried: Sequence[ir.Value], body: Any) -> list[ir.Value]:
        """ONNX's Loop; see `moedge.export.gating.GraphBuilder`."""
        inner = Rewriter(self.model)
        self.loops += 1
        name = f"loop.{self.loops}"
        rounds, was = ir.val(f"{name}.round", ir.DataType.INT64, []), ir.val(f"{name}.go", ir.DataType.BOOL, [])
        taken = [ir.Value(name=f"{name}.in.{place}") for place in range(len(carried))]
        again, given = body(inner, taken)
        for place, value in enumerate(value for node in inner.tape.nodes for value in node.outputs):
            value.name = f"{name}.{place}"  # a name of the graph outside would be taken for that
        graph = ir.Graph([rounds, was, *taken], [again, *given], nodes=inner.tape.nodes, name=name)
        return self.ops("Loop", [most, go, *carried], len(carried), body=graph)

    def replace(self, node: ir.Node, new_outputs: Sequence[ir.Value]) -> None:
        """Put the nodes made since the last replacement in `node`'s place."""
        self.replace_all(node, [node], node.outputs, new_outputs)

    def replace_all(
        self, place: ir.Node, nodes: Sequence[ir.Node], old_values: Sequence[ir.Value], new_values: Sequence[ir.Value]
    ) -> None:
        """Put the nodes made since the last replacement behind `place`, which may be one of those that go."""
        for old, new in zip(old_values, new_values, strict=True):
            if new.name is None:
                new.name = old.name
        ir.convenience.replace_nodes_and_values(
            self.model.graph, place, nodes, self._take(), old_values, new_values
        )

    def insert_before(self, node: ir.Node) -> None:
        """Put the nodes made since the last replacement before `node`, which stays."""
        self.model.graph.insert_before(node, self._take())

    def _take(self) -> list[ir.Node]:
        nodes = list(self.tape.nodes)
        self.tape = ir.tape.Tape()
        return nodes


def as_float(rewriter: Rewriter, stored: ir.Value | None) -> ir.Value | None:
    """A stored tensor, of bytes scales, as float32, for kernels that take no other; onnxruntime does it at load."""
    if stored is None or stored.dtype == ir.DataType.FLOAT:
        return stored
    if stored.dtype == ir.DataType.UINT8:
        return rewriter.op("Float8Scales", [stored], domain=DOMAIN)
    return rewriter.op("Cast", [stored], to=int(ir.DataType.FLOAT))


def values_of(rewriter: Rewriter, value: ir.Value | None) -> ir.Value:
    """A stored matrix as float32, dequantized by nodes that onnxruntime runs once, when it loads the graph.

    A `DequantizeLinear` of constants it would run in every step, in case a kernel takes the codes.
    """
    matrix = find_matrix(value)
    if not matrix.bits:
        assert value is not None
        if value.shape is None:  # what a Cast of float16 gives
            value.shape = ir.Shape(matrix.shape)
        return value
    op, ints, real = rewriter.op, rewriter.ints, int(ir.DataType.FLOAT)
    *lead, width = matrix.shape
    codes = op("Reshape", [op("Cast", [matrix.data], to=real), ints(*lead, -1, matrix.block_size)])
    middle = 1 << (matrix.bits - 1)
    points = rewriter.constant(f"float.{middle}", np.array(middle, np.float32))
    if not matrix.symmetric:
        points = op("Unsqueeze", [op("Cast", [matrix.zero_points], to=real), ints(-1)])
    scales = op("Unsqueeze", [as_float(rewriter, matrix.scales), ints(-1)])
    values = op("Mul", [op("Sub", [codes, points]), scales])
    whole = op("Reshape", [values, ints(*lead, width)])
    whole.dtype, whole.shape = ir.DataType.FLOAT, ir.Shape([*lead, width])
    return whole


def replace_each(rewriter: Rewriter, nodes: list[ir.Node], lower: Callable[[ir.Node], Sequence[ir.Value]]) -> None:
    """Replace each node by what `lower` builds for it."""
    for node in nodes:
        rewriter.replace(node, lower(node))


def finish_model(model: ir.Model, opsets: dict[str, int]) -> None:
    """Drop what nothing uses any more and declare the operator sets that are used."""
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    model.graph.opset_imports.update(opsets)


def keep_asked_rows(rewriter: Rewriter) -> None:
    """Logits float32 [R, vocab] only for the rows that a new input `rows` int64 [R] asks for."""
    graph = rewriter.model.graph
    rows = ir.val("rows", ir.DataType.INT64, ["R"])
    graph.inputs.insert(1, rows)
    norm = next(iter(graph.initializers["final_norm.weight"].uses())).node
    norm.replace_input_with(0, rewriter.op("Gather", [norm.inputs[0], rows], axis=0))
    rewriter.insert_before(norm)
    reshape = graph.outputs[0].producer()
    assert reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None
    vocab = graph.outputs[0].shape[2]  # type: ignore[index]
    logits = reshape.inputs[0]
    graph.outputs[0] = logits
    reshape.replace_input_with(1, None)  # or the nodes that make the shape would stay
    graph.remove(reshape, safe=False)
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["R", vocab])
