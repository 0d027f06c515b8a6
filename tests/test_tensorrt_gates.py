"""Gates that no family's checkpoint brings, lowered for TensorRT: a router of codes in the place of a family's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_tensorrt_families import export

from moedge.bundle import MODEL, Bundle
from moedge.export.functions import DOMAIN
from moedge.export.gating import binary_code, list_gates
from moedge.profiles.targets._canonical import find_calls, load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits
from moedge.profiles.targets._trt_form import NetworkForm
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network


def give_codes(bundle: Bundle, norm: int, factor: float) -> int:
    """Put BinaryCodeGate in the place of each gate, the router cut to a row for each bit; how many there were."""
    model, config = load_canonical(bundle)
    bits = binary_code.count_bits(config.moe.num_experts)
    calls = [call for kind in list_gates() for call in find_calls(model, kind)]
    for call in calls:
        top_k = call.attributes["top_k"].as_int()
        call.op_type = "BinaryCodeGate"
        call.attributes.clear()
        for name, value in {"top_k": top_k, "bits": bits, "norm_topk_prob": norm}.items():
            call.attributes.add(ir.AttrInt64(name, value))
        call.attributes.add(ir.AttrFloat32("routed_scaling_factor", factor))
    for name, value in model.graph.initializers.items():
        if name.endswith(".router.weight"):
            old = value.const_value
            width = int(old.shape[1])
            shape = ir.Shape([bits, width])
            value.const_value = ir.ExternalTensor(
                old.location, old.offset, 4 * bits * width, old.dtype, shape=shape, name=name, base_dir=old.base_dir
            )
            value.shape = shape
    function = ir.serde.deserialize_function(onnx.parser.parse_function(binary_code.FUNCTION))
    model.functions[(DOMAIN, "BinaryCodeGate", "")] = function
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    (bundle.path / MODEL).write_bytes(proto.SerializeToString())
    return len(calls)


@pytest.mark.parametrize(("experts", "top_k", "norm", "factor"), [(8, 3, 1, 1.0), (16, 5, 0, 2.5), (4, 4, 0, 1.0)])
def test_codes_choose_as_in_the_canonical_graph(
    experts: int, top_k: int, norm: int, factor: float, tmp_path: Path
) -> None:
    changes = {"num_experts": experts, "num_experts_per_tok": top_k}
    bundle = export("qwen3_moe", "normalized_mqa", tmp_path, **changes)
    assert give_codes(bundle, norm, factor) == len(bundle.config["moe"]["layers"])
    model, config = load_canonical(bundle)
    network = lower_network(model, config, 32, real=ir.DataType.FLOAT, form=NetworkForm(lanes=2))
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    ids = np.random.default_rng(experts).integers(0, bundle.config["vocab_size"], 20)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    for cuts in ([], [7, 8], list(range(1, 20))):
        runner = NetworkRunner(tmp_path / MODEL, lanes=2)
        steps = [runner.step(part) for part in np.split(ids, cuts)]
        found = np.concatenate([step["logits"] for step in steps])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    together = runner.step_together({0: int(ids[0])})
    assert together["experts.0"].shape == (2, top_k) and together["experts.0"].max() < experts
