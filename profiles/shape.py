"""What a bundle's manifest says of the model, in the numbers that fit, prediction and benchmark share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..manifest import check_manifest
from ..runtime import kernels

# Tensor classes of the manifest's `sizes` that every decode step reads in full; `embedding` and `experts` it reads in
# part.
READ_IN_FULL = ("norm", "attention", "dense_mlp", "router", "shared_experts", "head")
# The same of a torch model's own graph, whose linear layers have no names that say what they are for.
READ_IN_FULL_OF_TORCH = ("linear", "other")

# Bytes of an element that a target computes with, and keeps in its KV cache where it has no choice: onnxruntime has
# fp32 on a CPU, what runs on a GPU fp16.
ELEMENT_BYTES = {"onnxruntime": 4, "onnxruntime_cuda": 2, "tensorrt_rtx": 2, "tensorrt": 2}
# What a target with a choice can keep its KV cache in; `default_kv_cache` says which it takes by itself.
KV_CACHES = {"onnxruntime": ("fp32", "fp16", "int8")}
# The same in words, for help and documents (tests/test_kv_cache.py).
KV_CACHE_DEFAULT = (
    "int8 beside int4 and int8 weights where moedge's own kernels run "
    "(fp16 for an MLA latent in blocks below 32 channels), else fp32"
)
STOCK_KV_CACHE = "fp32"  # by itself, of graphs that onnxruntime's own ops run
# Whose kernels, where they are compiled, read codes of 6 bits, scales of either type and routers in bf16. Elsewhere
# codes become 8-bit ones, at build or when the graph is loaded, scales what the target computes in, routers float32.
_OWN_KERNELS = ("onnxruntime",)
# Of a head's 6 bits these kernels read four of each row, and the lower two of rows whose logit is among the largest
# (runtime/kernels/planes.cpp): rows by blocks of so many, and how many blocks' maxima a logit is compared with.
_BLOCK_ROWS, _BEST_BLOCKS = 16, 2048
_MOST_BLOCK = 64  # channels of an int8 latent that share a scale
_INTEGER_BLOCKS = (32, 64)  # which the kernels multiply as integers; others become floats first, slower than fp16 does


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model; `sizes` in bytes by tensor class, widths in channels, `moe_layers`, `dense_layers` counted."""

    name: str
    sizes: Mapping[str, int]
    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    dense_layers: int
    dense_width: int
    moe_layers: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    heads: int
    cache_width: int
    attention_parameters: int
    attention_flops_per_row: int
    latent_attention: bool
    head_bits: int = 0  # of the head's integers, 0 where they are none
    # Bytes of `sizes` that are scales in one byte, in fp16, and routers' matrices in bf16.
    byte_scales: Mapping[str, int] = dataclasses.field(default_factory=dict)
    half_scales: Mapping[str, int] = dataclasses.field(default_factory=dict)
    half_routers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> ModelShape:
        """The shape in a `moedge.json`.

        Raises:
            BundleError: a part is missing, or is not what an export writes.
        """
        check_manifest(manifest)
        return _shape(manifest)

    def on(self, target: str) -> ModelShape:
        """The shape as a target's engine has it."""
        if has_own_kernels(target):
            return self
        sizes, bits = dict(self.sizes), self.head_bits
        if bits == 6:
            sizes["head"] = sizes.get("head", 0) + self.vocab_size * self.hidden_size * (8 - 6) // 8
            bits = 8
        widens = widens_scales(target)
        narrow = (self.half_routers, 1), (self.byte_scales, 3 if widens else 1), (self.half_scales, int(widens))
        for held, times in narrow:
            for name, count in held.items():
                sizes[name] = sizes.get(name, 0) + times * count
        if sizes == self.sizes:
            return self
        return dataclasses.replace(
            self, sizes=sizes, head_bits=bits, byte_scales={}, half_scales={}, half_routers={}
        )

    @property
    def weight_bytes(self) -> int:
        """All weights, scales and zero points included."""
        return sum(self.sizes.values())

    @property
    def embedding_row_bytes(self) -> float:
        """One token's row; a tied embedding is counted with the head."""
        return (self.sizes.get("embedding") or self.sizes.get("head", 0)) / self.vocab_size

    def head_bytes(self, tokens: int) -> float:
        """What `tokens` tokens read of the head in one step; of 6 bits as our own kernels do (see `on`)."""
        whole = self.sizes.get("head", 0)
        if self.head_bits != 6:
            return whole
        unread = self.vocab_size - self.distinct_refined_rows(tokens)
        return whole - unread * self.hidden_size * 2 / 8

    def distinct_refined_rows(self, tokens: int) -> float:
        """Expected number of the head's rows whose lower two bits some of `tokens` tokens read.

        Of B blocks n have a largest logit above the threshold; logits that do not depend on each other are above it
        with the probability p for which 1 - (1 - p)^16 = n / B. Tokens that follow each other in one text have more
        rows in common than such have.
        """
        blocks = math.ceil(self.vocab_size / _BLOCK_ROWS)
        share = 1.0 if blocks <= _BEST_BLOCKS else 1.0 - (1.0 - _BEST_BLOCKS / blocks) ** (1 / _BLOCK_ROWS)
        return self.vocab_size * (1.0 - (1.0 - share) ** tokens)

    def cache_bytes(self, tokens: int, element_bytes: float) -> int:
        """The KV cache of `tokens` tokens over all layers."""
        return round(tokens * self.cache_width * element_bytes)

    def distinct_experts(self, tokens: int) -> float:
        """Expected number of distinct experts a layer that `tokens` tokens call on, each on k of E at random.

        E * (1 - (1 - k/E)^tokens), the expected number of occupied cells in the occupancy problem (W. Feller, An
        Introduction to Probability Theory and Its Applications, vol. 1, 3rd ed. 1968, IV.2). Trained routers are less
        even than random ones: they call on fewer.
        """
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens)

    def expert_bytes(self, tokens: int) -> float:
        """Bytes of the experts that `tokens` tokens call on, all layers."""
        return self.sizes.get("experts", 0) * self.distinct_experts(tokens) / self.experts if self.experts else 0.0


