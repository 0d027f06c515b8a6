#!/usr/bin/env python3
"""Make the sample model: train a teacher on the standard library's sources, distil it into a DeepSeek-V3 student.

python scripts/distill.py                       # two CPU cores, under 90 minutes, writes sample/
python scripts/distill.py --device cuda         # a larger pair, in minutes, writes sample-cuda/
python scripts/distill.py --resume              # go on after a kill
python scripts/distill.py quantized int8=BUNDLE int4=BUNDLE   # measure moedge's own engines on heldout.txt
python scripts/distill.py card                  # write sample/README.md from sample/training.json again
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch loads: large pages for large tensors

import safetensors.torch
import torch
import transformers
from distill_card import QUANTIZED, write_atomically, write_card
from distill_data import Corpus, encode_files, read_corpus, save_tokenizer, train_tokenizer
from distill_model import Decoder, initialize
from distill_train import CONTEXT, STRIDE, Plan, Stream, Trainer, bits_per_byte, faster_type, torch_logits, utilization
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

SAMPLE = Path(__file__).resolve().parent.parent / "sample"
SAMPLING = {"temperature": 0.7, "top_p": 0.95}
PROMPTS = ("    def __init__(self", "import os\nimport sys\n\ndef main(", "class Queue:\n    def put(self, item")


@dataclass(frozen=True)
class Preset:
    teacher: dict[str, Any]
    student: dict[str, Any]
    teacher_plan: Plan
    student_plan: Plan
    vocab_size: int = 3072


# Every input width of a linear layer is a multiple of 128, so that int4 in groups of 128 divides it.
PRESETS = {
    "cpu": Preset(
        teacher={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
        student={"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 768},
        teacher_plan=Plan(steps=1400),
        student_plan=Plan(steps=1000),
    ),
    "cuda": Preset(
        teacher={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
        student={"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1536},
        teacher_plan=Plan(steps=1200, batch_tokens=16384),
        student_plan=Plan(steps=1200, batch_tokens=16384),
    ),
    # Seconds, for trying the path itself; the model is of no use.
    "try": Preset(
        teacher={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
        student={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
        teacher_plan=Plan(steps=20, batch_tokens=2048, warmup=5),
        student_plan=Plan(steps=20, batch_tokens=2048, warmup=5),
    ),
}


def decoder_config(sizes: dict[str, Any], vocab_size: int, dense: bool) -> DeepseekV3Config:
    """The student's architecture, or the teacher's: the same decoder with every layer dense and no query rank."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        num_key_value_heads=sizes["num_attention_heads"],
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=sizes["num_hidden_layers"] if dense else 1,
        q_lora_rank=None if dense else 128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["DeepseekV3ForCausalLM"],
        dtype="bfloat16",
        **sizes,
    )


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def keep_memory() -> None:
    """Ask glibc not to return freed tensors to the system: the page faults cost more than the arithmetic."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@torch.no_grad()
def rounded(model: Decoder) -> Decoder:
    """The weights as they are saved: in bfloat16 (the correction bias, a buffer, stays in float32)."""
    for p in model.parameters():
        p.copy_(p.bfloat16())
    return model.eval()


def save_student(model: Decoder, folder: Path) -> None:
    tensors = {name: p.detach().bfloat16().cpu().contiguous() for name, p in model.named_parameters()}
    for name, gate in model.gates().items():
        tensors[f"model.layers.{name}.mlp.gate.e_score_correction_bias"] = gate.e_score_correction_bias.float().cpu()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    transformers.GenerationConfig(bos_token_id=0, eos_token_id=0, max_new_tokens=128).save_pretrained(folder)


def check_student(folder: Path, model: Decoder, ids: Stream) -> float:
    """transformers must load the folder unchanged and agree on every position; the largest difference of logits."""
    reference, info = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise SystemExit(f"transformers does not load the student cleanly: {wrong}")
    with torch.no_grad():
        theirs = reference.eval()(torch.from_numpy(ids)[None]).logits
    difference = float((theirs - model.cpu()(torch.from_numpy(ids)[None])).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"The saved student's logits differ from the trained one's by {difference:.2e}.")
    return difference


def completions(folder: Path, seed: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        row = {"prompt": prompt}
        for kind, how in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, **SAMPLING})):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, pad_token_id=0, **how)
            row[kind] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append(row)
    return {"seed": seed, **SAMPLING, "rows": rows}


def count_parameters(model: Decoder) -> int:
    """Every stored one, as `moedge inspect` counts them: the gates' correction biases are buffers here."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def describe(model: Decoder, plan: Plan, run: dict[str, Any]) -> dict[str, Any]:
    c = model.config
    total = count_parameters(model)
    idle = c.n_routed_experts - c.num_experts_per_tok
    moe_layers = len(model.gates())
    inactive = moe_layers * idle * 3 * c.hidden_size * c.moe_intermediate_size
    return {"parameters": total, "active_parameters": total - inactive, "plan": asdict(plan), **run}


