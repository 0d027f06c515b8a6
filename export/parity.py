"""The parity check that every export passes before its bundle is kept.

Two halves, each failing by name and gathering all it finds first. Weights: each tensor of the checkpoint is read
again and compared with what weights.bin gives back at its place. Graph: each layer of the canonical graph runs on
onnxruntime and is compared with a numpy decoder on the same dequantized weights, every expert of it with tokens of
its own. Neither holds more than the export's memory plan gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import Progress
from ..errors import ParityError
from . import reference
from .checkpoint import Checkpoint
from .config import MoEConfig
from .digests import Digest, Key
from .graph_runner import GraphRunner, Step, Values, warm_up
from .layout import Layout, Stored
from .memory import GraphNeeds, MemoryPlan, rows_at_once
from .reader import WeightsReader
from .weights import Weight, list_rows, read_unit

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-4  # of the largest activation, graph against reference on equal weights
# Root mean square of (value - original) in units of the group's scale. Rounding alone gives 1/sqrt(12) = 0.29.
MAX_ROUNDING = 0.45
_SEED = 20261122
_TOKENS = 48
_HEAD_TOKENS = 16  # logits are as wide as the vocabulary
_COPIES = 8  # of an activation that running and comparing a layer holds


def check_parity(
    checkpoint: Checkpoint,
    config: MoEConfig,
    layout: Layout,
    model: ir.Model,
    weights_path: Path,
    memory: MemoryPlan | None = None,
    progress: Progress | None = None,
    max_rounding: float = MAX_ROUNDING,
    digests: dict[Key, Digest] | None = None,
) -> None:
    """Both halves, within `memory`. `max_rounding`: what the algorithm may move a group's values, in its steps.

    `digests`: what the writer noted of the values it quantized.

    Raises:
        ParityError: names the first tensor or layer that differs, by how much, and how many do.
    """
    memory = memory or MemoryPlan()
    faults = find_weight_faults(checkpoint, layout, weights_path, memory.chunk, progress, max_rounding, digests)
    checkpoint.whole.clear()
    _raise_first(faults, "tensors differ from the checkpoint")
    faults = find_graph_faults(config, layout, model, weights_path, memory, progress)
    _raise_first(faults, "layers of the graph differ from the reference")


def find_needs(config: MoEConfig, layout: Layout, model: ir.Model, folder: Path) -> GraphNeeds:
    """What the check of the graph holds, from shapes alone; onnxruntime is loaded, so that its own memory shows.

    Raises:
        DependencyError: onnxruntime is not installed; better said now than after everything is written.
    """
    warm_up()
    widest = max(_HEAD_TOKENS * config.vocab_size, _TOKENS * 2 * max(config.hidden_size, config.intermediate_size))
    runner = GraphRunner(model, folder, _count_tokens(config, layout))
    return GraphNeeds(runner.budget, _COPIES * 4 * widest)


def _count_tokens(config: MoEConfig, layout: Layout) -> int:
    """Rows that go through a mixture at most: the sequence's own, and those that visit the experts it leaves out.

    Where experts have orders of their own, each choice is a row.
    """
    experts, top_k = config.moe.num_experts, config.moe.num_experts_per_tok
    if any(stored.order is not None and len(stored.order.shape) == 2 for stored in layout.stored.values()):
        return _TOKENS * top_k + experts
    return _TOKENS + -(-experts // top_k)


def _raise_first(faults: list[str], what: str) -> None:
    if faults:
        raise ParityError(
            f"{len(faults)} {what}, first: {faults[0]}; nothing was written: this is a fault of the exporter or of "
            "the disk, export again and report it if it stays"
        )


# Weights


@dataclass
class _Difference:
    """What was found so far of one piece: values that differ, or the worst rounding and its row, and the digest."""

    wrong: int = 0
    worst: float = 0.0
    row: int = 0
    digest: Digest = field(default_factory=Digest)

    def describe(self, limit: float, noted: Digest | None) -> str | None:
        if self.wrong:
            return f"{self.wrong} values differ"
        if not self.worst <= limit:
            return f"row {self.row} is off by {self.worst:.2f} quantization steps (root mean square), at most {limit}"
        return None if noted is None else noted.find_fault(self.digest)


def find_weight_faults(
    checkpoint: Checkpoint,
    layout: Layout,
    weights_path: Path,
    chunk: int,
    progress: Progress | None = None,
    max_rounding: float = MAX_ROUNDING,
    digests: dict[Key, Digest] | None = None,
) -> list[str]:
    """One line for each checkpoint tensor that weights.bin does not give back."""
    reader = WeightsReader(weights_path, layout, chunk)
    faults: list[str] = []
    total = sum(math.prod(stored.data.shape) for stored in layout.stored.values())
    done = 0
    for stored in layout.stored.values():
        faults += _compare_orders(reader, stored)
        for unit in range(len(stored.weight.units)):
            for name, fault in _compare_unit(checkpoint, reader, stored, unit, max_rounding, digests or {}).items():
                faults.append(f"{name} (as {stored.weight.name}): {fault}")
            done += math.prod(stored.weight.unit_shape)
            if progress is not None:
                progress("checking weights", done, total)
    return faults


def _compare_orders(reader: WeightsReader, stored: Stored) -> list[str]:
    """One line for each unit whose columns stand for other input channels than they were arranged by."""
    order = stored.weight.order
    if order is None:
        return []
    return [
        f"{stored.weight.units[unit][0].names[0]} (as {stored.weight.name}): the order of its input channels differs"
        for unit, wanted in enumerate(np.atleast_2d(order))
        if not np.array_equal(reader.read_order(stored, unit), wanted)
    ]


def _compare_unit(
    checkpoint: Checkpoint,
    reader: WeightsReader,
    stored: Stored,
    unit: int,
    max_rounding: float,
    digests: dict[Key, Digest],
) -> dict[str, str]:
    """By tensor of the checkpoint: what is wrong with it in one unit."""
    weight = stored.weight
    rows = math.prod(weight.unit_shape[:-1])
    step = rows_at_once(weight, reader.chunk_bytes)
    found: dict[int, _Difference] = {}
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        ours = reader.read_rows(stored, unit * rows + start, unit * rows + stop)
        scales = _scales_of(reader, stored, unit * rows + start, unit * rows + stop)
        for place, target, first, theirs in _read_theirs(checkpoint, weight, unit, start, stop):
            difference = found.setdefault(place, _Difference())
            kept = scales is None or weight.units[unit][place].integers is not None
            part_scales = None if kept or scales is None else scales[target]
            _compare_rows(stored, first, ours[target], theirs, part_scales, difference)
            if (weight.name, unit, place) in digests:
                difference.digest.add(theirs, ours[target])
    faults = {}
    for place, difference in found.items():
        piece = weight.units[unit][place]
        fault = difference.describe(max_rounding, digests.get((weight.name, unit, place)))
        if fault is not None:
            faults[piece.names[0]] = fault
    return faults


def _scales_of(reader: WeightsReader, stored: Stored, start: int, stop: int) -> Array | None:
    """float32 [stop - start, groups]: the scales of some rows, to judge their rounding by."""
    if stored.scales is None:
        return None
    groups = stored.scales.shape[-1]
    return reader.read_codes(stored.scales, start * groups, stop * groups).reshape(-1, groups)


def _read_theirs(
    checkpoint: Checkpoint, weight: Weight, unit: int, start: int, stop: int
) -> Iterator[tuple[int, slice, int, Array]]:
    """What the checkpoint has for rows of a unit: (place of the piece, rows from `start`, its first row, values)."""
    if len(weight.unit_shape) < 2:
        yield 0, slice(None), 0, read_unit(checkpoint, weight, unit).reshape(1, -1)
        return
    for part in list_rows(weight, unit, start, stop):
        yield weight.units[unit].index(part.piece), part.target, part.first, part.read_values(checkpoint)


def _compare_rows(
    stored: Stored, first: int, mine: Array, theirs: Array, scales: Array | None, found: _Difference
) -> None:
    """mine and theirs float32 [rows, in]; `first`: the row of the piece that they begin with. `scales` [rows, groups]
    where values were quantized here; without, they must be equal."""
    if scales is None:
        expected = theirs.astype(np.float16).astype(np.float32) if stored.data.dtype == "float16" else theirs
        found.wrong += int(np.count_nonzero(mine != expected))
        return
    difference = (mine - theirs).reshape(len(mine), -1, stored.group_size)
    squares = np.einsum("rgk,rgk->rg", difference, difference)
    rounding = np.sqrt(squares / np.float32(stored.group_size)) / scales
    worst = float(rounding.max(initial=0))
    if not worst <= found.worst:  # NaN is worse than any number
        row = int(np.unravel_index(int(rounding.argmax()), rounding.shape)[0])
        found.worst, found.row = worst, first + row


# Graph


def find_graph_faults(
    config: MoEConfig,
    layout: Layout,
    model: ir.Model,
    weights_path: Path,
    memory: MemoryPlan,
    progress: Progress | None = None,
) -> list[str]:
    """One line for each layer whose graph differs from the numpy reference on the same weights."""
    reader = WeightsReader(weights_path, layout, memory.chunk)
    runner = GraphRunner(model, weights_path.parent, _count_tokens(config, layout), memory.graph)
    check = _GraphCheck(config, reader, runner)
    steps = config.num_hidden_layers + 2
    for step, _ in enumerate(check.run(), 1):
        if progress is not None:
            progress("checking the graph", step, steps)
    return check.faults


class _GraphCheck:
    """The walk through the layers; each layer starts from what the reference made of those before it."""

    def __init__(self, config: MoEConfig, reader: WeightsReader, runner: GraphRunner) -> None:
        self.config, self.reader, self.runner = config, reader, runner
        self.faults: list[str] = []
        rng = np.random.default_rng(_SEED)
        self.tokens = rng.integers(0, config.vocab_size, min(_TOKENS, config.max_position_embeddings))

    def run(self) -> Iterator[None]:
        """Yields after the embedding, after each layer and after the head."""
        config, open_weight = self.config, self.reader.open
        x = reference.embed_tokens(open_weight, self.tokens)
        known = {"input_ids": self.tokens[None]}
        self.faults += _compare("the embedding", self.runner.run(known, ["embed.output"])["embed.output"], x)
        yield
        for layer in range(config.num_hidden_layers):
            y = reference.run_layer(config, open_weight, layer, x)
            faults = self.check_layer(layer, x, y)
            if faults:
                # A choice of experts that is a tie but for rounding differs rightly; it does not for other inputs.
                x = np.ascontiguousarray(x[::-1])
                y = reference.run_layer(config, open_weight, layer, x)
                faults = self.check_layer(layer, x, y)
            self.faults += faults
            x = y
            yield
        x = x[:_HEAD_TOKENS]
        logits = reference.run_head(config, open_weight, x)
        known = {_hidden_name(config.num_hidden_layers): x, "input_ids": self.tokens[None, : len(x)]}
        self.faults += _compare("the head", self.runner.run(known, ["logits"])["logits"][0], logits)
        yield

    def check_layer(self, layer: int, x: Array, expected: Array) -> list[str]:
        """One layer over the whole sequence, and its mixture over every expert."""
        faults: list[str] = []

        def mixture(step: Step, values: Values) -> Values:
            outputs, found = self.check_mixture(layer, step, values)
            faults.extend(found)
            return outputs

        output = f"layers.{layer}.output"
        known = {_hidden_name(layer): x, "input_ids": self.tokens[None]}
        actual = self.runner.run(known, [output], mixture)[output]
        return _compare(f"layer {layer}", actual, expected) + faults

    def check_mixture(self, layer: int, step: Step, values: Values) -> tuple[Values, list[str]]:
        """The mixture's outputs, and what is wrong with the experts that no token chose, or with a token alone.

        Further tokens visit those experts, whatever the gate says; one token by itself takes the sparse branch of
        moedge.Experts where many take the dense one.
        """
        names = [value.name or "" for value in step.node.inputs[:3] if value is not None]
        (name,) = [value.name or "" for value in step.node.outputs]
        h, choices, shares = (values[name] for name in names)
        rows, visits, weights = visit_rest(choices, self.config.moe.num_experts)
        plain = h[rows % len(h), : self.config.hidden_size]
        further = self.order_rows(layer, plain, visits)
        parts = [np.concatenate(pair) for pair in ((h, further), (choices, visits), (shares, weights))]
        y = self.runner.run_step(step, {**values, **dict(zip(names, parts, strict=True))})[name]
        faults = []
        if len(visits):
            expected = self._run_experts(layer, plain, visits, weights)
            faults = _compare(f"layer {layer} (experts {_shorten(visits)})", y[len(h) :], expected)
        alone = self._run_alone(step, values, names)
        faults += _compare(f"layer {layer} (one token)", alone, y[:1])
        return {name: y[: len(h)]}, faults

    def order_rows(self, layer: int, h: Array, visits: Array) -> Array:
        """h [n, H] as the experts take them, where they want their inputs in an order of their own."""
        stored = self.reader.layout[f"layers.{layer}.experts.gate_up.weight"]
        if stored.order is None:
            return h
        ordered = np.empty((len(h), stored.order.shape[-1]), np.float32)
        for row, expert in enumerate(visits[:, 0].tolist()):
            ordered[row] = h[row, self.reader.read_order(stored, expert)]
        return ordered

    def _run_experts(self, layer: int, h: Array, visits: Array, weights: Array) -> Array:
        """The reference; a choice of weight 0 repeats an expert and is left out."""
        prefix, width = f"layers.{layer}", int((weights[-1] > 0).sum())
        config, open_weight = self.config, self.reader.open
        full = reference.run_experts(config, open_weight, prefix, h[:-1], visits[:-1], weights[:-1])
        last = reference.run_experts(config, open_weight, prefix, h[-1:], visits[-1:, :width], weights[-1:, :width])
        return np.concatenate([full, last])

    def _run_alone(self, step: Step, values: Values, names: list[str]) -> Array:
        """The first token by itself: on the whole stack where that fits, else on its experts one by one."""
        one = {name: value[:1] for name, value in values.items() if name in names}
        if step.cost_of(one[names[1]].shape[1]) <= self.runner.budget:
            (y,) = self.runner.run_step(step, one).values()
            return y
        outputs = []
        for place, expert in enumerate(one[names[1]][0].tolist()):
            # With an odd number of scales a row, slices of int4 zero points can only begin at every other expert.
            first = expert // step.multiple * step.multiple
            single = {names[0]: one[names[0]], **{name: one[name][:, place : place + 1] for name in names[1:]}}
            outputs.append(self.runner.run_experts(step, single, first, min(first + step.multiple, step.rows)))
        total: Array = np.sum(outputs, axis=0)
        return total


def visit_rest(choices: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """Tokens for the experts that `choices` [T, k] leave out: rows [n], choices [n, k], weights [n, k].

    The last row repeats its first expert with weight 0 where the experts do not fill it.
    """
    top_k = choices.shape[1]
    rest = np.setdiff1d(np.arange(num_experts), choices)
    count = -(-len(rest) // top_k)
    visits = np.full((count, top_k), rest[(count - 1) * top_k] if count else 0, choices.dtype)
    weights = np.zeros((count, top_k), np.float32)
    visits.reshape(-1)[: len(rest)] = rest
    weights.reshape(-1)[: len(rest)] = np.float32(1 / top_k)
    return np.arange(count), visits, weights


def _shorten(visits: Array) -> str:
    ids = np.unique(visits).tolist()
    return ", ".join(map(str, ids)) if len(ids) <= 4 else f"{ids[0]}, {ids[1]} ... {ids[-1]}"


def _compare(where: str, actual: Array, expected: Array) -> list[str]:
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(actual - expected).max()) / scale
    if difference <= TOLERANCE:
        return []
    return [f"{where} differs by {difference:.1e} of the largest value, at most {TOLERANCE:.0e}"]


def _hidden_name(layer: int) -> str:
    return f"layers.{layer - 1}.output" if layer else "embed.output"
