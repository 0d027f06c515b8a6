#!/usr/bin/env python3
"""Train a small model of grouped-query attention on the sample's text, to measure on it what a KV cache's type costs.

    python scripts/train_grouped.py -o CHECKPOINT          # one thread, twenty minutes
    python scripts/kv_cache.py -o docs/kv-cache.md --grouped CHECKPOINT

Qwen2-MoE, the family whose keys have a bias, of which channels of large magnitude come. Text, held-out text, tokenizer
and batches are those of `distill.py`. It is no good model, but a trained one: what its heads attend to means something.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import explain_missing  # noqa: F401
import torch
import torch.nn.functional as F
from distill_data import encode_files, read_corpus
from distill_train import Batches, Plan, faster_type
from tokenizers import Tokenizer
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

SAMPLE = Path(__file__).resolve().parent.parent / "sample"
SEED = 0
RATE = 2e-3
# Texts of 1,024 tokens in a quarter of the steps, so that positions beyond 512 are trained.
PLAN = Plan(steps=1000, batch_tokens=4096, short=256, long=1024, long_every=4, warmup=50)


def config_of(vocab_size: int) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def train(model: Qwen2MoeForCausalLM, batches: Batches, plan: Plan, dtype: torch.dtype) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    began, losses = time.monotonic(), []
    for step in range(plan.steps):
        batch = batches.at(step)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = model(batch[:, :-1])
        logits = found.logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + model.config.router_aux_loss_coef * found.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * plan.rate_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0:
            rate, mean = (step + 1) * plan.batch_tokens / (time.monotonic() - began), sum(losses) / len(losses)
            print(f"step {step + 1}/{plan.steps}  loss {mean:.4f}  {rate:,.0f} tokens/s", flush=True)
            losses = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    stream = encode_files(tokenizer, read_corpus(SEED).train)
    plan = Plan(**{**vars(PLAN), "steps": options.steps})
    model = Qwen2MoeForCausalLM(config_of(tokenizer.get_vocab_size()))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens", flush=True)
    train(model, Batches(stream, plan, SEED), plan, faster_type("cpu"))
    model.eval().bfloat16().save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLE / name, options.output / name)


if __name__ == "__main__":
    main()
