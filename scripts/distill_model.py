"""The decoder that `distill.py` trains: DeepSeek-V3, written for training speed.

Parameter names and semantics are those of transformers' `DeepseekV3ForCausalLM`, so a state dict moves between the two
without renaming; the teacher is the same decoder with every layer dense. What differs is the cost: tokens are sorted
by expert once, norms are fused, and matrix products run in bfloat16 over float32 weights.

Shapes: B = batch, S = sequence, N = B*S tokens, D = hidden, H = heads, E = experts, K = experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config


class Linear(nn.Linear):
    """A bias-free linear layer that computes in its input's type."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class _Permute(torch.autograd.Function):
    """Reorder rows; the backward pass is the inverse gather, far cheaper than the scatter-add autograd would choose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """Sigmoid scores; a correction bias steers the choice of experts but never their weights."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    @torch.no_grad()
    def choose(self, scores: Tensor) -> Tensor:  # [N, E] -> [N, K]
        c = self.config
        biased = scores + self.e_score_correction_bias
        groups = biased.view(-1, c.n_group, c.n_routed_experts // c.n_group)
        best = groups.topk(2, dim=-1)[0].sum(-1).topk(c.topk_group, dim=-1)[1]
        kept = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1).unsqueeze(-1).bool()
        return groups.masked_fill(~kept, 0.0).flatten(1).topk(c.num_experts_per_tok, dim=-1)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.weight).sigmoid()
        chosen = self.choose(scores)
        self.load += torch.bincount(chosen.flatten(), minlength=self.load.numel())
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.config.routed_scaling_factor

    @torch.no_grad()
    def rebalance(self, speed: float) -> None:
        """Move the bias towards underloaded experts (auxiliary-loss-free balancing), then forget the counts."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        # A common offset changes no choice; at minimum 0, no kept expert can fall below a masked group's 0.0.
        self.e_score_correction_bias -= self.e_score_correction_bias.min()
        self.load.zero_()


class MoE(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(config.hidden_size, inner) for _ in range(config.n_routed_experts))
        self.gate = Gate(config)
        self.shared_experts = MLP(config.hidden_size, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:  # [N, D]
        chosen, weights = self.gate(x)
        k = chosen.shape[1]
        flat = chosen.flatten()  # [N*K]
        order = flat.argsort()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        copies = x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[1])
        counts = torch.bincount(flat, minlength=len(self.experts)).tolist()
        parts = _Permute.apply(copies, order, inverse).split(counts)  # type: ignore[no-untyped-call]
        mixed = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        mixed = _Permute.apply(mixed, inverse, order).view(-1, k, x.shape[1])  # type: ignore[no-untyped-call]
        return (mixed * weights.to(mixed.dtype).unsqueeze(-1)).sum(1) + self.shared_experts(x)  # type: ignore[no-any-return]


def rope_tables(config: DeepseekV3Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(
        torch.arange(length, dtype=torch.float32, device=device),
        config.rope_theta ** (-half / config.qk_rope_head_dim),
    )
    return angles.cos(), angles.sin()  # [S, rope/2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE on [B, H, S, rope]; pairs come out split in halves, as transformers leaves them."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, causal."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        c = self.config = config
        heads, query = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * query)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
            self.q_b_proj = Linear(c.q_lora_rank, heads * query)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size)

    def queries(self, x: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x)  # type: ignore[no-any-return]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)).to(x.dtype))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:  # [B, S, D]
        c, (b, s, _) = self.config, x.shape
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        q_nope, q_rope = self.queries(x).view(b, s, heads, -1).transpose(1, 2).split([nope, rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent).to(x.dtype)).view(b, s, heads, -1).transpose(1, 2)
        k_nope, value = expanded.split([nope, c.v_head_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, heads, -1, -1)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)  # [B, H, S, nope+rope]
        key = torch.cat((k_nope, k_rope), -1)
        if x.is_cuda:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            # Plain products: at these head sizes torch's CPU flash kernel trains 2 to 4 times slower.
            keys = key.flatten(0, 1).transpose(1, 2)
            scores = torch.baddbmm(mask, query.flatten(0, 1), keys, alpha=(nope + rope) ** -0.5)
            out = torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(b, heads, s, -1)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, S, D] is float32 throughout; the mask's type is the one to multiply in."""
        x = x + self.self_attn(self.input_layernorm(x).to(mask.dtype), cos, sin, mask)
        inner = self.post_attention_layernorm(x).to(mask.dtype)
        return x + self.mlp(inner.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]


class Body(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def hidden(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [B, S] -> [N, D]
        s = ids.shape[1]
        cos, sin = rope_tables(self.config, s, ids.device)
        mask = torch.full((s, s), float("-inf"), device=ids.device, dtype=dtype).triu(1)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        return self.model.norm(x).to(dtype).flatten(0, 1)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.lm_head(self.hidden(ids, dtype)).view(*ids.shape, -1)  # type: ignore[no-any-return]

    def gates(self) -> dict[int, Gate]:
        return {i: layer.mlp.gate for i, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MoE)}  # type: ignore[misc]


def initialize(model: Decoder, seed: int) -> Decoder:
    """Normal weights by fan-in; what writes to the residual stream starts smaller the deeper the model."""
    generator = torch.Generator().manual_seed(seed)
    shrink = (2 * model.config.num_hidden_layers) ** -0.5
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        std = 0.02 if "embed_tokens" in name or "lm_head" in name or "gate.weight" in name else p.shape[1] ** -0.5 * 0.6
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= shrink
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model
