"""LoRA adapters in PEFT's layout: merged as they say, and refused by name where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from checkpoints import make_model, save_model, transformers_logits
from packed_checkpoints import convert_checkpoint, gptq, make_codes, unpack
from safetensors.torch import save_file

import moedge
from moedge.export.adapter import bind_adapter
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.quantization.sources import bind_sources
from moedge.export.weights import read_rows, read_unit

MODULES = (
    "model.layers.0.self_attn.q_b_proj",
    "model.layers.1.mlp.experts.3.gate_proj",
    "model.layers.1.mlp.experts.5.down_proj",
    "model.layers.2.mlp.shared_experts.up_proj",
)


def save_adapter(folder: Path, model: Any, merge: bool = True, **settings: Any) -> Path:
    """An adapter on `MODULES`; `merge` puts it into the model itself, by the definition."""
    import torch

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "alpha_pattern": {"down_proj": 10}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    tensors = {}
    torch.manual_seed(1)
    for module in MODULES:
        weight = model.get_parameter(f"{module}.weight")
        a, b = torch.randn(4, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 4) * 0.2
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        alpha = 10 if module.endswith("down_proj") else 6
        if merge:
            with torch.no_grad():
                weight.add_(alpha / (2 if settings.get("use_rslora") else 4) * (b @ a))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def units(checkpoint: Checkpoint, plan: Any) -> dict[str, Any]:
    return {weight.name: [read_unit(checkpoint, weight, unit) for unit in range(len(weight.units))] for weight in plan}


@pytest.mark.parametrize("stabilized", [False, True])
def test_every_matrix_is_that_of_the_merged_model(stabilized: bool, tmp_path: Path) -> None:
    model = make_model(30)
    save_model(model, tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", model, use_rslora=stabilized)
    save_model(model, tmp_path / "merged")
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "merged")
    family = find_family(base)
    plan = family.plan_weights(family.read_config(base))
    bound, notes = bind_adapter(base, plan, adapter)
    assert notes == ["adapter adapter merged into 4 matrices"]
    ours, theirs = units(base, bound), units(merged, plan)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
    weight = next(weight for weight in bound if weight.name == "layers.1.experts.gate_up.weight")
    np.testing.assert_array_equal(read_rows(base, weight, 3, 5, 40), ours[weight.name][3][5:40])


def test_an_adapter_on_packed_integers(tmp_path: Path) -> None:
    """As QLoRA leaves them: what it was trained on is dequantized, then merged."""
    model = make_model(31)

    def convert(stem: str, values: Any) -> Any:
        parts = make_codes(values, 4, 16, True)
        return gptq(stem, *parts, bits=4), unpack(*parts)

    convert_checkpoint(model, tmp_path / "c", convert, {"quant_method": "gptq", "bits": 4})
    adapter = save_adapter(tmp_path / "adapter", model)
    checkpoint = Checkpoint.open(tmp_path / "c")
    family = find_family(checkpoint)
    plan = bind_sources(checkpoint, family.plan_weights(family.read_config(checkpoint)))
    bound, _ = bind_adapter(checkpoint, plan, adapter)
    named = {weight.name: weight for weight in bound}
    ours = read_unit(checkpoint, named["layers.1.experts.down.weight"], 5)
    theirs = model.get_parameter(f"{MODULES[2]}.weight").detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    pieces = named["layers.1.experts.down.weight"].units
    assert pieces[5][0].integers is None and pieces[4][0].integers is not None


def refused(tmp_path: Path, change: Any = None, **settings: Any) -> str:
    model = make_model(30)
    save_model(model, tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", model, **settings)
    if change is not None:
        from safetensors.torch import load_file

        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
    base = Checkpoint.open(tmp_path / "base")
    family = find_family(base)
    with pytest.raises(moedge.CheckpointError) as caught:
        plan, _ = bind_adapter(base, family.plan_weights(family.read_config(base)), adapter)
        units(base, plan)
    return str(caught.value).replace(f"{adapter}/", "").replace(f"{adapter}: ", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "adapter_config.json: peft_type 'LOHA' cannot be merged here; can be: LORA"),
        ({"use_dora": True}, "adapter_config.json: use_dora cannot be merged here; merge the adapter with PEFT first"),
        ({"lora_alpha": "x"}, "adapter_config.json: lora_alpha is 'x', a number was expected"),
        ({"bias": "all"}, "adapter_config.json: bias 'all' cannot be merged here; merge the adapter with PEFT"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json: alpha_pattern {'(': 1} is not readable; save the adapter "
         "again"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_merged(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, **settings) == message


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    import torch

    first = f"base_model.model.{MODULES[0]}.lora_A.weight"
    cases = [
        ({first: torch.ones(4, 7)}, "adapter_model.safetensors: module 'model.layers.0.self_attn.q_b_proj' has A "
         "[4, 7] and B [96, 4] for a matrix [96, 48]; name the adapter that was trained on this checkpoint"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)},
         "1 of 5 modules of the adapter are not in this checkpoint, first 'model.layers.9.mlp.up_proj'; name the "
         "adapter that was trained on it"),
        ({"base_model.model.lm_head.weight": torch.ones(4, 64)}, "adapter_model.safetensors: tensor "
         "'base_model.model.lm_head.weight' is no part of a plain LoRA (.lora_A.weight and .lora_B.weight); merge the "
         "adapter with PEFT first"),
    ]  # fmt: skip
    for place, (more, message) in enumerate(cases):
        (tmp_path / str(place)).mkdir()
        assert refused(tmp_path / str(place), lambda tensors, more=more: tensors.update(more)) == message
    (tmp_path / "lost").mkdir()
    assert refused(tmp_path / "lost", lambda tensors: tensors.pop(first)).startswith(
        f"adapter_model.safetensors: tensor '{first}' is missing"
    )
    nan = {first: torch.full((4, 48), torch.nan)}
    (tmp_path / "nan").mkdir()
    assert refused(tmp_path / "nan", lambda tensors: tensors.update(nan)).endswith(
        f"tensor '{first}' holds NaN or infinity in row 0; download it again"
    )


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(moedge.CheckpointError, match=r"has no adapter_config.json; name a folder that PEFT saved"):
        bind_adapter(Checkpoint(tmp_path, {}, {}), [], tmp_path)


def test_export_merges(tmp_path: Path) -> None:
    model = make_model(30)
    save_model(model, tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", model)
    bundle = moedge.export(tmp_path / "base", tmp_path / "b", weights="fp32", adapter=adapter)
    ids = np.random.default_rng(30).integers(0, 320, (1, 40))
    (logits,) = ort.InferenceSession(str(tmp_path / "b" / "model.onnx")).run(None, {"input_ids": ids})
    np.testing.assert_allclose(logits, transformers_logits(model, ids), rtol=0, atol=1e-4)
    assert "adapter adapter merged into 4 matrices" in bundle.manifest["provenance"]["notes"]
