"""Hostile checkpoints: whatever the bytes, reading ends in a result or a CheckpointError, quickly and in little memory.

Derandomized: every run tries the same 10,000 and more inputs.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moedge
from moedge.export.checkpoint import INDEX, Checkpoint, read_header
from moedge.export.config import MoEConfig
from moedge.export.families import find_family, list_families

EXAMPLES = {"bytes": 1500, "headers": 1500, "indexes": 500, "documents": 500, "configs": 1200}
TRIED: list[int] = []  # an entry for each input that this process tried
MOST_BYTES = 8 << 20  # an input is a few KB
MOST_SECONDS = 2.0

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "I4", "", "f32"]
numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([-(1 << 63), 1 << 31, (1 << 31) + 1, 1 << 62, 1 << 63, 1 << 64, 10**30, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([float("inf"), float("-inf"), float("nan"), 1e308, -0.0, 5e-324]),
    st.booleans(),
    st.none(),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["", "64", "silu", "../x", "\x00", "a/b", "\ud800"]))
anything = st.recursive(
    st.one_of(numbers, texts), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)


def fuzz(kind: str) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES[kind], derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )


@contextlib.contextmanager
def modest() -> Iterator[None]:
    """What is done inside may raise CheckpointError with one line and nothing else; it must be quick and small."""
    TRIED.append(1)
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
    except moedge.CheckpointError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 4000, text
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak} bytes held"
    assert time.monotonic() - began < MOST_SECONDS


def dump(document: Any) -> bytes:
    """JSON as Python writes it: NaN, infinity and lone surrogates included."""
    return json.dumps(document).encode()


# What each test must try; hypothesis may stop earlier than it is asked to.
EACH = {
    "test_arbitrary_bytes_as_safetensors": EXAMPLES["bytes"],
    "test_headers_with_fields_changed": EXAMPLES["headers"],
    "test_shard_indexes": EXAMPLES["indexes"],
    "test_config_files": EXAMPLES["documents"],
    "test_configs_with_values_changed": EXAMPLES["configs"] // len(list_families()),
}


@pytest.fixture(autouse=True)
def every_input_is_tried(request: pytest.FixtureRequest) -> Iterator[None]:
    before = len(TRIED)
    yield
    wanted = EACH.get(request.node.originalname, 0)
    assert len(TRIED) - before >= wanted, f"{len(TRIED) - before} inputs tried, {wanted} were meant"


def test_a_run_is_at_least_ten_thousand_inputs() -> None:
    exhaustive = len(list_families()) * len({**SIZES, **OTHERS}) * len(HOSTILE)
    assert sum(EXAMPLES.values()) + exhaustive >= 10_000


lengths = st.one_of(st.integers(0, 80), st.integers(0, (1 << 64) - 1)).map(lambda number: number.to_bytes(8, "little"))
json_like = st.text(alphabet='{}[]",:0123456789.eE+-tfn \\ua', max_size=60).map(str.encode)


announced = st.tuples(lengths, st.one_of(json_like, st.binary(max_size=80))).map(b"".join)


@given(st.one_of(st.binary(max_size=100), announced))
@fuzz("bytes")
def test_arbitrary_bytes_as_safetensors(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with modest():
        read_header(path)


@st.composite
def headers(draw: st.DrawFn) -> tuple[Any, int]:
    """(A sound header with up to three fields changed, bytes of data)."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(texts, min_size=1, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    for _ in range(draw(st.integers(0, 3))):
        entry = header[draw(st.sampled_from(sorted(header)))]
        if not isinstance(entry, dict) or draw(st.integers(0, 9)) == 0:
            header[draw(st.sampled_from([*sorted(header), "__metadata__"]))] = draw(anything)
            continue
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        if key == "dtype":
            entry[key] = draw(st.one_of(st.sampled_from(DTYPES), anything))
        else:
            entry[key] = draw(st.one_of(st.lists(numbers, max_size=4), st.lists(st.integers(0, 64)), anything))
    return header, max(0, offset + draw(st.sampled_from([0, 0, 0, -1, 7, -100])))


