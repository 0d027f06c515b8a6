"""Does the lowered network compute what the canonical graph computes? Both run on onnxruntime's CPU, no GPU needed.

The network's float32 form runs on chunks (one half of every branch) and on one token (the other half), and each token's
logits are compared. That says the lowering is right; the rounding that half precision adds is measured beside it. What
does not fit the memory at once is checked in slices, of experts and of the vocabulary (`_trt_views`).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import Bundle, Progress
from ...errors import BuildError, ParityError, require
from ...export.config import MoEConfig, moe_config_from_json
from ...runtime import machine
from ._canonical import Array, attributes_of, find_calls, load_canonical
from ._trt_form import NetworkForm
from ._trt_fp8_check import round_canonical
from ._trt_parts import Part, whole
from ._trt_views import View, keep_view, measure_view_sizes, plan_views
from .tensorrt_network import lower_network

TOLERANCE = 1e-4  # of a logit, relative where the largest is above 1
MOST_PARAMETERS_HALF = 64_000_000
_SEEDS = (0, 1)
_LANE_TOKENS = 4  # that `_step_lanes` takes
_TITLE = "checking the lowered network"


def check_numerics(
    bundle: Bundle,
    progress: Progress | None = None,
    *,
    parts: Sequence[Part] | None = None,
    memory: int | None = None,
    form: NetworkForm | None = None,
) -> dict[str, Any]:
    """Compare the lowered network, its `parts` chained, with the canonical graph; returns what engine.json keeps of it.

    `memory`: bytes that the check may take beside what the process has; half the machine's unless given.

    Raises:
        ParityError: their logits differ.
    """
    require("onnxruntime", purpose="check the network that TensorRT is given")
    model, config = load_canonical(bundle)
    sizes = measure_view_sizes(model, config)
    views = plan_views(sizes, (machine.memory_bytes() or 8 << 30) // 2 if memory is None else memory)
    parts, form = parts or whole(config.num_hidden_layers), form or NetworkForm()
    matrix = "matrix of the network"
    if form.buckets:  # a slice's experts would get more tokens than their buckets hold
        views = [view for view in views if view.experts == sizes.experts]
        matrix = "layer of experts, which expert buckets cannot be checked in slices of"
    if not views:
        whose = "this machine's memory" if memory is None else "the bound on memory"
        return {"checked": False, "reason": f"{whose} does not hold a dequantized {matrix}"}
    checks = [check for view in views for check in list_checks(config, view)]
    steps = _Steps(progress, sum(_count_steps(view, form.lanes) for view, _ in checks))
    worst = max(_check_view(bundle, view, lift, parts, form, steps) for view, lift in checks)
    deepest = max(view.layers for view in views)
    return {
        "checked": True,
        "against": "canonical graph on onnxruntime, float32",
        "layers": deepest,
        "of_layers": config.num_hidden_layers,
        "layers_with_every_expert": views[0].layers,
        "experts_at_once": views[0].experts,
        "of_experts": sizes.experts,
        "chained": sum(part.start < deepest for part in parts),
        "difference": worst,
        "tolerance": TOLERANCE,
    }


def list_checks(config: MoEConfig, view: View) -> list[tuple[View, bool]]:
    """How a view is compared, each time with or without what load-aware gates put on a call.

    The canonical graph has one call for all tokens: what a gate allows a call is compared in one, all else in several.
    """
    if config.moe.gate.base is None:
        return [(view, False)]
    return [(dataclasses.replace(view, chunks=(sum(view.chunks),)), False), (view, True)]


def lift_capacity(model: ir.Model) -> None:
    """Give every expert of a load-aware gate room for every token."""
    for call in find_calls(model, "LoadAwareGate"):
        load = call.inputs[2]
        assert load is not None and load.shape is not None
        factor = 2 * int(load.shape[0]) / int(attributes_of(call)["top_k"])  # type: ignore[arg-type]
        call.attributes["capacity_factor"] = ir.AttrFloat32("capacity_factor", factor)


def _check_view(
    bundle: Bundle, view: View, lift: bool, parts: Sequence[Part], form: NetworkForm, steps: _Steps
) -> float:
    """`difference` of a view; raises ParityError beyond the tolerance."""
    worst = math.inf
    # Two routers' scores may lie closer than rounding, so that another order of sums picks another expert: other
    # tokens then decide. A wrong lowering is wrong for both.
    for seed in _SEEDS:
        with tempfile.TemporaryDirectory(prefix="moedge-check-") as scratch:
            worst = min(worst, _compare(bundle, view, lift, parts, form, Path(scratch), seed, steps))
        if worst <= TOLERANCE:
            return worst
    raise ParityError(
        f"the network lowered for TensorRT differs from the canonical graph by {worst:.2g} over {view.layers} of "
        f"{bundle.config['num_hidden_layers']} layers (at most {TOLERANCE:.0e} was expected); this is a fault of "
        "moedge: report it, and build for the onnxruntime target meanwhile: moedge build ... --profile cpu"
    )


def _count_steps(view: View, lanes: int) -> int:
    return len(view.chunks) + (2 if lanes > 1 else 1)


@dataclass
class _Steps:
    """Counts the runs of all views, for the one progress that the user sees."""

    progress: Progress | None
    total: int
    done: int = 0
    title: str = _TITLE

    def say(self) -> None:
        if self.progress is not None:
            self.progress(self.title, min(self.done, self.total), self.total)

    def advance(self) -> None:
        self.done += 1
        self.say()


class NetworkRunner:
    """A lowered network on onnxruntime, or its parts chained, with its cache: what a session does on a GPU.

    `lanes`, as it was lowered for: so many sequences, each with a `length` of its own. `loads`: what load-aware gates
    are given, drawn at random; it stays as it is.
    """

    def __init__(self, *paths: Path, lanes: int = 1) -> None:
        self.sessions = [open_plain_session(path) for path in paths]
        self.cache: dict[str, Array] = {}
        self.lanes = lanes
        for session in self.sessions:
            for value in session.get_inputs():
                if value.name.startswith("past."):
                    dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                    name, shape = value.name.removeprefix("past."), (lanes, *value.shape[1:])
                    self.cache[name] = np.zeros(shape, dtype)
                    self.slots = int(shape[2])
        self.loads = draw_loads(self.sessions)
        self.lengths = [0] * lanes

    @property
    def length(self) -> int:
        return self.lengths[0]

    def step(self, tokens: Sequence[int], lane: int = 0) -> dict[str, Array]:
        """Append tokens to a sequence; every output but the cache: logits float32 [tokens, vocab], routing."""
        results = self._run(np.array(tokens, np.int64), [self.lengths[lane]], [0], slice(lane, lane + 1))
        self.lengths[lane] += len(tokens)
        return results

    def step_together(self, tokens: dict[int, int]) -> dict[str, Array]:
        """Append a token to the sequence of each lane named; the outputs have a row for each lane, named or not."""
        busy = [lane in tokens for lane in range(self.lanes)]
        starts = [self.lengths[lane] if busy[lane] else self.slots - 1 for lane in range(self.lanes)]
        source = [lane if busy[lane] else min(tokens) for lane in range(self.lanes)]
        ids = np.array([tokens.get(lane, 0) for lane in range(self.lanes)], np.int64)
        results = self._run(ids, starts, source, slice(None))
        for lane in tokens:
            self.lengths[lane] += 1
        return results

    def _run(self, tokens: Array, starts: list[int], source: list[int], lanes: slice) -> dict[str, Array]:
        feeds: dict[str, Array] = {f"past.{name}": rows[lanes] for name, rows in self.cache.items()} | self.loads
        feeds["input_ids"] = tokens
        feeds["start"], feeds["source"] = np.array(starts, np.int64), np.array(source, np.int64)
        feeds["rows"] = np.arange(len(tokens), dtype=np.int64)
        results: dict[str, Array] = {}
        for session in self.sessions:
            names = [output.name for output in session.get_outputs()]
            taken = {value.name: feeds[value.name] for value in session.get_inputs()}
            results |= dict(zip(names, session.run(names, taken), strict=True))
            if "hidden.next" in results:
                feeds["hidden"] = results.pop("hidden.next")
        for name, rows in self.cache.items():
            rows[lanes] = results.pop(f"present.{name}")
        return results


def open_plain_session(model: Path | bytes, external: Path | None = None) -> Any:
    """onnxruntime without graph optimizations: what is checked is what was written. `external`: the weights' folder."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # dequantized experts are given back before the next are made
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if external is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(external.absolute()))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _compare(
    bundle: Bundle,
    view: View,
    lift: bool,
    parts: Sequence[Part],
    form: NetworkForm,
    scratch: Path,
    seed: int,
    steps: _Steps,
) -> float:
    """`difference` between the float32 form, run in chunks, and the canonical graph, both cut down to the view."""
    kept = [Part(part.start, min(part.stop, view.layers), view.layers) for part in parts if part.start < view.layers]
    for part in kept:
        model, config = load_canonical(bundle)
        config = keep_view(model, config, view)
        if lift:
            lift_capacity(model)
        slots = sum(view.chunks) + 3
        network = lower_network(model, config, slots, real=ir.DataType.FLOAT, part=part, form=form)
        network.weights.write(scratch / part.weights)
        network.save(scratch, part.model)
    runner = NetworkRunner(*[scratch / part.model for part in kept], lanes=form.lanes)
    return _run_both(bundle, view, lift, runner, draw_tokens(view, seed), steps, fp8=form.fp8)[0]


