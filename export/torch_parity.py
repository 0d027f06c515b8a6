"""The parity check of a user's own torch model: the graph against the model itself, on equal weights.

Weights: each tensor that weights.bin gives back is compared with the module's. Graph: the module gets those
(dequantized) values, and its logits are compared with those of the canonical graph on onnxruntime; then each
`moedge.Experts` runs alone with tokens that visit every expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import MODEL, WEIGHTS, Progress
from ..errors import ParityError, require
from .digests import Digest, Key
from .graph_runner import GraphRunner
from .layout import Layout
from .parity import MAX_ROUNDING, TOLERANCE, find_weight_faults, visit_rest
from .reader import CHUNK_BYTES, WeightsReader
from .torch_graph import ExpertsCall, TorchGraph

Array = np.ndarray[Any, Any]
_SEED = 20261122
_SHAPES = ((1, 1), (2, 24), (1, 48))  # batch, sequence: one token, several texts, one longer text
_TRIES = 2
LONGEST = max(sequence for _, sequence in _SHAPES)


def check_torch_parity(
    model: Any,
    graph: TorchGraph,
    layout: Layout,
    canonical: ir.Model,
    folder: Path,
    positions: int,
    digests: dict[Key, Digest] | None = None,
    progress: Progress | None = None,
) -> None:
    """Both halves; `folder` holds model.onnx and weights.bin, `model` gives logits and is left as it was.

    `digests`: what the writer noted of the values it quantized.

    Raises:
        ParityError: names the first tensor, layer or text that differs, by how much, and how many do.
    """
    stored = folder / WEIGHTS
    faults = find_weight_faults(graph.source, layout, stored, CHUNK_BYTES, progress, MAX_ROUNDING, digests)
    if not faults:
        with _stored_weights(model, graph, WeightsReader(stored, layout)):
            faults = _find_logit_faults(model, folder / MODEL, positions)
            faults += _find_expert_faults(graph, layout, canonical, folder, progress)
    if faults:
        raise ParityError(
            f"{len(faults)} differences between the graph and the torch model, first: {faults[0]}; nothing was "
            "written: a model that is random in eval(), or that looks at values in Python, cannot be exported"
        )


@contextlib.contextmanager
def _stored_weights(model: Any, graph: TorchGraph, reader: WeightsReader) -> Iterator[None]:
    """The module with the values that the bundle has, and its own again afterwards."""
    import torch

    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept: list[tuple[Any, Any]] = []
    try:
        with torch.no_grad():
            for name, keys in graph.held.items():
                if reader.layout[name].data.dtype == "float32":
                    continue
                values = torch.from_numpy(np.array(reader.read(name)))
                for key in keys:
                    kept.append((named[key], named[key].detach().clone()))
                    named[key].copy_(values)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in reversed(kept):
                parameter.copy_(values)


def _find_logit_faults(model: Any, path: Path, positions: int) -> list[str]:
    """One line for each text whose logits differ from the module's."""
    import torch

    ort = require("onnxruntime", purpose="check an export; or skip the check with --no-verify")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, each straight from Exception
        return [f"onnxruntime {ort.__version__} cannot run the graph ({(str(error).splitlines() or [''])[0]})"]
    rng = np.random.default_rng(_SEED)
    faults = []
    with torch.no_grad():
        vocab = model(torch.zeros((1, 1), dtype=torch.int64)).shape[-1]
    for batch, sequence in _SHAPES:
        differences = []
        # Experts that tie but for rounding are chosen differently with reason, which further tokens do not repeat.
        for _ in range(_TRIES):
            with torch.no_grad():
                ids = rng.integers(0, vocab, (batch, min(sequence, positions)))
                theirs = model(torch.from_numpy(ids)).numpy()
            (ours,) = session.run(["logits"], {"input_ids": ids})
            if ours.shape != theirs.shape:
                return [f"logits for input_ids {[*ids.shape]} have shape {[*ours.shape]}, not {[*theirs.shape]}"]
            differences.append(_difference(ours, theirs))
        if not min(differences) <= TOLERANCE:  # NaN is a difference
            faults.append(
                f"logits of {batch} x {sequence} tokens differ by {min(differences):.1e} of the largest value, at most "
                f"{TOLERANCE:.0e}"
            )
    return faults


def _find_expert_faults(
    graph: TorchGraph, layout: Layout, canonical: ir.Model, folder: Path, progress: Progress | None
) -> list[str]:
    """One line for each layer one of whose experts gives something else than torch's op does on the same weights."""
    rng = np.random.default_rng(_SEED)
    reader = WeightsReader(folder / WEIGHTS, layout)
    faults = []
    for layer, call in enumerate(graph.layers):
        if progress is not None:
            progress("checking every expert", layer + 1, len(graph.layers))
        _, choices, shares = visit_rest(np.empty((0, call.top_k), np.int64), call.num_experts)
        x = rng.standard_normal((len(choices), call.hidden_size)).astype(np.float32)
        for tokens in (len(x), 1):  # one token by itself takes the function's other branch
            values = (x[:tokens], choices[:tokens], shares[:tokens])
            difference = _difference(_run_call(canonical, folder, call, *values), _run_torch(reader, layer, *values))
            if not difference <= TOLERANCE:
                faults.append(f"the experts of layer {layer} differ by {difference:.1e} of the largest value")
    return faults


def _run_call(canonical: ir.Model, folder: Path, call: ExpertsCall, x: Array, choices: Array, shares: Array) -> Array:
    names = [value.name or "" for value in call.node.inputs[:3] if value is not None]
    runner = GraphRunner(canonical, folder, len(x))
    (name,) = [value.name or "" for value in call.node.outputs]
    runner.budget = max(step.cost for step in runner.steps)
    return runner.run(dict(zip(names, (x, choices, shares), strict=True)), [name])[name]


def _run_torch(reader: WeightsReader, layer: int, x: Array, choices: Array, shares: Array) -> Array:
    import torch

    parts = [reader.read(f"layers.{layer}.experts.{part}.weight") for part in ("gate_up", "down")]
    tensors = [torch.from_numpy(np.array(values)) for values in (x, choices, shares, *parts)]
    with torch.no_grad():
        result: Array = torch.ops.moedge.experts(*tensors).numpy()
    return result


def _difference(ours: Array, theirs: Array) -> float:
    scale = max(1.0, float(np.abs(theirs).max(initial=0)))
    return float(np.abs(ours - theirs).max(initial=0)) / scale
