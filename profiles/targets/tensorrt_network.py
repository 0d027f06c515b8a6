"""The network that both TensorRT targets build: a canonical graph lowered to one ONNX with the cache inside.

T = new tokens, S = sequences in a run (lanes), L = slots of the cache, n = heads, r = kv_lora_rank, E = experts, H =
hidden size, I = intermediate size. Two optimization profiles are built from it: exactly one token, and a chunk of 2 or
more; of several lanes a third: one token for each lane. Matrix products are in half precision (`real`), all else in
float32; with `real` FLOAT the very same network runs on onnxruntime's CPU, which is how its numerics are checked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ...errors import BuildError
from ...export.config import MoEConfig
from ...export.functions import DOMAIN
from ...export.gating import list_gates
from ._canonical import (
    Matrix,
    Rewriter,
    attributes_of,
    find_calls,
    find_linears,
    finish_model,
    linear_matrix,
    replace_each,
    take_loads,
)
from ._trt_attention import (
    ATTENTION_BY_LENGTH,
    ATTENTION_BY_MASK,
    TENSOR_SCATTER,
    lower_grouped_attention,
    lower_sink_attention,
)
from ._trt_form import NetworkForm, cache_widths
from ._trt_gates import lower_gates
from ._trt_inputs import RunInputs, count_slots, lower_angles_by_lane, lower_inputs
from ._trt_latent import lower_latent_attention
from ._trt_moe import lower_experts
from ._trt_parts import Part, cut_part
from ._trt_weights import LoweredWeights, Stored

WEIGHTS_FILE = "model.weights"

# Calls whose bodies are as good as anything else; every other one is lowered.
_INLINED = (
    "Positions",
    "RotaryAngles",
    "LongRotaryAngles",
    "DynamicRotaryAngles",
    "SwiGLU",
    "SixBitPlanes",
    "SixBitCodes",  # of bundles of before, which is told where its weights are read
    "Float8Scales",
)
_LOWERED = {
    "LatentAttention": lower_latent_attention,
    "GroupedAttention": lower_grouped_attention,
    "SinkAttention": lower_sink_attention,
}
_EXPERTS = ("Experts", "BiasedExperts")


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of the cache, [lanes, heads, L, dim]."""

    name: str
    heads: int
    dim: int

    def to_json(self) -> dict[str, Any]:
        """As engine.json has it: `width` elements a token."""
        return {"name": self.name, "width": self.heads * self.dim, "dtype": "float16", "heads": self.heads}


@dataclass
class LoweredNetwork:
    """The lowered graph, its weights' plan, and the tensors of its cache in order, with `slots` tokens' room; `chunk`
    tokens at most in a run."""

    model: ir.Model
    weights: LoweredWeights
    form: NetworkForm
    slots: int
    chunk: int
    cache: list[CacheTensor] = field(default_factory=list)

    def save(self, folder: Path, name: str) -> None:
        """Write the graph alone; `weights.write` writes what it points to."""
        (folder / name).write_bytes(ir.to_proto(self.model).SerializeToString())


