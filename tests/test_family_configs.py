"""What each family makes of a config.json: what it cannot express is refused by name, and nothing is a crash."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from family_cases import BASE, DYNAMIC, FAMILIES, LINEAR, LLAMA3, LONGROPE, YARN

from moedge.errors import CheckpointError
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family

# What decides the shape of published models, from their config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
    },
    "deepseek-moe-16b-base": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "max_position_embeddings": 4096,
    },
    "Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "OLMoE-1B-7B-0924": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "clip_qkv": None,
        "max_position_embeddings": 4096,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 21,
        "max_position_embeddings": 8192,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "sliding_window": None,
        "max_position_embeddings": 40960,
    },
    "Phi-3.5-MoE-instruct": {
        "model_type": "phimoe",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 131072,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 64,
            "long_factor": [2.0] * 64,
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
    },
    "granite-3.0-1b-a400m-base": {
        "model_type": "granitemoe",
        "vocab_size": 49155,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
    },
}


def test_newer_spelling_of_the_rope_is_read() -> None:
    """transformers 5 writes base and scaling into one object."""
    older = read_config("mixtral", rope_theta=5000.0, rope_scaling=YARN)
    newer = read_config("mixtral", rope_theta=None, rope_parameters={**YARN, "rope_theta": 5000.0})
    assert newer.rope == older.rope


BROKEN = [None, -1, 0, 0.5, True, "x", [], [0], {}, {"type": []}, 10**400, float("nan"), [None] * 99, 1 << 30]


def read_config(family: str, **changes: Any) -> Any:
    """What the family makes of config.json, weights apart."""
    document = {**BASE, **FAMILIES[family].base, "model_type": family, **changes}
    checkpoint = Checkpoint(Path("folder"), document, {})
    found = find_family(checkpoint)
    config = found.read_config(checkpoint)
    assert len(found.plan_weights(config)) > 10
    return config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"rope_scaling": {"type": "su"}}, "rope type 'su' is not known; known: default, dynamic, linear, "),
        ("deepseek", {"rope_scaling": YARN}, "rope type 'yarn' is not known; known: default, dynamic, linear"),
        ("phimoe", {"rope_scaling": LLAMA3}, "rope type 'llama3' is not known; known: default, longrope"),
        ("olmoe", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', an object was expected"),
        ("olmoe", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None, a finite number was expected"),
        ("olmoe", {"rope_scaling": {**LINEAR, "factor": 0}}, "rope_scaling: factor is 0.0, more than 0 was expected"),
        ("olmoe", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor 1.0 is not above low_freq_f"),
        (
            "olmoe",
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
            "rope_scaling: long_factor is not a list of 8 positive numbers, one a ",
        ),
        ("mixtral", {"rope_parameters": {"full_attention": YARN}}, "rope_parameters differ by layer type (full_"),
        ("mixtral", {"rope_theta": 0}, "rope_theta is 0.0, more than 1 was expected"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported here: 'silu'"),
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4; correct"),
        ("olmoe", {"hidden_size": 65}, "num_attention_heads 4 does not divide hidden_size 65; correct config.json"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8 experts"),
        ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, at most 4096 was expected"),
        ("mixtral", {"num_hidden_layers": 4096, "num_local_experts": 16384}, "67108864 experts in all layers, at most"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer of 2 is a mixture of experts; this exporter is for "),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1, a list of layers was expected"),
        ("deepseek", {"num_hidden_layers": 2, "moe_layer_freq": 2}, "no layer of 2 is a mixture of experts"),
        ("deepseek", {"mlp_bias": True}, "mlp_bias is True; supported here: False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported here: 'greedy', 'group_li"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing; it is needed for this model fam"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0, it divides; correct config.json"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3, this gate chooses 2; correct config.json"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0; supported here: 7.0"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention"]},
            "layer_types is ['full_attention']; a list of 2, one a layer, of sliding_attention or full_attention was ",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_config(family, **changes)
    assert str(raised.value).startswith(("folder/config.json: ", "config.json: ")) and "\n" not in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_a_config_is_a_crash(family: str) -> None:
    """Every key the family reads, with a value of every wrong kind: a config, or one line that names what is wrong."""
    keys = {*BASE, *FAMILIES[family].base}
    for _, changes in FAMILIES[family].configurations.values():
        keys |= set(changes)
    for key in keys - {"pad_token_id", "bos_token_id", "eos_token_id"}:
        for value in BROKEN:
            read_or_refuse(family, {key: value})


def test_no_value_of_a_rope_is_a_crash() -> None:
    for scaling in (YARN, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}, LINEAR, LLAMA3, DYNAMIC, LONGROPE):
        for key in (*scaling, "attention_factor", "truncate"):
            for value in BROKEN:
                read_or_refuse("olmoe", {"rope_scaling": {**scaling, key: value}})


def read_or_refuse(family: str, changes: dict[str, Any]) -> None:
    try:
        read_config(family, **changes)
    except CheckpointError as error:
        assert len(str(error)) < 300 and "\n" not in str(error), changes


def test_published_configurations_have_their_published_sizes() -> None:
    """Parameters in billions, all of the model, as each model card says."""
    sizes = {}
    for name, document in PUBLISHED.items():
        checkpoint = Checkpoint(Path(name), {"hidden_act": "silu", **document}, {})
        family = find_family(checkpoint)
        plan = family.plan_weights(family.read_config(checkpoint))
        sizes[name] = round(sum(math.prod(weight.shape) for weight in plan) / 1e9, 1)
    assert sizes == {
        "DeepSeek-V3": 671.0,
        "DeepSeek-V2-Lite": 15.7,
        "deepseek-moe-16b-base": 16.4,
        "Mixtral-8x7B-v0.1": 46.7,
        "OLMoE-1B-7B-0924": 6.9,
        "Qwen1.5-MoE-A2.7B": 14.3,
        "Qwen3-30B-A3B": 30.5,
        "Phi-3.5-MoE-instruct": 41.9,
        "granite-3.0-1b-a400m-base": 1.3,
        "gpt-oss-20b": 20.9,
    }
