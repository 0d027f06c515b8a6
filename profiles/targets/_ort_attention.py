"""Attention on onnxruntime's CPU kernels: positions behind a cache, and each layer's attention over it.

The graph is flat over tokens. With one lane they are one sequence's. With more, a run takes any number of tokens of the
first lane's sequence, or one token of each of several; `Lanes` deals the rows out to the sequences, each of which has a
cache of its own, and puts what comes back together. S = tokens of the run, T = rows in a sequence's cache, those of the
run included, n = heads, r = kv_lora_rank, w = r + rope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ._canonical import Array, Rewriter, attributes_of, find_calls, values_of
from ._ort_kv import CacheEntry, GroupedCache, LatentCache

MS = "com.microsoft"
GROUPED = ("GroupedAttention", "SinkAttention")


class Lanes:
    """How the rows of a run belong to sequences.

    With more than one lane these inputs say it: places int64 [1, S], each row's position; lengths int64 [lanes], what
    each cache holds before the run; sizes int64 [lanes], rows of each; where rows are dealt out by nodes of the graph,
    take int64 [all of sizes], the run's row for each of theirs, and give int64 [S], the way back. A run may hold a row
    twice: products over an even number of rows round alike.
    """

    def __init__(self, rewriter: Rewriter, count: int, deals: bool) -> None:
        self.rewriter = rewriter
        self.count = count
        if count == 1:
            return
        self.positions = self._input("places", [1, "S"])
        self.lengths = self._input("lengths", [count])
        self.sizes = self._input("sizes", [count])
        op, ints = rewriter.op, rewriter.ints
        if deals:
            self.take = self._input("take", ["K"])
            self.give = self._input("give", ["S"])
            self.other_sizes = op("Slice", [self.sizes, ints(1), ints(count), ints(0)], name="other_sizes")
        # Rows of which the rounding depends on how many are multiplied together go piece by piece: each for itself
        # where lanes are stepped together, and the whole of a prompt's chunk, which is the first lane's.
        first = op("Slice", [self.sizes, ints(0), ints(1), ints(0)])
        together = op("Greater", [first, ints(1)])
        self.pieces = op("Where", [together, ints(1), op("Shape", [self.positions], start=1)], name="pieces")

    def name(self, kind: str, entry: str, lane: int) -> str:
        """What a lane's tensor of the cache is called in the graph."""
        return f"{kind}.{entry}" if self.count == 1 else f"{kind}.{entry}.{lane}"

    def deal(self, value: ir.Value, axis: int = 0) -> list[ir.Value]:
        """Rows, which lie along `axis`, to those of each lane."""
        if self.count == 1:
            return [value]
        rows = self.rewriter.op("Gather", [value, self.take], axis=axis)
        return self.rewriter.ops("Split", [rows, self.sizes], self.count, axis=axis)

    def deal_after(self, value: ir.Value, written: Sequence[ir.Value]) -> list[ir.Value]:
        """As `deal`, in a node that runs after `written`, the first lane's new rows, lie in the cache.

        The caches are read through views that already show those rows, so something must keep the order.
        """
        op, ops = self.rewriter.op, self.rewriter.ops
        counts = [op("Shape", [rows], start=0, end=1) for rows in written]
        sizes = op("Max", counts) if len(counts) > 1 else counts[0]
        if self.count == 1:
            return ops("Split", [value, sizes], 1, axis=0)
        rows = op("Gather", [value, self.take], axis=0)
        return ops("Split", [rows, op("Concat", [sizes, self.other_sizes], axis=0)], self.count, axis=0)

    def join(self, values: Sequence[ir.Value], axis: int = 0) -> ir.Value:
        """What `deal` took apart."""
        if self.count == 1:
            return values[0]
        return self.rewriter.op("Gather", [self.rewriter.op("Concat", values, axis=axis), self.give], axis=axis)

    def multiply_heads(self, rows: ir.Value, matrices: ir.Value, **attributes: Any) -> ir.Value:
        """Rows [S, n, i], each head by its own of the constant `matrices` [n, i, o] (or as `FusedMatMul` is told)."""
        op, ints = self.rewriter.op, self.rewriter.ints
        if self.count == 1:
            result = op("FusedMatMul", [rows, matrices], domain=MS, transBatchA=1, **attributes)
            return op("Transpose", [result], perm=[1, 0, 2])
        assert matrices.shape is not None
        heads, first, second = matrices.shape.numpy()
        width, height = (second, first) if attributes.get("transB") else (first, second)
        if matrices.const_value is not None:
            tall = self.rewriter.reshaped(matrices, [heads, 1, first, second])
        else:
            tall = op("Reshape", [matrices, ints(heads, 1, first, second)])
        by_head = op("Transpose", [rows], perm=[1, 0, 2])
        cut = op("Concat", [ints(heads), self.pieces, ints(-1, width)], axis=0)
        result = op("FusedMatMul", [op("Reshape", [by_head, cut]), tall], domain=MS, **attributes)
        return op("Transpose", [op("Reshape", [result, ints(heads, -1, height)])], perm=[1, 0, 2])

    def _input(self, name: str, shape: list[int | str]) -> ir.Value:
        value = ir.val(name, ir.DataType.INT64, shape)
        self.rewriter.model.graph.inputs.append(value)
        return value


