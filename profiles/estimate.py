"""Predicted latency of a model on a device that is not here: what there is to read and to compute, kind by kind.

How long it takes is a roofline's to say (roofline.py, roofline_cpu.py), which also has what comes on top and the band
that the low and high ends of every predicted time come from.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from ..errors import BundleError, UsageError
from .device import DeviceProfile
from .fit import PREFILL_CHUNK, check_fit
from .roofline import ENDS, GPU, JETSON, Pass, Roofline, Work
from .roofline_cpu import load_fit
from .shape import KV_CACHES, READ_IN_FULL, ModelShape, cache_element_bytes, describe_model
from .shape import bytes_per_token as bytes_per_token

SCHEMA = 1
PROMPT_TOKENS = 512  # where nothing else is asked for
# The runtime's, for CPU engines: tokens of a chunk, and chunks that go together where weights are integers.
CPU_PREFILL_CHUNK, CPU_AT_ONCE = 64, 4


def estimate(
    manifest: Mapping[str, Any],
    device: DeviceProfile,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 64,
    batch: int = 1,
    max_seq_len: int | None = None,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """A prediction with the keys of `moedge bench --json`, `measured` false, and null for what cannot be known.

    `ttft_ms` and `itl_ms` have `p50` (expected), `low` and `high` (the band); `decode_tokens_per_s` counts all
    sequences of the batch. The inter-token latency is that in the middle of the new tokens. `kv_cache`: as of `build`.
    prompt_tokens: default: 512, or what `max_seq_len` and the model's positions leave beside the new tokens.
    Added: `fit`, `fits`, `per_op`, `assumptions`.

    Raises:
        UsageError: a count below 1, or more tokens than the model has positions.
        BundleError: the manifest lacks what every bundle has, or is of a torch model's own graph.
    """
    shape = ModelShape.from_manifest(manifest).on(device.target)
    if manifest["config"]["attention"]["kind"] == "torch":
        raise BundleError(
            f"{shape.name} is a PyTorch model's own graph, whose attention is not known: nothing can be predicted of "
            "it; measure it on the device: moedge bench BUNDLE"
        )
    if prompt_tokens is None:
        prompt_tokens = max(1, min(PROMPT_TOKENS, (max_seq_len or shape.max_positions) - new_tokens))
    length = max_seq_len or prompt_tokens + new_tokens
    _check_counts(shape, prompt_tokens, new_tokens, batch, length)
    context = prompt_tokens + new_tokens // 2
    check_kv_cache(device, kv_cache)
    element = cache_element_bytes(manifest, device.target, kv_cache)
    bits = _integer_bits(manifest)
    step = decode_work(shape, device, batch, context, bits, element)
    prefill = prefill_work(shape, device, prompt_tokens, bits, element)
    roofline = find_roofline(device)
    itl = {end: 1e3 * roofline.pass_seconds(step, shape, device, end) for end in ENDS}
    chunks = {end: [roofline.pass_seconds(chunk, shape, device, end) for chunk in prefill] for end in ENDS}
    ttft = {end: 1e3 * batch * sum(seconds) for end, seconds in chunks.items()}
    count = bytes_per_token(manifest, context, batch, element, device.target)
    seconds = itl["expected"] / 1e3
    fit = check_fit(manifest, device, batch, length, cache_bytes_per_element=element)
    return {
        **_described(manifest, device),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": device.cores,
        "repeat": None,
        "load_s": None,
        "ttft_ms": _percentiles(ttft),
        "itl_ms": _percentiles(itl),
        "prefill_tokens_per_s": batch * prompt_tokens / (ttft["expected"] / 1e3),
        "decode_tokens_per_s": batch / seconds,
        "peak_memory_bytes": fit.total_bytes,
        "bundle_bytes": sum(entry["bytes"] for entry in manifest["files"].values()) or None,
        "bytes_per_token": count,
        "bandwidth_bytes_per_s": count / seconds,
        "bandwidth_limit_bytes_per_s": device.bandwidth_bytes_per_s,
        "fraction_of_limit": count / seconds / device.bandwidth_bytes_per_s,
        "energy_j_per_token": None,
        "measured": False,
        "fits": fit.fits,
        "fit": fit.to_json(),
        "per_op": _per_op(step, shape, device, itl["expected"]),
        "usd_per_million_tokens": _price(device, batch / seconds),
        "assumptions": roofline.source,
    }


def check_kv_cache(device: DeviceProfile, kv_cache: str | None) -> None:
    """Raises UsageError where the device's target cannot keep its KV cache in that type."""
    known = KV_CACHES.get(device.target, ())
    if kv_cache is not None and kv_cache not in known:
        has = f"has {', '.join(known)}" if known else "has no choice of it"
        change = "change it" if known else "give it to a profile of its own that has"
        raise UsageError(f"kv_cache {kv_cache!r}: target {device.target} {has}; leave --kv-cache out, or {change}")


