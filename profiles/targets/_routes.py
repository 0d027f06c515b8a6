"""What routes a graph takes, layer by layer, beside the router's logits that led to them: for `moedge verify --deep`.

T = tokens, k = experts a token, n = logits a token. Lowered graphs are run on onnxruntime's CPU as they stand in the
engine's folder, with the routers' logits as further outputs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ...bundle import MODEL, Bundle
from ...export.config import MoEConfig
from ...export.gating import list_gates
from ...runtime import kernels
from ...runtime.machine import memory_bytes
from ...runtime.preflight import EngineInfo
from ...runtime.sessions import SessionOptions, backend_module
from ...runtime.sessions._load_state import LoadState, load_state_of
from ...runtime.sessions.onnxruntime_cpu import LANES_MODEL
from ._canonical import Array, Rewriter, attributes_of, find_calls, find_matrix, load_canonical
from ._trt_attention import layer_of
from ._trt_check import MOST_PARAMETERS_HALF, NetworkRunner, open_plain_session
from ._trt_form import NetworkForm
from ._trt_parts import Part
from ._trt_views import keep_layers
from .tensorrt_network import lower_network

CPU = "CPUExecutionProvider"
_MOST_PARAMETERS = 600_000_000  # of the layers compared
_COPIES = 5  # of a tensor in fp32 while onnxruntime dequantizes it
_ROUTE_TYPES = (ir.DataType.INT64, ir.DataType.FLOAT)  # of experts, of weights
# Nodes whose place matters; shapes and masks may be computed anywhere.
_HEAVY = ("MatMul", "Gemm", "Attention", "QMoE", "Experts", "TopK", "Softmax")


class Route(NamedTuple):
    """A layer's experts int64 and weights float32 [T, k]; logits float32 [T, n], None where they are not to be had."""

    experts: Array
    weights: Array
    logits: Array | None


@dataclass
class CanonicalGate:
    """A gate of the canonical graph: its op, its attributes, its inputs (the logits first) and the route it takes.

    Of a load-aware one: its base's op, both gates' attributes, its base's inputs, and the first `load` float32 [E].
    """

    op: str
    attributes: dict[str, Any]
    inputs: tuple[Array, ...]
    route: Route = field(init=False)
    base: str | None = None
    load: Array | None = None


@dataclass(frozen=True)
class Evaluation:
    """How a graph runs a layer's experts: `chosen` alone, `every` one for every token, or both, by count of tokens."""

    chosen: bool
    every: bool

    @property
    def text(self) -> str:
        if self.every:
            return "one token its own, several tokens every expert" if self.chosen else "every expert for every token"
        return "each token its own"


@dataclass
class Traced:
    """An engine's routes by layer, in `calls` of so many tokens. `strays`: heavy nodes that ran on another provider
    than was asked for. `together`: those of its graph that steps several sequences, where that is another."""

    how: str
    calls: list[int]
    routes: dict[int, Route]
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    provider: str = CPU
    together: Traced | None = None


