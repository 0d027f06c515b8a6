"""Smaller models by which a lowering is checked: the first layers, some of the experts, some rows of the vocabulary.

Dequantized, one layer of experts may be larger than the memory. A slice of the experts is a mixture like the whole: a
token that chose expert e takes expert e modulo the slice's size, in the canonical graph and in the lowered one, and
every expert has its turn in one of the slices. The vocabulary's table and head are cut likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...export.config import MoEConfig
from ...export.quantization import slice_int6
from ._canonical import Rewriter, find_calls, find_matrix

CHUNKS = (2, 1, 2)  # a chunk at the beginning, one token, a chunk behind others
DEEP_CHUNKS = (2, 1)
# onnxruntime dequantizes every matrix in every run, five times the largest at once, and takes seconds for each 100
# million parameters: a larger model is checked whole in breadth by its first layers, in depth by few of its experts.
MOST_PARAMETERS = 600_000_000
MOST_PARAMETERS_DEEP = 1_500_000_000
_COPIES = 5
_DEEP_ROWS, _FEWEST_ROWS = 4096, 32
_EXPERTS = ("Experts", "BiasedExperts")


@dataclass(frozen=True)
class View:
    """The first `layers` layers, `experts` of each layer's from `first_expert` on, `rows` of the vocabulary."""

    layers: int
    first_expert: int
    experts: int
    first_row: int
    rows: int
    chunks: tuple[int, ...] = CHUNKS


@dataclass(frozen=True)
class ViewSizes:
    """Elements of a model's matrices, by which views are chosen.

    `expert`: of the largest matrix of one expert; `shared`: experts' worth of a shared MLP that rides along; `other`:
    of the largest matrix that no view cuts; `by_layer`: (one expert's, all else) of each layer; `held`: bytes that an
    element takes while it waits.
    """

    by_layer: tuple[tuple[int, int], ...]
    first_mixture: int
    experts: int
    expert: int
    shared: int
    vocabulary: int
    width: int
    other: int
    held: float

    def elements(self, layers: int, experts: int, rows: int) -> int:
        return 2 * rows * self.width + sum(experts * one + rest for one, rest in self.by_layer[:layers])

    def need(self, layers: int, experts: int, rows: int) -> float:
        """Bytes that running such a view takes."""
        largest = max(self.other, (experts + self.shared) * self.expert, rows * self.width)
        return 4 * _COPIES * largest + self.held * self.elements(layers, experts, rows)


