"""The network that both TensorRT targets build: a canonical graph lowered to one ONNX with the cache inside.

One sequence: T = new tokens, L = slots of the cache (max_seq_len), n = heads, r = kv_lora_rank, E = experts, H = hidden
size, I = intermediate size. Two optimization profiles are built from it: exactly one token, and a chunk of 2 or more.
Matrix products are in half precision (`real`), all else in float32; with `real` FLOAT the very same network runs on
onnxruntime's CPU, which is how its numerics are checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ...export.config import MoEConfig
from ...export.functions import DOMAIN
from ...export.gating import list_gates
from ._canonical import (
    Matrix,
    Rewriter,
    attributes_of,
    find_calls,
    find_linears,
    find_matrix,
    finish_model,
    linear_matrix,
    replace_each,
)
from ._trt_moe import lower_experts
from ._trt_weights import LoweredWeights, Stored, check_symmetric

CHUNK = 256  # tokens of the second profile: its MoE runs every expert, so a longer chunk costs more than it saves
WEIGHTS_FILE = "model.weights"

# TensorRT's importer takes an op of this name, of any domain, for its in-place cache layer; others run the body.
# cache [1, 1, L, width], update [1, 1, T, width], start int64 [1] -> present [1, 1, L, width]
_TENSOR_SCATTER = f"""
<domain: "{DOMAIN}", opset_import: ["" : 23]>
TensorScatter <axis> (cache, update, start) => (present)
{{
    flat = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    outer = Constant <value_ints = [0, 1]> ()
    all = Shape (cache)
    rows = Squeeze (cache, outer)
    new = Squeeze (update, outer)
    count_1d = Shape <start = 0, end = 1> (new)
    first = Constant <value_ints = [0]> ()
    count = Squeeze (count_1d, first)
    steps = Range (zero, count, one)
    places = Add (steps, start)
    column = Unsqueeze (places, flat)
    written = ScatterND (rows, column, new)
    present = Reshape (written, all)
}}
"""


@dataclass
class LoweredNetwork:
    """The lowered graph and its weights' plan; `cache` is (name, width) of each cache tensor, in order."""

    model: ir.Model
    weights: LoweredWeights
    cache: list[tuple[str, int]] = field(default_factory=list)

    def save(self, folder: Path, name: str) -> None:
        """Write the graph alone; `weights.write` writes what it points to."""
        (folder / name).write_bytes(ir.to_proto(self.model).SerializeToString())