def cut_steps(tokens: Array) -> list[Array]:
    """A chunk, then tokens one by one, then a chunk behind others: both halves of whatever branches there are."""
    third = max(1, len(tokens) // 3)
    single = range(third, 2 * third + 1)
    return [part for part in np.split(tokens, single) if len(part)]


# the canonical graph


def pick_layers(bundle: Bundle) -> int:
    """How many of the first layers are compared, a mixture among them; 0 where this machine cannot hold one in fp32."""
    model, config = load_canonical(bundle)
    total = config.num_hidden_layers
    parameters, largest = [0] * total, 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        largest = max(largest, int(tensor.size))
        if value.name.startswith("layers."):
            parameters[int(value.name.split(".")[1])] += int(tensor.size)
    if 4 * _COPIES * largest > (memory_bytes() or 8 << 30) // 2:
        return 0
    least = min(config.moe.layers, default=0) + 1
    return max(least, sum(sum(parameters[: layer + 1]) <= _MOST_PARAMETERS for layer in range(total)))


def trace_canonical(bundle: Bundle, layers: int, tokens: Array) -> dict[int, CanonicalGate]:
    """The gates of the first `layers` layers; load-aware ones in the calls of `cut_steps`."""
    model, config = load_canonical(bundle)
    keep_layers(model, layers, config)
    gates: dict[int, CanonicalGate] = {}
    constants = _constants_of(model)
    model.graph.outputs.clear()
    for call in [call for op in list_gates() for call in find_calls(model, op)]:
        layer, gate = layer_of(call), _describe_gate(model, config, call)
        gates[layer] = gate
        logits = call.inputs[0] if gate.base is None else find_logits(model, layer, constants)
        assert logits is not None
        chosen = call.outputs if gate.base is None else _cut_call(model, call, cut_steps(tokens))
        for value, dtype in ((logits, ir.DataType.FLOAT), *zip(chosen, _ROUTE_TYPES, strict=True)):
            value.dtype, value.shape = dtype, ir.Shape(["T", f"{value.name}.width"])
            model.graph.outputs.append(value)
    if not gates:
        return {}
    session = open_plain_session(ir.to_proto(model).SerializeToString(), bundle.path)
    loads = {f"load.{layer}": gate.load for layer, gate in gates.items() if gate.load is not None}
    outputs = iter(session.run(None, {"input_ids": tokens[None], **loads}))
    for gate, logits, experts, weights in zip(gates.values(), outputs, outputs, outputs, strict=True):
        gate.inputs, gate.route = (logits, *gate.inputs), Route(experts, weights, logits)
    return gates


def _first_load(top_k: int, num_experts: int) -> float:
    """One token's, spread evenly, in place of many tokens': a few choices must weigh to be followed."""
    return top_k / num_experts


def start_soon(info: EngineInfo) -> EngineInfo:
    """An engine whose gates, if they are load-aware, begin with `_first_load`."""
    if "load_start" not in info.session:
        return info
    start = _first_load(info.num_experts_per_tok, info.num_experts)
    return dataclasses.replace(info, session={**info.session, "load_start": start})


def _describe_gate(model: ir.Model, config: MoEConfig, call: ir.Node) -> CanonicalGate:
    """All but what a run gives: the logits and the route."""
    attributes, base = attributes_of(call), config.moe.gate.base
    if base is None:
        return CanonicalGate(call.op_type, attributes, tuple(_read_constant(value) for value in call.inputs[1:]))
    bias = [model.graph.initializers[f"layers.{layer_of(call)}.router.bias"]] if base.bias else []
    inputs = tuple(_read_constant(value) for value in bias)
    load = np.full(config.moe.num_experts, _first_load(attributes["top_k"], config.moe.num_experts), np.float32)
    return CanonicalGate(call.op_type, {**base.attributes, **attributes}, inputs, base=base.op, load=load)


def _cut_call(model: ir.Model, call: ir.Node, parts: Sequence[Array]) -> list[ir.Value]:
    """One load-aware call for each part of the tokens, which hand the load on; experts and weights of all."""
    rewriter = Rewriter(model)
    scores, choice, load = call.inputs
    sizes = rewriter.ints(*(len(part) for part in parts))
    split = [rewriter.ops("Split", [value, sizes], len(parts), axis=0) for value in (scores, choice)]
    routes: list[list[ir.Value]] = []
    for inputs in zip(*split, strict=True):
        *route, load = rewriter.ops(call.op_type, [*inputs, load], 3, domain=call.domain, **attributes_of(call))
        routes.append(route)
    chosen = [rewriter.op("Concat", list(pieces), axis=0) for pieces in zip(*routes, strict=True)]
    assert load is not None
    rewriter.replace(call, [*chosen, load])
    return chosen


def _read_constant(value: ir.Value | None) -> Array:
    tensor = find_matrix(value).data.const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32)


# lowered graphs


def find_constants(nodes: Iterable[ir.Node], known: Iterable[ir.Value]) -> set[ir.Value]:
    """`known`, and the values that come from them alone."""
    constants = set(known)
    for node in nodes:
        if all(value is None or value in constants for value in node.inputs):
            constants |= set(node.outputs)
    return constants


def _constants_of(model: ir.Model) -> set[ir.Value]:
    return find_constants(model.graph, model.graph.initializers.values())


def find_logits(model: ir.Model, layer: int, constants: set[ir.Value]) -> ir.Value | None:
    """What a layer's router gives, its bias added: the first value behind its weights that is no constant, less the
    columns that rows of padding gave."""
    waiting = [value for value in constants if str(value.name).startswith(f"layers.{layer}.router.weight")]
    found = None
    while waiting and found is None:
        for use in waiting.pop().uses():
            if use.node.outputs[0] in constants:
                waiting += use.node.outputs
            else:
                found = use.node.outputs[0]
                found.name = found.name or f"layers.{layer}.router.logits"  # which a step leaves out
    cut = [use.node for use in found.uses() if use.node.op_type == "Slice"] if found is not None else []
    found = cut[0].outputs[0] if cut else found
    for use in found.uses() if found is not None else ():
        other = use.node.inputs[1 - use.idx] if use.node.op_type == "Add" else None
        if other is not None and str(other.name).startswith(f"layers.{layer}.router.logits_bias"):
            return use.node.outputs[0]
    return found