def measure_half(
    bundle: Bundle, paths: list[Path], form: NetworkForm, progress: Progress | None = None
) -> dict[str, Any] | None:
    """How far the half precision form, as written part by part in `paths`, is from the canonical graph; with FP8, from
    the graph with the bundle's own weights.

    None where this onnxruntime has no half precision kernels for it, or the model is too large to bother.

    Raises:
        BuildError: half precision overflows.
    """
    import onnxruntime as ort

    if (bundle.manifest["model"].get("parameters") or 0) > MOST_PARAMETERS_HALF:
        return None
    config = bundle.config
    view = View(int(config["num_hidden_layers"]), 0, int(config["moe"]["num_experts"]), 0, int(config["vocab_size"]))
    (view, lift), *_ = list_checks(moe_config_from_json(config), view)
    unable = ort.capi.onnxruntime_pybind11_state
    try:
        runner = NetworkRunner(*paths, lanes=form.lanes)
        steps = _Steps(progress, _count_steps(view, form.lanes), title="measuring half precision")
        worst, same = _run_both(bundle, view, lift, runner, draw_tokens(view, _SEEDS[0]), steps)
    except (unable.NotImplemented, unable.Fail):
        return None
    if not math.isfinite(worst):
        raise BuildError(
            "the logits overflow in half precision, which this target computes in; build for the onnxruntime target: "
            "moedge build ... --profile cpu"
        )
    return {"difference": worst, "same_choice": same}