class AttentionLowering:
    """Replaces positions and attention of one model; `cache` then says what is kept of each layer.

    `max_seq_len`: wider windows are no windows. `kv_cache`: fp32, fp16 or int8; `scales`: of int8 keys and values, by
    entry, float32 [width].
    """

    deals = True  # whether nodes of the graph deal a run's rows out to the lanes

    def __init__(
        self,
        rewriter: Rewriter,
        max_seq_len: int | None,
        lanes: int = 1,
        kv_cache: str = "fp32",
        scales: Mapping[str, Array] | None = None,
    ) -> None:
        self.rewriter = rewriter
        self.model = rewriter.model
        self.graph = rewriter.model.graph
        self.max_seq_len = max_seq_len
        self.cache: list[CacheEntry] = []
        self.mask: ir.Value | None = None
        self.ends: list[tuple[ir.Value, ir.Value]] = []  # of each lane, int32: the last row [1], and how many []
        self.windows: list[dict[int, ir.Value]] = []  # of each lane: window -> mask
        tokens = ir.val("input_ids", ir.DataType.INT64, ["S"])
        self.graph.inputs[0].replace_all_uses_with(tokens)
        self.graph.inputs[0] = self.tokens = tokens
        self.lanes = Lanes(rewriter, lanes, self.deals)
        self.kv_cache = kv_cache
        self.grouped = GroupedCache(rewriter, kv_cache, scales or {})

    def lower(self) -> None:
        """All of it; the graph's first input becomes flat, and the cache's inputs and outputs are added."""
        latent = find_calls(self.model, "LatentAttention")
        grouped = [call for kind in GROUPED for call in find_calls(self.model, kind)]
        (call,) = find_calls(self.model, "Positions")
        op, ints = self.rewriter.op, self.rewriter.ints
        caches = [self._latent_cache(each) for each in latent]
        views = [self._latent_views(each, cache) for each, cache in zip(latent, caches, strict=True)]
        count = op("Shape", [self.tokens])
        if self.lanes.count > 1:
            positions, length, first = self.lanes.positions, self.lanes.lengths, self.lanes.sizes
        else:
            first = count
            if latent:
                length = op("Sub", [caches[0].count(views[0][0]), count])
            else:
                length = ir.val("length", ir.DataType.INT64, [1])
                self.graph.inputs.append(length)
            steps = op("Range", [self._number(0), op("Squeeze", [count, ints(0)]), self._number(1)])
            positions = op("Unsqueeze", [op("Add", [steps, length]), ints(0)])
        if latent:
            self._make_mask(positions, caches[0].count(views[0][0]))
        if grouped:
            self._make_totals(grouped, positions, op("Add", [length, first]))
        # Replaced here and not by a name of its own: an input keeps its name.
        self.rewriter.replace(call, [op("Identity", [positions])] if self.lanes.count > 1 else [positions])
        for each, cache, of_lanes in zip(latent, caches, views, strict=True):
            self._lower_latent(each, cache, of_lanes)
        for each in grouped:
            self._lower_grouped(each)

    def _make_mask(self, positions: ir.Value, count: ir.Value) -> None:
        """Causal mask [S, 1, T] of the first lane; the others have one token, which sees everything."""
        op, ints = self.rewriter.op, self.rewriter.ints
        own = op("Reshape", [positions, ints(-1)])
        if self.lanes.count > 1:
            own = op("Slice", [own, ints(0), op("Slice", [self.lanes.sizes, ints(0), ints(1), ints(0)]), ints(0)])
        columns = op("Range", [self._number(0), op("Squeeze", [count, ints(0)]), self._number(1)])
        ahead = op("Less", [op("Unsqueeze", [own, ints(1, 2)]), columns])
        self.mask = op("Where", [ahead, self._float(-np.inf), self._float(0)], name="causal_mask")

    def _make_totals(self, calls: list[ir.Node], positions: ir.Value, totals: ir.Value) -> None:
        """For each lane the rows in its cache, and for each sliding window what its scores get added.

        That is [1, 1, S, T], minus infinity behind the window: `local_window_size` alone spares the work and not the
        token just behind it, since onnxruntime 1.23 attends to one more than later versions do.
        """
        op, ops, ints, lanes = self.rewriter.op, self.rewriter.ops, self.rewriter.ints, self.lanes.count
        narrow = op("Cast", [totals], to=int(ir.DataType.INT32))
        one = self.rewriter.constant("int32.1", np.array([1], np.int32))
        for total in ops("Split", [narrow], lanes, axis=0, num_outputs=lanes) if lanes > 1 else [narrow]:
            self.ends.append((op("Sub", [total, one]), op("Squeeze", [total, ints(0)])))
        widths = {attributes_of(call)["window"] for call in calls} - {0}
        widths = {width for width in widths if self.max_seq_len is None or width < self.max_seq_len}
        own = self.lanes.deal(op("Reshape", [positions, ints(-1)])) if widths else []
        self.windows = [{} for _ in range(lanes)]
        for lane, rows in enumerate(own):
            total = op("Cast", [self.ends[lane][1]], to=int(ir.DataType.INT64))
            columns = op("Range", [self._number(0), total, self._number(1)])
            distance = op("Sub", [op("Unsqueeze", [rows, ints(0, 1, 3)]), columns])
            for width in sorted(widths):
                limit = self.rewriter.constant(f"window.{width}", np.array(width, np.int64))
                behind = op("GreaterOrEqual", [distance, limit])
                mask = op("Where", [behind, self._float(-np.inf), self._float(0)], name=f"window_mask.{width}.{lane}")
                self.windows[lane][width] = mask

    def _number(self, value: int) -> ir.Value:
        return self.rewriter.constant(f"int.{value}", np.array(value, np.int64))

    def _float(self, value: float) -> ir.Value:
        return self.rewriter.constant(f"float.{value}", np.array(value, np.float32))

    def _latent_cache(self, call: ir.Node) -> LatentCache:
        a = attributes_of(call)
        return LatentCache(self.rewriter, self.kv_cache, a["kv_lora_rank"], a["qk_rope_head_dim"])

    def _latent_views(self, call: ir.Node, cache: LatentCache) -> list[list[ir.Value]]:
        """The cache inputs of an attention call, for each lane those of all entries."""
        entries = cache.entries(layer_of(call))
        self.cache += entries
        found = []
        for lane in range(self.lanes.count):
            views = []
            for entry in entries:
                name = self.lanes.name("cache", entry.name, lane)
                shape: list[int | str] = [name + ".rows"]
                shape += [entry.width // entry.parts] if entry.width != entry.parts else []
                views.append(ir.val(name, entry.onnx_type, shape))
            self.graph.inputs.extend(views)
            found.append(views)
        return found

    def _lower_grouped(self, call: ir.Node) -> None:
        """`GroupQueryAttention`, its cache in place: the buffer goes in as the past and comes out as the present."""
        op, ints = self.rewriter.op, self.rewriter.ints
        q, k, v, cos, sin = call.inputs[:5]
        a = attributes_of(call)
        heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
        rows: list[ir.Value | None] = []
        for value, count in ((q, heads), (k, groups), (v, groups)):
            row = op("Reshape", [value, ints(1, -1, count * dim)])
            if value is not v:
                row = op("RotaryEmbedding", [row, cos, sin], interleaved=a["interleaved"], num_heads=count)
            rows.append(self._widen_heads(row, count, dim))
        room = kernel_head_size(dim)
        for kind in ("key", "value"):
            self.cache.append(CacheEntry(f"{kind}.{layer_of(call)}", groups * room, groups, self.grouped.dtype))
        rows = [self.grouped.narrow(row) for row in rows]
        if self.lanes.count == 1:
            attended = self._attend_grouped(call, 0, rows)
        else:
            parts = self.lanes.deal(op("Concat", rows, axis=2), axis=1)
            ones = [self._attend_grouped(call, lane, [part, None, None]) for lane, part in enumerate(parts)]
            attended = self.lanes.join(ones, axis=1)
        if room != dim:
            by_head = op("Reshape", [attended, ints(1, -1, heads, room)])
            attended = op("Slice", [by_head, ints(0), ints(dim), ints(3)])
        self.rewriter.replace(call, [op("Reshape", [attended, ints(-1, heads * dim)])])

    def _attend_grouped(self, call: ir.Node, lane: int, rows: list[ir.Value | None]) -> ir.Value:
        """One lane's attention over its cache; `rows` are q, k and v, or all of them side by side."""
        a, window = attributes_of(call), attributes_of(call)["window"]
        layer, groups, room = layer_of(call), a["num_key_value_heads"], kernel_head_size(a["head_dim"])
        shape = [1, groups, "capacity", room]
        entries = [f"{kind}.{layer}" for kind in ("key", "value")]
        kind = self.cache[-1].onnx_type
        pasts = [ir.val(self.lanes.name("past", entry, lane), kind, shape) for entry in entries]
        self.graph.inputs.extend(pasts)
        rotation = [None] * 3  # its own, which takes a table of every position
        mask = self.windows[lane].get(window)
        sinks = [self.grouped.narrow(value) for value in call.inputs[5:]] or [None]
        attended, *presents = self.rewriter.ops(
            "GroupQueryAttention",
            [
                *(*rows, *pasts, *self.ends[lane], *rotation, self.grouped.narrow(mask), *sinks),
                *self.grouped.scale_inputs(entries, groups),
            ],
            3,
            domain=MS,
            num_heads=a["num_heads"],
            kv_num_heads=groups,
            scale=float(a["scale"]),
            local_window_size=window if mask is not None else -1,
            **self.grouped.attributes,
        )
        for present, entry in zip(presents, entries, strict=True):
            present.name, present.dtype = self.lanes.name("new", entry, lane), kind
            present.shape = ir.Shape(shape)
        self.graph.outputs.extend(presents)
        return self.grouped.widen(attended)

    def _widen_heads(self, row: ir.Value, count: int, dim: int) -> ir.Value:
        """[1, S, count * dim] with zeros behind each head, up to the size the kernel takes; they change no product."""
        op, ints, room = self.rewriter.op, self.rewriter.ints, kernel_head_size(dim)
        if room == dim:
            return row
        by_head = op("Reshape", [row, ints(1, -1, count, dim)])
        padded = op("Pad", [by_head, ints(0, room - dim), None, ints(3)])
        return op("Reshape", [padded, ints(1, -1, count * room)])

    def _lower_latent(self, call: ir.Node, cache: LatentCache, views: list[list[ir.Value]]) -> None:
        """Absorbed form (arXiv:2405.04434, section 2.1.2): queries go to the latent's space, the cache stays.

        Rows are token by token, [S, n, ...], so that those of a lane lie together.
        """
        op, ops, ints = self.rewriter.op, self.rewriter.ops, self.rewriter.ints
        q, latent, k_rope, cos, sin = call.inputs[:5]
        k_up, v_up = (values_of(self.rewriter, value) for value in call.inputs[5:])
        a = attributes_of(call)
        heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        by_head = op("Reshape", [q, ints(-1, heads, nope + rope)])
        q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=2)
        absorbed = self.lanes.multiply_heads(q_nope, k_up)
        # One rotation for the queries' heads and, as a head more, the key.
        ropes = op("Concat", [q_rope, op("Unsqueeze", [k_rope, ints(1)])], axis=1)
        ropes = op("Reshape", [ropes, ints(1, -1, (heads + 1) * rope)])
        ropes = op("RotaryEmbedding", [ropes, cos, sin], interleaved=a["interleaved"], num_heads=heads + 1)
        q_rope, k_rope = ops("Split", [op("Reshape", [ropes, ints(-1, heads + 1, rope)]), ints(heads, 1)], 2, axis=1)
        query = op("Concat", [absorbed, q_rope], axis=2)
        new = op("Concat", [latent, op("Squeeze", [k_rope, ints(1)])], axis=1)
        first = self._write_latent(layer_of(call), cache, new)
        mixed = []
        dealt = zip(self.lanes.deal_after(query, first), cache.read(views, first), strict=True)
        for lane, (rows, known) in enumerate(dealt):
            scores = op("FusedMatMul", [rows, known], domain=MS, transB=1, alpha=float(a["scale"]))
            if lane == 0:
                scores = op("Add", [scores, self.mask])
            name = f"attention.{layer_of(call)}" if lane == 0 else None  # the name `moedge trace` knows
            mixed.append(op("MatMul", [op("Softmax", [scores], axis=2, name=name), known]))
        both = op("Slice", [self.lanes.join(mixed), ints(0), ints(rank), ints(2)])
        values = self.lanes.multiply_heads(both, v_up, transB=1)
        self.rewriter.replace(call, [op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])])

    def _write_latent(self, layer: int, cache: LatentCache, new: ir.Value) -> list[ir.Value]:
        """Give new rows [S, w] out to each lane's cache; those of the first lane, all entries."""
        first = []
        for entry, rows in zip(cache.entries(layer), cache.write(new), strict=True):
            dealt = self.lanes.deal(rows)
            for lane, part in enumerate(dealt):
                part.name, part.dtype = self.lanes.name("new", entry.name, lane), entry.onnx_type
                part.shape = ir.Shape([part.name + ".rows", entry.width])
            self.graph.outputs.extend(dealt)
            first.append(dealt[0])
        return first


def kernel_head_size(dim: int) -> int:
    """`GroupQueryAttention` takes multiples of 8."""
    return -(-dim // 8) * 8


def layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