@dataclass
class Workshop:
    """What the three trainings share."""

    args: argparse.Namespace
    preset: Preset
    corpus: Corpus
    tokenizer: Tokenizer
    stream: Stream
    dtype: torch.dtype

    def train(self, name: str, teacher: Decoder | None) -> tuple[Decoder, dict[str, Any]]:
        """One model, trained and measured as it would be saved. Both students start from the same weights."""
        dense, args = name == "teacher", self.args
        plan = self.preset.teacher_plan if dense else self.preset.student_plan
        config = decoder_config(self.preset.teacher if dense else self.preset.student, self.preset.vocab_size, dense)
        model = initialize(Decoder(config), args.seed + (not dense)).to(args.device)
        say(f"{name}: {count_parameters(model):,} parameters, {plan.steps} steps")
        run = Trainer(name, model, plan, self.stream, args.seed, args.work, self.dtype, teacher, say).run(args.resume)
        rounded(model).requires_grad_(False)
        measured = args.work / f"{name}.json"
        if not (args.resume and measured.exists()):
            write_atomically(measured, json.dumps(self.score(model)))
        bits = json.loads(measured.read_text(encoding="utf-8"))
        say(f"{name}: held-out bits per byte {bits}")
        return model, describe(model, plan, run) | {"bits_per_byte": bits}

    @property
    def held(self) -> Stream:
        return encode_files(self.tokenizer, self.corpus.held)

    def score(self, model: Decoder) -> dict[str, float]:
        logits_of, text = torch_logits(model), self.corpus.held_text()
        excerpt = encode_files(self.tokenizer, [("heldout.txt", text)])
        return {
            "held_out_files": round(bits_per_byte(logits_of, self.held, Corpus.bytes_of(self.corpus.held)), 4),
            "heldout_txt": round(bits_per_byte(logits_of, excerpt, len(text.encode())), 4),
        }

    def facts(self) -> dict[str, Any]:
        versions = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
        return {
            "preset": self.args.preset,
            "device": self.args.device,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.args.seed,
            "versions": {"python": platform.python_version(), **versions},
            "data": self.corpus.facts() | {"train_tokens": len(self.stream)},
            "evaluation": {
                "context": CONTEXT,
                "stride": STRIDE,
                "heldout_txt_bytes": len(self.corpus.held_text().encode()),
            },
        }

    def write_model(self, folder: Path, student: Decoder) -> dict[str, Any]:
        """Everything a checkpoint folder holds but its records; what was measured on it."""
        save_student(student, folder)
        save_tokenizer(self.tokenizer, folder, student.config.max_position_embeddings)
        (folder / "heldout.txt").write_text(self.corpus.held_text(), encoding="utf-8")
        config = {k: v for k, v in student.config.to_diff_dict().items() if isinstance(v, int | float | str | bool)}
        return {
            "utilization": utilization(student, self.held),
            "largest_logit_difference_to_transformers": check_student(folder, student, self.held[:1024]),
            "model_bytes": (folder / "model.safetensors").stat().st_size,
            "config": config,
            "completions": completions(folder, self.args.seed),
        }