def measure_view_sizes(model: ir.Model, config: MoEConfig) -> ViewSizes:
    """Read off the canonical model's initializers; nothing of the weights is touched."""
    total, count = config.num_hidden_layers, config.moe.num_experts
    stacks = {id(value) for call in _expert_calls(model) for value in _stack_values(call)}
    one, rest, expert, other, stored, elements = [0] * total, [0] * total, 0, 0, 0, 0
    for value in model.graph.initializers.values():
        tensor, name = value.const_value, str(value.name)
        assert tensor is not None
        size = int(tensor.size)
        elements += size
        stored += 4 * size if tensor.dtype.is_floating_point() else int(tensor.nbytes)
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if id(value) in stacks:
            assert layer is not None
            one[layer] += size // count
            expert = max(expert, size // count)
        elif layer is not None:
            rest[layer] += size
            other = max(other, size)
    mixtures = [layer for layer in range(total) if one[layer]]
    inner = config.moe.intermediate_size
    return ViewSizes(
        by_layer=tuple(zip(one, rest, strict=True)),
        first_mixture=min(mixtures, default=0),
        experts=count if mixtures else 1,
        expert=expert,
        shared=-(-(config.moe.shared_intermediate_size or 0) // inner) if inner else 0,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        other=other,
        held=stored / max(1, elements),
    )


def plan_views(sizes: ViewSizes, memory: int) -> list[View]:
    """Views that each run in `memory` bytes: together every expert and every row of the vocabulary in the first layers,
    and one through all layers as far as time allows. None at all where a single matrix is too large."""
    at_once = max(0, memory) // (4 * _COPIES)
    layers = sizes.first_mixture + 1
    few = min(_FEWEST_ROWS, sizes.vocabulary)
    experts = _largest(lambda n: sizes.need(layers, n, few) <= memory, sizes.experts)
    rows = _largest(lambda n: sizes.need(layers, experts, n) <= memory, sizes.vocabulary)
    if sizes.other > at_once or not experts or not rows:
        return []
    total = len(sizes.by_layer)

    def allowed(depth: int) -> bool:
        fits = sizes.need(depth, experts, rows) <= memory
        return fits and sizes.elements(depth, experts, 0) <= MOST_PARAMETERS

    while layers < total and allowed(layers + 1):
        layers += 1
    turns = max(-(-sizes.experts // experts), -(-sizes.vocabulary // rows))
    views = [
        View(layers, *_turn(turn, experts, sizes.experts), *_turn(turn, rows, sizes.vocabulary))
        for turn in range(turns)
    ]
    return views if layers == total else views + _plan_deep(sizes, memory, layers)


def _plan_deep(sizes: ViewSizes, memory: int, beyond: int) -> list[View]:
    """One view of few experts through as many layers as can be; none where that is no more than `beyond`."""
    rows = min(_DEEP_ROWS, sizes.vocabulary)

    def allowed(layers: int, experts: int) -> bool:
        fits = sizes.need(layers, experts, rows) <= memory
        return fits and sizes.elements(layers, experts, rows) <= MOST_PARAMETERS_DEEP

    layers = _largest(lambda n: allowed(n, 1), len(sizes.by_layer))
    if layers <= beyond:
        return []
    return [View(layers, 0, _largest(lambda n: allowed(layers, n), sizes.experts), 0, rows, DEEP_CHUNKS)]


def _turn(turn: int, at_once: int, total: int) -> tuple[int, int]:
    """(first, count) of a slice; the first slices again where another thing needs more turns."""
    first = turn % -(-total // at_once) * at_once
    return first, min(at_once, total - first)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n of 1..most with `fits(n)`, even where it is not all (two codes of 4 bits share a byte); 0: none."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low < 2 else low - low % 2


def keep_view(model: ir.Model, config: MoEConfig, view: View) -> MoEConfig:
    """Cut a canonical model down to a view, in place; returns its config."""
    keep_layers(model, view.layers, config)
    if view.experts < config.moe.num_experts:
        _keep_experts(model, view.first_expert, view.experts)
    if view.rows < config.vocab_size:
        _keep_rows(model, config.vocab_size, view)
    return dataclasses.replace(config, vocab_size=view.rows)


def keep_layers(model: ir.Model, layers: int, config: MoEConfig) -> None:
    """Cut a canonical model behind its first `layers` layers; norm and head stay."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if layers == config.num_hidden_layers:
        return
    ends = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = model.graph.outputs[:1]  # a load-aware gate's new load is of no use without its layer
    last = ends[f"layers.{config.num_hidden_layers - 1}.output"]
    last.replace_all_uses_with(ends[f"layers.{layers - 1}.output"])
    RemoveUnusedNodesPass()(model)


def _keep_experts(model: ir.Model, first: int, count: int) -> None:
    rewriter = Rewriter(model)
    divisor = rewriter.ints(count)
    for call in _expert_calls(model):
        for value in _stack_values(call):
            _slice_rows(value, first, count)
        call.replace_input_with(1, rewriter.op("Mod", [call.inputs[1], divisor]))
        rewriter.insert_before(call)


def _keep_rows(model: ir.Model, vocabulary: int, view: View) -> None:
    for name, value in model.graph.initializers.items():
        if not name.startswith(("embed.", "head.")) or value.shape is None:
            continue
        if value.shape[0] == vocabulary:
            _slice_rows(value, view.first_row, view.rows)
        elif value.shape.rank() == 3 and value.shape[1] == vocabulary:
            _slice_planes(value, view.first_row, view.rows)
    shape = model.graph.initializers["shape.vocab"]
    shape.const_value = ir.tensor(np.array([view.rows], np.int64), name="shape.vocab")
    logits = model.graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([*logits.shape[:-1], view.rows])


def _slice_rows(value: ir.Value, first: int, count: int) -> None:
    """The tensor's entries `first` to `first + count - 1` of its first axis: other bytes of the same file."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    rows, *rest = (int(size) for size in tensor.shape.numpy())
    bits = tensor.dtype.bitwidth * int(np.prod(rest, dtype=np.int64))
    assert first * bits % 8 == 0 and first + count <= rows, f"{value.name}: {first} to {first + count} of {rows}"
    value.const_value = ir.ExternalTensor(
        tensor.location,
        (tensor.offset or 0) + first * bits // 8,
        (count * bits + 7) // 8,
        tensor.dtype,
        shape=ir.Shape([count, *rest]),
        name=str(value.name),
        base_dir=tensor.base_dir,
    )
    value.shape = ir.Shape([count, *rest])


def _slice_planes(value: ir.Value, first: int, count: int) -> None:
    """Rows of codes of 6 bits, which lie in two places: copied."""
    tensor = value.const_value
    assert tensor is not None
    planes = slice_int6(tensor.numpy(), first, first + count)
    value.const_value = ir.tensor(planes, name=str(value.name))
    value.shape = ir.Shape(planes.shape)


def _expert_calls(model: ir.Model) -> list[ir.Node]:
    return [call for kind in _EXPERTS for call in find_calls(model, kind)]


def _stack_values(call: ir.Node) -> list[ir.Value]:
    """What a call reads that has an entry for each expert: codes, scales, zero points, biases."""
    operands: Sequence[ir.Value | None] = call.inputs[3:]
    matrices = [find_matrix(value) for value in operands]
    return [value for each in matrices for value in (each.data, each.scales, each.zero_points) if value is not None]
