"""The parity check of every export, with faults planted in what is written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIGURATIONS, make_model, save_model

import moedge
from moedge.export import graph, parity, pipeline, quantization, writer
from moedge.export.config import MoEConfig
from moedge.export.layout import Stored


def export_fails(checkpoint: Path, tmp_path: Path, weights: str) -> str:
    with pytest.raises(moedge.ParityError) as caught:
        moedge.export(checkpoint, tmp_path / "bundle", weights=weights, group_size=16)
    assert os.listdir(tmp_path) == []
    return str(caught.value)


def patch_part(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change(stored, part values)` tamper with what the writer writes."""
    real = writer._write_part

    def tampered(stream: Any, stored: Stored, part: writer.Part, *rest: Any) -> None:
        values = change(stored, part)
        real(stream, stored, writer.Part(part.start, part.stop, values), *rest)

    monkeypatch.setattr(writer, "_write_part", tampered)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "fp32"])
def test_two_experts_swapped(
    weights: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Any] = {}
    real = writer.read_parts

    def swapped(checkpoint: Any, stored: Stored, *rest: Any) -> Any:
        parts = list(real(checkpoint, stored, *rest))
        if stored.weight.name == "layers.2.experts.down.weight":
            held["seen"] = True
            parts[3], parts[6] = (
                writer.Part(parts[3].start, parts[3].stop, parts[6].values),
                writer.Part(parts[6].start, parts[6].stop, parts[3].values),
            )
        yield from parts

    monkeypatch.setattr(writer, "read_parts", swapped)
    message = export_fails(tiny_checkpoint, tmp_path, weights)
    assert held and message.startswith("2 tensors differ from the checkpoint, first: model.layers.2.mlp.experts.3.down")


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_gate_and_up_exchanged(
    weights: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(stored: Stored, part: writer.Part) -> Any:
        if stored.weight.name != "layers.1.experts.gate_up.weight" or part.start != 2 * 64:
            return part.values
        pairs = part.values.reshape(-1, 2, part.values.shape[-1])
        return pairs[:, ::-1].reshape(part.values.shape)

    patch_part(monkeypatch, exchange)
    message = export_fails(tiny_checkpoint, tmp_path, weights)
    assert message.startswith("2 tensors differ from the checkpoint, first: model.layers.1.mlp.experts.2.gate_proj")


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_row_of_scales_shifted(
    weights: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer._write_quantized

    def shifted(stream: Any, stored: Stored, start: int, quantized: quantization.Quantized) -> None:
        if stored.weight.name == "layers.0.mlp.down.weight":
            quantized.scales[5] = np.roll(quantized.scales[5], 1)
        real(stream, stored, start, quantized)

    monkeypatch.setattr(writer, "_write_quantized", shifted)
    message = export_fails(tiny_checkpoint, tmp_path, weights)
    assert message.startswith("1 tensors differ from the checkpoint, first: model.layers.0.mlp.down_proj.weight")
    assert "row 5 is off by" in message


def test_one_flipped_byte_on_disk(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.write_weights

    def damaged(checkpoint: Any, layout: Any, path: Path, *rest: Any) -> Any:
        errors = real(checkpoint, layout, path, *rest)
        with path.open("r+b") as stream:
            stream.seek(layout["layers.1.router.weight"].data.offset + 2)
            stream.write(b"\x7f")
        return errors

    monkeypatch.setattr(pipeline, "write_weights", damaged)
    message = export_fails(tiny_checkpoint, tmp_path, "int4")
    assert "model.layers.1.mlp.gate.weight (as layers.1.router.weight): 1 values differ" in message


@pytest.mark.parametrize(
    ("attribute", "value", "where"),
    [("scale", 0.5, "layer 0"), ("interleaved", 0, "layer 0"), ("routed_scaling_factor", 1.4, "layer 1")],
)
def test_a_graph_that_computes_something_else(
    attribute: str, value: Any, where: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = graph._GraphBuilder.call_many if attribute == "routed_scaling_factor" else graph._GraphBuilder.call
    name = real.__name__

    def other(self: Any, kind: str, inputs: Any, *rest: Any, **named: Any) -> Any:
        for attributes in rest:
            if isinstance(attributes, dict) and attribute in attributes:
                attributes = attributes.copy()
                rest = tuple({**item, attribute: value} if isinstance(item, dict) else item for item in rest)
        return real(self, kind, inputs, *rest, **named)

    monkeypatch.setattr(graph._GraphBuilder, name, other)
    message = export_fails(tiny_checkpoint, tmp_path, "int4")
    assert f"layers of the graph differ from the reference, first: {where} differs by" in message


@pytest.mark.parametrize("name", ["layers.1.experts.down.weight", "layers.1.experts.gate_up.weight.scales"])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_graph_that_reads_other_bytes(
    name: str, budget: int | None, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's experts are those of the next layer; whole, and one expert at a time."""
    real = graph._GraphBuilder.external

    def other(self: Any, slot: Any) -> Any:
        value = real(self, slot)
        if slot.name == name:
            stored = self.layout["layers.2.experts." + name.split(".")[3] + ".weight"]
            place = stored.scales if name.endswith("scales") else stored.data
            value.const_value._offset = place.offset
        return value

    monkeypatch.setattr(graph._GraphBuilder, "external", other)
    if budget is not None:
        real_plan = pipeline.plan_memory
        monkeypatch.setattr(pipeline, "plan_memory", lambda *a: dataclasses.replace(real_plan(*a), graph=budget))
    message = export_fails(tiny_checkpoint, tmp_path, "int4")
    assert "1 layers of the graph differ" in message or "2 layers of the graph differ" in message
    assert "first: layer 1 differs by" in message


def test_no_verify_skips_the_check(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "check_parity", lambda *arguments: pytest.fail("the check ran"))
    bundle = moedge.export(tiny_checkpoint, tmp_path / "bundle", verify=False)
    assert bundle.manifest["provenance"]["verified"] is False


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sound_exports_pass(name: str, weights: str, tmp_path: Path) -> None:
    model = make_model(300, **CONFIGURATIONS[name])
    bundle = moedge.export(save_model(model, tmp_path / "c"), tmp_path / "b", weights=weights)
    assert bundle.manifest["provenance"]["verified"] is True


def test_reference_is_transformers_too(tmp_path: Path) -> None:
    """The numpy decoder that exports are judged by is itself judged by transformers."""
    from checkpoints import transformers_logits

    from moedge.export import reference
    from moedge.export.checkpoint import Checkpoint
    from moedge.export.families import find_family
    from moedge.export.weights import read_unit

    for name, changes in CONFIGURATIONS.items():
        model = make_model(400, **changes)
        checkpoint = Checkpoint.open(save_model(model, tmp_path / name))
        family = find_family(checkpoint)
        config: MoEConfig = family.read_config(checkpoint)
        plan = {weight.name: weight for weight in family.plan_weights(config)}

        def weights(tensor: str, plan: Any = plan, checkpoint: Any = checkpoint) -> Any:
            weight = plan[tensor]
            units = [read_unit(checkpoint, weight, unit) for unit in range(len(weight.units))]
            return units[0] if len(units) == 1 else np.stack(units)

        ids = np.random.default_rng(4).integers(0, 320, (1, 50))
        x = reference.embed_tokens(weights, ids[0])
        for layer in range(config.num_hidden_layers):
            x = reference.run_layer(config, weights, layer, x)
        logits = reference.run_head(config, weights, x)
        np.testing.assert_allclose(logits, transformers_logits(model, ids)[0], rtol=0, atol=1e-4)


def test_tolerances_are_no_wider_than_the_contract() -> None:
    assert parity.TOLERANCE <= 1e-4