@given(headers())
@fuzz("headers")
def test_headers_with_fields_changed(tmp_path: Path, made: tuple[Any, int]) -> None:
    header, size = made
    raw = dump(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    with modest():
        for entry in read_header(path).values():
            assert 8 + len(raw) <= entry.offset and entry.offset + entry.nbytes <= path.stat().st_size


shard_names = st.one_of(st.sampled_from(["a.safetensors", "missing.safetensors", "/etc/passwd", "..", "."]), texts)


@given(
    st.one_of(
        st.dictionaries(texts, st.one_of(shard_names, anything), max_size=4).map(lambda held: {"weight_map": held}),
        st.dictionaries(texts, shard_names, max_size=4).map(lambda held: {"weight_map": held, "metadata": {}}),
        anything.map(lambda value: {"weight_map": value}),
        anything,
    )
)
@fuzz("indexes")
def test_shard_indexes(tmp_path: Path, index: Any) -> None:
    header = dump({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_bytes(dump(index))
    with modest():
        checkpoint = Checkpoint.open(tmp_path)
        assert all(entry.shard.parent == tmp_path for entry in checkpoint.entries.values())


@given(st.one_of(st.binary(max_size=60), json_like, anything.map(dump), st.integers(0, 3000).map(lambda n: b"[" * n)))
@fuzz("documents")
def test_config_files(tmp_path: Path, raw: bytes) -> None:
    header = dump({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "config.json").write_bytes(raw)
    with modest():
        checkpoint = Checkpoint.open(tmp_path)
        find_family(checkpoint).read_config(checkpoint)


# Every key that some family reads, with a value that is right for it.
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "sliding_window": 32,
    "max_window_layers": 2,
}
OTHERS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "qkv_bias": True,
    "hidden_act": "silu",
    "scoring_func": None,
    "topk_method": None,
    "rope_scaling": None,
    "rope_interleave": True,
    "mlp_only_layers": [],
    "layer_types": None,
    "clip_qkv": None,
    "use_sliding_window": False,
    "router_jitter_noise": 0.01,
    "swiglu_limit": 7.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "quantization_config": None,
}
ROPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "none"]
ROPE_KEYS = [
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    "truncate",
]
plausible = st.one_of(st.floats(-2, 50), st.lists(st.floats(0.1, 9), min_size=8, max_size=8), numbers, anything)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(ROPES)}, optional=dict.fromkeys(ROPE_KEYS, plausible)
)
changes = st.one_of(
    st.dictionaries(st.sampled_from(sorted(SIZES)), numbers, max_size=3),
    st.dictionaries(st.sampled_from(sorted({**SIZES, **OTHERS})), anything, max_size=3),
    st.one_of(ropes, anything).map(lambda rope: {"rope_scaling": rope}),
)


def sound_config(model_type: str) -> dict[str, Any]:
    document = {**SIZES, **OTHERS, "model_type": model_type}
    return {key: value for key, value in document.items() if value is not None}


HOSTILE: list[Any] = [-(1 << 63), -1, 0, 1, 7, 10**6, 1 << 31, 1 << 64, 10**400, 0.5, 1e300, math.inf, math.nan]
HOSTILE += [True, "64", "", [], [1], {}, {"type": "yarn"}, None]


def read_config(model_type: str, change: dict[str, Any], folder: Path) -> bool:
    """Whether the configuration was taken."""
    checkpoint = Checkpoint(folder, {**sound_config(model_type), **change}, {})
    taken = False
    with modest():
        config = find_family(checkpoint).read_config(checkpoint)
        assert isinstance(config, MoEConfig)
        json.dumps(config.to_json(), allow_nan=False)
        taken = True
    return taken


@pytest.mark.parametrize("model_type", list_families())
def test_every_key_with_every_hostile_value(model_type: str, tmp_path: Path) -> None:
    assert read_config(model_type, {}, tmp_path)
    for key in {**SIZES, **OTHERS}:
        for value in HOSTILE:
            read_config(model_type, {key: value}, tmp_path)


@pytest.mark.parametrize("model_type", list_families())
def test_configs_with_values_changed(model_type: str, tmp_path: Path) -> None:
    @given(changes)
    @settings(fuzz("configs"), max_examples=-(-EXAMPLES["configs"] // len(list_families())))
    def check(change: dict[str, Any]) -> None:
        read_config(model_type, change, tmp_path)

    check()


def test_a_config_of_more_than_the_checkpoint_holds_is_refused_before_it_is_laid_out(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """4,096 layers of 32 experts would be half a million names."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit_config(folder, num_hidden_layers=4096, n_routed_experts=32)
    began = time.monotonic()
    with pytest.raises(moedge.CheckpointError) as caught:
        moedge.export(folder, tmp_path / "bundle")
    assert time.monotonic() - began < MOST_SECONDS
    assert str(caught.value).startswith(
        f"{folder / 'config.json'}: 4096 layers with 32 experts are more than the checkpoint's "
    )
