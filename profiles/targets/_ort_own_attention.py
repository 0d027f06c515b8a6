"""Attention by the ops of runtime/kernels: one node a layer for any number of lanes, which writes the caches itself.

The canonical call's own inputs go in, before their norms, with each lane's caches, whole: they are inputs that the op
changes, so nothing comes out again, nothing is bound anew from step to step, and no order of nodes has to be kept up.
An input costs onnxruntime half a microsecond a run, whoever reads it: a lane has one for each kind of cache, of all
layers, and an op takes the layer that its attribute names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from ...runtime.kernels import DOMAIN, IN_PLACE, STACKED, stack_of
from ._canonical import attributes_of, find_calls, find_matrix
from ._ort_attention import GROUPED, AttentionLowering, kernel_head_size, layer_of
from ._ort_codes import bytes_of, zero_points_of
from ._ort_kv import DTYPES, CacheEntry


class OwnAttentionLowering(AttentionLowering):
    """As `AttentionLowering`; inputs are places int64 [1, S] and length int64 [1] with one lane too."""

    deals = False

    def lower(self) -> None:
        (call,) = find_calls(self.model, "Positions")
        self.stacks: list[ir.Value] = []  # of each lane in turn all kinds of cache
        self.sizes: ir.Value | None = None
        if self.lanes.count > 1:
            self.places, self.lengths, self.sizes = self.lanes.positions, self.lanes.lengths, self.lanes.sizes
        else:
            self.places = ir.val("places", ir.DataType.INT64, [1, "S"])
            self.lengths = ir.val("length", ir.DataType.INT64, [1])
            self.graph.inputs.extend([self.places, self.lengths])
        # Replaced by a node and not by the input itself, which keeps its name.
        self.rewriter.replace(call, [self.rewriter.op("Identity", [self.places])])
        latent = find_calls(self.model, "LatentAttention")
        grouped = [call for kind in GROUPED for call in find_calls(self.model, kind)]
        self.layers = len(latent) + len(grouped)
        for each in latent:
            self._lower_latent_call(each)
        for each in grouped:
            self._lower_grouped_call(each)
        self.model.metadata_props.update({IN_PLACE: "1", STACKED: "1"})

    def _lower_latent_call(self, call: ir.Node) -> None:
        a, cache = attributes_of(call), self._latent_cache(call)
        entries = cache.entries(layer_of(call))
        caches, place = self._take_caches(entries)
        *rows, k_up, v_up = call.inputs
        ups = [find_matrix(value) for value in (k_up, v_up)]
        codes: list[ir.Value | None] = [None] * 4
        if all(up.bits for up in ups):
            k_up, v_up = (bytes_of(self.rewriter, up) for up in ups)
            points = (None if up.symmetric else zero_points_of(self.rewriter, up) for up in ups)
            codes = [*(up.scales for up in ups), *points]
        found = _joined_latent(rows[1], rows[2])
        attributes: dict[str, Any] = {}
        if found is not None:
            rows[1:3], attributes = found
        attended = self.rewriter.op(
            "LatentAttention",
            [*rows, k_up, v_up, self.lengths, self.sizes, *codes, *caches],
            domain=DOMAIN,
            **attributes,
            scale=float(a["scale"]),
            interleaved=a["interleaved"],
            scaled=int(len(entries) > 1),
            layer=place,
        )
        self.rewriter.replace(call, [attended])

    def _lower_grouped_call(self, call: ir.Node) -> None:
        a, layer = attributes_of(call), layer_of(call)
        groups, room = a["num_key_value_heads"], kernel_head_size(a["head_dim"])
        entries = own_entries(self.kv_cache, layer, groups, room)
        q, k, v, cos, sin, *sinks = call.inputs
        caches, place = self._take_caches(entries)
        found = [_norm_before(value, a["head_dim"]) for value in (q, k)]
        attributes: dict[str, Any] = {}
        norms: list[ir.Value | None] = []
        if found[0] is not None and found[1] is not None and found[0][2] == found[1][2]:
            (q, *_), (k, *_), attributes = found[0], found[1], {"epsilon": found[0][2]}
            norms = [found[0][1], found[1][1]]
        rows = [q, k, v, cos, sin, self.lengths, self.sizes, *(sinks or [None]), None, None]  # no scales of channels
        window = a["window"] if self.max_seq_len is None or a["window"] < self.max_seq_len else 0
        attended = self.rewriter.op(
            "GroupedAttention",
            [*rows, *norms, *caches],
            domain=DOMAIN,
            **attributes,
            num_heads=a["num_heads"],
            num_key_value_heads=groups,
            head_dim=a["head_dim"],
            scale=float(a["scale"]),
            interleaved=a["interleaved"],
            window=window,
            layer=place,
        )
        self.rewriter.replace(call, [attended])

    def _take_caches(self, entries: list[CacheEntry]) -> tuple[list[ir.Value], int]:
        """The inputs that have the next layer's caches, as they have every layer's, and its place in them."""
        if not self.stacks:
            self.stacks = [self._make_stack(entry, lane) for lane in range(self.lanes.count) for entry in entries]
            self.graph.inputs.extend(self.stacks)
        place = len(self.cache) // len(entries)
        self.cache += entries
        first, own = ([replace(entry, name="") for entry in some] for some in (self.cache[: len(entries)], entries))
        assert first == own, "all layers' rows are of one shape"
        return self.stacks, place

    def _make_stack(self, entry: CacheEntry, lane: int) -> ir.Value:
        shape: list[int | str] = [self.layers, "capacity", entry.width]
        if entry.heads:
            shape = [self.layers, 1, entry.heads, "capacity", entry.width // entry.heads]
        return ir.val(self.lanes.name("past", stack_of(entry.name), lane), entry.onnx_type, shape)


def own_entries(kind: str, layer: int, groups: int, room: int) -> list[CacheEntry]:
    """Keys and values of a layer; in int8 with a scale for each token and head, made when a row is written."""
    dtype = DTYPES[kind]
    entries = [CacheEntry(f"{name}.{layer}", groups * room, groups, dtype) for name in ("key", "value")]
    if kind == "int8":
        entries += [CacheEntry(f"scale.{name}.{layer}", groups, groups) for name in ("key", "value")]
    return entries


def _norm_before(value: ir.Value | None, head_dim: int = 0) -> tuple[ir.Value, ir.Value, float] | None:
    """What an RMSNorm over rows, or between two reshapes over heads, is of, its weight and its epsilon."""
    node = value.producer() if value is not None else None
    by_head = node is not None and node.op_type == "Reshape"
    if by_head and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "RMSNormalization" or node.attributes.get_int("axis", -1) != -1:
        return None
    x, weight = node.inputs[:2]
    if by_head:
        before = x.producer() if x is not None else None
        x = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
    if x is None or weight is None or weight.dtype != ir.DataType.FLOAT or weight.shape is None:
        return None
    if by_head and weight.shape[0] != head_dim:
        return None
    return x, weight, float(node.attributes.get_float("epsilon", 1e-5))


def _joined_latent(
    latent: ir.Value | None, k_rope: ir.Value | None
) -> tuple[list[ir.Value | None], dict[str, Any]] | None:
    """The row that latent and rotated key are split off, and the weight of the latent's norm, for the op to do both."""
    found = _norm_before(latent)
    split = found[0].producer() if found is not None else None
    if found is None or split is None or split.op_type != "Split" or list(split.outputs) != [found[0], k_rope]:
        return None
    return [split.inputs[0], found[1]], {"epsilon": found[2]}