def describe_experts(model: ir.Model, layer: int, top_k: int, constants: set[ir.Value]) -> Evaluation | None:
    """How the graph evaluates a layer's experts, by what reads their weights; None where nothing does."""
    prefix = f"layers.{layer}.experts."
    weights = model.graph.initializers.items()
    starts = [value for name, value in weights if name.startswith(prefix) and "bias" not in name]
    chosen, every = _find_readers(model, starts, constants, top_k)
    return Evaluation(chosen, every) if chosen or every else None


def _find_readers(
    model: ir.Model, starts: Sequence[ir.Value], constants: set[ir.Value], top_k: int
) -> tuple[bool, bool]:
    """Whether something looks up the chosen experts among `starts`, and whether something multiplies by all of them."""
    waiting, seen = list(starts), set[ir.Node]()
    chosen = every = False
    while waiting:
        for node in {use.node: None for use in waiting.pop().uses()}:
            function = model.functions.get(node.op_identifier())
            if node in seen or node.op_type in ("Shape", "Size"):
                continue
            seen.add(node)
            if function is not None:
                inner = [name for name, value in zip(function.inputs, node.inputs, strict=False) if value in constants]
                nodes = ir.traversal.RecursiveGraphIterator(function.graph)
                looks_up, multiplies = _find_readers(model, inner, find_constants(nodes, inner), top_k)
                chosen, every = chosen or looks_up, every or multiplies
            elif node.domain:  # a kernel, which takes k of each token's
                k = node.attributes.get_int("k", 0)
                chosen, every = chosen or k <= top_k, every or k > top_k
            elif node.outputs[0] in constants:
                waiting += node.outputs
            elif node.op_type.startswith("Gather"):
                chosen = True
            elif node.op_type in ("MatMul", "Gemm", "Einsum", "Mul"):
                every = True
    return chosen, every


# the engine's own session


