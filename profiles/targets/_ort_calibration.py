"""Scales of int8 keys and values: what each channel's largest magnitude is over some tokens.

`GroupQueryAttention` wants one scale for each channel, the same for every text. Random tokens show a channel's range
well enough: which channels are large is a matter of the weights. What lies beyond the range later is clipped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...errors import EngineError, require
from ...export.config import MoEConfig
from ...runtime.preflight import CacheEntry, EngineInfo
from ...runtime.sessions.onnxruntime_cpu import OnnxruntimeCpuSession
from . import BuildRequest
from ._canonical import Array, describe_load
from ._ort_kv import CacheEntry as Entry

TOKENS, CHUNK = 512, 64
SEED = 0
MARGIN = 1.25  # room for what the tokens did not show


def find_scales(
    request: BuildRequest, model: ir.Model, config: MoEConfig, cache: list[Entry]
) -> dict[str, Array]:
    """By entry the scale float32 [width] of each channel, out of a run of the lowered `model` with its fp32 `cache`.

    Holds the weights once while it runs.

    Raises:
        EngineError: memory is short.
    """
    ort = require("onnxruntime", purpose="find the scales of an int8 KV cache")
    count = min(TOKENS, request.max_seq_len)
    settings = ort.SessionOptions()
    settings.enable_mem_pattern = False
    settings.log_severity_level = 3
    folder = str(request.bundle.path.absolute())
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
    except Exception as error:  # onnxruntime's own classes, each straight from Exception
        raise EngineError(f"the model cannot be run to find the KV cache's scales ({error})") from error
    info = _describe(request, config, cache)
    sequence = OnnxruntimeCpuSession(session, info, count, 1)
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, count)
    for start in range(0, count, CHUNK):
        sequence.step(tokens[start : start + CHUNK], np.empty(0, np.int64))
    found = {}
    for entry, rows in zip(info.cache, sequence.read_rows(0, count), strict=False):  # a gate's routes may follow
        largest = np.abs(rows).max(axis=(0, 2)).reshape(-1)  # of [1, heads, tokens, head size]
        found[entry.name] = np.maximum(MARGIN * largest / 127, 1e-10).astype(np.float32)
    sequence.close()
    return found


def _describe(request: BuildRequest, config: MoEConfig, cache: list[Entry]) -> EngineInfo:
    return EngineInfo(
        profile=request.device.name,
        target="onnxruntime",
        backend="onnxruntime",
        backend_version="",
        compute_capability=None,
        precision="fp32",
        max_batch=1,
        max_seq_len=request.max_seq_len,
        bytes=0,
        files={},
        made_from={},
        status="ready",
        vocab_size=config.vocab_size,
        moe_layers=tuple(config.moe.layers),
        num_experts_per_tok=config.moe.num_experts_per_tok,
        num_experts=config.moe.num_experts,
        cache=tuple(CacheEntry(entry.name, entry.width, entry.dtype, entry.heads) for entry in cache),
        session=describe_load(config),
    )
