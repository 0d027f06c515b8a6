"""Random checkpoints of every family: transformers' classes, configurations and their seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import edit_config

VOCAB = 160
LENGTH = 80
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.3, 1.9, 2.6, 4.0, 5.5, 7.0, 8.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class FamilyCase:
    """transformers' config and model classes, what all configurations share, and each with its seed."""

    config: str
    model: str
    base: dict[str, Any]
    configurations: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)


FAMILIES = {
    "deepseek_v2": FamilyCase(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "q_lora_rank": None},
        {
            "greedy_first_dense": (1, {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5}),
            "many_groups_yarn": (
                2,
                {
                    "q_lora_rank": 48,
                    "n_routed_experts": 12,
                    "num_experts_per_tok": 3,
                    "topk_method": "group_limited_greedy",
                    "n_group": 6,
                    "topk_group": 3,
                    "routed_scaling_factor": 4.0,
                    "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
                },
            ),
            "no_shared_top_1_odd": (
                3,
                {"n_shared_experts": 0, "n_routed_experts": 5, "num_experts_per_tok": 1, "attention_bias": True},
            ),
            "every_expert_tied": (
                4,
                {"n_routed_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True, "q_lora_rank": 32},
            ),
        },
    ),
    "deepseek_v3": FamilyCase(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "q_lora_rank": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
        },
        {
            "many_groups": (5, {"n_routed_experts": 12, "n_group": 6, "topk_group": 3, "num_experts_per_tok": 3}),
            "odd_experts_top_1_no_shared": (
                6,
                {"n_routed_experts": 7, "num_experts_per_tok": 1, "n_shared_experts": 0, "q_lora_rank": None},
            ),
            "every_expert_yarn_tied": (
                7,
                {
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 4,
                    "norm_topk_prob": False,
                    "tie_word_embeddings": True,
                    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
                },
            ),
        },
    ),
    "mixtral": FamilyCase(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 10000.0},
        {
            "odd_experts_short_window": (8, {"num_local_experts": 5, "sliding_window": 7}),
            "top_1_mqa_tied_odd_heads": (
                9,
                {
                    "num_experts_per_tok": 1,
                    "num_attention_heads": 3,
                    "num_key_value_heads": 1,
                    "head_dim": 12,
                    "tie_word_embeddings": True,
                },
            ),
            "every_expert_mha_yarn": (
                10,
                {
                    "num_local_experts": 3,
                    "num_experts_per_tok": 3,
                    "num_key_value_heads": 4,
                    "head_dim": 16,  # transformers cannot compute yarn without it
                    "rope_scaling": YARN,
                },
            ),
            "wide_heads_llama3": (11, {"head_dim": 32, "rope_scaling": LLAMA3}),
            "dynamic": (37, {"head_dim": 16, "max_position_embeddings": 32, "rope_scaling": DYNAMIC}),
        },
    ),
    "olmoe": FamilyCase(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 3},
        {
            "clipped": (12, {"clip_qkv": 0.5}),
            "odd_experts_normalized_biases_mqa": (
                13,
                {"num_experts": 7, "norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 1},
            ),
            "top_1_mha_linear": (114, {"num_experts_per_tok": 1, "num_key_value_heads": 4, "rope_scaling": LINEAR}),
            "every_expert_tied": (15, {"num_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True}),
            "longrope": (38, {"original_max_position_embeddings": 32, "rope_scaling": LONGROPE}),
        },
    ),
    "qwen2_moe": FamilyCase(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 80,
        },
        {
            "one_layer_dense": (16, {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}),
            "odd_experts_top_1_no_bias": (17, {"num_experts": 5, "num_experts_per_tok": 1, "qkv_bias": False}),
            "every_second_layer_window": (
                18,
                {
                    "num_hidden_layers": 3,
                    "decoder_sparse_step": 2,
                    "use_sliding_window": True,
                    "sliding_window": 9,
                    "max_window_layers": 0,
                },
            ),
            "every_expert_tied_yarn": (
                19,
                {"num_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True, "rope_scaling": YARN},
            ),
        },
    ),
    "qwen3_moe": FamilyCase(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
        {
            "normalized_mqa": (20, {"norm_topk_prob": True, "num_key_value_heads": 1}),
            "odd_experts_sparse_step_biases": (
                21,
                {
                    "num_hidden_layers": 3,
                    "decoder_sparse_step": 2,
                    "num_experts": 7,
                    "num_experts_per_tok": 3,
                    "attention_bias": True,
                },
            ),
            "top_1_one_layer_dense": (22, {"num_experts_per_tok": 1, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
            "every_expert_window_tied": (
                23,
                {
                    "num_experts": 4,
                    "num_experts_per_tok": 4,
                    "use_sliding_window": True,
                    "sliding_window": 6,
                    "tie_word_embeddings": True,
                    "rope_scaling": LINEAR,
                },
            ),
        },
    ),
}
FAMILIES |= {
    "granitemoe": FamilyCase(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
        {
            "multipliers": (
                24,
                {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
            ),
            "odd_experts_top_1_biases_tied": (
                25,
                {
                    "num_local_experts": 5,
                    "num_experts_per_tok": 1,
                    "attention_bias": True,
                    "tie_word_embeddings": True,
                    "logits_scaling": 0.5,
                },
            ),
            "every_expert_mha_yarn": (
                26,
                {
                    "num_local_experts": 3,
                    "num_experts_per_tok": 3,
                    "num_key_value_heads": 4,
                    "rope_scaling": YARN,
                    "residual_multiplier": 0.5,
                },
            ),
        },
    ),
    "deepseek": FamilyCase(
        "DeepseekV2Config",
        "deepseek_v1",
        {
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
        },
        {
            "first_dense_dynamic": (27, {"max_position_embeddings": 40, "rope_scaling": DYNAMIC}),
            "normalized_gqa_biases": (
                28,
                {"norm_topk_prob": True, "num_key_value_heads": 2, "attention_bias": True, "n_routed_experts": 7},
            ),
            "every_second_layer_top_1_no_shared": (
                29,
                {
                    "num_hidden_layers": 4,
                    "first_k_dense_replace": 1,
                    "moe_layer_freq": 2,
                    "num_experts_per_tok": 1,
                    "norm_topk_prob": True,
                    "n_shared_experts": 0,
                },
            ),
            "every_expert_linear_tied": (
                30,
                {
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 4,
                    "rope_scaling": LINEAR,
                    "tie_word_embeddings": True,
                    "first_k_dense_replace": 0,
                },
            ),
        },
    ),
    "phimoe": FamilyCase(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"num_local_experts": 8, "rope_theta": 10000.0},
        {
            "plain_norms": (31, {}),
            "odd_experts_biases_mqa": (
                32,
                {
                    "num_local_experts": 5,
                    "num_key_value_heads": 1,
                    "attention_bias": True,
                    "lm_head_bias": True,
                    "router_jitter_noise": 0.3,
                },
            ),
            "both_experts_window_tied": (
                33,
                {"num_local_experts": 2, "sliding_window": 9, "tie_word_embeddings": True, "lm_head_bias": True},
            ),
            "longrope": (
                39,
                {
                    "rope_scaling": {
                        **LONGROPE,
                        "short_mscale": 1.1,
                        "long_mscale": 1.3,
                        "original_max_position_embeddings": 32,
                    },
                },
            ),
        },
    ),
    "gpt_oss": FamilyCase(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 8,
            "rope_scaling": {**YARN, "factor": 32.0, "truncate": False},
        },
        {
            "alternate_windows": (34, {"num_hidden_layers": 3}),
            "odd_experts_top_1_mqa_tied": (
                35,
                {
                    "num_local_experts": 5,
                    "num_experts_per_tok": 1,
                    "num_key_value_heads": 1,
                    "tie_word_embeddings": True,
                },
            ),
            "every_expert_full_attention": (
                36,
                {
                    "num_local_experts": 4,
                    "num_experts_per_tok": 4,
                    "num_key_value_heads": 4,
                    "layer_types": ["full_attention", "full_attention"],
                    "rope_scaling": None,
                },
            ),
        },
    ),
}


def make_model(family: str, name: str) -> Any:
    """transformers' model in float32, its weights random and large enough to tell layers apart."""
    import torch
    import transformers

    case = FAMILIES[family]
    seed, changes = case.configurations[name]
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**{**BASE, **case.base, **changes})
    if case.model == "deepseek_v1":
        from deepseek_v1 import make_deepseek_v1

        model = make_deepseek_v1(config).float().eval()
    else:
        model = getattr(transformers, case.model)(config).float().eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "bias" in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif key.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.numel():
                parameter.copy_(torch.randn_like(parameter) * (2.0 / _inputs_of(key, parameter)) ** 0.5)
    return model


def save_model(model: Any, family: str, folder: Path) -> None:
    model.save_pretrained(folder)
    if family == "deepseek":  # put together from other models' parts
        edit_config(folder, model_type="deepseek")


def _inputs_of(key: str, parameter: Any) -> int:
    """What a matrix sums over; gpt-oss stores its experts the other way round."""
    return int(parameter.shape[-2 if key.endswith(("gate_up_proj", "experts.down_proj")) else -1])