def decode_work(
    shape: ModelShape, device: DeviceProfile, batch: int, context: int, bits: int, element: float
) -> Pass:
    """One decode step: a token for each of `batch` sequences with `context` tokens in the cache.

    `bits`: of the weights' integers, 0 where they are none.
    """
    linear, attention = _precisions(device, bits)
    experts = _expert_flops(shape, batch, shape.experts_per_token)
    work = [
        Work("embedding", batch * shape.embedding_row_bytes, 0, linear),
        *_dense_work(shape, batch, linear, bits),
        Work(
            "attention over the cache",
            batch * shape.cache_bytes(context, element),
            batch * context * shape.layers * shape.attention_flops_per_row,
            attention,
        ),
        Work("experts", shape.expert_bytes(batch), experts, linear, bits),
        _head_work(shape, batch, linear),
    ]
    return Pass(work, batch, batch)


def prefill_work(
    shape: ModelShape, device: DeviceProfile, prompt_tokens: int, bits: int, element: float
) -> list[Pass]:
    """One sequence's prompt, in chunks one after the other; only its last token takes the head.

    TensorRT's prompt form evaluates every expert for every token; onnxruntime's the chosen ones.
    """
    linear, attention = _precisions(device, bits)
    dense_experts = not device.target.startswith("onnxruntime")
    length = CPU_PREFILL_CHUNK * (CPU_AT_ONCE if bits else 1) if device.target == "onnxruntime" else PREFILL_CHUNK
    chunks = []
    for start in range(0, prompt_tokens, length):
        tokens = min(length, prompt_tokens - start)
        pairs = tokens * start + tokens * (tokens + 1) / 2  # (query, key) pairs that a causal mask leaves
        evaluated = shape.experts if dense_experts else shape.experts_per_token
        read = float(shape.sizes.get("experts", 0)) if dense_experts else shape.expert_bytes(tokens)
        work = [
            Work("embedding", tokens * shape.embedding_row_bytes, 0, linear),
            *_dense_work(shape, tokens, linear, bits),
            Work(
                "attention over the cache",
                shape.cache_bytes(start + tokens, element),
                pairs * shape.layers * shape.attention_flops_per_row,
                attention,
            ),
            Work("experts", read, _expert_flops(shape, tokens, evaluated), linear, bits),
        ]
        if start + tokens == prompt_tokens:
            work.append(_head_work(shape, 1, linear))
        chunks.append(Pass(work, tokens))
    return chunks


def find_roofline(device: DeviceProfile) -> Roofline:
    """How long work takes on this kind of device."""
    if device.kind == "cpu":
        return load_fit()
    return {"gpu": GPU, "jetson": JETSON}[device.kind]


