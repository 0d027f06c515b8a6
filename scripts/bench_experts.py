"""The experts of a layer on onnxruntime's CPU: moedge's own op against `QMoE`, at the shapes of real models.

    python scripts/bench_experts.py [--shape olmoe] [--tokens 1 64 512] [--threads 2] [--bits 4] [--json FILE]

Each line: the least time of a call over interleaved turns, with other experts in each call than in the last so that
the weights come from memory; how many times as fast as `QMoE`; for one token, the bytes of the chosen experts over the
time, as a share of the bandwidth measured in the same run. Loading is timed from a weights file in the
page cache; private: what memory the process then holds that no other can share. Random weights, seed 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from moedge.runtime import kernels, machine

Array = NDArray[Any]
MS = "com.microsoft"


@dataclass(frozen=True)
class Shape:
    """E = experts, H = hidden size, I = intermediate size of an expert, k = experts per token."""

    experts: int
    hidden: int
    inner: int
    top_k: int


SHAPES = {
    "olmoe": Shape(64, 2048, 1024, 8),
    "deepseek-v2-lite": Shape(64, 2048, 1408, 6),
    "qwen3-30b-a3b": Shape(128, 2048, 768, 8),
}
GROUP = 128
WEIGHTS = "weights.bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if kernels.library() is None:
        raise SystemExit(f"error: {kernels.why_not()}")
    results: list[dict[str, Any]] = []
    bandwidth = machine.measure_bandwidth(args.threads)
    print(f"onnxruntime {ort.__version__}, kernels {kernels.instruction_set()}, {args.threads} threads, int{args.bits}")
    for name in args.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            for line in measure_shape(name, args, Path(folder), bandwidth):
                results.append(line)
                print(describe(line), flush=True)
    print(f"memory reads at {bandwidth / 1e9:.1f} GB/s")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(), "results": results}, indent=1) + "\n")


def measure_shape(name: str, args: argparse.Namespace, folder: Path, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The results of one shape: first loading, then each number of tokens."""
    shape = SHAPES[name]
    places = write_weights(shape, args.bits, folder)
    sessions, loads = {}, {}
    for kind, make in (("moedge.cpu", own_model), ("QMoE", stock_model)):
        before, started = machine_private(), time.perf_counter()
        sessions[kind] = open_session(make(shape, args.bits, places), folder, args.threads)
        loads[kind] = (time.perf_counter() - started, machine_private() - before)
    for kind, (seconds, private) in loads.items():
        yield {"shape": name, "kind": kind, "load_s": seconds, "private_bytes": private}
    codes = 3 * shape.hidden * shape.inner  # of gate, up and down
    expert_bytes = codes * args.bits // 8 + codes // GROUP * 4
    generator = np.random.default_rng(0)
    for tokens in args.tokens:
        least = dict.fromkeys(sessions, float("inf"))
        calls = max(1, min(40, 64 // tokens))
        for _ in range(args.turns):
            feeds = [make_feed(shape, tokens, generator, call) for call in range(calls)]
            for kind, session in sessions.items():
                for feed in feeds:
                    given = own_feed(feed) if kind == "moedge.cpu" else stock_feed(feed, shape)
                    started = time.perf_counter()
                    session.run(None, given)
                    least[kind] = min(least[kind], time.perf_counter() - started)
        for kind, seconds in least.items():
            rate = shape.top_k * expert_bytes / seconds / bandwidth if tokens == 1 else None
            ratio = least["QMoE"] / seconds
            yield {"shape": name, "kind": kind, "tokens": tokens, "s": seconds, "speedup": ratio, "of_bandwidth": rate}


def describe(line: dict[str, Any]) -> str:
    head = f"{line['shape']:18} {line['kind']:11}"
    if "load_s" in line:
        return f"{head} load {line['load_s'] * 1e3:8.1f} ms, {line['private_bytes'] / 2**20:7.0f} MiB private"
    share = "" if line["of_bandwidth"] is None else f"  {line['of_bandwidth']:4.0%} of bandwidth"
    return f"{head} {line['tokens']:4} token(s) {line['s'] * 1e6:9.0f} us  {line['speedup']:5.2f}x{share}"


def write_weights(shape: Shape, bits: int, folder: Path) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """weights.bin of random codes and scales: name -> (offset, shape, ONNX type)."""
    generator = np.random.default_rng(0)
    places: dict[str, tuple[int, tuple[int, ...], int]] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for name, rows, width in (
            ("gate_up", 2 * shape.inner, shape.hidden),
            ("down", shape.hidden, shape.inner),
        ):
            packed = (shape.experts, rows, width * bits // 8)
            places[name] = (file.tell(), packed, TensorProto.UINT8)
            file.write(generator.integers(0, 256, packed, np.uint8).tobytes())
            scales = (shape.experts, rows, width // GROUP)
            places[f"{name}.scales"] = (file.tell(), scales, TensorProto.FLOAT)
            file.write((generator.random(scales, np.float32) * 0.02).tobytes())
    return places


def make_model(node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], places: dict[str, Any]) -> bytes:
    initializers = []
    for name, (offset, shape, kind) in places.items():
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        size = int(np.prod(shape)) * (4 if kind == TensorProto.FLOAT else 1)
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", "H"])
    graph = helper.make_graph([node], "experts", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1), helper.make_opsetid(kernels.DOMAIN, 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


def own_model(shape: Shape, bits: int, places: dict[str, Any]) -> bytes:
    inputs = ["x", "experts", "weights", "gate_up", "gate_up.scales", "down", "down.scales"]
    node = helper.make_node("Experts", inputs, ["y"], domain=kernels.DOMAIN, bits=bits)
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", shape.hidden]),
        helper.make_tensor_value_info("experts", TensorProto.INT64, ["T", shape.top_k]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", shape.top_k]),
    ]
    return make_model(node, values, places)


def stock_model(shape: Shape, bits: int, places: dict[str, Any]) -> bytes:
    inputs = ["x", "routing", "gate_up", "gate_up.scales", "", "down", "down.scales", *[""] * 7, "routing"]
    node = helper.make_node(
        "QMoE",
        inputs,
        ["y"],
        domain=MS,
        k=shape.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        expert_weight_bits=bits,
        block_size=GROUP,
        use_sparse_mixer=0,
        normalize_routing_weights=0,
        accuracy_level=4,
    )
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", shape.hidden]),
        helper.make_tensor_value_info("routing", TensorProto.FLOAT, ["T", shape.experts]),
    ]
    return make_model(node, values, places)


def open_session(model: bytes, folder: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.register_custom_ops_library(str(kernels.library()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_feed(shape: Shape, tokens: int, generator: np.random.Generator, call: int) -> dict[str, Array]:
    """Random tokens and choices; one token's go through all experts call by call, so that none is in a cache still."""
    if tokens == 1:
        chosen = (np.arange(shape.top_k) + call * shape.top_k)[None] % shape.experts
    else:
        chosen = np.argsort(generator.random((tokens, shape.experts)), axis=1)[:, : shape.top_k]
    return {
        "x": generator.standard_normal((tokens, shape.hidden), np.float32),
        "experts": chosen.astype(np.int64),
        "weights": generator.random((tokens, shape.top_k), np.float32),
    }


def own_feed(feed: dict[str, Array]) -> dict[str, Array]:
    return feed


def stock_feed(feed: dict[str, Array], shape: Shape) -> dict[str, Array]:
    routing = np.zeros((len(feed["x"]), shape.experts), np.float32)
    np.put_along_axis(routing, feed["experts"], feed["weights"], axis=1)
    return {"x": feed["x"], "routing": routing}


def machine_private() -> int:
    """Bytes of this process that are in memory and in no file."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.is_file() else ""
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
