"""The canonical graph: one decoder, written once, whose shape follows `MoEConfig`.

T = tokens (batch x sequence), H = hidden size. Everything per token is flat [T, ...]; only attention looks at the
batch. Weights are external initializers in weights.bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from ..bundle import WEIGHTS
from .config import (
    CLAMPED_SWIGLU_ALPHA,
    CLAMPED_SWIGLU_LIMIT,
    GroupedAttentionConfig,
    LatentAttentionConfig,
    MoEConfig,
)
from .functions import DOMAIN, FUNCTIONS, OPSET, VERSION
from .gating import LoopBody, list_gates
from .layout import Layout, Slot
from .load_balance import find_scores, start_load

IR_VERSION = 11
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8": ir.DataType.UINT8,  # no type of ONNX's
    "uint8": ir.DataType.UINT8,
    "uint6": ir.DataType.UINT8,  # in planes
    "uint4": ir.DataType.UINT4,
    "int64": ir.DataType.INT64,
}


def build_canonical_graph(config: MoEConfig, layout: Layout, base_dir: Path) -> ir.Model:
    """The canonical model; `base_dir` holds weights.bin (it need not exist yet)."""
    return _GraphBuilder(config, layout, base_dir).build()


class _GraphBuilder:
    def __init__(self, config: MoEConfig, layout: Layout, base_dir: Path) -> None:
        self.config = config
        self.layout = layout
        self.base_dir = base_dir
        self.tape = ir.tape.Tape()
        self.initializers: dict[str, ir.Value] = {}
        self.loads: list[ir.Value] = []
        self.new_loads: list[ir.Value] = []

    def build(self) -> ir.Model:
        config = self.config
        input_ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        cos, sin = self.rotary_angles(self.call("Positions", [input_ids], name="positions"))
        tokens = self.op("Reshape", [input_ids, self.ints("shape.flat", [-1])])
        x = self.hidden(self.embed(tokens))
        for layer in range(config.num_hidden_layers):
            x = self.decoder_layer(layer, x, cos, sin)
        logits = self.linear(self.norm(x, "final_norm.weight"), self.head_name(), "head.bias")
        logits = self.scaled(logits, "logits_divisor", "Div")
        batch_sequence = self.op("Shape", [input_ids])
        shape = self.op("Concat", [batch_sequence, self.ints("shape.vocab", [config.vocab_size])], axis=0)
        logits = self.op("Reshape", [logits, shape], name="logits")
        logits.dtype = ir.DataType.FLOAT
        logits.shape = ir.Shape(["batch", "sequence", config.vocab_size])
        for load in self.new_loads:
            load.dtype, load.shape = ir.DataType.FLOAT, ir.Shape([config.moe.num_experts])
        return self.finish([input_ids, *self.loads], [logits, *self.new_loads])

    def finish(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.tape.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, DOMAIN: VERSION},
            name=self.config.family,
        )
        used = {node.op_type for node in graph if node.domain == DOMAIN}
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="moedge", functions=load_functions(used))
        return model

    def head_name(self) -> str:
        return "embed.weight" if self.config.tie_word_embeddings else "head.weight"

    def rotary_angles(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos, sin [batch, sequence, rope/2] of the config's kind of rope."""
        rope = self.config.rope
        attributes: dict[str, int | float] = {} if rope.kind == "fixed" else {"original_length": rope.original_length}
        if rope.kind == "dynamic":
            kind = "DynamicRotaryAngles"
            tables = {"exponents": np.arange(0, rope.dim, 2) / rope.dim}
            growth = rope.dim / (rope.dim - 2)
            attributes |= {"theta": float(rope.theta), "factor": float(rope.factor), "growth": growth}
        else:
            kind = "RotaryAngles"
            tables = {"inv_freq": np.array(rope.inv_freq)}
            attributes["attention_factor"] = float(rope.attention_factor)
        if rope.kind == "long":
            kind = "LongRotaryAngles"
            tables["long_inv_freq"] = np.array(rope.long_inv_freq)
            attributes["long_attention_factor"] = float(rope.long_attention_factor)
        values = [self.constant(f"rope.{name}", table.astype(np.float32)) for name, table in tables.items()]
        cos, sin = self.call_many(kind, [positions, *values], 2, attributes, names=["rope.cos", "rope.sin"])
        return cos, sin

    # layers

    def decoder_layer(self, layer: int, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """x [T, H] -> [T, H], named layers.N.output, which is where the parity check cuts the graph."""
        prefix = f"layers.{layer}"
        if layer == 0:  # here and not in the embedding, whose output is rows of a table
            x = self.scaled(x, "embedding_multiplier")
        h = self.norm(x, f"{prefix}.attn_norm.weight")
        attention = self.config.attention
        if isinstance(attention, LatentAttentionConfig):
            attended = self.latent_attention(attention, f"{prefix}.attn", h, cos, sin)
        else:
            attended = self.grouped_attention(attention, layer, h, cos, sin)
        x = self.op("Add", [x, self.scaled(attended, "residual_multiplier")], name=f"{prefix}.attn.output")
        h = self.norm(x, f"{prefix}.mlp_norm.weight")
        if layer in self.config.moe.layers:
            mlp = self.mixture(prefix, h)
        else:
            mlp = self.gated_mlp(f"{prefix}.mlp", h)
        mlp = self.scaled(mlp, "residual_multiplier")
        return self.hidden(self.op("Add", [x, mlp], name=f"{prefix}.output"))

    def scaled(self, x: ir.Value, multiplier: str, kind: Literal["Mul", "Div"] = "Mul") -> ir.Value:
        """x times, or by, one of the config's multipliers; 1, as in most models, costs no node."""
        factor = float(getattr(self.config, multiplier))
        if factor == 1:
            return x
        return self.op(kind, [x, self.constant(multiplier, np.array(factor, np.float32))])

    def hidden(self, x: ir.Value) -> ir.Value:
        """Type a value between layers: the parity check makes graph inputs of these."""
        x.dtype, x.shape = ir.DataType.FLOAT, ir.Shape(["tokens", self.config.hidden_size])
        return x

    def grouped_attention(
        self, attention: GroupedAttentionConfig, layer: int, h: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> ir.Value:
        prefix = f"layers.{layer}.attn"
        q, k, v = (self.linear(h, f"{prefix}.{name}.weight") for name in ("q", "k", "v"))
        if attention.qk_norm != "none":
            per_head = attention.head_dim if attention.qk_norm == "head" else 0
            q = self.norm(q, f"{prefix}.q_norm.weight", head_dim=per_head)
            k = self.norm(k, f"{prefix}.k_norm.weight", head_dim=per_head)
        if attention.clip is not None:
            low, high = (self.constant(f"clip.{s}", np.array(s * attention.clip, np.float32)) for s in (-1, 1))
            q, k, v = (self.op("Clip", [value, low, high]) for value in (q, k, v))
        attributes = {
            "num_heads": attention.num_heads,
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "scale": float(attention.scale),
            "interleaved": int(self.config.rope.interleaved),
            "window": attention.windows[layer],
        }
        inputs, kind = [q, k, v, cos, sin], "GroupedAttention"
        if attention.sinks:
            inputs, kind = [*inputs, self.weight(f"{prefix}.sinks")], "SinkAttention"
        attended = self.call(kind, inputs, attributes, name=prefix)
        return self.linear(attended, f"{prefix}.o.weight")

    def latent_attention(
        self, attention: LatentAttentionConfig, prefix: str, h: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> ir.Value:
        if attention.q_lora_rank is None:
            q = self.linear(h, f"{prefix}.q.weight")
        else:
            q_a = self.linear(h, f"{prefix}.q_a.weight")
            q_a = self.norm(q_a, f"{prefix}.q_a_norm.weight", attention.lora_norm_eps)
            q = self.linear(q_a, f"{prefix}.q_b.weight")
        kv_a = self.linear(h, f"{prefix}.kv_a.weight")
        sizes = self.ints("split.kv_a", [attention.kv_lora_rank, attention.qk_rope_head_dim])
        latent, k_rope = self.op_many("Split", [kv_a, sizes], 2, axis=-1)
        latent = self.norm(latent, f"{prefix}.kv_a_norm.weight", attention.lora_norm_eps)
        attributes = {
            "num_heads": attention.num_heads,
            "qk_nope_head_dim": attention.qk_nope_head_dim,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "kv_lora_rank": attention.kv_lora_rank,
            "scale": float(attention.scale),
            "interleaved": int(self.config.rope.interleaved),
        }
        k_up, v_up = self.weight(f"{prefix}.k_up.weight"), self.weight(f"{prefix}.v_up.weight")
        inputs = [q, latent, k_rope, cos, sin, k_up, v_up]
        attended = self.call("LatentAttention", inputs, attributes, name=prefix)
        return self.linear(attended, f"{prefix}.o.weight")

    def gated_mlp(self, prefix: str, h: ir.Value) -> ir.Value:
        gate_up = self.linear(h, f"{prefix}.gate_up.weight")
        return self.linear(self.call("SwiGLU", [gate_up]), f"{prefix}.down.weight")

    def mixture(self, prefix: str, h: ir.Value) -> ir.Value:
        gate = self.config.moe.gate
        # router.bias is the gate's correction bias; a bias of the router's own is logits_bias.
        logits = self.linear(h, f"{prefix}.router.weight", f"{prefix}.router.logits_bias")
        inputs = [logits, self.weight(f"{prefix}.router.bias")] if gate.bias else [logits]
        names = [f"{prefix}.gate.experts", f"{prefix}.gate.weights"]
        if gate.base is not None:
            layer = prefix.removeprefix("layers.")
            inputs = [*find_scores(gate.base).score(_GateNodes(self), inputs, gate.base.attributes), self.load(layer)]
            names.append(f"new_load.{layer}")
        experts, weights, *loads = self.call_many(gate.op, inputs, len(names), gate.attributes, names=names)
        self.new_loads += loads
        order = self.layout[f"{prefix}.experts.gate_up.weight"].order
        if order is None:
            y = self.experts(f"{prefix}.experts", [h, experts, weights])
        elif len(order.shape) == 1:
            ordered = self.op("Gather", [h, self.external(order)], axis=1)
            y = self.experts(f"{prefix}.experts", [ordered, experts, weights])
        else:
            y = self.ordered_experts(f"{prefix}.experts", h, experts, weights, order)
        if f"{prefix}.shared.down.weight" in self.layout:
            shared = self.gated_mlp(f"{prefix}.shared", h)
            if self.config.moe.shared_gate:
                shared = self.op("Mul", [shared, self.op("Sigmoid", [self.linear(h, f"{prefix}.shared.gate.weight")])])
            y = self.op("Add", [y, shared])
        return y

    def ordered_experts(
        self, prefix: str, h: ir.Value, experts: ir.Value, weights: ir.Value, order: Slot
    ) -> ir.Value:
        """Each expert wants its inputs in an order of its own: a row for each choice, which chooses that expert alone.

        h [T, H], experts and weights [T, k] -> [T, H]. GatherND, because onnx's evaluator is wrong for long
        GatherElements.
        """
        orders = self.op("Gather", [self.external(order), experts], axis=0)  # [T, k, in]
        places = self.op("Reshape", [orders, self.ints("shape.places", [0, -1, 1])])
        picked = self.op("GatherND", [h, places], batch_dims=1)  # [T, k*in]
        rows = self.op("Reshape", [picked, self.ints(f"shape.rows.{order.shape[-1]}", [-1, order.shape[-1]])])
        column = self.ints("shape.column", [-1, 1])
        choices, shares = self.op("Reshape", [experts, column]), self.op("Reshape", [weights, column])
        choices.dtype, choices.shape = ir.DataType.INT64, ir.Shape(["choices", 1])
        outputs = self.experts(prefix, [rows, choices, shares])
        top_k = self.config.moe.num_experts_per_tok
        shape = self.ints("shape.choices", [-1, top_k, self.config.hidden_size])
        by_token = self.op("Reshape", [outputs, shape])
        return self.op("ReduceSum", [by_token, self.ints("axis.choices", [1])], keepdims=0)

    def load(self, layer: str) -> ir.Value:
        """A gate's running load, float32 [E]: an input that may be left out where a sequence begins."""
        even = np.full(self.config.moe.num_experts, start_load(self.config), np.float32)
        load = self.constant(f"load.{layer}", even)
        self.loads.append(load)
        return load

    def experts(self, prefix: str, inputs: list[ir.Value]) -> ir.Value:
        """`inputs`: tokens [T, H], their experts and weights [T, k]."""
        parts = ("gate_up", "down")
        weights = [self.weight(f"{prefix}.{part}.weight") for part in parts]
        if self.config.moe.activation == "swiglu":
            return self.call("Experts", [*inputs, *weights], name=prefix)
        biases = [self.weight(f"{prefix}.{part}.bias") for part in parts]
        attributes = {"alpha": CLAMPED_SWIGLU_ALPHA, "limit": CLAMPED_SWIGLU_LIMIT}
        operands = [weights[0], biases[0], weights[1], biases[1]]
        return self.call("BiasedExperts", [*inputs, *operands], attributes, name=prefix)

    # weights

    def linear(self, x: ir.Value, name: str, bias: str | None = None) -> ir.Value:
        """x [T, in] times the transpose of a weight [out, in], plus a bias where the checkpoint has one."""
        order = self.layout[name].order
        if order is not None:
            x = self.op("Gather", [x, self.external(order)], axis=1)
        y = self.op("MatMul", [x, self.op("Transpose", [self.weight(name)], perm=[1, 0])])
        bias = name.removesuffix(".weight") + ".bias" if bias is None else bias
        if bias in self.layout:
            y = self.op("Add", [y, self.weight(bias)])
        return y

    def norm(self, x: ir.Value, name: str, epsilon: float | None = None, head_dim: int = 0) -> ir.Value:
        """The config's norm over the last axis of x [T, H]; over each `head_dim` of it where that is given."""
        epsilon = float(self.config.rms_norm_eps if epsilon is None else epsilon)
        if self.config.norm == "layer":
            inputs = [x, self.weight(name), self.weight(name.removesuffix(".weight") + ".bias")]
            return self.op("LayerNormalization", inputs, axis=-1, epsilon=epsilon)
        if head_dim:
            x = self.op("Reshape", [x, self.ints(f"shape.heads.{head_dim}", [0, -1, head_dim])])
        x = self.op("RMSNormalization", [x, self.weight(name)], axis=-1, epsilon=epsilon)
        if head_dim:
            x = self.op("Reshape", [x, self.ints("shape.rows", [0, -1])])
        return x

    def weight(self, name: str) -> ir.Value:
        """A canonical tensor in float32, dequantized or cast where it is stored otherwise."""
        stored = self.layout[name]
        data = self.external(stored.data)
        if stored.data.dtype == "uint6":
            data = self.call("SixBitPlanes", [data])
        if stored.scales is not None and stored.zero_points is not None:
            scales = self.external(stored.scales)
            if stored.scales.dtype == "float16":  # whose products onnx would round to float16
                scales = self.op("Cast", [scales], to=int(ir.DataType.FLOAT))
            elif stored.scales.dtype == "float8":
                scales = self.call("Float8Scales", [scales])
            inputs = [data, scales, self.external(stored.zero_points)]
            axis = len(stored.data.shape) - 1
            return self.op("DequantizeLinear", inputs, axis=axis, block_size=stored.group_size)
        if stored.data.dtype in ("float16", "bfloat16"):
            return self.op("Cast", [data], to=int(ir.DataType.FLOAT))
        return data

    def embed(self, tokens: ir.Value) -> ir.Value:
        """Rows of the table; a quantized one is dequantized after the look-up, not before."""
        stored = self.layout["embed.weight"]
        rows = self.op("Gather", [self.external(stored.data), tokens], axis=0)
        if stored.scales is not None and stored.zero_points is not None:
            scales = self.op("Gather", [self.external(stored.scales), tokens], axis=0)
            zero_points = self.op("Gather", [self.external(stored.zero_points), tokens], axis=0)
            inputs = [rows, scales, zero_points]
            return self.op("DequantizeLinear", inputs, axis=1, block_size=stored.group_size, name="embed.output")
        if stored.data.dtype == "float16":
            return self.op("Cast", [rows], to=int(ir.DataType.FLOAT), name="embed.output")
        rows.name = "embed.output"
        return rows

    def external(self, slot: Slot) -> ir.Value:
        if slot.name not in self.initializers:
            shape = ir.Shape(slot.tensor_shape)
            tensor = ir.ExternalTensor(
                WEIGHTS,
                slot.offset,
                slot.nbytes,
                DTYPES[slot.dtype],
                shape=shape,
                name=slot.name,
                base_dir=self.base_dir,
            )
            self.initializers[slot.name] = ir.Value(
                name=slot.name, shape=shape, type=ir.TensorType(DTYPES[slot.dtype]), const_value=tensor
            )
        return self.initializers[slot.name]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def ints(self, name: str, values: list[int]) -> ir.Value:
        return self.constant(name, np.array(values, np.int64))

    # nodes

    def op(self, kind: str, inputs: list[ir.Value], *, name: str | None = None, **attributes: Any) -> ir.Value:
        value = self.tape.op(kind, inputs, attributes)
        if name is not None:
            value.name = name
        return value

    def op_many(self, kind: str, inputs: list[ir.Value], outputs: int, **attributes: Any) -> list[ir.Value]:
        return list(self.tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs))

    def call(
        self, kind: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None, name: str | None = None
    ) -> ir.Value:
        value = self.tape.op(kind, inputs, attributes, domain=DOMAIN, version=VERSION, name=name)
        if name is not None:
            value.name = name
        return value

    def call_many(
        self, kind: str, inputs: list[ir.Value], outputs: int, attributes: dict[str, Any], *, names: list[str]
    ) -> list[ir.Value]:
        values = self.tape.op_multi_out(
            kind, inputs, attributes, num_outputs=outputs, domain=DOMAIN, version=VERSION, name=names[0]
        )
        for value, name in zip(values, names, strict=True):
            value.name = name
        return list(values)


class _GateNodes:
    """What a gate's `score` needs to write its nodes into the canonical graph."""

    def __init__(self, graph: _GraphBuilder) -> None:
        self.graph = graph

    def op(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> ir.Value:
        return self.graph.op(kind, list(inputs), **attributes)

    def ops(self, kind: str, inputs: Sequence[Any], outputs: int, **attributes: Any) -> list[ir.Value]:
        return self.graph.op_many(kind, list(inputs), outputs, **attributes)

    def constant(self, name: str, array: Any) -> ir.Value:
        return self.graph.constant(name, array)

    def ints(self, *values: int) -> ir.Value:
        return self.graph.ints("ints." + "_".join(str(value) for value in values), list(values))

    def part_rows(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return [], list(values)

    def loop(self, most: Any, go: Any, carried: Sequence[Any], body: LoopBody) -> list[Any]:
        raise NotImplementedError("scores take no rounds")


def load_functions(names: set[str]) -> list[ir.Function]:
    """The bodies of moedge functions, gates included."""
    texts = {**FUNCTIONS, **{op: gate.FUNCTION for op, gate in list_gates().items()}}
    return [ir.serde.deserialize_function(onnx.parser.parse_function(texts[name])) for name in sorted(names)]


def check_graph(path: Path) -> None:
    """onnx's own checker over a saved model, moedge's ops included: attributes, types and shapes.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: name the node.
    """
    from .gating._schemas import register_schemas

    register_schemas()
    onnx.checker.check_model(str(path), full_check=True)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a model whose weights are external already; the tensors themselves are not read."""
    path.write_bytes(ir.to_proto(model).SerializeToString())