def open_workshop(args: argparse.Namespace) -> Workshop:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; leave --device out, or install a CUDA build of torch.")
    keep_memory()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work = args.work / f"{args.preset}-seed{args.seed}"  # so that --resume never meets another run's checkpoints
    if not args.resume:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]
    corpus = read_corpus(args.seed)
    tokenizer = train_tokenizer(corpus.train, preset.vocab_size)
    stream = encode_files(tokenizer, corpus.train)
    say(f"{Corpus.bytes_of(corpus.train):,} bytes in {len(corpus.train)} files, {len(stream):,} tokens")
    return Workshop(args, preset, corpus, tokenizer, stream, faster_type(args.device))


def record(folder: Path, facts: dict[str, Any]) -> None:
    write_atomically(folder / "training.json", json.dumps(facts, indent=1) + "\n")
    write_card(folder)


def release(shop: Workshop, student: Decoder, facts: dict[str, Any]) -> None:
    """Write the model beside its place, check it there, then move its files in; what else lies in `out` stays."""
    folder = Path(tempfile.mkdtemp(prefix=".distill-", dir=shop.args.out.parent))
    try:
        facts |= shop.write_model(folder, student)
        record(folder, facts)
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, shop.args.out / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"the student is in {shop.args.out}")


def run(args: argparse.Namespace) -> None:
    shop = open_workshop(args)
    facts = shop.facts() | {"models": {}}
    teacher, facts["models"]["teacher"] = shop.train("teacher", None)
    student, facts["models"]["student"] = shop.train("student", teacher)
    release(shop, student, facts)
    # The same student without its teacher, for the card alone.
    _, undistilled = shop.train("undistilled", None)
    facts = json.loads((args.out / "training.json").read_text(encoding="utf-8"))
    facts["models"]["undistilled"] = undistilled
    record(args.out, facts)
    say("done")


def record_quantized(folder: Path, bundles: dict[str, Path]) -> None:
    """Add moedge's own bits per byte on heldout.txt, by kind of weights, to training.json and the card."""
    import moedge

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    stream = encode_files(tokenizer, [("heldout.txt", text)])
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    for kind, bundle in bundles.items():
        with moedge.load(bundle, profile="cpu") as engine:
            value = bits_per_byte(lambda ids, engine=engine: engine.logits(ids.tolist()), stream, len(text.encode()))
        facts.setdefault("quantized", {})[kind] = {"heldout_txt": round(value, 4)}
        say(f"{kind}: {value:.4f} bits per byte on heldout.txt")
    record(folder, facts)


def kind_and_bundle(text: str) -> tuple[str, Path]:
    kind, _, bundle = text.partition("=")
    if kind not in QUANTIZED or not bundle:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=BUNDLE with KIND one of {', '.join(QUANTIZED)}")
    return kind, Path(bundle)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "quantized", "card"), default="run")
    parser.add_argument("bundles", nargs="*", type=kind_and_bundle, metavar="KIND=BUNDLE", help="for `quantized`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="sizes and steps (default: the device's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--out", type=Path, help="folder of the model (default: sample/; other presets: sample-PRESET/)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "moedge-distill",
        help="folder of checkpoints (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    args = parser.parse_args(argv)
    args.preset = args.preset or args.device
    args.out = args.out or (SAMPLE if args.preset == "cpu" else SAMPLE.with_name(f"sample-{args.preset}"))
    return args


def main() -> None:
    args = arguments()
    if args.command == "card":
        say(f"wrote {write_card(args.out)}")
    elif args.command == "quantized":
        record_quantized(args.out, dict(args.bundles))
    else:
        run(args)


if __name__ == "__main__":
    main()
