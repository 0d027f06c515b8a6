"""The check of a lowered network in slices, so that it fits any memory that a layer's engine can be built in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from test_tensorrt_families import export

from moedge.bundle import WEIGHTS, Bundle
from moedge.errors import ParityError
from moedge.export.quantization import split_int6, unpack_int6
from moedge.profiles.targets import _trt_check, _trt_views
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import canonical_logits, check_numerics
from moedge.profiles.targets._trt_parts import Part
from moedge.profiles.targets._trt_views import View, keep_view, measure_view_sizes, plan_views
from moedge.profiles.targets.tensorrt_network import NetworkForm

CUTS = [Part(0, 1, 4), Part(1, 3, 4), Part(3, 4, 4)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny")
    return export("qwen2_moe", "one_layer_dense", folder, num_hidden_layers=4, hidden_size=128, vocab_size=512)


def sizes_of(bundle: Bundle) -> _trt_views.ViewSizes:
    return measure_view_sizes(*load_canonical(bundle))


def test_slices_hold_every_expert_and_every_row_in_any_memory(tiny: Bundle) -> None:
    sizes = sizes_of(tiny)
    assert sizes.experts == 6 and sizes.vocabulary == 512 and sum(sizes.by_layer[1]) == sizes.by_layer[1][1]
    least = next(size for size in range(0, 1 << 22, 4096) if plan_views(sizes, size))
    for memory in range(least, 4 << 20, 32 << 10):
        views = plan_views(sizes, memory)
        assert all(sizes.need(view.layers, view.experts, view.rows) <= memory for view in views)
        wide = [view for view in views if view.chunks == _trt_views.CHUNKS]
        assert {e for view in wide for e in range(view.first_expert, view.first_expert + view.experts)} == set(range(6))
        assert {r for view in wide for r in range(view.first_row, view.first_row + view.rows)} == set(range(512))
        assert min(view.layers for view in wide) > sizes.first_mixture
    assert plan_views(sizes, least - 4096) == []
    assert plan_views(sizes, 1 << 30) == [View(4, 0, 6, 0, 512)]


@pytest.mark.parametrize(
    ("family", "name"), [("gpt_oss", "alternate_windows"), ("deepseek_v2", "greedy_first_dense")]
)
def test_a_network_in_slices_is_checked_like_the_whole(family: str, name: str, tmp_path: Path) -> None:
    """In the least memory there is: one expert, or few, at a time."""
    bundle = export(family, name, tmp_path)
    sizes = sizes_of(bundle)
    least = next(size for size in range(0, 1 << 24, 8192) if plan_views(sizes, size))
    whole, sliced = check_numerics(bundle), check_numerics(bundle, memory=least)
    assert whole["checked"] and whole["experts_at_once"] == sizes.experts
    assert sliced["checked"] and sliced["experts_at_once"] < sizes.experts
    assert max(whole["difference"], sliced["difference"]) < 1e-5


def test_a_large_model_is_checked_in_breadth_by_its_first_layers_and_in_depth_by_few_experts(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt_views, "MOST_PARAMETERS", 1)
    checked = check_numerics(tiny, parts=CUTS)
    assert (checked["layers_with_every_expert"], checked["layers"], checked["chained"]) == (1, 4, 3)
    monkeypatch.setattr(_trt_views, "MOST_PARAMETERS_DEEP", 1)
    assert check_numerics(tiny, parts=CUTS)["layers"] == 1
    assert check_numerics(tiny, memory=1000) == {
        "checked": False,
        "reason": "the bound on memory does not hold a dequantized matrix of the network",
    }
    sizes = sizes_of(tiny)
    least = next(size for size in range(0, 1 << 22, 4096) if plan_views(sizes, size))
    assert check_numerics(tiny, memory=least, form=NetworkForm(buckets=True)) == {
        "checked": False,
        "reason": "the bound on memory does not hold a dequantized layer of experts, which expert buckets cannot be "
        "checked in slices of",
    }
    monkeypatch.setattr(_trt_check.machine, "memory_bytes", lambda: 1000)
    assert check_numerics(tiny)["reason"].startswith("this machine's memory does not hold")


def test_a_slice_is_the_model_with_those_experts_and_rows(tiny: Bundle) -> None:
    """Against weights cut by numpy, and choices folded by hand."""
    model, config = load_canonical(tiny)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    keep_view(model, config, View(4, 2, 3, 100, 50))
    for name, value in model.graph.initializers.items():
        expected, found = before.get(name), value.const_value.numpy()
        if name == "head.weight":  # in two planes
            expected, found = (unpack_int6(*split_int6(each)) for each in (expected, found))
        if ".experts." in name:
            expected = expected[2:5]
        elif name.startswith(("embed.", "head.")):
            expected = expected[100:150]
        if name in before and name != "shape.vocab":
            np.testing.assert_array_equal(found, expected)
    folded = [node for node in model.graph if node.op_type == "Mod"]
    assert len(folded) == 3 and model.graph.outputs[0].shape[-1] == 50


@pytest.mark.parametrize("expert", [0, 5])
def test_one_wrong_expert_is_found_in_its_slice(tiny: Bundle, expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lower_right = _trt_check.lower_network

    def lower_wrong(model: ir.Model, *args: Any, **options: Any) -> Any:
        """Its down projection twice as large, in the lowered network alone."""
        stack = model.graph.initializers["layers.0.experts.down.weight.scales"].const_value
        first = (stack.offset - offset) // (stack.length // int(stack.shape[0]))
        network = lower_right(model, *args, **options)
        if first <= expert < first + int(stack.shape[0]):
            scales = next(t for t in network.weights.tensors if "experts.down.lowered.scales" in str(t.value.name))
            chunks = scales.chunks
            object.__setattr__(scales, "chunks", lambda: (2 * chunk for chunk in chunks()))
        return network

    offset = load_canonical(tiny)[0].graph.initializers["layers.0.experts.down.weight.scales"].const_value.offset
    monkeypatch.setattr(_trt_check, "lower_network", lower_wrong)
    sizes = sizes_of(tiny)
    least = next(size for size in range(0, 1 << 22, 4096) if plan_views(sizes, size))
    with pytest.raises(ParityError, match="differs from the canonical graph"):
        check_numerics(tiny, memory=least)


def test_as_many_experts_as_a_layers_number(tmp_path: Path) -> None:
    """A constant of the experts' count must not take the name of that layer's choices."""
    bundle = export("mixtral", "odd_experts_short_window", tmp_path, num_hidden_layers=5, num_local_experts=4)
    assert check_numerics(bundle)["difference"] < 1e-5
    assert np.isfinite(canonical_logits(bundle, 5, np.arange(3))).all() and bundle.file(WEIGHTS).is_file()
