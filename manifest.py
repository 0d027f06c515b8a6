"""What `moedge.json` must hold for whoever reads a bundle. Standard library only, as in bundle.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import BundleError, shorten

# A kind is a type, a range of whole numbers, a tuple of texts, [kind of each item] or {key: kind}. "*" stands for every
# key; one that ends with "?" may be null, or not there.
_SIZE = range((1 << 50) + 1)  # more bytes, parameters, tokens than any model's
_COUNT, _LAYERS = range(1, 1 << 31), range(1, 1 << 12)
_GATE: dict[str, Any] = {"op": str, "attributes": {"*": float}}
_GATE["base?"] = _GATE["over?"] = _GATE


def _of(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


_ATTENTION = {
    "mla": _of(_COUNT, "num_heads q_lora_rank? kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    "gqa": {"windows?": [_SIZE]},
    "torch": {},
}
_HEADS = _of(_COUNT, "num_key_value_heads head_dim")
_MOE = _of(_COUNT, "num_experts num_experts_per_tok") | _of(_SIZE, "intermediate_size shared_intermediate_size?")
_CLASS = {"dtype": str, "relative_error?": float} | _of(
    _SIZE, "group_size? float8_scales? float16_scales? bfloat16_values?"
)
_MANIFEST = {
    "model": {"name": str, "family?": str} | _of(_SIZE, "parameters? active_parameters?"),
    "config": {
        **_of(_COUNT, "vocab_size hidden_size max_position_embeddings"),
        **_of(_SIZE, "intermediate_size num_attention_heads"),
        "family?": str,
        "num_hidden_layers": _LAYERS,
        "attention": {"kind": tuple(_ATTENTION)},
        "rope?": {"kind?": str},
        "moe": {"layers": [_SIZE], "gate?": _GATE, **_MOE},
    },
    "gating?": [_GATE],
    "quantization": {"weights": str, "group_size?": _SIZE, "algorithm?": str, "classes?": {"*": _CLASS}},
    "sizes": {"*": _SIZE},
    "cache": [{"name": str, "width": _COUNT}],
    "provenance?": {},
    "files": {"*": {"bytes": _SIZE, "sha256": str}},
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
