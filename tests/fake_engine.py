"""A bundle made by hand around a tiny lowered graph, for tests of the runtime alone.

The graph has the interface of a lowered engine (views of the cache in, with room for the run's own rows, those rows
out, routing of one MoE layer) and does the real thing in small: causal attention over past and new rows, positions
counted from the past, a top-k router.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

VOCAB, HIDDEN, LATENT, ROPE, LAYERS, EXPERTS, TOP_K, INNER = 300, 16, 8, 4, 2, 4, 2, 8
MOE_LAYERS = [1]
EOS = 299
MAX_SEQ_LEN = 64


def write_bundle(folder: Path, *, chain: dict[int, int] | None = None, nan: bool = False) -> Path:
    """Write a bundle with a `cpu` engine to `folder`.

    chain: token -> the token that surely follows it. nan: the logits are NaN.
    """
    engine = folder / "engines" / "cpu"
    engine.mkdir(parents=True)
    weights, tensors = _weights(chain or {}, nan)
    (folder / "weights.bin").write_bytes(weights)
    onnx.save(_lowered(tensors), engine / "model.onnx")
    onnx.save(_canonical(tensors), folder / "model.onnx")
    write_tokenizer(folder)
    _write_json(folder / "config.json", {"model_type": "deepseek_v3", "eos_token_id": EOS})
    names = ["model.onnx", "weights.bin", "config.json", "tokenizer.json", "tokenizer_config.json"]
    files = {name: file_entry(folder / name) for name in names}
    _write_json(folder / "moedge.json", _manifest(files, tensors))
    _write_json(engine / "engine.json", _engine(engine, files))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object on disk."""
    _write_json(path, {**json.loads(path.read_text()), **changes})


