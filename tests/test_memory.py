"""`--max-memory`: the bound on an export's peak resident memory, read from the operating system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_model, save_model

import moedge
from moedge.export import memory, parity, reader
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.graph import build_canonical_graph
from moedge.export.graph_runner import GraphRunner
from moedge.export.layout import plan_layout
from moedge.export.memory import MIB, format_size, parse_size, plan_memory

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
# 0.86 GB as fp32, 206 MB in its largest tensor; a layer's experts are 201 MB.
LARGE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 50304,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 2048,
}
# Runs the command line and prints the peak of its own memory: a child's ru_maxrss begins with the parent's size.
MEASURED = """
import sys
from moedge.cli import run
code = 0
try:
    run()
except SystemExit as end:
    code = end.code
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


def write_synthetic(config: dict[str, Any], folder: Path) -> Path:
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(config))
    script = ROOT / "scripts" / "synthetic_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(path), str(folder)], check=True, capture_output=True)
    return folder


def export_measured(*arguments: str | Path) -> tuple[int, str]:
    """(peak bytes, stderr) of `moedge export`."""
    command = [sys.executable, "-c", MEASURED, "export", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]) * 1024, result.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(LARGE, tmp_path_factory.mktemp("large") / "checkpoint")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("bound", "options"), [("288MiB", ()), ("320MiB", ("--weights", "fp32")), ("400MiB", ())])
def test_peak_memory_stays_within_the_bound(bound: str, options: tuple[str, ...], large: Path, tmp_path: Path) -> None:
    peak, _ = export_measured(large, "-o", tmp_path / "b", "--max-memory", bound, *options)
    assert peak <= parse_size(bound), f"{peak / MIB:.0f} MiB"
    manifest = json.loads((tmp_path / "b" / "moedge.json").read_text())
    assert manifest["provenance"]["verified"] is True


@LINUX
@pytest.mark.slow
def test_the_smallest_that_works_is_named_and_works(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moedge", "export", str(large), "-o", str(tmp_path / "b"), "--max-memory", "64MiB"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and os.listdir(tmp_path) == []
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    smallest = line.split()[-3]
    assert line == (
        f"error: --max-memory 64MiB is too small for this checkpoint: the smallest that works is {smallest}; "
        f"use --max-memory {smallest} or more"
    )
    peak, _ = export_measured(large, "-o", tmp_path / "b", "--max-memory", smallest)
    assert peak <= parse_size(smallest), f"{peak / MIB:.0f} MiB"


def test_without_the_check_less_is_enough(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    plan = family.plan_weights(config)
    layout = plan_layout(plan, "int4", 128, zero_points=False)
    model = build_canonical_graph(config, layout, tmp_path)
    with_check = plan_memory(plan, parity.find_needs(config, layout, model, tmp_path), "100GiB")
    without = plan_memory(plan, None, "100GiB")
    assert without.peak < with_check.peak < 100 << 30


@pytest.mark.parametrize("weights", ["int4", "fp16", "fp32"])
def test_the_least_holds_an_expert_and_its_copy(weights: str, tmp_path: Path) -> None:
    """One token takes the branch that gathers its experts: where an expert is large, that is most of what is held."""
    sizes = {"hidden_size": 2048, "intermediate_size": 7168, "num_local_experts": 3, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1000, "num_hidden_layers": 1}
    checkpoint = Checkpoint(tmp_path, {"model_type": "mixtral", "hidden_act": "silu", **sizes, **heads}, {})
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    layout = plan_layout(family.plan_weights(config), weights, 128, zero_points=False)
    runner = GraphRunner(build_canonical_graph(config, layout, tmp_path), tmp_path, 51)
    gate_up, down = 4 * 2 * 7168 * 2048, 4 * 2048 * 7168
    dequantized = 0 if weights == "fp32" else gate_up + down
    assert runner.smallest_budget() >= dequantized + gate_up
    (mixture,) = [step for step in runner.steps if step.split == "experts"]
    assert mixture.cost_of(3) >= 3 * (dequantized + gate_up)


def test_too_small_is_refused_before_anything_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(moedge.CheckpointError, match="--max-memory 1MiB is too small for this checkpoint: the "):
        moedge.export(tiny_checkpoint, tmp_path / "b", max_memory=MIB)
    assert os.listdir(tmp_path) == []


def test_the_default_is_a_quarter_of_what_is_free_or_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "free_bytes", lambda: 4096 * MIB)
    needs = memory.GraphNeeds(smallest=200 * MIB, activations=10 * MIB)
    assert plan_memory([], needs, None).peak <= 1024 * MIB
    monkeypatch.setattr(memory, "free_bytes", lambda: 600 * MIB)
    assert 400 * MIB < plan_memory([], needs, None).peak <= 408 * MIB
    monkeypatch.setattr(memory, "free_bytes", lambda: 300 * MIB)
    with pytest.raises(moedge.CheckpointError) as caught:
        plan_memory([], needs, None)
    assert str(caught.value) == (
        "this export needs 408MiB of memory at least, 300MiB are free; free some, or export where there is more"
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5g", 3 << 29),
        (" 10 kib ", 10240),
        ("123", 123),
        (123, 123),
        ("7B", 7),
        ("1tb", 10**12),
    ],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2XB", "1e9", "nan", "1.2.3MB", "9" * 40])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(moedge.UsageError, match="is not understood; write 2GiB, 500MB or a number of bytes"):
        parse_size(text)


def test_sizes_are_written_as_they_are_read() -> None:
    assert [format_size(count) for count in (2 << 30, 300 * MIB, 5)] == ["2GiB", "300MiB", "5B"]


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "fp32"])
def test_a_graph_in_parts_gives_what_the_whole_gives(weights: str, tmp_path: Path) -> None:
    """Odd sizes, the smallest budget: linears by rows, experts one by one, the table by rows."""
    changes = {"n_routed_experts": 7, "n_group": 1, "num_experts_per_tok": 3, "vocab_size": 323, "hidden_size": 48}
    source = save_model(make_model(3, **changes), tmp_path / "c")
    bundle = moedge.export(source, tmp_path / "b", weights=weights, group_size=16, verify=False)
    checkpoint = Checkpoint.open(source)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    layout = plan_layout(family.plan_weights(config), weights, 16, zero_points=False)
    model = build_canonical_graph(config, layout, bundle.path)
    whole = GraphRunner(model, bundle.path, 64, 1 << 30)
    parts = GraphRunner(model, bundle.path, 64)
    assert parts.budget < 1 << 20
    ids = np.random.default_rng(0).integers(0, 323, (1, 20))
    (expected,) = whole.run({"input_ids": ids}, ["logits"]).values()
    (logits,) = parts.run({"input_ids": ids}, ["logits"]).values()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    smallest = memory.MemoryPlan(chunk=1024, graph=parts.budget)
    weights_path = bundle.path / "weights.bin"
    assert parity.find_weight_faults(checkpoint, layout, weights_path, 1024) == []
    assert parity.find_graph_faults(config, layout, model, weights_path, smallest) == []