def _run_both(
    bundle: Bundle, view: View, lift: bool, runner: NetworkRunner, tokens: Array, steps: _Steps, *, fp8: bool = False
) -> tuple[float, float]:
    """(`difference`, share of tokens whose largest logit is the same) of a lowered network and the canonical graph,
    the latter's weights rounded too for `fp8`."""
    pieces = []
    steps.say()
    for length in view.chunks:
        pieces.append(runner.step(tokens[runner.length : runner.length + length].tolist())["logits"])
        steps.advance()
    places = list(range(sum(view.chunks)))
    if runner.lanes > 1:
        pieces += _step_lanes(runner, tokens, places)
        steps.advance()
    runner.sessions.clear()  # before the other graph's weights come
    if len(view.chunks) == 1 and runner.lanes == 1:
        tokens = tokens[: view.chunks[0]]
    expected = _view_logits(bundle, view, tokens, runner.loads, lift, fp8=fp8)[places]
    found = np.concatenate(pieces)
    steps.advance()
    same = float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean())
    return difference(found, expected), same


def _step_lanes(runner: NetworkRunner, tokens: Array, places: list[int]) -> list[Array]:
    """The last lane begins the same text, steps with all others idle, then with the first lane a token behind it.

    Appends the place of each row to `places`.
    """
    last = runner.lanes - 1
    pieces = [runner.step(tokens[:2].tolist(), last)["logits"]]
    pieces.append(runner.step_together({last: int(tokens[2])})["logits"][last:])
    runner.lengths[0] = 2
    both = runner.step_together({0: int(tokens[2]), last: int(tokens[3])})["logits"]
    places += [0, 1, 2, 2, 3]
    return [*pieces, both[:1], both[last:]]


def draw_tokens(view: View, seed: int) -> Array:
    """int64 [tokens]: random tokens; a wrong lowering is wrong for any."""
    return np.random.default_rng(seed).integers(0, view.rows, max(_LANE_TOKENS, sum(view.chunks)))


def difference(found: Array, expected: Array) -> float:
    """The largest difference of a logit over the larger of 1 and the largest logit; infinite where that is NaN."""
    worst = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    return worst if math.isfinite(worst) else math.inf


def draw_loads(sessions: Sequence[Any]) -> dict[str, Array]:
    """Some load for each load-aware gate of lowered graphs: float32 [E] by its input's name."""
    inputs = {value.name: value.shape for session in sessions for value in session.get_inputs()}
    rng = np.random.default_rng(_SEEDS[0])
    names = [name for name in inputs if name.startswith("load.")]
    return {name: (9 * rng.random(inputs[name])).astype(np.float32) for name in sorted(names)}


def canonical_logits(bundle: Bundle, layers: int, tokens: Array, loads: dict[str, Array] | None = None) -> Array:
    """float32 [tokens, vocab] of the canonical graph's first layers, all tokens in one call on these loads."""
    config = bundle.config
    view = View(layers, 0, int(config["moe"]["num_experts"]), 0, int(config["vocab_size"]))
    return _view_logits(bundle, view, tokens, loads or {}, lift=False)


def _view_logits(
    bundle: Bundle, view: View, tokens: Array, loads: dict[str, Array], lift: bool, *, fp8: bool = False
) -> Array:
    """float32 [tokens, rows] of the canonical graph cut down to the view, its weights rounded for `fp8`."""
    model, config = load_canonical(bundle)
    keep_view(model, config, view)
    if lift:
        lift_capacity(model)
    if fp8:
        round_canonical(model)
    session = open_plain_session(ir.to_proto(model).SerializeToString(), bundle.path)
    (logits,) = session.run(["logits"], {"input_ids": tokens[None]} | loads)
    result: Array = logits[0]
    return result