def file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: tokens 0 to 255 are the bytes; <eos> is EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({char: place for place, char in enumerate(_byte_alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(f"<unused{place}>") for place in range(256, EOS)])
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    assert tokenizer.token_to_id("<eos>") == EOS
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    _write_json(folder / "tokenizer_config.json", config)


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte value, so that a token's id is its byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars, extra = [], 0
    for byte in range(256):
        chars.append(chr(byte) if byte in printable else chr(256 + extra))
        extra += byte not in printable
    return chars


def _weights(chain: dict[int, int], nan: bool) -> tuple[bytes, dict[str, tuple[np.ndarray, int]]]:
    """All weights as one file, 64-byte aligned, and each one's array and offset."""
    random = np.random.default_rng(7)

    def dense(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

    arrays = {"embed.weight": 3 * dense(VOCAB, HIDDEN), "head": dense(HIDDEN, VOCAB)}
    for i in range(LAYERS):
        shapes = {"q": (HIDDEN, LATENT + ROPE), "kv": (HIDDEN, LATENT), "kr": (HIDDEN, ROPE), "o": (LATENT, HIDDEN)}
        arrays |= {f"{name}.{i}": dense(*shape) for name, shape in shapes.items()}
    for i in MOE_LAYERS:
        arrays[f"router.{i}"] = dense(HIDDEN, EXPERTS)
        arrays[f"layers.{i}.experts.gate_up.weight"] = dense(EXPERTS, HIDDEN, 2 * INNER)
        arrays[f"layers.{i}.experts.down.weight"] = dense(EXPERTS, INNER, HIDDEN)
    arrays["chain"] = np.zeros((VOCAB, VOCAB), np.float32)
    for token, after in chain.items():
        arrays["chain"][token, after] = 1000
    if nan:
        arrays["head"][:] = np.nan
    content, placed = b"", {}
    for name, array in arrays.items():
        content += b"\0" * (-len(content) % 64)
        placed[name] = (array, len(content))
        content += array.tobytes()
    return content, placed


def _external(name: str, array: np.ndarray, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _lowered(tensors: dict[str, tuple[np.ndarray, int]]) -> onnx.ModelProto:
    text = [_PREAMBLE]
    inputs, outputs = ["int64[S] input_ids", "int64[R] rows"], [f"float[R,{VOCAB}] logits"]
    for i in range(LAYERS):
        inputs += [f'float[T,{LATENT}] "cache.latent.{i}"', f'float[T,{ROPE}] "cache.rope.{i}"']
        outputs += [f'float[S,{LATENT}] "new.latent.{i}"', f'float[S,{ROPE}] "new.rope.{i}"']
        text.append(_ATTENTION.replace("#", str(i)).replace("@", str(i + 1)))
        if i in MOE_LAYERS:
            outputs += [f'int64[S,{TOP_K}] "experts.{i}"', f'float[S,{TOP_K}] "weights.{i}"']
            text.append(_MOE.replace("#", str(i)).replace("@", str(i + 1)))
    body = "\n".join([*text, _HEAD])
    header = f"lowered ({', '.join(inputs)}) => ({', '.join(outputs)})"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 22]>\n{header} {{{body}\n}}')
    model.graph.initializer.extend(_external(name, *placed) for name, placed in tensors.items())
    return model


def _canonical(tensors: dict[str, tuple[np.ndarray, int]]) -> onnx.ModelProto:
    """Only what the runtime reads of it: where the tensors lie."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 22]>\ncanonical (int64[B,S] input_ids) => (int64[B,S] same)'
        "{ same = Identity (input_ids) }"
    )
    model.graph.initializer.extend(_external(name, *placed) for name, placed in tensors.items())
    return model


def _manifest(files: dict[str, Any], tensors: dict[str, tuple[np.ndarray, int]]) -> dict[str, Any]:
    classes = ("embedding", "norm", "attention", "dense_mlp", "router", "shared_experts", "experts", "head")
    sizes = dict.fromkeys(classes, 0)
    for name, (array, _) in tensors.items():
        kind = {"embed": "embedding", "layers": "experts", "router": "router"}.get(name.split(".")[0], "attention")
        sizes["head" if name in ("head", "chain") else kind] += array.nbytes
    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": LATENT + ROPE,
        "intermediate_size": 32,
        "attention": {
            "kind": "mla",
            "num_heads": 1,
            "q_lora_rank": None,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": LATENT,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": LATENT,
        },
        "moe": {
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "intermediate_size": INNER,
            "shared_intermediate_size": 0,
            "layers": MOE_LAYERS,
        },
    }
    return {
        "format": 1,
        "model": {"name": "fake", "family": "deepseek_v3", "parameters": 12345, "active_parameters": 2345},
        "config": config,
        "gating": [{"op": "moedge.SigmoidTopKGate", "layers": MOE_LAYERS, "attributes": {"top_k": TOP_K}}],
        "quantization": {"weights": "fp32", "group_size": None, "algorithm": None, "classes": {}},
        "sizes": sizes,
        "cache": [{"name": name, "width": width} for name, width, _ in _cache()],
        "provenance": {"source": "made by hand", "created": "2026-01-01T00:00:00Z", "moedge": "0", "tensors": 0},
        "files": files,
    }


def _engine(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    model = file_entry(folder / "model.onnx")
    return {
        "format": 1,
        "profile": "cpu",
        "target": "onnxruntime",
        "backend": "onnxruntime",
        "backend_version": onnxruntime.__version__,
        "compute_capability": None,
        "precision": "fp32 weights, fp32 activations",
        "max_batch": 1,
        "max_seq_len": MAX_SEQ_LEN,
        "bytes": model["bytes"],
        "files": {"model.onnx": model},
        "made_from": {name: files[name]["sha256"] for name in ("model.onnx", "weights.bin")},
        "build_seconds": 0.1,
        "peak_build_memory_bytes": 1,
        "status": "ready",
        "cache": [{"name": name, "width": width, "dtype": dtype} for name, width, dtype in _cache()],
        "vocab_size": VOCAB,
        "layers": LAYERS,
        "moe_layers": MOE_LAYERS,
        "num_experts_per_tok": TOP_K,
        "num_experts": EXPERTS,
        "session": {},
    }


def _cache() -> list[tuple[str, int, str]]:
    return [
        (f"{kind}.{i}", width, "float32") for i in range(LAYERS) for kind, width in (("latent", LATENT), ("rope", ROPE))
    ]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document))


_PREAMBLE = """
  rows_shape = Shape <start = 0, end = 1> ("cache.latent.0")
  count = Shape (input_ids)
  past_shape = Sub (rows_shape, count)
  P = Squeeze (past_shape)
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  S = Squeeze (count)
  steps = Range (zero, S, one)
  positions = Add (steps, P)
  angle = Cast <to = 1> (positions)
  tenth = Constant <value = float {0.1}> ()
  scaled = Mul (angle, tenth)
  cosine = Cos (scaled)
  axis1 = Constant <value = int64[1] {1}> ()
  turn = Unsqueeze (cosine, axis1)
  square = Concat <axis = 0> (count, count)
  closed = ConstantOfShape <value = float[1] {-1e9}> (square)
  mask = Trilu <upper = 1> (closed, one)
  minus1 = Constant <value = int64[1] {-1}> ()
  start0 = Constant <value = int64[1] {0}> ()
  far = Constant <value = int64[1] {9223372036854775807}> ()
  k = Constant <value = int64[1] {2}> ()
  x_0 = Gather ("embed.weight", input_ids)"""

_ATTENTION = """
  "new.latent.#" = MatMul (x_#, "kv.#")
  rope_# = MatMul (x_#, "kr.#")
  "new.rope.#" = Mul (rope_#, turn)
  query_# = MatMul (x_#, "q.#")
  past_latent_# = Slice ("cache.latent.#", start0, past_shape)
  past_rope_# = Slice ("cache.rope.#", start0, past_shape)
  past_# = Concat <axis = 1> (past_latent_#, past_rope_#)
  new_# = Concat <axis = 1> ("new.latent.#", "new.rope.#")
  past_t_# = Transpose <perm = [1, 0]> (past_#)
  new_t_# = Transpose <perm = [1, 0]> (new_#)
  past_scores_# = MatMul (query_#, past_t_#)
  new_scores_# = MatMul (query_#, new_t_#)
  causal_# = Add (new_scores_#, mask)
  scores_# = Concat <axis = 1> (past_scores_#, causal_#)
  share_# = Softmax <axis = 1> (scores_#)
  past_share_# = Slice (share_#, start0, past_shape, axis1)
  new_share_# = Slice (share_#, past_shape, far, axis1)
  from_past_# = MatMul (past_share_#, past_latent_#)
  from_new_# = MatMul (new_share_#, "new.latent.#")
  context_# = Add (from_past_#, from_new_#)
  added_# = MatMul (context_#, "o.#")
  sum_# = Add (x_#, added_#)
  x_@ = Tanh (sum_#)"""

_MOE = """
  gate_# = MatMul (x_@, "router.#")
  scores_moe_# = Softmax <axis = 1> (gate_#)
  "weights.#", "experts.#" = TopK (scores_moe_#, k)
  chosen_# = Gather ("layers.#.experts.gate_up.weight", "experts.#")
  down_# = Gather ("layers.#.experts.down.weight", "experts.#")
  axes12_# = Constant <value = int64[2] {1, 2}> ()
  row_# = Unsqueeze (x_@, axes12_#)
  up_# = MatMul (row_#, chosen_#)
  left_#, right_# = Split <axis = 3, num_outputs = 2> (up_#)
  inner_# = Mul (left_#, right_#)
  out_# = MatMul (inner_#, down_#)
  axis2_# = Constant <value = int64[1] {2}> ()
  flat_# = Squeeze (out_#, axis2_#)
  weight_# = Unsqueeze ("weights.#", minus1)
  weighed_# = Mul (flat_#, weight_#)
  moe_# = ReduceSum <keepdims = 0> (weighed_#, axis1)
  y_# = Add (x_@, moe_#)"""

_HEAD = """
  chosen = Gather (y_1, rows)
  plain = MatMul (chosen, head)
  asked = Gather (input_ids, rows)
  forced = Gather (chain, asked)
  logits = Add (plain, forced)"""