def has_own_kernels(target: str) -> bool:
    """Whether a target's engines run in kernels of ours here: they read 6-bit codes, narrow scales and bf16 routers."""
    return target in _OWN_KERNELS and kernels.library() is not None


def widens_scales(target: str) -> bool:
    """Whether narrow scales become fp32 and not fp16: onnxruntime's own kernels take the type of the activations."""
    return target in _OWN_KERNELS and not has_own_kernels(target)


def latent_block(rank: int, rope: int) -> int:
    """Channels of an int8 latent that share a scale: none of them on both sides of the border of latent and key."""
    return math.gcd(math.gcd(rank, rope), _MOST_BLOCK)


def default_kv_cache(manifest: Mapping[str, Any]) -> str:
    """The type of the KV cache where there is a choice and nobody asks for one.

    fp32 where weights are exact, and where onnxruntime's own ops run, which are slower with fp16. Beside integer
    weights, whose rounding is coarser by far (docs/kv-cache.md), int8, but fp16 for a latent of MLA's whose blocks are
    smaller than those that the kernels multiply as integers.
    """
    integers = manifest["quantization"].get("weights") in ("int4", "int8")
    if not integers or kernels.library() is None:
        return STOCK_KV_CACHE
    attention = manifest["config"]["attention"]
    if attention["kind"] == "mla":
        block = latent_block(attention["kv_lora_rank"], attention["qk_rope_head_dim"])
        return "int8" if block in _INTEGER_BLOCKS else "fp16"
    return "int8" if attention["kind"] == "gqa" else "fp16"


def cache_element_bytes(manifest: Mapping[str, Any], target: str, kv_cache: str | None = None) -> float:
    """Bytes of an element of the KV cache on a target, of one of its KV_CACHES' types or of what it takes by itself."""
    if target not in KV_CACHES:
        return ELEMENT_BYTES[target]
    return kv_element_bytes(kv_cache or default_kv_cache(manifest), manifest["config"])


def kv_element_bytes(kv_cache: str, config: Mapping[str, Any]) -> float:
    """Bytes of a KV cache's element of one of KV_CACHES' types, scales that each token brings included."""
    if kv_cache != "int8":
        return {"fp32": 4.0, "fp16": 2.0}[kv_cache]
    attention = config["attention"]
    if attention["kind"] == "gqa":
        # In our own kernels each token and head has a scale; for onnxruntime's each channel has one, in the graph.
        return 1.0 + (4.0 / config["head_dim"] if kernels.library() is not None else 0.0)
    return 1.0 + 4.0 / latent_block(attention["kv_lora_rank"], attention["qk_rope_head_dim"])


