"""`moedge verify --deep`: do the engines take the routes that the canonical graph takes?

A few tokens go through the canonical graph and through each engine: onnxruntime's by its own session, TensorRT's
network on onnxruntime, no GPU needed. In each layer two things are compared. First, what the engine's gate made of
the engine's own logits, with the gate's numpy reference on those logits: they must be equal but for near ties
(export/gating/_compare.py), whatever rounding did to the hidden states before. Second, the engine's logits with the
canonical ones, for tokens that took the canonical experts in all layers before: rounding moves them a little, a wrong
router altogether. Behind a layer that differs nothing is compared: all that follows may differ rightly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import Bundle, Progress
from ..errors import EngineError, require
from ..runtime.preflight import EngineInfo, read_engine

if TYPE_CHECKING:
    from .targets._routes import CanonicalGate, Route, Traced

TOKENS = 24
SEED = 20261122
# Of the spread of a token's logits, root mean square, median over tokens: int8 activations move them by a tenth.
MOST_DRIFT = 0.5
# Where an engine's logits are not to be had, its choices are held to the canonical ones with this much room.
_SLACK, _TOLERANCE = 0.1, 0.1


@dataclass
class Deep:
    """`engines`: by profile, as in --json; `faults` must be mended, `unchecked` could not be looked at."""

    tokens: int = 0
    layers: int = 0
    of_layers: int = 0
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("faults", "unchecked")}


def verify_routes(bundle: Bundle, profiles: list[str], progress: Progress | None = None) -> Deep:
    """Compare the engines of `profiles`, which are sound and of this bundle, with the canonical graph.

    Raises:
        DependencyError: onnxruntime or onnx is not installed.
    """
    require("onnx", purpose="run the canonical graph")
    require("onnxruntime", purpose="run the canonical graph")
    from .targets._canonical import holds_torch_graph
    from .targets._routes import pick_layers, trace_canonical

    deep = Deep(of_layers=int(bundle.config["num_hidden_layers"]))
    if not bundle.config["moe"].get("layers"):
        deep.unchecked.append("routes: the model has no mixture of experts")
        return deep
    if holds_torch_graph(bundle):
        deep.unchecked.append("routes: a PyTorch model's own graph has no layers that --deep could cut")
        return deep
    deep.layers = min(pick_layers(bundle), deep.of_layers)
    if not deep.layers:
        deep.unchecked.append("routes: this machine's memory does not hold a dequantized layer of experts")
        return deep
    infos = [read_engine(bundle, profile) for profile in profiles]
    deep.tokens = min([TOKENS, *(info.max_seq_len for info in infos)])
    tokens = np.random.default_rng(SEED).integers(0, int(bundle.config["vocab_size"]), deep.tokens)
    if progress is not None:
        progress("routes of the canonical graph", 0, len(infos) + 1)
    gates = trace_canonical(bundle, deep.layers, tokens)
    for done, info in enumerate(infos, 1):
        if progress is not None:
            progress(f"routes of engine {info.profile}", done, len(infos) + 1)
        _check_engine(bundle, info, tokens, gates, deep)
    if progress is not None:
        progress("routes", len(infos) + 1, len(infos) + 1)
    return deep


def _check_engine(
    bundle: Bundle, info: EngineInfo, tokens: Any, gates: dict[int, CanonicalGate], deep: Deep
) -> None:
    from .targets import find_target

    label = f"engine '{info.profile}'"
    counts = _compare_counts(bundle, info)
    rebuild = f"build it again: moedge build {bundle.path} --profile {info.profile}"
    try:
        traced = find_target(info.target).trace_routes(bundle, info, tokens, deep.layers)
    except EngineError as error:
        deep.faults.append(f"{label}: {error}")
        deep.engines[info.profile] = {"how": None, "layers": [], "strays": [], "faults": [str(error)]}
        return
    found = _follow(gates, traced)
    found["faults"] = counts + found["faults"]
    if traced.together is not None:
        together = found["together"] = _follow(gates, traced.together)
        if not found["faults"]:  # else the same are said twice: both graphs are lowered alike
            found["faults"] += [f"several sequences in a step: {fault}" for fault in together["faults"]]
    deep.faults += [f"{label}: {fault}; {rebuild}" for fault in found["faults"]]
    deep.engines[info.profile] = found


def _compare_counts(bundle: Bundle, info: EngineInfo) -> list[str]:
    """What is wrong with how a session would count the load; the routes below begin with another."""
    from ..export.config import moe_config_from_json
    from .targets._canonical import describe_load

    counts = describe_load(moe_config_from_json(bundle.config))
    given = {name: info.session.get(name) for name in counts}
    return [f"{name} is {given[name]} and the model's {each}" for name, each in counts.items() if given[name] != each]


def _follow(gates: dict[int, CanonicalGate], traced: Traced) -> dict[str, Any]:
    """Layer after layer until one differs; what --json has of an engine."""
    faults: list[str] = []
    layers: list[dict[str, Any]] = []
    alike = None
    for layer in sorted(gates.keys() & traced.routes.keys()):
        described, alike = _compare_layer(gates[layer], traced.routes[layer], traced.calls, alike)
        evaluation = traced.evaluations.get(layer)
        described["experts"] = evaluation.text if evaluation else None
        layers.append({"layer": layer, **described})
        if evaluation is not None and not evaluation.chosen:
            faults.append(f"layer {layer} runs {evaluation.text}: none of its forms runs the chosen experts alone")
        if described["fault"] is not None:
            faults.append(f"layer {layer}, {described['fault']}")
            break
    if traced.strays:
        count = f"{len(traced.strays)} nodes run" if len(traced.strays) > 1 else "a node runs"
        faults.append(f"{count} elsewhere than on {traced.provider}, the first: {traced.strays[0]}")
    return {"how": traced.how, "layers": layers, "strays": traced.strays, "faults": faults}


def _compare_layer(
    gate: CanonicalGate, route: Route, calls: list[int], alike: Any
) -> tuple[dict[str, Any], Any]:
    """One layer for --json, and which tokens [T] still take the canonical route. `alike`: those so far; None: all."""
    from ..export.gating._compare import by_expert, compare_choices
    from ..export.gating._compare_load import follow_load, reference_behind

    alike = np.ones(len(gate.route.experts), bool) if alike is None else alike
    same = (by_expert(*route[:2])[0] == by_expert(*gate.route[:2])[0]).all(axis=-1)
    place, drift = np.arange(len(alike)), None
    further: tuple[Any, ...] = gate.inputs[1:]
    reference: Any = gate.op
    whose = "its"
    if gate.base is not None:
        further += follow_load(route.experts, calls, gate.load, gate.attributes)
        reference, whose = reference_behind(gate.base), "its load and"
    if route.logits is not None:
        inputs = [route.logits, *further]
        compared = compare_choices(reference, inputs, gate.attributes, *route[:2], whose=whose)
        drift = _drift(route.logits[alike], gate.inputs[0][alike]) if alike.any() else None
    else:
        place = np.flatnonzero(alike)
        inputs = [each[place] if each.ndim == 2 else each for each in (gate.inputs[0], *further)]
        choices = (route.experts[place], route.weights[place])
        room = {"slack": _SLACK, "tolerance": _TOLERANCE}
        compared = compare_choices(reference, inputs, gate.attributes, *choices, **room, whose="the canonical")
    fault = None
    if drift is not None and not drift <= MOST_DRIFT:
        fault = f"moedge.{gate.op}: the router's logits are not the canonical ones (off by {drift:.2g} of their spread)"
    elif compared.token is not None:
        fault = f"token {place[compared.token]}, moedge.{gate.op}: it {compared.fault}"
    return {
        "gate": f"moedge.{gate.op}",
        "compared": "on its own logits" if route.logits is not None else "on the canonical logits",
        "near_ties": len(compared.near_ties),
        "tokens_elsewhere": int((alike & ~same).sum()),
        "logits_drift": drift,
        "fault": fault,
    }, alike & same


def _drift(logits: Any, canonical: Any) -> float:
    """Root mean square difference of a token's logits over their spread, median over tokens; NaN counts as infinite.

    0 of a single logit, which has no spread: it chooses nothing.
    """
    if canonical.shape[1] == 1:
        return 0.0
    spread = np.maximum(canonical.std(axis=1), 1e-6)
    moved = np.sqrt(np.square(logits - canonical).mean(axis=1)) / spread
    return float(np.median(np.nan_to_num(moved, nan=np.inf)))
