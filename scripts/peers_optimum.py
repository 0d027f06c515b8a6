"""What optimum-onnx makes of a family, really tried on a small checkpoint: python peers_optimum.py CONFIG.json FOLDER

Exports the configuration, cut down to REDUCED, with and without optimum; compares optimum's logits with transformers';
and where they agree measures both side by side. One JSON document on stdout, whatever comes of it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_checkpoint import write_checkpoint

# Large enough to be measured, small enough for a tracer that writes every expert out.
REDUCED = {
    "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192, "num_experts": 16,
    "n_routed_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
PROMPT, NEW, ROUNDS = 128, 32, 5
AGREES = 1e-3  # of the largest logit


def reduce(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every size that is in REDUCED replaced."""
    return config | {key: value for key, value in REDUCED.items() if config.get(key) is not None}


def attempt(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What optimum says, or what it measured."""
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(config, folder / "checkpoint")
    found: dict[str, Any] = {
        "family": config["model_type"],
        "config": {key: config[key] for key in REDUCED if key in config},
        "versions": {name: importlib.metadata.version(name) for name in ("optimum-onnx", "transformers")},
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "exported": False,
    }
    began = time.perf_counter()
    try:
        from optimum.exporters.onnx import main_export

        main_export(
            str(folder / "checkpoint"), output=folder / "optimum", task="text-generation-with-past",
            do_validation=False, no_post_process=True,
        )  # fmt: skip
    except Exception as error:  # whatever it is, it is the answer
        return found | {"reason": tell(error)}
    found |= {"exported": True, "export_s": time.perf_counter() - began}
    try:
        found["largest_difference"] = largest_difference(folder)
    except Exception as error:
        return found | {"reason": f"its graph does not run: {tell(error)}"}
    if found["largest_difference"] > AGREES:
        return found | {"reason": "its logits are not transformers'"}
    return found | measure(folder)


def tell(error: Exception) -> str:
    """Its first sentence."""
    line = (str(error).splitlines() or [""])[0].split(". ")[0]
    return f"{type(error).__name__}: {line if len(line) <= 200 else line[:197] + '...'}"


def largest_difference(folder: Path) -> float:
    """Of optimum's logits from transformers', over the largest of those."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.random.default_rng(0).integers(0, REDUCED["vocab_size"], (1, 48)))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
        wanted = model(ids).logits.numpy()
        found = ORTModelForCausalLM.from_pretrained(folder / "optimum")(ids, torch.ones_like(ids)).logits.numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def measure(folder: Path) -> dict[str, Any]:
    """Seconds for a prompt and for a token after it, round by round, in turns; ours at fp32 as optimum's, and int4."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    import moedge

    prompt = np.random.default_rng(1).integers(0, REDUCED["vocab_size"], PROMPT)
    theirs = ORTModelForCausalLM.from_pretrained(folder / "optimum")
    runs = {"optimum": lambda: run_optimum(theirs, torch.from_numpy(prompt)[None])}
    with contextlib.ExitStack() as stack:
        for weights in ("fp32", "int4"):
            bundle = folder / weights
            moedge.export(folder / "checkpoint", bundle, weights=weights, verify=False)
            moedge.build(bundle, "cpu")
            engine = stack.enter_context(moedge.load(bundle, "cpu"))
            runs[f"moedge {weights}"] = lambda engine=engine: run_moedge(engine, prompt)
        found: dict[str, Any] = {name: {"prefill_s": [], "decode_s": []} for name in runs}
        for turn in range(ROUNDS + 1):
            for name, run in runs.items():
                prefill, decode = run()
                if turn:
                    found[name]["prefill_s"].append(prefill)
                    found[name]["decode_s"].append(float(np.median(decode)))
    return {"peers": found}


def run_optimum(model: Any, prompt: Any) -> tuple[float, list[float]]:
    import torch

    mask = torch.ones((1, PROMPT + NEW), dtype=torch.int64)
    with torch.no_grad():
        began = time.perf_counter()
        out = model(prompt, mask[:, :PROMPT], use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        prefill, seconds = time.perf_counter() - began, []
        for length in range(PROMPT + 1, PROMPT + NEW + 1):
            began = time.perf_counter()
            out = model(token, mask[:, :length], past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
    return prefill, seconds


def run_moedge(engine: Any, prompt: Any) -> tuple[float, list[float]]:
    session, row = engine.begin(), np.zeros(1, np.int64)
    began = time.perf_counter()
    token = int(engine.prefill(prompt).argmax())
    prefill, seconds = time.perf_counter() - began, []
    for _ in range(NEW):
        began = time.perf_counter()
        token = int(session.step(np.array([token], np.int64), row).argmax())
        seconds.append(time.perf_counter() - began)
    return prefill, seconds


def main() -> None:
    config, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):  # what the libraries print is not the document
        found = attempt(reduce(config), folder)
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
