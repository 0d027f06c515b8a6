"""What is chosen of a TensorRT network beside its sizes: how many lanes, which form of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import BuildError
from ...export.config import LatentAttentionConfig, MoEConfig
from ..fit import check_fit
from . import BuildRequest
from ._canonical import check_one_sequence
from ._trt_fp8 import LEAST_CAPABILITY

LATENT_FORMS = ("auto", "absorbed", "expanded")
LARGEST_HEAD = 256  # that TensorRT's attention kernels take
# Chunks of 32 and 64 tokens with heads of 24, 48, 80 or 208 channels met a fault of tensorrt_rtx 1.7.1 ("Graph contains
# more than one op named"); chunks of 65 and more did not.
LEAST_TOKENS = 65
_HALF_BYTES = 2
CHUNK = 256  # tokens of the second profile: its MoE runs every expert, so a longer chunk costs more than it saves


@dataclass(frozen=True)
class NetworkForm:
    """`lanes`: sequences that one run can step. `chunk`: the most tokens of a run. `buckets`: a chunk's experts work on
    buckets of what their gate lets them have, which must bound it. `expanded`: latent attention caches keys and values
    by head in place of latents. `fp8`: weights quantized again to FP8, but for embedding and head."""

    lanes: int = 1
    chunk: int = CHUNK
    buckets: bool = False
    expanded: bool = False
    fp8: bool = False


def choose_form(request: BuildRequest, config: MoEConfig) -> NetworkForm:
    """What the request asks for; where it leaves the form of latent attention open, expanded where that fits.

    Raises:
        BuildError: an unknown form or precision, or one that this model or device has not.
    """
    gate = config.moe.gate
    if gate.base is not None:
        check_one_sequence(request.max_batch)
    if request.expert_buckets and gate.base is None:
        raise BuildError(
            f"--expert-buckets: {gate.op} does not bound the tokens of an expert, so that a bucket would drop some; "
            "export with --load-aware, or leave --expert-buckets out"
        )
    chunk = CHUNK if request.prefill_chunk is None else request.prefill_chunk
    if chunk < 2 or (request.prefill_chunk is not None and chunk > request.max_seq_len):
        raise BuildError(f"prefill_chunk {chunk}: 2 to max_seq_len {request.max_seq_len} tokens can be one; mend it")
    expanded = _choose_expanded(request, config, min(chunk, request.max_seq_len))
    return NetworkForm(request.max_batch, chunk, request.expert_buckets, expanded, _choose_fp8(request))


def cache_widths(config: MoEConfig, form: NetworkForm) -> list[int]:
    """Elements of a token in each tensor of a layer's cache."""
    attention = config.attention
    if not isinstance(attention, LatentAttentionConfig):
        return [attention.num_key_value_heads * attention.head_dim] * 2
    if form.expanded:
        return [attention.num_heads * _head_size(attention)] * 2
    return [attention.kv_lora_rank, attention.qk_rope_head_dim]


def cache_bytes_per_token(config: MoEConfig, form: NetworkForm) -> int:
    """Bytes of a token in all layers' caches."""
    return config.num_hidden_layers * _HALF_BYTES * sum(cache_widths(config, form))


def _choose_fp8(request: BuildRequest) -> bool:
    if request.precision is None:
        return False
    if request.precision != "fp8":
        raise BuildError(
            f"--precision {request.precision}: an engine has the bundle's weights, or fp8 made of them; use "
            "--precision fp8 or leave it out, and for others export again: moedge export ... --weights int4"
        )
    for device in request.devices:
        capability = device.compute_capability
        if capability is None or capability < LEAST_CAPABILITY:
            has = "none" if capability is None else f"{capability[0]}.{capability[1]}"
            raise BuildError(
                f"--precision fp8: {device.name} cannot run it, because fp8 needs compute capability "
                f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later and it has {has}; leave the option out for the "
                "bundle's own weights, or build for a later device (moedge profiles)"
            )
    return True


def head_size(nope: int, rope: int, value: int) -> int:
    """Channels of a head in the expanded form: keys and values have one size, so the smaller ones are padded."""
    return max(nope + rope, value)


def _head_size(attention: LatentAttentionConfig) -> int:
    return head_size(attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim)


def _choose_expanded(request: BuildRequest, config: MoEConfig, chunk: int) -> bool:
    asked, attention = request.latent_attention, config.attention
    if asked not in LATENT_FORMS:
        raise BuildError(f"latent attention {asked!r} is not known; known: {', '.join(LATENT_FORMS)}")
    if not isinstance(attention, LatentAttentionConfig):
        if asked == "auto":
            return False
        raise BuildError(
            f"--latent-attention {asked}: this model ({config.family}) has no latent attention; leave the option out"
        )
    size = _head_size(attention)
    if asked == "expanded" and size > LARGEST_HEAD:
        raise BuildError(
            f"--latent-attention expanded: heads of {size} channels are beyond the {LARGEST_HEAD} that TensorRT's "
            "attention kernels take; use --latent-attention absorbed"
        )
    if asked == "expanded" and chunk < LEAST_TOKENS:
        raise BuildError(
            f"--latent-attention expanded: TensorRT does not build it reliably for chunks of {chunk} tokens; "
            f"use --max-seq-len (and --prefill-chunk) {LEAST_TOKENS} or more, or --latent-attention absorbed"
        )
    if asked == "absorbed" or size > LARGEST_HEAD or chunk < LEAST_TOKENS:
        return False
    per_token = cache_bytes_per_token(config, NetworkForm(expanded=True))
    sizes = (request.max_batch, request.max_seq_len)
    fits = [
        check_fit(request.bundle.manifest, device, *sizes, cache_bytes_per_token=per_token)
        for device in request.devices
    ]
    refused = next((fit for fit in fits if not fit.fits), None)
    if refused is not None and asked == "expanded":
        raise BuildError(f"--latent-attention expanded: {refused.explain()}; or use --latent-attention absorbed")
    return refused is None