def _dense_work(shape: ModelShape, tokens: int, precision: str, bits: int) -> list[Work]:
    """What every token goes through, apart from the attention's cache, the experts and the head."""
    hidden, sizes = shape.hidden_size, shape.sizes
    parameters = {
        "norm": 0,
        "attention": shape.layers * shape.attention_parameters,
        "dense_mlp": shape.dense_layers * 3 * hidden * shape.dense_width,
        "router": shape.moe_layers * shape.experts * hidden,
        "shared_experts": shape.moe_layers * 3 * hidden * shape.shared_width,
    }
    assert set(parameters) | {"head"} == set(READ_IN_FULL)
    plain = ("norm", "router")  # never quantized
    return [
        Work(name, sizes.get(name, 0), 2 * tokens * count, *(("fp32", 0) if name in plain else (precision, bits)))
        for name, count in parameters.items()
    ]


def _head_work(shape: ModelShape, rows: int, precision: str) -> Work:
    flops = 2 * rows * shape.vocab_size * shape.hidden_size
    return Work("head", shape.head_bytes(rows), flops, precision, shape.head_bits)


def _expert_flops(shape: ModelShape, tokens: int, experts: int) -> float:
    return 2.0 * tokens * shape.moe_layers * experts * 3 * shape.hidden_size * shape.expert_width


def _precisions(device: DeviceProfile, bits: int) -> tuple[str, str]:
    """(linear layers, attention): int8 dot products on a CPU with quantized weights, fp16 tensor cores on a GPU."""
    if device.target == "onnxruntime":
        return ("int8" if bits else "fp32"), "fp32"
    return "fp16", "fp16"


def _integer_bits(manifest: Mapping[str, Any]) -> int:
    """4 or 8 where the weights are integers, else 0."""
    return {"int4": 4, "int8": 8}.get(str(manifest["quantization"].get("weights")), 0)


def _check_counts(shape: ModelShape, prompt_tokens: int, new_tokens: int, batch: int, length: int) -> None:
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "batch": batch}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; at least 1 is needed")
    if length < prompt_tokens + new_tokens:
        raise UsageError(
            f"max_seq_len is {length}, less than {prompt_tokens} prompt and {new_tokens} new tokens; "
            f"ask for at least {prompt_tokens + new_tokens}"
        )
    if length > shape.max_positions:
        raise UsageError(
            f"{length} tokens are more than {shape.name} has positions ({shape.max_positions}); ask for fewer prompt "
            "or new tokens, or a smaller --max-seq-len"
        )


def _percentiles(times: Mapping[str, float]) -> dict[str, float | None]:
    return {"p50": times["expected"], "p90": None, "p99": None, "low": times["fast"], "high": times["slow"]}


def _per_op(step: Pass, shape: ModelShape, device: DeviceProfile, itl_ms: float) -> list[dict[str, Any]]:
    """What each kind of operation takes by itself, and what is left of the step: launches and a pass's own cost."""
    rows: list[dict[str, Any]] = [
        {
            "op": work.name,
            "bytes": round(work.bytes),
            "flops": round(work.flops),
            "ms": 1e3 * find_roofline(device).work_seconds(work, device, shape),
        }
        for work in step.work
    ]
    rest = max(0.0, itl_ms - sum(row["ms"] for row in rows))
    return [*rows, {"op": "launches and fixed costs", "bytes": 0, "flops": 0, "ms": rest}]


def _price(device: DeviceProfile, tokens_per_s: float) -> float | None:
    """US dollars a million decoded tokens, the device busy all the time."""
    if device.price_usd_per_hour is None:
        return None
    return device.price_usd_per_hour / (tokens_per_s * 3600) * 1e6


def _described(manifest: Mapping[str, Any], device: DeviceProfile) -> dict[str, Any]:
    """What was predicted: schema, model, device, quantization, date and version."""
    from .. import __version__

    quantization = manifest["quantization"]
    return {
        "schema": SCHEMA,
        "model": manifest["model"]["name"],
        "profile": device.name,
        "backend": device.target,
        "device": device.title,
        "weights": quantization.get("weights"),
        "group_size": quantization.get("group_size"),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"moedge": __version__},
        "model_info": describe_model(manifest),
    }
