"""Does the lowered network compute what the canonical graph computes? Both run on onnxruntime's CPU, no GPU needed.

The network's float32 form runs on chunks (one half of every branch) and on one token (the other half), and each token's
logits are compared. That says the lowering is right; the rounding that half precision adds is measured beside it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import Bundle, Progress
from ...errors import BuildError, ParityError, require
from ...export.config import MoEConfig
from ...runtime import machine
from ._canonical import Array, load_canonical
from ._trt_parts import Part, whole
from .tensorrt_network import NetworkForm, lower_network

TOLERANCE = 1e-4  # of a logit, relative where the largest is above 1
CHUNKS = (2, 1, 2)  # a chunk at the beginning, one token, a chunk behind others
# onnxruntime dequantizes every expert in every run, five times the largest matrix at once and seconds for each 100
# million parameters: a larger model is checked by its first layers.
MOST_PARAMETERS = 600_000_000
MOST_PARAMETERS_HALF = 64_000_000
_COPIES = 5
_SEEDS = (0, 1)
_TITLE = "checking the lowered network"


def check_numerics(
    bundle: Bundle,
    progress: Progress | None = None,
    *,
    parts: Sequence[Part] | None = None,
    max_memory: int | None = None,
    form: NetworkForm | None = None,
) -> dict[str, Any]:
    """Compare the lowered network, its `parts` chained, with the canonical graph; returns what engine.json keeps of it.

    Raises:
        ParityError: their logits differ.
    """
    require("onnxruntime", purpose="check the network that TensorRT is given")
    layers, total = pick_layers(bundle, max_memory), int(bundle.config["num_hidden_layers"])
    if layers == 0:
        whose = "this machine's memory" if max_memory is None else "the bound on memory"
        return {"checked": False, "reason": f"{whose} does not hold a dequantized layer of experts"}
    parts, form = parts or whole(total), form or NetworkForm()
    worst = math.inf
    with tempfile.TemporaryDirectory(prefix="moedge-check-") as scratch:
        # Two routers' scores may lie closer than rounding, so that another order of sums picks another expert: other
        # tokens then decide. A wrong lowering is wrong for both.
        for seed in _SEEDS:
            worst = min(worst, _compare(bundle, layers, parts, form, Path(scratch), seed, progress))
            if worst <= TOLERANCE:
                return {
                    "checked": True,
                    "against": "canonical graph on onnxruntime, float32",
                    "layers": layers,
                    "of_layers": total,
                    "chained": sum(part.start < layers for part in parts),
                    "difference": worst,
                    "tolerance": TOLERANCE,
                }
    raise ParityError(
        f"the network lowered for TensorRT differs from the canonical graph by {worst:.2g} over {layers} of {total} "
        f"layers (at most {TOLERANCE:.0e} was expected); this is a fault of moedge: report it, and build for the "
        "onnxruntime target meanwhile: moedge build ... --profile cpu"
    )


def pick_layers(bundle: Bundle, max_memory: int | None = None) -> int:
    """How many of the first layers the check takes, a mixture among them; 0 where this machine cannot hold one."""
    model, config = load_canonical(bundle)
    total = config.num_hidden_layers
    parameters, largest = [0] * total, 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        largest = max(largest, int(tensor.size))
        if value.name.startswith("layers."):
            parameters[int(value.name.split(".")[1])] += int(tensor.size)
    memory = (machine.memory_bytes() or 8 << 30) // 2
    memory = memory if max_memory is None else min(memory, max_memory)
    if 4 * _COPIES * largest > memory:
        return 0
    most = MOST_PARAMETERS if max_memory is None else min(MOST_PARAMETERS, max_memory // (4 * _COPIES))
    least = min(config.moe.layers, default=0) + 1
    return max(least, sum(sum(parameters[: layer + 1]) <= most for layer in range(total)))


def keep_layers(model: ir.Model, layers: int, config: MoEConfig) -> None:
    """Cut a canonical model behind its first `layers` layers; norm and head stay."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if layers == config.num_hidden_layers:
        return
    ends = {value.name: value for node in model.graph for value in node.outputs}
    last = ends[f"layers.{config.num_hidden_layers - 1}.output"]
    last.replace_all_uses_with(ends[f"layers.{layers - 1}.output"])
    RemoveUnusedNodesPass()(model)