def test_every_expert_is_visited_although_the_router_never_chooses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 6 of layer 1 has a bias that keeps it out; the graph reads expert 5 in its place."""
    import torch

    model = make_model(8, n_group=1, topk_group=1)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[6] = -100.0
    source = save_model(model, tmp_path / "c")
    real = GraphRunner.run_step

    def exchanged(self: GraphRunner, step: Any, values: Any) -> Any:
        if step.split == "experts" and "layers.1.experts" in step.node.outputs[0].name:
            name = step.node.inputs[1].name
            values = {**values, name: np.where(values[name] == 6, 5, values[name])}
        return real(self, step, values)

    moedge.export(source, tmp_path / "good")
    monkeypatch.setattr(GraphRunner, "run_step", exchanged)
    with pytest.raises(moedge.ParityError) as caught:
        moedge.export(source, tmp_path / "bad")
    assert "1 layers of the graph differ from the reference, first: layer 1 (experts 6) differs by" in str(caught.value)


def test_a_stored_matrix_is_read_in_parts(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    family = find_family(checkpoint)
    layout = plan_layout(family.plan_weights(family.read_config(checkpoint)), "int4", 32, zero_points=False)
    small = reader.WeightsReader(tiny_bundle / "weights.bin", layout, chunk_bytes=600)
    x = np.random.default_rng(1).standard_normal((5, 64), np.float32)
    for name in ("embed.weight", "layers.1.attn.q_a.weight"):
        whole, lazy = small.read(name), small.open(name)
        assert isinstance(lazy, reader.StoredMatrix) and len(lazy) == len(whole)
        np.testing.assert_allclose(x @ lazy.T, x @ whole.T, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(lazy[np.array([3, 0, 3])], whole[[3, 0, 3]])
        np.testing.assert_array_equal(np.asarray(lazy), whole)
    name = "layers.1.experts.gate_up.weight"
    np.testing.assert_array_equal(np.asarray(small.open(name)[5]), small.read(name)[5])
    np.testing.assert_allclose(x @ small.open(name)[5].T, x @ small.read(name)[5].T, rtol=0, atol=1e-4)
    assert isinstance(small.open("final_norm.weight"), np.ndarray)


@pytest.mark.parametrize("shape", json.loads((ROOT / "scripts" / "real_shapes.json").read_text()))
def test_real_shapes_can_be_written(shape: str, tmp_path: Path) -> None:
    """The script, on each real shape made small."""
    config = json.loads((ROOT / "scripts" / "real_shapes.json").read_text())[shape]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 500}
    small = {key: value for key, value in sizes.items() if key in config}
    small |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"q_lora_rank": config.get("q_lora_rank") and 32, "kv_lora_rank": 32, "head_dim": 16}
    small |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    first = write_synthetic({**config, **small}, tmp_path / "first")
    again = write_synthetic({**config, **small}, tmp_path / "again")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in again.iterdir()) and len(files) >= 3
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    bundle = moedge.export(first, tmp_path / "bundle")
    assert bundle.manifest["provenance"]["verified"] is True
