"""The KV cache in less than fp32 on onnxruntime's CPU: what is written to it, and how it is read.

The latent of MLA is written out in fp32 for each product. int8: blocks of channels with a scale of their own for each
token, so that neither a calibration nor an outlier in another token can hurt. Grouped attention leaves both to its
kernel. `GroupQueryAttention` has in int8 a scale for each channel, found once by `find_scales`; our own has one for
each token and head (_ort_own_attention.py). T = rows of a cache, S = tokens of a run, w = width, b = block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..shape import latent_block
from ._canonical import Rewriter

DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}  # of a cache's elements
_LARGEST = 127.0  # magnitude of an int8 code


@dataclass(frozen=True)
class CacheEntry:
    """A tensor of the KV cache: a row of `width` elements a token.

    Without `heads` the graph takes a view of the rows up to the run's last, and gives the run's own, which are bound to
    the view's end. The view is [T * parts, width / parts], or [T * parts] where that is a single element. With `heads`
    it takes and gives the whole buffer [1, heads, capacity, width / heads].
    """

    name: str
    width: int
    heads: int = 0
    dtype: str = "float32"
    parts: int = 1

    def to_json(self) -> dict[str, Any]:
        kind = {"dtype": self.dtype, "heads": self.heads}
        return {"name": self.name, "width": self.width, **kind, **({"parts": self.parts} if self.parts > 1 else {})}

    @property
    def bytes(self) -> int:
        """Of a token."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def onnx_type(self) -> ir.DataType:
        return {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}[self.dtype]


class LatentCache:
    """Rows of latent and rotated key, [T, w] once read. `rank` and `rope` are their widths."""

    def __init__(self, rewriter: Rewriter, kind: str, rank: int, rope: int) -> None:
        self.rewriter = rewriter
        self.kind = kind
        self.width = rank + rope
        self.block = latent_block(rank, rope)

    def entries(self, layer: int) -> list[CacheEntry]:
        name = f"latent.{layer}"
        if self.kind != "int8":
            return [CacheEntry(name, self.width, dtype=DTYPES[self.kind])]
        parts = self.width // self.block
        codes = CacheEntry(name, self.width, dtype="int8", parts=parts)
        return [codes, CacheEntry(f"scale.{layer}", parts, parts=parts)]

    def write(self, rows: ir.Value) -> list[ir.Value]:
        """What goes into each entry for new rows [S, w]."""
        op, ints = self.rewriter.op, self.rewriter.ints
        if self.kind == "fp32":
            return [rows]
        if self.kind == "fp16":
            return [op("Cast", [rows], to=int(ir.DataType.FLOAT16))]
        blocks = op("Reshape", [rows, ints(-1, self.block)])
        largest = op("ReduceMax", [op("Abs", [blocks]), ints(1)], keepdims=0)
        step = self.rewriter.constant("int8.step", np.array(1 / _LARGEST, np.float32))
        least = self.rewriter.constant("int8.least", np.array(1e-30, np.float32))  # a scale of 0 divides by it
        scales = op("Max", [op("Mul", [largest, step]), least])
        codes = op("QuantizeLinear", [blocks, scales], axis=0, output_dtype=int(ir.DataType.INT8))
        whole, parts = ints(-1, self.width), ints(-1, self.width // self.block)
        return [op("Reshape", [codes, whole]), op("Reshape", [scales, parts])]

    def read(self, lanes: list[list[ir.Value]], written: list[ir.Value]) -> list[ir.Value]:
        """The rows float32 [T, w] of each lane's views, once `written`, the first lane's new rows, lie in the cache.

        Nothing in a view says when it may be read, so that stands in a branch whose condition says it.
        """
        op, ints = self.rewriter.op, self.rewriter.ints
        if self.kind == "fp32":  # the products themselves wait: see `Lanes.deal_after`
            return [views[0] for views in lanes]
        counts = [op("Shape", [rows], start=0, end=1) for rows in written]
        there = op("GreaterOrEqual", [op("Min", counts) if len(counts) > 1 else counts[0], ints(0)])
        then, otherwise = self._branch(lanes), self._branch(lanes)
        return self.rewriter.ops("If", [there], len(lanes), then_branch=then, else_branch=otherwise)

    def _branch(self, lanes: list[list[ir.Value]]) -> ir.Graph:
        nodes: list[ir.Node] = []
        for views in lanes:
            if self.kind == "fp16":
                nodes.append(ir.node("Cast", views, {"to": int(ir.DataType.FLOAT)}))
                continue
            blocks = ir.node("DequantizeLinear", views, {"axis": 0})
            nodes += [blocks, ir.node("Reshape", [blocks.outputs[0], self.rewriter.ints(-1, self.width)])]
        outputs = [node.outputs[0] for node in nodes if node.op_type != "DequantizeLinear"]
        for place, node in enumerate(nodes):
            node.outputs[0].name = f"blocks.{place}"  # a name of the graph around would be taken for that
        for lane, value in enumerate(outputs):
            value.name, value.type = f"known.{lane}", ir.TensorType(ir.DataType.FLOAT)
        return ir.Graph([], outputs, nodes=nodes, name="rows")

    def count(self, views: list[ir.Value]) -> ir.Value:
        """T, int64 [1]."""
        op, ints = self.rewriter.op, self.rewriter.ints
        rows = op("Shape", [views[0]], start=0, end=1)
        return op("Div", [rows, ints(self.width // self.block)]) if self.kind == "int8" else rows


class GroupedCache:
    """Keys and values by head, as `GroupQueryAttention` keeps them."""

    def __init__(self, rewriter: Rewriter, kind: str, scales: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.rewriter = rewriter
        self.kind = kind
        self.scales = scales
        self.dtype = DTYPES[kind]
        self.attributes: dict[str, Any] = {}
        if kind == "int8":
            self.attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

    def narrow(self, value: ir.Value | None) -> ir.Value | None:
        """An input of the kernel in the type that goes with this cache."""
        if self.kind != "fp16" or value is None:
            return value
        return self.rewriter.op("Cast", [value], to=int(ir.DataType.FLOAT16))

    def widen(self, value: ir.Value) -> ir.Value:
        """The kernel's output in fp32."""
        return self.rewriter.op("Cast", [value], to=int(ir.DataType.FLOAT)) if self.kind == "fp16" else value

    def scale_inputs(self, names: list[str], groups: int) -> list[ir.Value | None]:
        """The kernel's last inputs: a scale for each channel of keys and values."""
        if self.kind != "int8":
            return []
        return [
            self.rewriter.constant(f"scale.{name}", self.scales[name].astype(np.float32).reshape(1, groups, 1, -1))
            for name in names
        ]