def lower_network(
    model: ir.Model, config: MoEConfig, max_seq_len: int, *, real: ir.DataType, location: str = WEIGHTS_FILE
) -> LoweredNetwork:
    """Rewrite a canonical model in place.

    Afterwards: inputs input_ids int64 [T], start int64 [1] (the first new token's position), rows int64 [R] (which of
    the new tokens get logits) and past.NAME [1, 1, L, width] (zeros at first: what lies behind the length is masked,
    but must be finite); outputs logits float32 [R, vocab], present.NAME (to be bound to the address of past.NAME),
    experts.LAYER int64 and weights.LAYER float32 [T, k].

    Raises:
        BuildError: weights that TensorRT does not take.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    lowering = Lowering(model, config, max_seq_len, LoweredWeights(real, location))
    lowering.lower_inputs()
    lowering.lower_embedding()
    for call in find_calls(model, "LatentAttention"):
        lowering.lower_latent_attention(call)
    replace_each(lowering.rewriter, find_calls(model, "Experts"), lowering.lower_experts)
    lowering.lower_head()
    RemoveUnusedNodesPass()(model)
    lowering.lower_linears()
    lowering.lower_gates()
    lowering.finish()
    return lowering.network


class Lowering:
    def __init__(self, model: ir.Model, config: MoEConfig, max_seq_len: int, weights: LoweredWeights) -> None:
        self.model = model
        self.graph = model.graph
        self.config = config
        self.max_seq_len = max_seq_len
        self.weights = weights
        self.real = weights.real
        self.rewriter = Rewriter(model)
        self.linears = find_linears(model)
        self.network = LoweredNetwork(model, weights)
        self.more_outputs: list[ir.Value] = []
        self.head_weight = "embed.weight" if config.tie_word_embeddings else "head.weight"
        self.table: Stored | None = None
        self.start: ir.Value | None = None
        self.visible: ir.Value | None = None  # bool [T, L]
        self.single: ir.Value | None = None  # int64 [1]: T where it is one token, else 0

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

    def lower_inputs(self) -> None:
        """Positions begin at `start`; the mask and the choice of the branch are made once for all layers."""
        op, ints = self.rewriter.op, self.rewriter.ints
        tokens, self.start = ir.val("input_ids", ir.DataType.INT64, ["T"]), ir.val("start", ir.DataType.INT64, [1])
        self.graph.inputs[0].replace_all_uses_with(tokens)
        self.graph.inputs[:] = [tokens, self.start]
        (call,) = find_calls(self.model, "Positions")
        count = op("Shape", [tokens], start=0, end=1)
        zero = self.rewriter.constant("int.0", np.array(0, np.int64))
        one = self.rewriter.constant("int.1", np.array(1, np.int64))
        places = op("Add", [op("Range", [zero, op("Squeeze", [count, ints(0)]), one]), self.start])
        length = self.rewriter.constant(f"int.{self.max_seq_len}", np.array(self.max_seq_len, np.int64))
        slots = op("Unsqueeze", [op("Range", [zero, length, one]), ints(0)])
        self.visible = op("LessOrEqual", [slots, op("Unsqueeze", [places, ints(1)])], name="visible")
        # Never an If: TensorRT folds shape arithmetic in each profile, so the half that has no rows vanishes.
        self.single = op("Where", [op("LessOrEqual", [count, ints(1)]), count, ints(0)], name="single")
        self.rewriter.replace(call, [op("Unsqueeze", [places, ints(0)])])

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
            self.table = self.store_linear("embed.weight", [matrix])
            rows = self.full(op("Gather", [self.table.data, tokens]))
        else:
            matrix = _gathered_matrix(node)
            self.table = self.store_linear("embed.weight", [matrix])
            blocks = matrix.shape[1] // self.table.block
            codes = op("DequantizeLinear", [self.table.data, self.unit()])
            codes = op("Reshape", [codes, ints(matrix.shape[0], blocks, self.table.block)])
            scales = self.full(op("Gather", [self.table.scales, tokens]))
            rows = op("Mul", [self.full(op("Gather", [codes, tokens])), op("Unsqueeze", [scales, ints(2)])])
            rows = op("Reshape", [rows, ints(-1, matrix.shape[1])])
        self.rewriter.replace(node, [rows])

    def lower_head(self) -> None:
        """Logits only for the rows that are asked for."""
        rows = ir.val("rows", ir.DataType.INT64, ["R"])
        self.graph.inputs.insert(2, rows)
        (use,) = self.graph.initializers["final_norm.weight"].uses()
        norm = use.node
        last = self.rewriter.op("Gather", [norm.inputs[0], rows], axis=0)
        attributes = attributes_of(norm)
        self.rewriter.replace(norm, [self.rewriter.op("RMSNormalization", [last, norm.inputs[1]], **attributes)])
        reshape = self.graph.outputs[0].producer()
        assert reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None
        vocab = self.config.vocab_size
        self.graph.outputs[0] = reshape.inputs[0]
        self.graph.remove(reshape)
        self.type_output(0, "logits", ir.DataType.FLOAT, ["R", vocab])

    def type_output(self, index: int, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value = self.graph.outputs[index]
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)

    def lower_gates(self) -> None:
        """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
        for kind, gate in list_gates().items():
            for call in find_calls(self.model, kind):
                layer, attributes = _layer_of(call), attributes_of(call)
                experts, weights = gate.lower(self.rewriter, call.inputs, attributes)
                self.rewriter.replace(call, [experts, weights])
                experts.name, weights.name = f"experts.{layer}", f"weights.{layer}"
                experts.dtype, weights.dtype = ir.DataType.INT64, ir.DataType.FLOAT
                experts.shape = weights.shape = ir.Shape(["T", attributes["top_k"]])
                self.more_outputs += [experts, weights]

    def finish(self) -> None:
        """Functions are inlined but for the cache's, which every importer must meet by its name."""
        from onnx_ir.passes.common import InlinePass

        self.graph.outputs.extend(self.more_outputs)
        finish_model(self.model, {})
        self.weights.take_over(self.graph)
        InlinePass()(self.model)
        scatter = ir.serde.deserialize_function(onnx.parser.parse_function(_TENSOR_SCATTER))
        self.model.functions[scatter.identifier()] = scatter
        self.graph.opset_imports[DOMAIN] = 1

    # attention

    def lower_latent_attention(self, call: ir.Node) -> None:
        """Absorbed form (arXiv:2405.04434, section 2.1.2): queries move to the latent's space, the cache is read as is.

        Two caches and plain 2-D products: no attention kernel of TensorRT takes heads of r + rope channels. TensorRT
        copies each cache once a step for it; one joint cache, or products in 4-D, cost transposes of all of it as well.
        """
        op, ops, ints = self.rewriter.op, self.rewriter.ops, self.rewriter.ints
        q, latent, k_rope, cos, sin, k_up, v_up = call.inputs
        a = attributes_of(call)
        layer, heads, nope, rope, rank = (
            _layer_of(call),
            a["num_heads"],
            a["qk_nope_head_dim"],
            a["qk_rope_head_dim"],
            a["kv_lora_rank"],
        )
        rotary = {"interleaved": a["interleaved"]}
        # The scale goes to the queries: half precision could not hold unscaled scores.
        scale = self.rewriter.constant(f"scale.{a['scale']!r}", np.array(a["scale"], np.float32))
        by_token = op("Reshape", [op("Mul", [q, scale]), ints(1, -1, heads, nope + rope)])
        by_head = op("Transpose", [by_token], perm=[0, 2, 1, 3])
        q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
        q_rope = self.half(op("Reshape", [op("RotaryEmbedding", [q_rope, cos, sin], **rotary), ints(-1, rope)]))
        k_rope = op("RotaryEmbedding", [op("Reshape", [k_rope, ints(1, 1, -1, rope)]), cos, sin], **rotary)
        latents = self.update_cache(f"latent.{layer}", op("Reshape", [latent, ints(1, 1, -1, rank)]), rank)
        ropes = self.update_cache(f"rope.{layer}", k_rope, rope)
        # [heads, r, nope] read through a Transpose: the layout [N, K] that both profiles share.
        up = self.weights.heads(f"layers.{layer}.attn.k_up.turned", find_matrix(k_up), turned=True)
        up = op("Transpose", [self.put(up)], perm=[0, 2, 1])
        query = op("MatMul", [self.half(op("Squeeze", [q_nope, ints(0)])), up])
        query = op("Reshape", [query, ints(-1, rank)])
        scores = self.product(query, op("Transpose", [latents], perm=[1, 0]))
        scores = op("Add", [scores, self.product(q_rope, op("Transpose", [ropes], perm=[1, 0]))])
        never = self.rewriter.constant("float.never", np.array(-1e30, np.float32))
        scores = op("Where", [self.visible, op("Reshape", [scores, ints(heads, -1, self.max_seq_len)]), never])
        shares = self.half(op("Reshape", [op("Softmax", [scores], axis=-1), ints(-1, self.max_seq_len)]))
        mixed = op("Reshape", [op("MatMul", [shares, latents]), ints(heads, -1, rank)])
        down = self.weights.heads(f"layers.{layer}.attn.v_up", find_matrix(v_up), turned=False)
        values = self.product(mixed, op("Transpose", [self.put(down)], perm=[0, 2, 1]))
        values = op("Transpose", [values], perm=[1, 0, 2])
        self.rewriter.replace(call, [op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])])

    def update_cache(self, name: str, new: ir.Value, width: int) -> ir.Value:
        """Write rows [1, 1, T, width] at `start`; the whole cache as [L, width]."""
        shape = ir.Shape([1, 1, self.max_seq_len, width])
        past = ir.val(f"past.{name}", self.real, shape)
        self.graph.inputs.append(past)
        inputs = [past, self.half(new), self.start]
        present = self.rewriter.op("TensorScatter", inputs, domain=DOMAIN, name=f"present.{name}", axis=2)
        present.dtype, present.shape = self.real, shape
        self.more_outputs.append(present)
        self.network.cache.append((name, width))
        return self.rewriter.op("Reshape", [present, self.rewriter.ints(self.max_seq_len, width)])

    # matrices

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        """Only the chosen experts for one token, all of them for a chunk; shared experts ride along where they fit."""
        return lower_experts(self, call)

    def lower_linears(self) -> None:
        """Products of the same input become one: TensorRT would join them in one profile only and store both forms."""
        groups: dict[tuple[int, int, int], list[ir.Node]] = {}
        gates = set(list_gates())
        for node in self.linears:
            if node.graph is None:
                continue  # a shared MLP that moved in with the experts
            matrix = linear_matrix(node)
            check_symmetric(matrix, str(matrix.data.name))
            if any(use.node.op_type in gates for use in node.outputs[0].uses()):
                continue  # a router stays in float32
            groups.setdefault((id(node.inputs[0]), matrix.bits, matrix.block_size), []).append(node)
        for nodes in groups.values():
            self.lower_group(nodes)

    def lower_group(self, nodes: list[ir.Node]) -> None:
        matrices = [linear_matrix(node) for node in nodes]
        name = "+".join(str(matrix.data.name) for matrix in matrices)
        x = nodes[0].inputs[0]
        if name == self.head_weight:
            tied = self.table if self.config.tie_word_embeddings else None
            weight = tied or self.store_linear(name, matrices)
            y = self.multiply_few(x, weight) if weight.bits else self.multiply(x, weight)
        elif matrices[0].bits:
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
        left factor, because a transposed constant would be stored again as such.
        """
        op = self.rewriter.op
        if weight.bits == 8:
            product = op("MatMul", [self.dequantize(weight), op("Transpose", [self.half(x)], perm=[1, 0])])
            return self.full(op("Transpose", [product], perm=[1, 0]))
        return self.product(self.half(x), op("Transpose", [self.dequantize(weight)], perm=[1, 0]))

    def multiply_split(self, x: ir.Value | None, weight: Stored) -> ir.Value:
        """Codes: sums for one token, a product for a chunk. Left to itself TensorRT makes sums of the small products of
        the first profile, reads them in another layout, and so stores those codes twice."""
        h = self.half(x)
        few, many = self.multiply_few(self.first_rows(h), weight), self.multiply(self.other_rows(h), weight)
        return self.rewriter.op("Concat", [few, many], axis=0)

    def multiply_few(self, x: ir.Value | None, weight: Stored) -> ir.Value:
        """x [M, K] times the transpose of codes [N, K] as multiply and sum, which fuses with the dequantization."""
        op, ints = self.rewriter.op, self.rewriter.ints
        terms = op("Mul", [op("Unsqueeze", [self.half(x), ints(1)]), self.dequantize(weight)])
        return op("ReduceSum", [self.full(terms), ints(2)], keepdims=0)

    def first_rows(self, x: ir.Value) -> ir.Value:
        """All rows where there is one, else none."""
        return self.rewriter.op("Slice", [x, self.rewriter.ints(0), self.single, self.rewriter.ints(0)])

    def other_rows(self, x: ir.Value) -> ir.Value:
        """No row where there is one, else all."""
        end = self.rewriter.ints(np.iinfo(np.int64).max)
        return self.rewriter.op("Slice", [x, self.single, end, self.rewriter.ints(0)])

    def store_linear(self, name: str, matrices: list[Matrix]) -> Stored:
        for matrix in matrices:
            check_symmetric(matrix, name)
        return self.put_stored(self.weights.linear(f"{name}.lowered", matrices))

    def put_stored(self, stored: Stored) -> Stored:
        self.put(stored.data)
        if stored.scales is not None:
            self.put(stored.scales)
        return stored

    def put(self, value: ir.Value | None) -> ir.Value:
        """Make a lowered tensor an initializer of the graph."""
        assert value is not None
        self.graph.register_initializer(value)
        return value

    def dequantize(self, weight: Stored) -> ir.Value:
        if not weight.bits:
            return weight.data
        return self.rewriter.op("DequantizeLinear", [weight.data, weight.scales], axis=1, block_size=weight.block)

    def unit(self) -> ir.Value:
        """1 in `real`: the scale of a DequantizeLinear that only casts."""
        dtype = np.float32 if self.real == ir.DataType.FLOAT else np.float16
        return self.rewriter.constant("unit", np.array(1, dtype))


def _gathered_matrix(node: ir.Node) -> Matrix:
    """The table behind a DequantizeLinear of gathered codes, scales and zero points."""
    sources = []
    for value in node.inputs:
        assert value is not None
        gather = value.producer()
        assert gather is not None and gather.inputs[0] is not None
        sources.append(gather.inputs[0])
    return Matrix(sources[0], sources[1], sources[2], node.attributes["block_size"].as_int())


def _layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