class _Probed(Bundle):
    """A bundle whose engine is read from elsewhere."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        super().__init__(bundle.path, bundle.manifest)
        self.folder = folder

    def engine_dir(self, profile: str) -> Path:
        return self.folder


def trace_session(bundle: Bundle, info: EngineInfo, tokens: Array, layers: int) -> Traced:
    """Routes of an onnxruntime engine by its own session.

    A session gives experts and weights of a fixed width: the logits ride behind the weights, in as many columns more.
    """
    traced = _trace_graphs(bundle, info, tokens, MODEL, 1)
    if int(info.session.get("lanes", 1)) > 1:
        traced.together = _trace_graphs(bundle, info, tokens, LANES_MODEL, 2)
    return traced


def _trace_graphs(bundle: Bundle, info: EngineInfo, tokens: Array, graph: str, lanes: int) -> Traced:
    """By the graph of this name, or the one of our own kernels beside it where the session loads that."""
    folder, top_k, moe = bundle.engine_dir(info.profile), info.num_experts_per_tok, bundle.config["moe"]
    names = [name for name in (graph, kernels.own_name(graph)) if (folder / name).is_file()]
    models = {name: ir.load(folder / name) for name in names}
    evaluations: dict[int, Evaluation | None] = {}
    found = []
    for model in models.values():
        constants = _constants_of(model)
        found.append({layer: find_logits(model, layer, constants) for layer in info.moe_layers})
        for layer in info.moe_layers:
            evaluations.setdefault(layer, describe_experts(model, layer, top_k, constants))
    width = int(moe["gate"]["attributes"].get("bits", moe["num_experts"]))
    width = 0 if any(None in logits.values() for logits in found) else width
    with tempfile.TemporaryDirectory(prefix="moedge-routes-") as scratch:
        for (name, model), logits in zip(models.items(), found, strict=True):
            for layer, value in logits.items() if width else ():
                _widen_route(model, layer, value, top_k + width)
            (Path(scratch) / name).write_bytes(ir.to_proto(model).SerializeToString())
        wide = dataclasses.replace(start_soon(info), num_experts_per_tok=top_k + width)
        options = SessionOptions(1, len(tokens), str(Path(scratch) / "profile"), lanes=lanes)
        session: Any = backend_module(info.backend).open_session(_Probed(bundle, Path(scratch)), wide, options)
        experts, weights = _step_session(session, tokens, lanes)
        provider = str(info.session.get("provider", CPU))
        strays = find_strays(session.end_profiling(), provider) if hasattr(session, "end_profiling") else []
        session.close()
    routes = {
        layer: Route(
            experts[place, :, :top_k], weights[place, :, :top_k], weights[place, :, top_k:] if width else None
        )
        for place, layer in enumerate(info.moe_layers)
    }
    known = {layer: each for layer, each in evaluations.items() if each is not None}
    return Traced("its own session", [len(part) for part in cut_steps(tokens)], routes, known, strays, provider)


def _step_session(session: Any, tokens: Array, lanes: int) -> tuple[Array, Array]:
    """Experts and weights of `tokens`; of several lanes those in the second, single tokens together with the first."""
    other = session.another() if lanes > 1 else session
    experts, weights = [], []
    for part in cut_steps(tokens):
        if lanes > 1 and len(part) == 1:
            session.step_together([other], np.repeat(part, 2))
        else:
            for each in dict.fromkeys((session, other)):
                each.step(part, np.empty(0, np.int64))
        experts.append(other.routing.experts.copy())
        weights.append(other.routing.weights.copy())
    if other is not session:
        other.close()
    return np.concatenate(experts, axis=1), np.concatenate(weights, axis=1)


def _widen_route(model: ir.Model, layer: int, logits: ir.Value | None, width: int) -> None:
    """Put the logits behind the weights, and behind the experts the first as often: a load counts it once."""
    graph = model.graph
    for place, value in enumerate(list(graph.outputs)):
        kind, _, number = str(value.name).partition(".")
        if kind not in ("experts", "weights") or number != str(layer):
            continue
        name, dtype = value.name, _ROUTE_TYPES[kind == "weights"]
        value.name = f"{name}.narrow"
        rewriter = Rewriter(model)
        more = logits
        if kind == "experts":
            first = rewriter.op("Slice", [value, rewriter.ints(0), rewriter.ints(1), rewriter.ints(1)])
            more = rewriter.op("Expand", [first, rewriter.op("Shape", [logits])])
        wide = rewriter.op("Concat", [value, more], axis=1)
        wide.name, wide.dtype, wide.shape = name, dtype, ir.Shape(["S", width])
        graph.extend(rewriter.tape.nodes)
        graph.outputs[place] = wide


def find_strays(profile: Path, provider: str) -> list[str]:
    """Heavy nodes that onnxruntime's profile shows on another provider than `provider`, each once."""
    strays = {}
    for event in json.loads(Path(profile).read_text(encoding="utf-8")):
        arguments = event.get("args", {})
        op, where = arguments.get("op_name", ""), arguments.get("provider")
        if event.get("cat") == "Node" and where and where != provider and any(word in op for word in _HEAVY):
            strays[str(event["name"]).removesuffix("_kernel_time")] = f"{op} on {where}"
    return [f"{name} ({what})" for name, what in strays.items()]


# the network that TensorRT was given


def trace_network(bundle: Bundle, info: EngineInfo, tokens: Array, layers: int) -> Traced:
    """Routes of a TensorRT engine's network on onnxruntime: that in its folder, or its first layers lowered again."""
    parts = [Part(int(entry["layers"][0]), int(entry["layers"][1]), info.layers) for entry in info.session["parts"]]
    small = (bundle.manifest["model"].get("parameters") or 0) <= MOST_PARAMETERS_HALF
    folder = bundle.engine_dir(info.profile)
    if small and all((folder / part.model).is_file() for part in parts):
        try:
            return _trace_parts(bundle, info, parts, tokens, info.layers, folder)
        except _unable():
            pass  # no half precision kernels for it here
    return _trace_parts(bundle, info, [p for p in parts if p.start < layers], tokens, layers, None)


def _unable() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.NotImplemented, state.Fail)


