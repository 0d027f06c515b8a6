"""The parity check that every export passes before its bundle is kept.

Two halves, each failing by name and gathering all it finds first. Weights: each tensor of the checkpoint is read
again and compared with what weights.bin gives back at its place. Graph: each layer of the canonical graph runs on
onnxruntime and is compared with a numpy decoder on the same dequantized weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import Progress
from ..errors import ParityError, require
from . import reference
from .checkpoint import Checkpoint
from .config import MoEConfig
from .layout import Layout, Stored
from .reader import WeightsReader
from .weights import Piece, read_piece

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-4  # of the largest activation, graph against reference on equal weights
_SEED = 20261122
# Root mean square of (value - original) in units of the group's scale. Rounding alone gives 1/sqrt(12) = 0.29.
_MAX_ROUNDING = 0.45
_TOKENS = 48


def check_parity(
    checkpoint: Checkpoint,
    config: MoEConfig,
    layout: Layout,
    model: ir.Model,
    weights_path: Path,
    progress: Progress | None = None,
) -> None:
    """Both halves.

    Raises:
        ParityError: names the first tensor or layer that differs, by how much, and how many do.
    """
    faults = find_weight_faults(checkpoint, layout, weights_path, progress)
    _raise_first(faults, "tensors differ from the checkpoint")
    faults = find_graph_faults(config, layout, model, weights_path, progress)
    _raise_first(faults, "layers of the graph differ from the reference")


def _raise_first(faults: list[str], what: str) -> None:
    if faults:
        raise ParityError(
            f"{len(faults)} {what}, first: {faults[0]}; nothing was written: this is a fault of the exporter or of "
            "the disk, export again and report it if it stays"
        )


def find_weight_faults(
    checkpoint: Checkpoint, layout: Layout, weights_path: Path, progress: Progress | None = None
) -> list[str]:
    """One line for each checkpoint tensor that weights.bin does not give back."""
    reader = WeightsReader(weights_path, layout)
    faults: list[str] = []
    for index, stored in enumerate(layout.stored.values()):
        rows = int(np.prod(stored.weight.unit_shape[:-1], dtype=np.int64))
        for unit, pieces in enumerate(stored.weight.units):
            ours = reader.read_rows(stored, unit * rows, (unit + 1) * rows).reshape(stored.weight.unit_shape)
            scales = _scales_of(reader, stored, unit * rows, (unit + 1) * rows)
            faults += [fault for piece in pieces if (fault := _compare_piece(checkpoint, stored, piece, ours, scales))]
        if progress is not None:
            progress("checking weights", index + 1, len(layout.stored))
    return faults


def _scales_of(reader: WeightsReader, stored: Stored, start: int, stop: int) -> Array | None:
    """float32 [unit_shape[:-1], groups]: the scales of a unit, to judge its rounding by."""
    if stored.scales is None:
        return None
    groups = stored.scales.shape[-1]
    scales = reader.read_flat(stored.scales, start * groups, stop * groups)
    return scales.reshape(*stored.weight.unit_shape[:-1], groups)


def _compare_piece(
    checkpoint: Checkpoint, stored: Stored, piece: Piece, ours: Array, scales: Array | None
) -> str | None:
    theirs = read_piece(checkpoint, piece)
    mine = ours[piece.at]
    name = f"{piece.source} (as {stored.weight.name})"
    if scales is None:
        wrong = mine != (theirs.astype(np.float16).astype(np.float32) if stored.data.dtype == "float16" else theirs)
        return f"{name}: {int(wrong.sum())} values differ" if wrong.any() else None
    steps = (mine - theirs).reshape(*theirs.shape[:-1], -1, stored.group_size) / scales[piece.at][..., None]
    rounding = np.sqrt(np.mean(np.square(steps), axis=-1))
    if (worst := float(rounding.max(initial=0))) <= _MAX_ROUNDING:
        return None
    row = int(np.unravel_index(int(rounding.argmax()), rounding.shape)[0])
    return f"{name}: row {row} is off by {worst:.2f} quantization steps (root mean square), at most {_MAX_ROUNDING}"


def find_graph_faults(
    config: MoEConfig, layout: Layout, model: ir.Model, weights_path: Path, progress: Progress | None = None
) -> list[str]:
    """One line for each layer whose graph differs from the numpy reference on the same weights."""
    reader = WeightsReader(weights_path, layout)
    rng = np.random.default_rng(_SEED)
    tokens = rng.integers(0, config.vocab_size, min(_TOKENS, config.max_position_embeddings))
    steps = config.num_hidden_layers + 2
    faults = []

    def compare(step: int, where: str, inputs: dict[str, Array], output: str, expected: Array) -> None:
        actual = _run_between(model, weights_path.parent, inputs, output).reshape(expected.shape)
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(actual - expected).max()) / scale
        if not difference <= TOLERANCE:
            faults.append(f"{where} differs by {difference:.1e} of the largest value, at most {TOLERANCE:.0e}")
        if progress is not None:
            progress("checking the graph", step, steps)

    x = reference.embed_tokens(reader.read, tokens)
    compare(1, "the embedding", {"input_ids": tokens[None]}, "embed.output", x)
    for layer in range(config.num_hidden_layers):
        y = reference.run_layer(config, reader.read, layer, x)
        inputs = {_hidden_name(layer): x, "input_ids": tokens[None]}
        compare(layer + 2, f"layer {layer}", inputs, f"layers.{layer}.output", y)
        # One token takes the sparse branch of moedge.Experts where many take the dense one.
        inputs = {_hidden_name(layer): x[:1], "input_ids": tokens[None, :1]}
        compare(layer + 2, f"layer {layer} (one token)", inputs, f"layers.{layer}.output", y[:1])
        x = y
    logits = reference.run_head(config, reader.read, x)
    inputs = {_hidden_name(config.num_hidden_layers): x, "input_ids": tokens[None]}
    compare(steps, "the head", inputs, "logits", logits)
    return faults


def _hidden_name(layer: int) -> str:
    return f"layers.{layer - 1}.output" if layer else "embed.output"


def _run_between(model: ir.Model, folder: Path, inputs: dict[str, Array], output: str) -> Array:
    """Run the part of the graph between some values; weights are read from `folder` as that part needs them."""
    ort = require("onnxruntime", purpose="check an export; or skip the check with --no-verify")
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    used = {node.op_identifier() for node in graph.all_nodes()}
    functions = [function for identifier, function in model.functions.items() if identifier in used]
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    result: Array = session.run([output], {name: value for name, value in inputs.items() if name in wanted})[0]
    return result
