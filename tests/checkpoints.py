"""Random DeepSeek-V3 checkpoints out of transformers' own class, and reading and rewriting their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
# Odd on purpose: expert counts that divide by nothing, one choice, all choices, many groups, no shared expert.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_q_lora_odd_experts": {"q_lora_rank": None, "n_group": 1, "n_routed_experts": 7, "num_experts_per_tok": 3},
    "yarn_tied_biases": {"rope_scaling": YARN, "tie_word_embeddings": True, "attention_bias": True},
    "top_1_halves": {
        "rope_interleave": False,
        "n_shared_experts": 2,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "every_expert_odd_heads": {
        "n_routed_experts": 5,
        "num_experts_per_tok": 5,
        "n_group": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "v_head_dim": 32,
        "first_k_dense_replace": 0,
        "rope_theta": 500000.0,
    },
    "no_shared_linear_rope": {
        "n_shared_experts": 0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "routed_scaling_factor": 1.0,
        "hidden_size": 48,
    },
}


def make_model(seed: int = 0, **changes: Any) -> Any:
    """transformers' DeepseekV3ForCausalLM, float32, with random weights large enough to tell layers apart."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**TINY, **changes})).float().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif parameter.numel():
                parameter.copy_(torch.randn_like(parameter) * (2.0 / parameter.shape[-1]) ** 0.5)
    return model


def save_model(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def transformers_logits(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 [batch, sequence, vocab]."""
    import torch

    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor(ids)).logits.numpy()
    return logits


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Rewrite model.safetensors after `edit` changed the dict of its tensors in place."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
