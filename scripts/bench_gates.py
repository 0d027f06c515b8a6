"""Router and gate on onnxruntime CPU: `SoftmaxTopKGate` behind a linear router against `BinaryCodeGate`.

    python scripts/bench_gates.py [--hidden 2048] [--experts 1024] [--top-k 4] [--threads 1]

Each line: the median time of a call in the best of eight turns, how many times as fast as the linear router, the bytes
of the router's weights, and, for one token, what reading those takes from memory at the bandwidth measured here. Called
in a row, as here, a router stays in the caches and may be faster than that; between the layers of a model it is not.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import explain_missing  # noqa: F401
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from moedge.export.gating import binary_code, list_gates
from moedge.profiles.targets._canonical import Rewriter

TURNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 2048), ("experts", 1024), ("top-k", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each is timed")
    args = parser.parse_args()
    bandwidth = measure_bandwidth()
    print(f"hidden {args.hidden}, {args.experts} experts, top {args.top_k}, {args.threads} thread(s), float32")
    print(f"onnxruntime {ort.__version__}; memory reads at {bandwidth / 1e9:.1f} GB/s on one thread")
    sessions = make_sessions(args)
    for tokens in (1, 512):
        x = np.random.default_rng(0).standard_normal((tokens, args.hidden)).astype(np.float32)
        # In turns, so that what else the machine does meets all of them.
        turns = [
            {name: measure(session, x, args.seconds / TURNS) for name, (session, _) in sessions.items()}
            for _ in range(TURNS)
        ]
        took = {name: min(turn[name] for turn in turns) for name in sessions}
        for name, (_, weights) in sessions.items():
            bound = f", {weights / bandwidth * 1e6:.0f} us from memory" if tokens == 1 else ""
            ratio = took["linear"] / took[name]
            print(f"{tokens:4} token(s)  {name:16} {took[name] * 1e6:9.0f} us  {ratio:6.1f}x  {weights:9} B{bound}")


def make_sessions(args: argparse.Namespace) -> dict[str, tuple[ort.InferenceSession, int]]:
    """Sessions by name, with the bytes of their routers: the linear gate, the binary gate lowered and as a function."""
    bits = binary_code.count_bits(args.experts)
    softmax = {"top_k": args.top_k, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 1.0}
    binary = {"top_k": args.top_k, "bits": bits, "norm_topk_prob": 1, "routed_scaling_factor": 1.0}
    fault = binary_code.find_fault(binary, args.experts)
    if fault:
        raise SystemExit(f"error: {fault}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    made = {}
    for name, op, width, attributes, lowered in (
        ("linear", "SoftmaxTopKGate", args.experts, softmax, True),
        ("binary", "BinaryCodeGate", bits, binary, True),
        ("binary function", "BinaryCodeGate", bits, binary, False),
    ):
        model = make_model(op, args.hidden, width, attributes, lowered=lowered)
        made[name] = ort.InferenceSession(model.SerializeToString(), options), args.hidden * width * 4
    return made


def make_model(op: str, hidden: int, width: int, attributes: dict[str, Any], *, lowered: bool) -> onnx.ModelProto:
    """x [T, hidden] -> experts, weights: a router of `width` logits and its gate."""
    router = np.random.default_rng(1).standard_normal((width, hidden)).astype(np.float32) / hidden**0.5
    nodes = [
        helper.make_node("Gemm", ["x", "router"], ["logits"], transB=1),
        helper.make_node(op, ["logits"], ["experts", "weights"], domain="moedge", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "gate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", hidden])],
        [
            helper.make_tensor_value_info("experts", TensorProto.INT64, ["T", attributes["top_k"]]),
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", attributes["top_k"]]),
        ],
        [numpy_helper.from_array(router, "router")],
    )
    functions = [onnx.parser.parse_function(list_gates()[op].FUNCTION)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)
    if not lowered:
        return model
    graph_ir = ir.serde.deserialize_model(model)
    rewriter = Rewriter(graph_ir)
    (call,) = [node for node in graph_ir.graph if node.domain == "moedge"]
    rewriter.replace(call, list_gates()[op].lower(rewriter, call.inputs, attributes))
    return ir.to_proto(graph_ir)


def measure(session: ort.InferenceSession, x: Any, seconds: float) -> float:
    """Seconds of a call, the median of as many as fit; the first fifth warms up."""
    feed = {"x": x}
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(times) // 5 :]))


def measure_bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second of summing an array larger than the caches."""
    data = np.ones(size // 8)
    best = min(_time_sum(data) for _ in range(3))
    return size / best


def _time_sum(data: Any) -> float:
    start = time.perf_counter()
    data.sum()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
