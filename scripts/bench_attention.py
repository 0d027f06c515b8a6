"""Attention on onnxruntime's CPU: moedge's own op against what the stock graph has, at the shapes of real models.

    python scripts/bench_attention.py [--shape olmoe] [--kv-cache fp32] [--runs 1@512 512@0] [--threads 2] [--json FILE]

A run S@P is S tokens behind P in the cache. Both graphs are what `moedge build` makes of a model whose layers are
attention alone, rotation and writing to the cache included; of a latent also the products with k_up and v_up, which
our op has in codes of 4 and of 8 bits. Each line: the least time of a layer over interleaved turns, with the
processor's caches emptied before each; how many times as fast as the stock graph; the bytes of the cache over the time,
as a share of the bandwidth measured in the same run. Random numbers, seed 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from moedge.export.functions import DOMAIN, OPSET
from moedge.export.graph import load_functions
from moedge.profiles.targets._canonical import Rewriter, finish_model
from moedge.profiles.targets._ort_attention import MS, AttentionLowering
from moedge.profiles.targets._ort_kv import CacheEntry
from moedge.profiles.targets._ort_own_attention import OwnAttentionLowering
from moedge.runtime import kernels, machine

Array = NDArray[Any]
KINDS = ("fp32", "fp16", "int8")
GROUP = 128  # codes of k_up and v_up that share a scale, as engines have them
FLUSH = 96 << 20  # bytes: more than the processor's caches


@dataclass(frozen=True)
class Grouped:
    """n heads over g heads of keys and values of size d."""

    layers: int
    heads: int
    groups: int
    size: int

    def text(self) -> str:
        attributes = f"num_heads={self.heads}, num_key_value_heads={self.groups}, head_dim={self.size}, "
        attributes += f"scale={self.size**-0.5}, interleaved=0, window=0"
        few = self.groups * self.size
        inputs = f"float[S,{self.heads * self.size}] q#, float[S,{few}] k#, float[S,{few}] v#"
        call = f"moedge.GroupedAttention <{attributes}> (q#, k#, v#, cos, sin)"
        return _text(inputs, self.size // 2, call, self.layers)

    def scales(self) -> dict[str, Array]:
        names = [f"{kind}.{layer}" for kind in ("key", "value") for layer in range(self.layers)]
        return {name: np.full(self.groups * self.size, 0.03, np.float32) for name in names}


@dataclass(frozen=True)
class Latent:
    layers: int
    heads: int
    nope: int
    rope: int
    rank: int
    value: int

    def text(self) -> str:
        attributes = f"num_heads={self.heads}, qk_nope_head_dim={self.nope}, qk_rope_head_dim={self.rope}, "
        attributes += f"v_head_dim={self.value}, kv_lora_rank={self.rank}, interleaved=1, "
        attributes += f"scale={(self.nope + self.rope) ** -0.5}"
        inputs = f"float[S,{self.heads * (self.nope + self.rope)}] q#, float[S,{self.rank}] r#, float[S,{self.rope}] k#"
        inputs += f", float[{self.heads},{self.nope},{self.rank}] k_up#"
        inputs += f", float[{self.heads},{self.value},{self.rank}] v_up#"
        call = f"moedge.LatentAttention <{attributes}> (q#, r#, k#, cos, sin, k_up#, v_up#)"
        return _text(inputs, self.rope // 2, call, self.layers)

    def scales(self) -> dict[str, Array]:
        return {}


SHAPES: dict[str, Grouped | Latent] = {
    "olmoe": Grouped(8, 16, 16, 128),
    "qwen3-30b-a3b": Grouped(8, 32, 4, 128),
    "deepseek-v2-lite": Latent(8, 16, 128, 64, 512, 128),
}


def _text(inputs: str, pairs: int, call: str, layers: int) -> str:
    """A canonical graph of layers that are attention alone; `#` is a layer's number."""
    of_layers = [str(layer) for layer in range(layers)]
    body = "\n".join(f"    y# = {call}".replace("#", layer) for layer in of_layers)
    outputs = ", ".join(f"float[S,W] y{layer}" for layer in of_layers)
    every = ", ".join(inputs.replace("#", layer) for layer in of_layers)
    return f"""<ir_version: 11, opset_import: ["" : {OPSET}, "moedge" : 1]>
bench (int64[1,S] input_ids, {every}, float[{pairs}] waves) => ({outputs}) {{
    positions = moedge.Positions (input_ids)
    cos, sin = moedge.RotaryAngles <attention_factor = 1.0> (positions, waves)
{body}
}}"""


