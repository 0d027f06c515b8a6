"""DeepSeekMoE-16B (V1), for which transformers has no class, put together from transformers' parts.

Llama's decoder, DeepSeek-V2's mixture with its greedy gate, and what V1's own modeling_deepseek.py does beyond it:
the chosen weights are normalized where `norm_topk_prob` says so and more than one is chosen.
"""

from __future__ import annotations

from typing import Any


def make_deepseek_v1(config: Any) -> Any:
    """A torch model whose `save_pretrained` writes a V1 checkpoint; `config`: a DeepseekV2Config with V1's values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MoE, DeepseekV2MoEGate

    class Gate(DeepseekV2MoEGate):
        def forward(self, hidden_states: Any) -> Any:
            experts, weights = super().forward(hidden_states)
            if self.top_k > 1 and self.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return experts, weights

    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    shared += ("rope_scaling", "attention_bias")
    settings = {key: getattr(config, key) for key in shared}
    every = getattr(config, "moe_layer_freq", 1)
    model = LlamaForCausalLM(LlamaConfig(**settings, rms_norm_eps=config.rms_norm_eps))
    for place, layer in enumerate(model.model.layers):
        if place >= config.first_k_dense_replace and place % every == 0:
            layer.mlp = DeepseekV2MoE(config)
            layer.mlp.gate = Gate(config)
    own = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
    own += ("first_k_dense_replace", "norm_topk_prob")
    model.config.update({key: getattr(config, key) for key in own} | {"moe_layer_freq": every})
    assert isinstance(model, torch.nn.Module)
    return model
