"""`moedge export my_package:build_model`: bundles of a user's own torch models, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_nan_routing import damage_graphs

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("onnxscript", reason="torch exports by onnxscript")

import moedge  # noqa: E402
from moedge import cli  # noqa: E402
from moedge.errors import (  # noqa: E402
    BuildError,
    BundleError,
    CheckpointError,
    EngineError,
    ParityError,
    UsageError,
)
from moedge.export import torch_graph, torch_model, torch_ops  # noqa: E402
from moedge.export.torch_model import export_torch_model  # noqa: E402
from moedge.profiles.targets._ort_torch import lower  # noqa: E402
from moedge.runtime.preflight import read_engine  # noqa: E402
from moedge.runtime.sessions import SessionOptions, onnxruntime_prefix  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB, HIDDEN, EXPERTS = 96, 32, 5
PROMPT = [7, 3, 60, 3, 11]


class Layer(torch.nn.Module):
    """Attention by hand, with a mask in a buffer, and a mixture beside a dense layer with biases."""

    def __init__(self, scoring: str) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.gate = torch_ops.TopKGate(HIDDEN, EXPERTS, 2, scoring=scoring)
        self.experts = torch_ops.Experts(EXPERTS, HIDDEN, 48)
        self.dense = torch.nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("mask", torch.full((64, 64), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = self.mix(x) @ x.transpose(-1, -2) / HIDDEN + self.mask[:length, :length]
        h = self.norm(x + scores.softmax(dim=-1) @ x)
        rows = h.reshape(-1, HIDDEN)
        y = self.experts(rows, *self.gate(rows)) + torch.nn.functional.silu(self.dense(rows))
        return x + y.reshape(x.shape)


class Tied(torch.nn.Module):
    """Embedding and head are one matrix; the answer is an object with `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(Layer(scoring) for scoring in ("softmax", "sigmoid"))
        self.unused = torch.nn.Linear(3, 3)
        self.max_position_embeddings = 64

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        from types import SimpleNamespace

        return SimpleNamespace(logits=torch.nn.functional.linear(x, self.embedding.weight))


def make_tied() -> Tied:
    torch.manual_seed(3)
    model = Tied().eval()
    with torch.no_grad():
        model.layers[1].gate.bias.copy_(torch.randn(EXPERTS) / 8)
    return model


def make_untied() -> Tied:
    class Untied(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(HIDDEN, VOCAB)

        def forward(self, input_ids: torch.Tensor) -> Any:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(4)
    return Untied().eval()


def torch_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def torch_greedy(logits: Any, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(text)[-1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def trace_once() -> Iterator[None]:
    """torch traces a model in seconds: `make_tied` gives the same one each time, so once is enough."""
    trace, kept = torch_model.trace, {}

    def traced(name: str, model: Any) -> Any:
        if name not in kept:
            kept[name] = ir.to_proto(trace(name, model)).SerializeToString()
        return ir.from_proto(onnx.load_from_string(kept[name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_model, "trace", traced)
        yield


@pytest.fixture(scope="module", params=["fp32", "int4"])
def bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trace_once: None
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("torch") / request.param
    export_torch_model(make_tied, folder, weights=request.param, group_size=16)
    moedge.build(folder, "cpu")
    return request.param, folder


def test_bundle_is_canonical_and_says_what_it_holds(bundle: tuple[str, Path]) -> None:
    weights, folder = bundle
    manifest = moedge.Bundle.open(folder).manifest
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    calls = [node.op_type for node in model.graph.node if node.domain == "moedge"]
    scales = "Float8Scales"
    assert [name for name in calls if name != scales] == ["SoftmaxTopKGate", "Experts", "SigmoidTopKGate", "Experts"]
    assert (scales in calls) == (weights == "int4")
    assert {function.name for function in model.functions if function.domain == "moedge"} == set(calls)
    assert not any(str(Path.cwd()) in node.SerializeToString().decode("latin-1") for node in model.graph.node)
    assert [entry["op"] for entry in manifest["gating"]] == ["moedge.SoftmaxTopKGate", "moedge.SigmoidTopKGate"]
    assert [entry["layers"] for entry in manifest["gating"]] == [[0], [1]]
    assert manifest["config"]["moe"]["num_experts"] == EXPERTS
    assert manifest["config"]["max_position_embeddings"] == 64
    assert manifest["provenance"]["notes"] == ["2 tensors of the model are not in its graph, first model.unused.weight"]
    dtypes = {role: entry["dtype"] for role, entry in manifest["quantization"]["classes"].items()}
    assert dtypes["router"] == dtypes["other"] == "float32"
    assert dtypes["experts"] == dtypes["linear"] == {"fp32": "float32", "int4": "uint4"}[weights]
    assert dtypes["head"] == {"fp32": "float32", "int4": "uint8"}[weights]  # the tied table, stored once
    assert "embedding" not in manifest["sizes"]
    outside = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert "model.embedding.weight" in outside and "layers.0.experts.gate_up.weight" in outside
    assert sum(manifest["sizes"].values()) <= (folder / "weights.bin").stat().st_size


def test_a_head_in_four_bits_where_it_is_not_the_embedding(tmp_path: Path, trace_once: None) -> None:
    options: dict[str, Any] = {"head": "int4", "group_size": 16, "force": True}
    tied = export_torch_model(make_tied, tmp_path / "b", **options).manifest
    assert tied["provenance"]["notes"][-1] == "the head is the embedding's own table, and stays int8"
    assert (tied["quantization"]["head"], tied["quantization"]["classes"]["head"]["dtype"]) == ("int8", "uint8")
    own = export_torch_model(make_untied, tmp_path / "b", **options)
    classes = own.manifest["quantization"]["classes"]
    assert (classes["head"]["dtype"], classes["embedding"]["dtype"]) == ("uint4", "uint8")
    assert len(own.manifest["provenance"]["notes"]) == 1 and own.manifest["quantization"]["head"] == "int4"


def make_wide() -> Tied:
    class Wide(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Linear(HIDDEN, 64)
            self.head = torch.nn.Linear(64, VOCAB)

        def forward(self, input_ids: torch.Tensor) -> Any:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.wide(x))

    torch.manual_seed(4)
    return Wide().eval()


def test_a_head_in_six_bits_is_what_nobody_asks_for(tmp_path: Path) -> None:
    """Its engine, whose products round activations, gives nearly what the checked graph does."""
    made = export_torch_model(make_wide, tmp_path / "b", group_size=16)
    assert made.manifest["quantization"]["head"] == "int6" and made.manifest["provenance"]["verified"]
    assert made.manifest["quantization"]["classes"]["head"]["dtype"] == "uint6"
    (wanted,) = ort.InferenceSession(made.file("model.onnx")).run(None, {"input_ids": np.array([PROMPT])})
    moedge.build(made.path, "cpu")
    with moedge.load(made.path, "cpu") as engine:
        found = engine.logits(PROMPT)
    assert np.median(np.abs(found - wanted[0])) < 0.1 * wanted.std()


def test_a_nan_in_a_router_is_reported(bundle: tuple[str, Path], tmp_path: Path) -> None:
    """Also where a step asks for no logits, which is not run before the next one."""
    made = moedge.Bundle.open(shutil.copytree(bundle[1], tmp_path / "b"))
    damage_graphs(made.engine_dir("cpu"), "model.layers.1.gate.weight")
    session = onnxruntime_prefix.open_session(made, read_engine(made, "cpu"), SessionOptions(threads=1))
    for asked in (1, 0):
        session.step(np.array(PROMPT), np.empty(0, np.int64))
        with pytest.raises(EngineError, match="^the router of layer 1 gave NaN for token 0: the weights or the engine"):
            session.step(np.array([2, 4]), np.arange(asked)) if asked else session.routing
        session.truncate(0)


def test_any_runtime_runs_the_canonical_graph(bundle: tuple[str, Path]) -> None:
    weights, folder = bundle
    session = ort.InferenceSession(folder / "model.onnx")
    (ours,) = session.run(None, {"input_ids": np.array([PROMPT, PROMPT[::-1]])})
    if weights == "fp32":
        model = make_tied()
        np.testing.assert_allclose(ours[0], torch_logits(model, PROMPT), atol=1e-4)
        np.testing.assert_allclose(ours[1], torch_logits(model, PROMPT[::-1]), atol=1e-4)
    reference = onnx.reference.ReferenceEvaluator(str(folder / "model.onnx"))
    (theirs,) = reference.run(None, {"input_ids": np.array([PROMPT, PROMPT[::-1]])})
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_lowered_graph_equals_the_canonical_one(bundle: tuple[str, Path]) -> None:
    _, folder = bundle
    (theirs,) = ort.InferenceSession(folder / "model.onnx").run(None, {"input_ids": np.array([PROMPT])})
    model = ir.load(folder / "model.onnx")
    lower(model, accuracy_level=0)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feeds = {"input_ids": np.array([PROMPT]), "rows": np.array([4, 1])}
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], theirs[0, [4, 1]], atol=1e-4)


def test_engine_generates_the_models_own_greedy_tokens(bundle: tuple[str, Path]) -> None:
    weights, folder = bundle
    model, session = make_tied(), ort.InferenceSession(folder / "model.onnx")

    def canonical(ids: list[int]) -> np.ndarray:
        return session.run(None, {"input_ids": np.array([ids])})[0][0]

    with moedge.load(folder) as engine:
        assert engine.info.backend == "onnxruntime_prefix"
        logits = engine.logits(PROMPT)
        # int4 engines multiply by int8 activations.
        scale = np.abs(logits).max()
        np.testing.assert_allclose(logits, canonical(PROMPT), atol=scale * (1e-5 if weights == "fp32" else 0.03))
        generation = engine.generate(PROMPT, max_new_tokens=30)
        assert list(generation) == []  # no tokenizer: tokens alone
        if weights == "fp32":
            assert generation.tokens == torch_greedy(lambda ids: torch_logits(model, ids), PROMPT, 30)
        again = engine.generate(PROMPT + generation.tokens[:4], max_new_tokens=26)
        list(again)
        assert again.tokens == generation.tokens[4:]
        with pytest.raises(moedge.EngineError, match="there is room for 64"):
            engine.logits([1] * 65)


def test_routes_are_the_gates_own(bundle: tuple[str, Path]) -> None:
    weights, folder = bundle
    model, seen = make_tied(), []
    for layer in model.layers:
        layer.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch_logits(model, PROMPT)
    with moedge.load(folder) as engine:
        experts, shares = engine.routing(PROMPT)
        engine.begin()
        engine.prefill(np.array(PROMPT))  # the session's routes are those of its last step
        np.testing.assert_array_equal(engine.session.routing.experts, experts)
    assert experts.shape == shares.shape == (2, len(PROMPT), 2)
    if weights == "fp32":
        np.testing.assert_array_equal(experts, np.stack([each.numpy() for each, _ in seen]))
        np.testing.assert_allclose(shares, np.stack([each.detach().numpy() for _, each in seen]), atol=1e-6)


def test_session_forgets_and_takes_up_texts(bundle: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = bundle
    with moedge.load(folder) as engine:
        session = engine.begin()
        whole = session.step(np.array(PROMPT), np.array([4])).copy()
        session.truncate(3)
        np.testing.assert_array_equal(session.step(np.array(PROMPT[3:]), np.array([1])), whole)
        other = session.another()
        other.append_rows(session.read_rows(0, 4))
        np.testing.assert_array_equal(other.step(np.array(PROMPT[4:]), np.array([0])), whole)
        for fault in ([np.zeros((2, 1), np.float32)], [np.zeros((1, 2), np.int64)], []):
            with pytest.raises(ValueError, match="another cache"):
                other.append_rows(fault)
        first = list(engine.generate(PROMPT, max_new_tokens=3))
        engine.save_snapshot(tmp_path / "snapshot")
        assert engine.load_snapshot(tmp_path / "snapshot") and list(engine.generate(PROMPT, max_new_tokens=3)) == first


def test_verify_inspect_and_what_is_refused(bundle: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = bundle
    for command in (["verify", folder, "--deep", "--json"], ["inspect", folder, "--json"]):
        cli.main.main([str(word) for word in command], standalone_mode=False)
    verdict, inspection = (json.loads(text) for text in re.split(r"(?<=\n})\n(?={)", capsys.readouterr().out))
    assert verdict["ok"] and verdict["experts"] == 2 * EXPERTS and verdict["engines"]["cpu"]["runs_here"]
    assert verdict["unchecked"] == ["routes: a PyTorch model's own graph has no layers that --deep could cut"]
    assert inspection["gating"][0]["attributes"]["top_k"] == 2
    for profile in ("rtx4090", "jetson-orin-nano-8gb", "h100"):
        with pytest.raises(BuildError, match="holds a PyTorch model's own graph.*--profile cpu"):
            moedge.build(folder, profile)
    with pytest.raises(BuildError, match="holds a PyTorch model's own graph"):
        cli.main.main(["build", str(folder), "--profile", "rtx4090", "--dry-run"], standalone_mode=False)
    with pytest.raises(BundleError, match="nothing can be predicted of it"):
        cli.main.main(["estimate", str(folder), "--profile", "rtx4090"], standalone_mode=False)


# Faults that the parity check has to find


def export_with(monkeypatch: pytest.MonkeyPatch, folder: Path, edit: Any) -> str:
    """The error of an export whose graph is changed by `edit` after it was made."""
    build = torch_graph.TorchGraph.build

    def spoiled(self: Any, layout: Any, base_dir: Path) -> Any:
        model = build(self, layout, base_dir)
        edit(model)
        return model

    monkeypatch.setattr(torch_graph.TorchGraph, "build", spoiled)
    with pytest.raises(ParityError) as error:
        export_torch_model(make_tied, folder / "bundle", weights="int8", group_size=16)
    assert not list(folder.iterdir())
    return str(error.value)


def test_a_graph_that_routes_otherwise_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace_once: None
) -> None:
    def edit(model: Any) -> None:
        gate = next(node for node in model.graph if node.op_type == "SigmoidTopKGate")
        gate.attributes["routed_scaling_factor"] = type(gate.attributes["routed_scaling_factor"])(
            "routed_scaling_factor", gate.attributes["routed_scaling_factor"].type, 1.01
        )

    text = export_with(monkeypatch, tmp_path, edit)
    assert text.startswith("3 differences between the graph and the torch model, first: logits of 1 x 1 tokens differ")


def test_an_expert_that_no_text_needs_is_still_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace_once: None
) -> None:
    monkeypatch.setattr("moedge.export.torch_parity._find_logit_faults", lambda *arguments: [])

    def edit(model: Any) -> None:
        (function,) = [each for each in model.functions.values() if each.name == "Experts"]
        sigmoid = next(node for node in function.all_nodes() if node.op_type == "Sigmoid")
        sigmoid.op_type = "Tanh"

    assert "first: the experts of layer 0 differ by" in export_with(monkeypatch, tmp_path, edit)


def test_a_weight_that_is_written_wrongly_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace_once: None
) -> None:
    write = torch_model.write_weights

    def swapped(source: Any, layout: Any, path: Path, *rest: Any) -> Any:
        errors = write(source, layout, path, *rest)
        slot = layout["layers.1.experts.down.weight"].data
        share = slot.nbytes // EXPERTS
        content = bytearray(path.read_bytes())
        first, second = (slice(slot.offset + share * place, slot.offset + share * (place + 1)) for place in (3, 4))
        content[first], content[second] = content[second], content[first]
        path.write_bytes(content)
        return errors

    monkeypatch.setattr(torch_model, "write_weights", swapped)
    with pytest.raises(ParityError, match=r"2 differences .*model\.layers\.1\.experts\.down \(as layers\.1\.experts"):
        export_torch_model(make_tied, tmp_path / "bundle", weights="int8", group_size=16)
    assert not list(tmp_path.iterdir())


def test_the_users_model_keeps_its_weights(tmp_path: Path, trace_once: None) -> None:
    model = make_tied()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.__name__ = "make_tied"
    export_torch_model(model, tmp_path / "bundle", weights="fp16")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# What a user can get wrong

FAULTY = '''
import torch
from moedge.export import torch_ops

print("this goes to stderr")
number = 3


class Model(torch.nn.Module):
    def __init__(self, answer, experts=(4, 4)):
        super().__init__()
        self.answer = answer
        self.embedding = torch.nn.Embedding(16, 8)
        self.gates = torch.nn.ModuleList(torch_ops.TopKGate(8, count, 2) for count in experts)
        self.experts = torch.nn.ModuleList(torch_ops.Experts(count, 8, 16) for count in experts)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for gate, experts in zip(self.gates, self.experts):
            x = x + experts(x, *gate(x))
        return self.answer(x @ self.embedding.weight.T)


def build_number(): return 3
def build_failing(): raise RuntimeError("no weights here\\nand a second line")
def needs_argument(size): return None
def build_last_token(): return Model(lambda logits: logits[:, -1])
def build_whole_numbers(): return Model(lambda logits: logits.argmax(-1))
def build_raising(): return Model(lambda logits: logits[99])
def build_branching(): return Model(lambda logits: logits if logits.sum() > 0 else -logits)
def build_dense(): return Model(lambda logits: logits, ())
def build_uneven(): return Model(lambda logits: logits, (4, 6))
def build_counting():
    calls = []
    return Model(lambda logits: calls.append(0) or logits * len(calls))
def build_exiting(): raise SystemExit(0)
def build_short():
    model = Model(lambda logits: logits)
    model.register_forward_pre_hook(lambda _, arguments: too_long(arguments[0]))
    model.max_position_embeddings = 64
    return model
def too_long(ids): assert ids.shape[1] < 30, "too long"
def build_own_gate():
    model = Model(lambda logits: logits)
    model.gates = torch.nn.ModuleList([OwnGate(), OwnGate()])
    return model
class OwnGate(torch.nn.Module):
    def forward(self, x):
        return torch.arange(2).expand(len(x.reshape(-1, x.shape[-1])), 2), x.reshape(-1, x.shape[-1])[:, :2]
def build_flat_attention():
    mask = torch.ones(9, 9).tril().bool()
    attention = torch.nn.functional.scaled_dot_product_attention
    return Model(lambda x: attention(x, x, x, attn_mask=mask[: x.shape[1], : x.shape[1]]))
def build_nan():
    model = Model(lambda logits: logits)
    with torch.no_grad():
        model.gates[1].weight[2, 3] = float("nan")
    return model
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "models.py").write_text(FAULTY)
    (tmp_path / "faulty" / "broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "faulty" / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere.at_all:build", r"^nowhere.at_all:build: there is no module 'nowhere'; the current folder \(.*\) and"),
        ("faulty.other:build", r"there is no module 'faulty.other'; the current folder"),
        ("faulty.broken:build", r"importing faulty.broken failed: .*broken.py:1: ModuleNotFoundError: No module named"),
        ("faulty.models:build_brnching", r"faulty.models has no 'build_brnching'; it has build_branching, build_"),
        ("faulty.models:number", r"^faulty.models:number is a int, not callable; name a function that returns"),
        ("faulty.models:build_number", r"build_number\(\) returned a int; a torch.nn.Module was expected"),
        ("faulty.models:build_failing", r"build_failing\(\) failed: .*models.py:\d+: RuntimeError: no weights here$"),
        ("faulty.models:needs_argument", r"^faulty.models:needs_argument needs arguments \(size\) and is called "),
        ("faulty.models:build_exiting", r"build_exiting\(\) failed: .*models.py:\d+: SystemExit: 0$"),
        ("faulty.leaving:build", r"^faulty.leaving:build: importing faulty.leaving f.*leaving.py:1: SystemExit:"),
        ("models.py:build", r"^models.py:build names a file; write the module: models:build$"),
        ("faulty.models:build_short", r"the model, given input_ids int64 \[1, 48\], failed: .*AssertionError: too l"),
        ("faulty.models:build_own_gate", r"Experts number 0 is not called with what a torch_ops.TopKGate gave; route"),
        ("faulty.models:build_flat_attention", r"cannot export this model: .*AssertionError: only 4D query, key, and"),
        ("faulty.models:build_last_token", r"for input_ids \[2, 5\] the model gave float32 \[2, 16\]; logits in"),
        ("faulty.models:build_whole_numbers", r"the model gave int64 \[2, 5\]; logits in floating point \[2, 5, vocab"),
        ("faulty.models:build_raising", r"given input_ids int64 \[2, 5\], failed: .*models.py:\d+: IndexError: ind"),
        ("faulty.models:build_dense", r"no mixture of experts that moedge knows; build it with torch_ops.TopKGate"),
        ("faulty.models:build_uneven", r"different mixtures \(experts, experts per token\): \[\(4, 2\), \(6, 2\)\]"),
        ("faulty.models:build_branching", r"torch cannot export this model: .*its forward must be traceable with"),
    ],
)
def test_what_cannot_be_exported_is_one_line(package: Path, source: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        export_torch_model(source, "bundle")
    assert re.search(text, str(error.value)) and "\n" not in str(error.value)
    assert not (package / "bundle").exists()


def test_models_that_the_checks_refuse(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'model.gates.1.weight' holds NaN or infinity in row 2"):
        export_torch_model("faulty.models:build_nan", "bundle")
    with pytest.raises(ParityError, match=r"a model that is random in eval\(\).*cannot be exported"):
        export_torch_model("faulty.models:build_counting", "bundle")
    assert not (package / "bundle").exists()
    assert capsys.readouterr() == ("", "this goes to stderr\n")
    with pytest.raises(UsageError, match="algorithm gptq calibrates on a checkpoint; for a torch model use rtn or hqq"):
        export_torch_model("faulty.models:build_counting", "bundle", algorithm="gptq")
    with pytest.raises(UsageError, match="max_positions 0: at least 1 was expected"):
        export_torch_model("faulty.models:build_counting", "bundle", max_positions=0)
    with pytest.raises(UsageError, match=r"the model, given input_ids int64 \[1, 2048\], failed: .*RuntimeError"):
        export_torch_model(make_tied, "bundle", max_positions=10**9)
    with pytest.raises(BundleError, match="faulty: no tokenizer.json there; name that file or a folder that holds it"):
        export_torch_model("faulty.models:build_counting", "bundle", tokenizer="faulty")


def test_only_a_named_function_is_imported(package: Path) -> None:
    """A folder of that name is a checkpoint; options of the other kind of source are bad usage."""
    Path("faulty.models:build_number").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        cli.main.main(["export", "faulty.models:build_number", "-o", "bundle"], standalone_mode=False)
    assert "faulty.models" not in sys.modules
    for words in (["nowhere", "--max-positions", "8"], ["faulty.models:build_nan", "--adapter", "x"]):
        command = [sys.executable, "-m", "moedge", "export", "-o", "bundle", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"Error: {words[1]} is for" in done.stderr
    assert "this runs its code" in " ".join(cli.main.get_command(None, "export").help.split())