def _trace_parts(
    bundle: Bundle, info: EngineInfo, parts: Sequence[Part], tokens: Array, layers: int, folder: Path | None
) -> Traced:
    """`folder`: where the graphs are; None: they are lowered again, in float32."""
    real = ir.DataType.FLOAT if folder is None else ir.DataType.FLOAT16
    slots = len(tokens) + 3 if folder is None else info.max_seq_len
    how = f"the network lowered again ({layers} of {info.layers} layers)" if folder is None else "its folder's network"
    moe_layers = [layer for layer in info.moe_layers if layer < layers]
    evaluations: dict[int, Evaluation] = {}
    with tempfile.TemporaryDirectory(prefix="moedge-routes-") as scratch:
        place = Path(scratch)
        for part in parts:
            part = Part(part.start, min(part.stop, layers), layers)
            model, config = load_canonical(bundle)
            keep_layers(model, layers, config)
            if folder is not None and (folder / part.weights).is_file():
                shutil.copyfile(folder / part.weights, place / part.weights)
                lowered = ir.load(folder / part.model)
            else:
                network = lower_network(model, config, slots, real=real, part=part, form=_form_of(info))
                network.weights.write(place / part.weights)
                lowered = network.model if folder is None else ir.load(folder / part.model)
            evaluations |= _add_logits(lowered, config, part)
            (place / part.model).write_bytes(ir.to_proto(lowered).SerializeToString())
        kept = [Part(part.start, min(part.stop, layers), layers) for part in parts]
        runner = NetworkRunner(*[place / part.model for part in kept], lanes=info.max_batch)
        state = load_state_of(dataclasses.replace(start_soon(info), moe_layers=tuple(moe_layers)), len(tokens))
        steps = [step for part in cut_steps(tokens) for step in _step_settled(runner, part, moe_layers, state)]
    joined = {name: np.concatenate([step[name] for step in steps]) for name in steps[0] if name != "logits"}
    routes = {
        layer: Route(joined[f"experts.{layer}"], joined[f"weights.{layer}"], joined.get(f"router_logits.{layer}"))
        for layer in moe_layers
    }
    return Traced(f"{how}, on onnxruntime", [len(step["logits"]) for step in steps], routes, evaluations)


def _form_of(info: EngineInfo) -> NetworkForm:
    """What the engine was lowered as, by its engine.json."""
    session = info.session
    return NetworkForm(
        info.max_batch,
        int(session["chunk"]),
        bool(session.get("expert_buckets", False)),
        session.get("latent_attention") == "expanded",
        info.precision.startswith("fp8"),
    )


def _step_settled(
    runner: NetworkRunner, tokens: Array, layers: Sequence[int], state: LoadState | None
) -> list[dict[str, Array]]:
    """The runs that TensorRT's session makes of a step: two of its halves where a load-aware gate is not settled."""
    if state is not None:
        runner.loads = {f"load.{layer}": load.copy() for layer, load in zip(layers, state.load, strict=True)}
    found = _step_network(runner, tokens)
    experts = np.stack([found[f"experts.{layer}"] for layer in layers])
    if (experts < 0).any():
        runner.lengths[-1] -= len(tokens)
        halves = np.array_split(tokens, 2)
        return [step for half in halves for step in _step_settled(runner, half, layers, state)]
    if state is not None:
        state.append(experts)
    return [found]


def _step_network(runner: NetworkRunner, tokens: Array) -> dict[str, Array]:
    """Of several lanes in the last, a single token by the form that steps all of them."""
    last = runner.lanes - 1
    if last == 0 or len(tokens) > 1:
        return runner.step(tokens.tolist(), last)
    return {name: rows[last : last + 1] for name, rows in runner.step_together({last: int(tokens[0])}).items()}


def _add_logits(model: ir.Model, config: MoEConfig, part: Part) -> dict[int, Evaluation]:
    """Make the routers' logits outputs router_logits.LAYER; how each layer's experts are evaluated."""
    evaluations, constants = {}, _constants_of(model)
    for layer in [layer for layer in config.moe.layers if part.start <= layer < part.stop]:
        logits = find_logits(model, layer, constants)
        if logits is not None:
            tape = ir.tape.Tape()
            output = tape.op("Identity", [logits])
            output.name, output.dtype, output.shape = f"router_logits.{layer}", ir.DataType.FLOAT, ir.Shape(["T", "n"])
            model.graph.extend(tape.nodes)
            model.graph.outputs.append(output)
        evaluation = describe_experts(model, layer, config.moe.num_experts_per_tok, constants)
        if evaluation is not None:
            evaluations[layer] = evaluation
    return evaluations
