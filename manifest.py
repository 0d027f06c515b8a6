"""What `moedge.json` must hold for whoever reads a bundle. Standard library only, as in bundle.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import BundleError, shorten

# A kind is a type, a range of whole numbers, a tuple of texts, [kind of each item] or {key: kind}. "*" stands for every
# key; one that ends with "?" may be null, or not there.
_BYTES = range((1 << 50) + 1)  # and parameters, tokens: more than any model's
_COUNT, _WIDTH, _LAYERS = range(1, 1 << 31), range(1 << 31), range(1, 1 << 12)
_GATE: dict[str, Any] = {"op": str, "attributes": {"*": float}}
_GATE["base?"] = _GATE["over?"] = _GATE
_LATENT = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ATTENTION: dict[str, dict[str, Any]] = {
    "mla": {"q_lora_rank?": _COUNT, "scale?": float, **dict.fromkeys(_LATENT, _COUNT)},
    "gqa": {"num_heads?": _COUNT, "scale?": float, "windows?": [_WIDTH], "clip?": float},
    "torch": {},
}
_HEADS = {"num_key_value_heads": _COUNT, "head_dim": _COUNT}
_MOE = {
    "layers": [_WIDTH],
    "num_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "intermediate_size": _WIDTH,
    "shared_intermediate_size?": _WIDTH,
    "gate?": _GATE,
}
_CLASS = {
    "dtype": str,
    "group_size?": _WIDTH,
    "relative_error?": float,
    "float16_scales?": _BYTES,
    "bfloat16_values?": _BYTES,
}
_MANIFEST = {
    "model": {"name": str, "family?": str, "parameters?": _BYTES, "active_parameters?": _BYTES},
    "config": {
        "family?": str,
        "vocab_size": _COUNT,
        "hidden_size": _COUNT,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "max_position_embeddings": _COUNT,
        "num_attention_heads": _WIDTH,
        "rms_norm_eps?": float,
        "attention": {"kind": tuple(_ATTENTION)},
        "rope?": {"dim": _COUNT, "inv_freq": [float], "kind?": str, "long_inv_freq?": [float]},
        "moe": _MOE,
        "notes?": [str],
    },
    "gating?": [_GATE],
    "quantization": {"weights": str, "group_size?": _WIDTH, "algorithm?": str, "classes?": {"*": _CLASS}},
    "sizes": {"*": _BYTES},
    "cache": [{"name": str, "width": _COUNT}],
    "provenance?": {},
    "files": {"*": {"bytes": _BYTES, "sha256": str}},
}
_WORDS = {dict: "an object", list: "a list", str: "a text", float: "a number", bool: "true or false"}


def check_manifest(manifest: Mapping[str, Any], where: str = "moedge.json") -> None:
    """Raises BundleError, which names the first part that is missing, of another kind or out of range."""
    wrong = _find_wrong(manifest, _MANIFEST, "") or _find_wrong_config(manifest["config"])
    if wrong:
        raise BundleError(f"{where}: {wrong}; export the checkpoint again")


def _find_wrong_config(config: Mapping[str, Any]) -> str | None:
    """What no table tells: what one value allows another."""
    kind, moe, layers = config["attention"]["kind"], config["moe"], config["num_hidden_layers"]
    wrong = _find_wrong(config["attention"], _ATTENTION[kind], "config.attention.")
    if kind != "torch":
        wrong = wrong or _find_wrong(config, _HEADS, "config.")
    if wrong:
        return wrong
    if moe["layers"] != sorted(set(moe["layers"]) & set(range(layers))):
        return f"config.moe.layers are not layers of {layers} in their order"
    if moe["num_experts_per_tok"] > moe["num_experts"]:
        return f"{moe['num_experts_per_tok']} experts for each token, of {moe['num_experts']}"
    return None


def _find_wrong(value: Any, kind: Any, place: str) -> str | None:
    """What is wrong with a part, in words; `place`: its name and a dot."""
    if isinstance(kind, dict) and isinstance(value, Mapping):
        for key, inner in kind.items():
            name = key.removesuffix("?")
            if name == key and key not in ("*", *value):
                return f"{place}{key} is missing"
            for part in value if key == "*" else (name,):
                if name == key or value.get(part) is not None:
                    wrong = _find_wrong(value[part], inner, f"{place}{part}.")
                    if wrong:
                        return wrong
        return None
    if isinstance(kind, list) and isinstance(value, list):
        each = (_find_wrong(item, kind[0], f"{place}{at}.") for at, item in enumerate(value))
        return next(filter(None, each), None)
    if isinstance(kind, range):
        right, wanted = type(value) is int and value in kind, f"a whole number from {kind[0]} to {kind[-1]}"
    elif isinstance(kind, tuple):
        right, wanted = isinstance(value, str) and value in kind, f"one of {', '.join(kind)}"
    else:
        kind = kind if isinstance(kind, type) else type(kind)
        right, wanted = isinstance(value, kind), _WORDS[kind]
        if kind is float:
            right = type(value) in (int, float) and -1e300 < value < 1e300
    if right:
        return None
    found = _WORDS.get(type(value), "null") if isinstance(value, dict | list | None) else shorten(value)
    return f"{place[:-1]} is {found}, {wanted} was expected"