def bytes_per_token(
    manifest: Mapping[str, Any],
    context: int,
    batch: int = 1,
    cache_bytes_per_element: float = 4,
    target: str = "onnxruntime",
) -> int:
    """The fewest bytes that one decode step reads: one token for each of `batch` sequences of `context` cached tokens.

    Weights that every token uses once, the expected distinct experts of the batch, one embedding row and the KV cache
    of each sequence.
    """
    shape = ModelShape.from_manifest(manifest).on(target)
    weights: float = sum(shape.sizes.get(name, 0) for name in (*READ_IN_FULL, *READ_IN_FULL_OF_TORCH) if name != "head")
    weights += shape.head_bytes(batch)
    rows = batch * shape.embedding_row_bytes
    cache = batch * shape.cache_bytes(context, cache_bytes_per_element)
    return round(weights + rows + shape.expert_bytes(batch) + cache)


def describe_model(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a result of `moedge bench` or `estimate` says of the model."""
    config, moe = manifest["config"], manifest["config"]["moe"]
    return {
        **{key: manifest["model"].get(key) for key in ("family", "parameters", "active_parameters")},
        "layers": config["num_hidden_layers"],
        "experts": moe["num_experts"],
        "experts_per_token": moe["num_experts_per_tok"],
    }


def _shape(manifest: Mapping[str, Any]) -> ModelShape:
    config = manifest["config"]
    moe = config["moe"]
    moe_layers = len(moe.get("layers", ()))
    parameters, per_row = _attention(config)
    return ModelShape(
        name=str(manifest["model"]["name"]),
        sizes=dict(manifest["sizes"]),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        max_positions=config["max_position_embeddings"],
        dense_layers=config["num_hidden_layers"] - moe_layers,
        dense_width=config["intermediate_size"],
        moe_layers=moe_layers,
        experts=moe["num_experts"] if moe_layers else 0,
        experts_per_token=moe["num_experts_per_tok"] if moe_layers else 0,
        expert_width=moe["intermediate_size"] if moe_layers else 0,
        shared_width=moe.get("shared_intermediate_size") or 0,
        heads=config["num_attention_heads"],
        cache_width=sum(entry["width"] for entry in manifest["cache"]),
        attention_parameters=parameters,
        attention_flops_per_row=per_row,
        latent_attention=config["attention"]["kind"] != "gqa",
        head_bits=_head_bits(manifest),
        byte_scales=_halves(manifest, "float8_scales"),
        half_scales=_halves(manifest, "float16_scales"),
        half_routers=_halves(manifest, "bfloat16_values"),
    )


def _halves(manifest: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Bytes of one of the kinds that `moedge export` counts, by class; none in bundles of before."""
    classes = manifest["quantization"].get("classes") or {}
    return {name: entry[kind] for name, entry in classes.items() if entry.get(kind)}


def _head_bits(manifest: Mapping[str, Any]) -> int:
    """Of the head's integers; a tied head is the embedding's table. 8 of quantized weights that say no more."""
    quantization = manifest["quantization"]
    name = "embedding" if manifest["config"].get("tie_word_embeddings") else "head"
    entry = (quantization.get("classes") or {}).get(name)
    if entry is None:
        return 8 if quantization.get("weights") in ("int8", "int4") else 0
    return {"uint4": 4, "uint6": 6, "uint8": 8}.get(str(entry.get("dtype")), 0)


def _attention(config: Mapping[str, Any]) -> tuple[int, int]:
    """(parameters, operations for each cached row and query token) of one layer's attention."""
    hidden, attention = config["hidden_size"], config["attention"]
    if attention["kind"] == "torch":  # a user's own graph: what it attends to, and how, is not known
        return 0, 0
    if attention["kind"] == "gqa":
        heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        return hidden * dim * (2 * heads + 2 * kv_heads), 4 * heads * dim
    heads, rank, rope = attention["num_heads"], attention["kv_lora_rank"], attention["qk_rope_head_dim"]
    nope, value, q_rank = attention["qk_nope_head_dim"], attention["v_head_dim"], attention.get("q_lora_rank")
    query = heads * (nope + rope) * (q_rank or hidden) + (hidden * q_rank if q_rank else 0)
    parameters = query + hidden * (rank + rope) + heads * rank * (nope + value) + heads * value * hidden
    # Absorbed form (DeepSeek-V2, arXiv:2405.04434, 2.1): scores over latent and rope, then a sum of latents.
    return parameters, 2 * heads * (2 * rank + rope)