def lower_network(
    model: ir.Model,
    config: MoEConfig,
    max_seq_len: int,
    *,
    real: ir.DataType,
    part: Part | None = None,
    form: NetworkForm | None = None,
) -> LoweredNetwork:
    """Rewrite a canonical model, or a `part` of it, in place.

    Afterwards: inputs input_ids int64 [T], start int64 [S] (each lane's first new token's position), rows int64 [R]
    (which of the new tokens get logits), where there are several lanes source int64 [S] (`RunInputs`), and past.NAME
    [S, heads, L, dim] (zeros at first: what lies behind the length is masked, but must be finite); outputs logits
    float32 [R, vocab], present.NAME (to be bound to the address of past.NAME), experts.LAYER int64 and weights.LAYER
    float32 [T, k] (`_trt_gates` says what experts of -1 are). A load-aware gate takes load.LAYER float32 [E]. A part
    that is not the first takes hidden float32 [T, H] in place of input_ids; one that is not the last gives hidden.next
    [T, H] in place of logits, and takes no rows.

    Raises:
        BuildError: an op that is not lowered, or weights that TensorRT does not take.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    check_ops(model)
    loads = take_loads(model)
    part = part or Part(0, config.num_hidden_layers, config.num_hidden_layers)
    cut_part(model, part, config.hidden_size)
    form = form or NetworkForm()
    weights = LoweredWeights(real, part.weights, fp8=form.fp8)
    lowering = Lowering(model, config, max_seq_len, weights, form)
    lowering.inputs = lower_inputs(lowering, part)
    model.graph.inputs.extend(load for load in loads if load.uses())
    if lowering.lanes > 1:
        lower_angles_by_lane(lowering)
    if part.is_first:
        lowering.lower_embedding()
    for kind, lower in _LOWERED.items():
        for call in find_calls(model, kind):
            lower(lowering, call)
    for kind in _EXPERTS:
        replace_each(lowering.rewriter, find_calls(model, kind), lowering.lower_experts)
    if part.is_last:
        lowering.lower_head()
    else:
        lowering.type_output(0, "hidden.next", ir.DataType.FLOAT, ["T", config.hidden_size])
    # What lower_linears asks for first must outlive the pass; in a part without experts nothing else does.
    shared = [lowering.inputs.single, lowering.inputs.stepping]
    model.graph.outputs.extend(shared)
    RemoveUnusedNodesPass()(model)
    del model.graph.outputs[-len(shared) :]
    lowering.lower_linears()
    lower_gates(lowering)
    lowering.finish()
    return lowering.network


def check_ops(model: ir.Model) -> None:
    """Raises BuildError naming the first op of the moedge domain that this target does not lower."""
    known = {*_INLINED, *_LOWERED, *_EXPERTS, *list_gates()}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type not in known:
            raise BuildError(
                f"{node.name}: TensorRT engines of this version do not have moedge.{node.op_type}; build for the "
                "onnxruntime target: moedge build ... --profile cpu"
            )


class Lowering:
    inputs: RunInputs

    def __init__(
        self, model: ir.Model, config: MoEConfig, max_seq_len: int, weights: LoweredWeights, form: NetworkForm
    ) -> None:
        self.model = model
        self.graph = model.graph
        self.config = config
        self.lanes = form.lanes
        self.expanded = form.expanded
        self.slot_count = count_slots(max_seq_len, form.lanes, cache_widths(config, form))
        self.weights = weights
        self.real = weights.real
        self.rewriter = Rewriter(model)
        self.linears = find_linears(model)
        self.network = LoweredNetwork(model, weights, form, self.slot_count, min(form.chunk, max_seq_len))
        self.more_outputs: list[ir.Value] = []
        self.head_weight = "embed.weight" if config.tie_word_embeddings else "head.weight"
        self.table: Stored | None = None
        self.expert_inputs: set[ir.Value | None] = set()

    # precision

    def half(self, x: ir.Value | None) -> ir.Value:
        """x as what a matrix product takes."""
        assert x is not None
        return x if self.real == ir.DataType.FLOAT else self.rewriter.op("Cast", [x], to=int(self.real))

    def full(self, x: ir.Value) -> ir.Value:
        return x if self.real == ir.DataType.FLOAT else self.rewriter.op("Cast", [x], to=int(ir.DataType.FLOAT))

    def product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.full(self.rewriter.op("MatMul", [x, weight]))

    # inputs and outputs

    def lower_embedding(self) -> None:
        """TensorRT lets only a DequantizeLinear read codes: one that only casts, then rows and scales are looked up."""
        output = next(value for node in self.graph for value in node.outputs if value.name == "embed.output")
        node = output.producer()
        assert node is not None
        op, ints = self.rewriter.op, self.rewriter.ints
        gather = node if node.op_type == "Gather" else node.inputs[0].producer()  # type: ignore[union-attr]
        assert gather is not None and gather.inputs[0] is not None
        tokens = gather.inputs[1]
        if node.op_type != "DequantizeLinear":
            matrix = Matrix(gather.inputs[0])
            self.table = self.store_linear("embed.weight", [matrix], as_it_is=True)
            rows = self.full(op("Gather", [self.table.data, tokens]))
        else:
            matrix = _gathered_matrix(node)
            self.table = self.store_linear("embed.weight", [matrix], as_it_is=True)
            blocks = matrix.shape[1] // self.table.block
            codes = op("DequantizeLinear", [self.table.data, self.unit()])
            codes = op("Reshape", [codes, ints(matrix.shape[0], blocks, self.table.block)])
            scales = self.full(op("Gather", [self.table.scales, tokens]))
            rows = op("Mul", [self.full(op("Gather", [codes, tokens])), op("Unsqueeze", [scales, ints(2)])])
            if self.table.offsets is not None:
                offsets = self.full(op("Gather", [self.table.offsets, tokens]))
                rows = op("Add", [rows, op("Unsqueeze", [offsets, ints(2)])])
            rows = op("Reshape", [rows, ints(-1, matrix.shape[1])])
        self.rewriter.replace(node, [rows])

    def lower_head(self) -> None:
        """Logits only for the rows that are asked for."""
        rows = ir.val("rows", ir.DataType.INT64, ["R"])
        self.graph.inputs.insert(2, rows)
        (use,) = self.graph.initializers["final_norm.weight"].uses()
        norm = use.node
        last = self.rewriter.op("Gather", [norm.inputs[0], rows], axis=0)
        inputs = [last, *norm.inputs[1:]]
        self.rewriter.replace(norm, [self.rewriter.op(norm.op_type, inputs, **attributes_of(norm))])
        reshape = self.graph.outputs[0].producer()
        assert reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None
        vocab = self.config.vocab_size
        self.graph.outputs[0] = reshape.inputs[0]
        self.graph.remove(reshape, safe=True)
        self.type_output(0, "logits", ir.DataType.FLOAT, ["R", vocab])

    def type_output(self, index: int, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value = self.graph.outputs[index]
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)

    def finish(self) -> None:
        """Functions are inlined but for the cache's, which every importer must meet by its name."""
        from onnx_ir.passes.common import InlinePass

        self.graph.outputs.extend(self.more_outputs)
        finish_model(self.model, {})
        self.weights.take_over(self.graph)
        InlinePass()(self.model)
        used = {(node.domain, node.op_type) for node in self.graph}
        for text in (TENSOR_SCATTER, ATTENTION_BY_LENGTH, ATTENTION_BY_MASK):
            function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
            if (function.domain, function.name) in used:
                self.model.functions[function.identifier()] = function
                self.graph.opset_imports[function.domain] = 1

    # attention

    def update_cache(self, name: str, new: ir.Value, heads: int, dim: int) -> ir.Value:
        """Write rows [S, heads, t, dim] at `start`; the whole cache, [S, heads, L, dim]."""
        shape = ir.Shape([1 if self.lanes == 1 else "S", heads, self.slot_count, dim])
        past = ir.val(f"past.{name}", self.real, shape)
        self.graph.inputs.append(past)
        inputs = [past, self.half(new), self.inputs.start]
        present = self.rewriter.op("TensorScatter", inputs, domain=DOMAIN, name=f"present.{name}", axis=2)
        present.dtype, present.shape = self.real, ir.Shape(list(shape))
        self.more_outputs.append(present)
        self.network.cache.append(CacheTensor(name, heads, dim))
        return present

    # matrices

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        """Only the chosen experts for one token, all of them for a chunk; shared experts ride along where they fit."""
        self.expert_inputs.add(call.inputs[0])
        return lower_experts(self, call)

    def lower_linears(self) -> None:
        """Products of the same input become one: TensorRT would join them in one profile only and store both forms."""
        groups: dict[tuple[int, int, int], list[ir.Node]] = {}
        for node in self.linears:
            if node.graph is None:
                continue  # a shared MLP that moved in with the experts
            matrix = linear_matrix(node)
            if str(matrix.data.name).endswith(".router.weight"):
                self.lower_router(node, matrix)
                continue
            if matrix.shape[0] == 1:
                row = self.store_linear(str(matrix.data.name), [matrix], as_it_is=True)
                self.rewriter.replace(node, [self.multiply_few(node.inputs[0], row)])
                continue
            groups.setdefault((id(node.inputs[0]), matrix.bits, matrix.block_size), []).append(node)
        for nodes in groups.values():
            self.lower_group(nodes)

    def lower_router(self, node: ir.Node, matrix: Matrix) -> None:
        """Stays in float32. An odd number of rows TensorRT would pad for the chunk's product, and store both forms."""
        rows = matrix.shape[0]
        more = -rows % 4
        if more or matrix.data.dtype != ir.DataType.FLOAT:
            padded = self.put(self.weights.padded_rows(f"{matrix.data.name}.padded", matrix.data, more))
            y = self.rewriter.op("MatMul", [node.inputs[0], self.rewriter.op("Transpose", [padded], perm=[1, 0])])
            ints = self.rewriter.ints
            if more:
                y = self.rewriter.op("Slice", [y, ints(0), ints(rows), ints(1)])
            self.rewriter.replace(node, [y])

    def lower_group(self, nodes: list[ir.Node]) -> None:
        matrices = [linear_matrix(node) for node in nodes]
        name = "+".join(str(matrix.data.name) for matrix in matrices)
        x = nodes[0].inputs[0]
        if name == self.head_weight:
            tied = self.table if self.config.tie_word_embeddings else None
            weight = tied or self.store_linear(name, matrices, as_it_is=True)
            y = self.multiply_few(x, weight) if weight.bits else self.multiply(x, weight)
        elif matrices[0].bits or self.weights.fp8 or len(nodes) > 1 or x in self.expert_inputs:
            y = self.multiply_split(x, self.store_linear(name, matrices))
        else:
            y = self.multiply(x, self.store_linear(name, matrices))
        if len(nodes) == 1:
            self.rewriter.replace(nodes[0], [y])
            return
        parts = self.rewriter.ops("Split", [y, self.rewriter.ints(*[m.shape[0] for m in matrices])], len(nodes), axis=1)
        for node, part in zip(nodes[1:], parts[1:], strict=True):
            node.outputs[0].replace_all_uses_with(part)
        self.rewriter.replace(nodes[0], [parts[0]])

    def multiply(self, x: ir.Value | None, weight: Stored) -> ir.Value:
        """x [T, K] times the transpose of [N, K], one product; fused with the dequantization of INT4.

        Of INT8 TensorRT fuses only one scale a row, and going from blocks to rows would quantize a second time: for a
        chunk it writes each matrix out in half precision, a cost that the chunk's tokens share. There the matrix is the
        left factor, because a transposed constant would be stored again as such. Offsets meet the sums of x's blocks: a
        product of their own, as added to the codes they would end the fusion.
        """
        op = self.rewriter.op
        x = self.half(x)
        if weight.bits == 8:
            y = op("MatMul", [self.dequantize(weight), op("Transpose", [x], perm=[1, 0])])
            y = self.full(op("Transpose", [y], perm=[1, 0]))
        else:
            y = self.product(x, op("Transpose", [self.dequantize(weight)], perm=[1, 0]))
        if weight.offsets is None:
            return y
        return op("Add", [y, self.product(self.block_sums(x, weight), op("Transpose", [weight.offsets], perm=[1, 0]))])

    def block_sums(self, x: ir.Value, weight: Stored) -> ir.Value:
        """x [T, K] -> [T, K/B]."""
        op, ints = self.rewriter.op, self.rewriter.ints
        assert weight.data.shape is not None
        width = int(weight.data.shape[1])  # type: ignore[arg-type]
        blocks = op("Reshape", [self.full(x), ints(-1, width // weight.block, weight.block)], allowzero=1)
        return self.half(op("ReduceSum", [blocks, ints(2)], keepdims=0))

    def multiply_split(self, x: ir.Value | None, weight: Stored) -> ir.Value:
        """Codes: sums for one token, a product for a chunk. Left to itself TensorRT makes sums of the small products of
        the first profile, reads them in another layout, and so stores those codes twice. A token of each lane goes
        with the chunk, but for INT8, which a product would first write out in half precision."""
        h = self.half(x)
        end = self.inputs.stepping if weight.bits == 8 else self.inputs.single
        rest = self.other_rows(h, end)
        if x not in self.expert_inputs or weight.bits == 8:
            many = self.multiply(rest, weight)
        else:
            many = self.multiply_apart(rest, weight)
        return self.rewriter.op("Concat", [self.multiply_few(self.first_rows(h, end), weight), many], axis=0)

    def multiply_apart(self, x: ir.Value, weight: Stored) -> ir.Value:
        """In another rank, or TensorRT would join it with the experts' product of the same x and store both forms."""
        op, zero = self.rewriter.op, self.rewriter.ints(0)
        plain = dataclasses.replace(weight, offsets=None)
        y = op("Squeeze", [self.multiply(op("Unsqueeze", [x, zero]), plain), zero])
        if weight.offsets is None:
            return y
        offsets = op("Transpose", [weight.offsets], perm=[1, 0])
        sums = op("Unsqueeze", [self.block_sums(x, weight), zero])
        return op("Add", [y, op("Squeeze", [self.product(sums, offsets), zero])])

    def multiply_few(self, x: ir.Value | None, weight: Stored) -> ir.Value:
        """x [M, K] times the transpose of codes [N, K] as multiply and sum, which fuses with the dequantization."""
        op, ints = self.rewriter.op, self.rewriter.ints
        matrix = self.dequantize(weight)
        if weight.offsets is not None:
            assert weight.data.shape is not None
            rows, width = (int(size) for size in weight.data.shape)  # type: ignore[arg-type]
            blocks = op("Reshape", [matrix, ints(rows, width // weight.block, weight.block)])
            matrix = op("Reshape", [op("Add", [blocks, op("Unsqueeze", [weight.offsets, ints(2)])]), ints(rows, width)])
        terms = op("Mul", [op("Unsqueeze", [self.half(x), ints(1)]), matrix])
        return op("ReduceSum", [self.full(terms), ints(2)], keepdims=0)

    def first_rows(self, x: ir.Value, end: ir.Value | None = None, axis: int = 0) -> ir.Value:
        """The first `end` of `axis`: unless given all tokens where there is one, else none."""
        end = end or self.inputs.single
        return self.rewriter.op("Slice", [x, self.rewriter.ints(0), end, self.rewriter.ints(axis)])

    def other_rows(self, x: ir.Value, start: ir.Value | None = None, axis: int = 0) -> ir.Value:
        """What `first_rows` leaves."""
        end = self.rewriter.ints(np.iinfo(np.int64).max)
        return self.rewriter.op("Slice", [x, start or self.inputs.single, end, self.rewriter.ints(axis)])

    def by_lane(self, *shape: int) -> ir.Value:
        """int64: [S, *shape], to reshape to."""
        if self.inputs.lane_count is None:
            return self.rewriter.ints(1, *shape)
        return self.rewriter.op("Concat", [self.inputs.lane_count, self.rewriter.ints(*shape)], axis=0)

    def by_lane_and(self, count: int, *shape: int) -> ir.Value:
        """int64: [S * count, *shape], to reshape to."""
        if self.inputs.lane_count is None:
            return self.rewriter.ints(count, *shape)
        product = self.rewriter.op("Mul", [self.inputs.lane_count, self.rewriter.ints(count)])
        return self.rewriter.op("Concat", [product, self.rewriter.ints(*shape)], axis=0)

    def store_linear(self, name: str, matrices: list[Matrix], *, as_it_is: bool = False) -> Stored:
        return self.put_stored(self.weights.linear(f"{name}.lowered", matrices, as_it_is=as_it_is))

    def put_stored(self, stored: Stored) -> Stored:
        self.put(stored.data)
        for beside in (stored.scales, stored.offsets):
            if beside is not None:
                self.put(beside)
        return stored

    def put(self, value: ir.Value | None) -> ir.Value:
        """Make a lowered tensor an initializer of the graph."""
        assert value is not None
        self.graph.register_initializer(value)
        return value

    def dequantize(self, weight: Stored) -> ir.Value:
        if not weight.bits:
            return weight.data
        if weight.by_row:
            return self.rewriter.op("DequantizeLinear", [weight.data, weight.scales], axis=0)
        return self.rewriter.op("DequantizeLinear", [weight.data, weight.scales], axis=1, block_size=weight.block)

    def unit(self, value: float = 1.0) -> ir.Value:
        """`value` in `real`: the scale of a DequantizeLinear that only casts."""
        dtype = np.float32 if self.real == ir.DataType.FLOAT else np.float16
        return self.rewriter.constant("unit" if value == 1.0 else f"unit.{value!r}", np.array(value, dtype))


def _gathered_matrix(node: ir.Node) -> Matrix:
    """The table behind a DequantizeLinear of gathered codes, scales and zero points."""
    sources = []
    for value in node.inputs:
        assert value is not None
        gather = value.producer()
        assert gather is not None and gather.inputs[0] is not None
        sources.append(gather.inputs[0])
    return Matrix(sources[0], sources[1], sources[2], node.attributes["block_size"].as_int())