class NetworkRunner:
    """A lowered network on onnxruntime, or its parts chained, with its cache: what a session does on a GPU.

    `lanes`, as it was lowered for: so many sequences, each with a `length` of its own.
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
        feeds: dict[str, Array] = {f"past.{name}": rows[lanes] for name, rows in self.cache.items()}
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
    layers: int,
    parts: Sequence[Part],
    form: NetworkForm,
    scratch: Path,
    seed: int,
    progress: Progress | None,
) -> float:
    """`difference` between the float32 form, run in CHUNKS, and the canonical graph, of the first layers."""
    kept = [Part(part.start, min(part.stop, layers), layers) for part in parts if part.start < layers]
    for part in kept:
        model, config = load_canonical(bundle)
        keep_layers(model, layers, config)
        network = lower_network(model, config, sum(CHUNKS) + 3, real=ir.DataType.FLOAT, part=part, form=form)
        network.weights.write(scratch / part.weights)
        network.save(scratch, part.model)
    runner = NetworkRunner(*[scratch / part.model for part in kept], lanes=form.lanes)
    return _run_both(bundle, layers, runner, draw_tokens(bundle, seed), _TITLE, progress)[0]


def measure_half(
    bundle: Bundle, paths: list[Path], form: NetworkForm, progress: Progress | None = None
) -> dict[str, Any] | None:
    """How far the half precision form, as written part by part in `paths`, is from the canonical graph.

    None where this onnxruntime has no half precision kernels for it, or the model is too large to bother.

    Raises:
        BuildError: half precision overflows.
    """
    import onnxruntime as ort

    if bundle.manifest["model"]["parameters"] > MOST_PARAMETERS_HALF:
        return None
    layers, tokens = int(bundle.config["num_hidden_layers"]), draw_tokens(bundle, _SEEDS[0])
    unable = ort.capi.onnxruntime_pybind11_state
    try:
        runner = NetworkRunner(*paths, lanes=form.lanes)
        worst, same = _run_both(bundle, layers, runner, tokens, "measuring half precision", progress)
    except (unable.NotImplemented, unable.Fail):
        return None
    if not math.isfinite(worst):
        raise BuildError(
            "the logits overflow in half precision, which this target computes in; build for the onnxruntime target: "
            "moedge build ... --profile cpu"
        )
    return {"difference": worst, "same_choice": same}


def _run_both(
    bundle: Bundle, layers: int, runner: NetworkRunner, tokens: Array, title: str, progress: Progress | None
) -> tuple[float, float]:
    """(`difference`, share of tokens whose largest logit is the same) of a lowered network and the canonical graph."""
    steps = len(CHUNKS) + (2 if runner.lanes > 1 else 1)
    report = progress or (lambda what, done, total: None)
    pieces = []
    for done, length in enumerate(CHUNKS):
        report(title, done, steps)
        pieces.append(runner.step(tokens[runner.length : runner.length + length].tolist())["logits"])
    places = list(range(len(tokens)))
    if runner.lanes > 1:
        report(title, len(CHUNKS), steps)
        pieces += _step_lanes(runner, tokens, places)
    report(title, steps - 1, steps)
    found, expected = np.concatenate(pieces), canonical_logits(bundle, layers, tokens)[places]
    report(title, steps, steps)
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


def draw_tokens(bundle: Bundle, seed: int) -> Array:
    """int64 [tokens]: random tokens; a wrong lowering is wrong for any."""
    return np.random.default_rng(seed).integers(0, int(bundle.config["vocab_size"]), sum(CHUNKS))


def difference(found: Array, expected: Array) -> float:
    """The largest difference of a logit over the larger of 1 and the largest logit; infinite where that is NaN."""
    worst = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    return worst if math.isfinite(worst) else math.inf


def canonical_logits(bundle: Bundle, layers: int, tokens: Array) -> Array:
    """float32 [tokens, vocab] of the canonical graph's first layers."""
    model, config = load_canonical(bundle)
    keep_layers(model, layers, config)
    session = open_plain_session(ir.to_proto(model).SerializeToString(), bundle.path)
    (logits,) = session.run(["logits"], {"input_ids": tokens[None]})
    result: Array = logits[0]
    return result