class Side:
    """One of the two graphs, its caches and what is bound to it."""

    def __init__(self, shape: Grouped | Latent, kind: str, own: bool, tokens: int, past: int, threads: int) -> None:
        self.own, self.tokens, self.past = own, tokens, past
        model = ir.from_proto(onnx.parser.parse_model(shape.text()))
        for function in load_functions({"Positions", "RotaryAngles", "GroupedAttention", "LatentAttention"}):
            model.functions[function.identifier()] = function
        generator = np.random.default_rng(0)
        self._hold(model, generator)
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type.endswith("Attention"):
                node.name = f"layers.{str(node.outputs[0].name)[1:]}.attention"
        form = OwnAttentionLowering if own else AttentionLowering
        lowering = form(Rewriter(model), None, 1, kind, shape.scales())
        lowering.lower()
        finish_model(model, {MS: 1, kernels.DOMAIN: 1})
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(kernels.library()))
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        self.cache_bytes = sum(entry.bytes for entry in lowering.cache) * (tokens + past)
        self._bind(lowering.cache, generator)

    @staticmethod
    def _hold(model: ir.Model, generator: np.random.Generator) -> None:
        """Make weights, which are inputs so far, initializers of random numbers; k_up in codes of 4 bits, v_up of 8."""
        graph = model.graph

        def hold(name: str, array: Array) -> ir.Value:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
            graph.register_initializer(value)
            return value

        for value in list(graph.inputs):
            name = str(value.name)
            if not name.startswith(("waves", "k_up", "v_up")) or value.shape is None:
                continue
            graph.inputs.remove(value)
            shape = value.shape.numpy()
            if name.startswith("waves"):
                held = hold(f"{name}.values", generator.standard_normal(shape, np.float32) * np.float32(0.05))
            else:
                bits, kind = (4, ml_dtypes.uint4) if name.startswith("k_up") else (8, np.uint8)
                codes = hold(f"{name}.codes", generator.integers(0, 1 << bits, shape).astype(kind))
                scales = np.full((*shape[:-1], shape[-1] // GROUP), 0.256 / (1 << bits), np.float32)
                inputs = [codes, hold(f"{name}.scales", scales), None]
                node = ir.node("DequantizeLinear", inputs, {"axis": 2, "block_size": GROUP})
                graph.insert_before(graph[0], node)
                held = node.outputs[0]
            value.replace_all_uses_with(held)

    def _bind(self, cache: list[CacheEntry], generator: np.random.Generator) -> None:
        end = self.past + self.tokens
        self.binding = self.session.io_binding()
        arrays: dict[str, Array] = {"length": np.array([self.past]), "places": np.arange(self.past, end)[None]}
        arrays["input_ids"] = np.zeros(self.tokens, np.int64)
        outputs: dict[str, Array] = {}
        for entry in cache:
            lead = (1, entry.heads, end) if entry.heads else (end,)
            buffer = generator.standard_normal((*lead, entry.width // (entry.heads or 1)), np.float32) * 20
            buffer = buffer.astype(entry.dtype) if entry.dtype == "int8" else (buffer / 40).astype(entry.dtype)
            buffer = abs(buffer) + np.float32(1e-3) if entry.name.startswith("scale") else buffer
            arrays[f"past.{entry.name}"] = buffer
            outputs[f"new.{entry.name}"] = buffer if entry.heads else buffer[self.past :]
            cut = (end * entry.parts, *([entry.width // entry.parts] if entry.width != entry.parts else []))
            arrays[f"cache.{entry.name}"] = buffer.reshape(cut) if entry.parts > 1 else buffer
        for value in self.session.get_inputs():
            if value.name not in arrays:
                width = value.shape[-1]
                arrays[value.name] = generator.standard_normal((self.tokens, width), np.float32)
            array = arrays[value.name]
            self.binding.bind_input(value.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for value in self.session.get_outputs():
            if value.name in outputs:
                array = outputs[value.name]
                self.binding.bind_output(value.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            else:
                self.binding.bind_output(value.name, "cpu")
        self.held = arrays, outputs

    def run(self) -> float:
        """Seconds of a run."""
        started = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - started

    def result(self) -> Array:
        names = [value.name for value in self.session.get_outputs()]
        found: Array = self.binding.get_outputs()[names.index("y0")].numpy()
        return found


def measure(name: str, kind: str, runs: list[str], args: argparse.Namespace, rate: float) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    emptied = np.zeros(FLUSH // 4, np.float32)
    for run in runs:
        tokens, past = (int(part) for part in run.split("@"))
        sides = {own: Side(shape, kind, own, tokens, past, args.threads) for own in (True, False)}
        least = dict.fromkeys(sides, float("inf"))
        for _ in range(args.turns):
            for own, side in sides.items():
                emptied += 1
                least[own] = min(least[own], side.run() / shape.layers)
        apart = np.abs(sides[True].result() - sides[False].result()).max() / np.abs(sides[False].result()).max()
        yield {
            "shape": name,
            "kv_cache": kind,
            "tokens": tokens,
            "past": past,
            "s": least[True],
            "stock_s": least[False],
            "speedup": least[False] / least[True],
            "of_bandwidth": sides[True].cache_bytes / shape.layers / least[True] / rate,
            # Of keys and values in int8 the two have other caches: ours has scales of rows.
            "apart": None if kind == "int8" and isinstance(shape, Grouped) else float(apart),
        }


def describe(line: dict[str, Any]) -> str:
    head = f"{line['shape']:17} {line['kv_cache']} {line['tokens']:4}@{line['past']:<5}"
    share = f"  {line['of_bandwidth']:4.0%} of bandwidth" if line["tokens"] == 1 else ""
    times = f"{line['s'] * 1e6:9.0f} us, stock {line['stock_s'] * 1e6:9.0f} us  {line['speedup']:5.2f}x"
    return f"{head} {times}{share}" + ("" if line["apart"] is None else f"  ({line['apart']:.0e} apart)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--kv-cache", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--runs", nargs="+", default=["1@63", "1@511", "1@4095", "512@0", "512@3584"])
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if kernels.library() is None:
        raise SystemExit(f"error: {kernels.why_not()}")
    rate = machine.measure_bandwidth(args.threads)
    print(f"onnxruntime {ort.__version__}, kernels {kernels.instruction_set()}, {args.threads} threads")
    results = []
    for name in args.shape or SHAPES:
        for kind in args.kv_cache or KINDS:
            for line in measure(name, kind, args.runs, args, rate):
                results.append(line)
                print(describe(line), flush=True)
    print(f"memory reads at {rate / 1e9:.1f} GB/s")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
