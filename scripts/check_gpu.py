"""Run engines on the GPU at hand, and write down what came of it: python scripts/check_gpu.py

Builds an engine for this GPU with each backend that is installed (TensorRT for RTX, TensorRT, onnxruntime on CUDA),
compares its logits with the canonical graph's on onnxruntime's CPU, measures its rates, and writes docs/gpu-check.md:
the figures, or the refusal in the words of whatever refused. With no bundle given, random ones of three shapes are
made: latent attention, grouped attention, and grouped attention cut into engines by layers. Without a GPU it writes
nothing and exits with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import numpy as np
from synthetic_checkpoint import write_checkpoint

import moedge
from moedge.bundle import Bundle
from moedge.errors import MoedgeError
from moedge.profiles.build import build
from moedge.profiles.device import DeviceProfile, list_profiles, load_profile
from moedge.profiles.targets._trt_check import canonical_logits
from moedge.progress import console_progress
from moedge.runtime import machine
from moedge.runtime.preflight import check_engine, read_engine
from moedge.runtime.sessions import SessionOptions, backend_module
from moedge.runtime.sessions._plans import installed_version

OUT = Path(__file__).resolve().parent.parent / "docs" / "gpu-check.md"
BACKENDS = ("tensorrt_rtx", "tensorrt", "onnxruntime")
SLOTS = 512
TOLERANCE = 0.1  # of a logit: half precision against float32; what a wrong kernel does is far beyond
_LATENT = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}
_GROUPED = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
}
_COMMON = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}
SHAPES = {"latent attention": (_LATENT, None), "grouped attention": (_GROUPED, None), "by layers": (_GROUPED, "small")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="your own (default: random ones)")
    parser.add_argument("--out", type=Path, default=OUT, help="what is written (default: docs/gpu-check.md)")
    parser.add_argument("--weights", default="int4", help="of the random bundles (default: int4)")
    arguments = parser.parse_args()
    if not machine.gpus():
        wanted = "a CUDA device that the NVIDIA driver (libcuda) shows"
        print(f"error: no GPU here: {wanted} was looked for; nothing was run or written", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moedge-gpu-") as scratch:
        for title, bundle, cut in _bundles(arguments.bundles, Path(scratch), arguments.weights):
            for backend in BACKENDS:
                one_engine = backend == "onnxruntime"
                if importlib.util.find_spec(backend) is not None and not (cut and one_engine):
                    results.append(_attempt(title, bundle, backend, cut))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(render(results), encoding="utf-8")
    print(f"{arguments.out}: {sum(result['passed'] for result in results)} of {len(results)} passed")
    return 0 if results and all(result["passed"] for result in results) else 1


def _bundles(given: list[Path], scratch: Path, weights: str) -> list[tuple[str, Bundle, bool]]:
    """(title, bundle, whether it is built in parts)."""
    if given:
        return [(path.name, Bundle.open(path), False) for path in given]
    made = []
    for title, (shape, cut) in SHAPES.items():
        folder = scratch / title.replace(" ", "-")
        write_checkpoint({**_COMMON, **shape}, folder / "checkpoint")
        bundle = moedge.export(folder / "checkpoint", folder / "bundle", weights=weights, group_size=64, verify=False)
        made.append((title, bundle, cut is not None))
    return made


def _small_bound(bundle: Bundle) -> int:
    """What building half of the model takes."""
    from moedge.profiles.targets._trt_parts import caller_bytes, estimate_build_bytes

    return estimate_build_bytes(sum(bundle.sizes.values()) // 2) + caller_bytes()


def _attempt(title: str, bundle: Bundle, backend: str, cut: bool) -> dict[str, Any]:
    """One engine built and run; whatever refuses is quoted."""
    result: dict[str, Any] = {"title": title, "backend": backend, "passed": False, "stage": "building"}
    try:
        device = this_gpu()
        result["gpu"] = device.title
        max_memory = _small_bound(bundle) if cut else None
        with console_progress() as progress:
            folder = build(
                bundle.path, device, backend=backend, max_seq_len=SLOTS, max_memory=max_memory, progress=progress
            )
        engine = json.loads((folder / "engine.json").read_text())
        result |= {"engines": len(engine["session"].get("parts", [0])), "build_seconds": engine["build_seconds"]}
        result["stage"] = "running"
        result |= measure(bundle, device.name)
        result["passed"] = result["difference"] <= TOLERANCE
        result["stage"] = "comparing" if not result["passed"] else "done"
    except (MoedgeError, RuntimeError, OSError) as error:
        result["refusal"] = " ".join(str(error).split())
    return result


def this_gpu() -> DeviceProfile:
    """The shipped profile of the first GPU's compute capability under this GPU's name and memory."""
    profiles = [load_profile(name) for name in list_profiles()]
    gpu = machine.gpus()[0]
    alike = [profile for profile in profiles if profile.compute_capability == gpu.compute_capability]
    return dataclasses.replace(
        (alike or [load_profile("rtx4090")])[0],
        name="this-gpu",
        title=gpu.name,
        compute_capability=gpu.compute_capability,
        memory_bytes=gpu.memory_bytes,
    )


def measure(bundle: Bundle, profile: str) -> dict[str, Any]:
    """Parity of a chunk and of steps with the canonical graph, and tokens per second of both."""
    info = read_engine(bundle, profile)
    check_engine(bundle, info)
    session = backend_module(info.backend).open_session(bundle, info, SessionOptions())
    try:
        ids = np.random.default_rng(0).integers(0, info.vocab_size, 32)
        expected = canonical_logits(bundle, info.layers, ids)
        every = session.step(ids, np.arange(32)).copy()  # each row a run of its own: single tokens
        session.truncate(0)
        chunk = session.step(ids, np.array([31])).copy()
        scale = max(1.0, float(np.abs(expected).max()))
        worst = max(float(np.abs(every - expected).max()), float(np.abs(chunk - expected[31:]).max())) / scale
        same = float((every.argmax(axis=-1) == expected.argmax(axis=-1)).mean())
        session.truncate(0)
        prompt = np.random.default_rng(1).integers(0, info.vocab_size, 256)
        prefill = _rate(lambda: session.step(prompt, np.array([255])), 256, lambda: session.truncate(0))
        decode = _rate(lambda: session.step(prompt[:1], np.zeros(1, np.int64)), 1, lambda: None, times=128)
    finally:
        session.close()
    return {"difference": worst, "same_choice": same, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}


def _rate(run: Any, tokens: int, between: Any, times: int = 5) -> float:
    run()
    seconds = 0.0
    for _ in range(times):
        between()
        began = time.perf_counter()
        run()
        seconds += time.perf_counter() - began
    return tokens * times / seconds


def render(results: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    packages = (*BACKENDS, "onnxruntime-gpu", "cuda-bindings")
    versions = {name: installed_version(name) or "not installed" for name in packages}
    now = datetime.datetime.now(datetime.timezone.utc)
    here = machine.describe()
    gpus = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in here["gpus"]) or "none"
    lines = [
        "# Engines on a GPU",
        "",
        f"Written by `python scripts/check_gpu.py` on {now:%Y-%m-%d %H:%M} UTC.",
        "",
        f"- GPUs that the driver shows: {gpus}; driver: {here['gpu_driver'] or 'none'}",
        f"- machine: {here['cpu']}, {here['system']}, Python {here['python']}",
        f"- packages: moedge {moedge.__version__}, " + ", ".join(f"{name} {text}" for name, text in versions.items()),
        "- parity: largest difference of a logit from the canonical graph on onnxruntime (float32), over the larger of "
        f"1 and the largest logit; passed up to {TOLERANCE}",
        "",
    ]
    if not results:
        lines.append("No backend is installed: `pip install 'moedge[rtx]'`.")
    for result in results:
        lines += [f"## {result['title']}, {result['backend']}: {'passed' if result['passed'] else 'not passed'}", ""]
        if "build_seconds" in result:
            lines.append(f"- built in {result['build_seconds']:.1f} s, {result['engines']} engine(s)")
        if "difference" in result:
            same = f"same choice for {result['same_choice']:.0%} of tokens"
            lines.append(f"- difference {result['difference']:.2e}, {same}")
            lines.append(
                f"- {result['prefill_tokens_per_s']:,.0f} tokens/s of a prompt of 256, "
                f"{result['decode_tokens_per_s']:,.1f} tokens/s decoding"
            )
        if "refusal" in result:
            lines += [f"- refused while {result['stage']}, in these words:", "", f"  > {result['refusal']}"]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
