"""Gates and experts as torch ops: equal to the numpy references, differentiable, exported as moedge's functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("onnxscript", reason="torch exports by onnxscript")

from moedge.errors import UsageError  # noqa: E402
from moedge.export import torch_ops  # noqa: E402
from moedge.export.gating import list_gates  # noqa: E402

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "torch.md"
TOPK = ("top_k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
# op, logits a token, attributes by name in the order of the torch op
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("SoftmaxTopKGate", 8, dict(zip(TOPK, (2, 1, 1, 1, 1.0), strict=True))),
    ("SoftmaxTopKGate", 12, dict(zip(TOPK, (4, 4, 2, 0, 2.5), strict=True))),
    ("SoftmaxTopKGate", 5, dict(zip(TOPK, (5, 1, 1, 0, 1.0), strict=True))),
    ("SoftmaxTopKGate", 12, dict(zip(TOPK, (1, 6, 1, 1, 1.5), strict=True))),
    ("SigmoidTopKGate", 8, dict(zip(TOPK, (2, 1, 1, 1, 1.0), strict=True))),
    ("SigmoidTopKGate", 12, dict(zip(TOPK, (4, 4, 2, 1, 2.5), strict=True))),
    ("SigmoidTopKGate", 7, dict(zip(TOPK, (7, 1, 1, 0, 1.5), strict=True))),
    ("BinaryCodeGate", 10, {"top_k": 4, "bits": 10, "norm_topk_prob": 1, "routed_scaling_factor": 1.5}),
    ("BinaryCodeGate", 3, {"top_k": 8, "bits": 3, "norm_topk_prob": 0, "routed_scaling_factor": 2.0}),
]


def torch_op(op: str) -> Any:
    return torch_ops._OPS[op]


def make_inputs(op: str, width: int, tokens: int = 200) -> list[torch.Tensor]:
    """Logits, half of them whole numbers so that they tie; a bias for the gate that takes one."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(tokens, width, generator=generator)
    logits[::2] = logits[::2].round()
    bias = torch.randn(width, generator=generator).round() / 8
    return [logits, bias] if op == "SigmoidTopKGate" else [logits]


@pytest.mark.parametrize(("op", "width", "attributes"), CASES)
def test_torch_and_numpy_choose_the_same(op: str, width: int, attributes: dict[str, Any]) -> None:
    inputs = make_inputs(op, width)
    experts, weights = torch_op(op)(*inputs, *attributes.values())
    expected = list_gates()[op].reference(*(tensor.numpy() for tensor in inputs), **attributes)
    np.testing.assert_array_equal(experts.numpy(), expected[0])
    np.testing.assert_allclose(weights.numpy(), expected[1], rtol=2e-6, atol=1e-7)


def plain_weights(op: str, logits: torch.Tensor, experts: torch.Tensor, kept: torch.Tensor, a: Any) -> torch.Tensor:
    """The weights of given choices by torch's own differentiable ops; `kept`: which lie in a group that was kept."""
    if op == "BinaryCodeGate":
        codes = (experts.unsqueeze(-1) >> torch.arange(a["bits"])) & 1
        picked = torch.where(codes == 1, logits.unsqueeze(1), -logits.unsqueeze(1)).sigmoid().prod(dim=-1)
    else:
        scores = logits.softmax(dim=-1) if op == "SoftmaxTopKGate" else logits.sigmoid()
        picked = scores.gather(1, experts) * (kept if op == "SoftmaxTopKGate" else 1)
    if a["norm_topk_prob"]:
        picked = picked / picked.sum(dim=-1, keepdim=True)
    return picked * a["routed_scaling_factor"]


@pytest.mark.parametrize(("op", "width", "attributes"), CASES)
def test_gradients_reach_the_logits_through_the_weights(op: str, width: int, attributes: dict[str, Any]) -> None:
    inputs = make_inputs(op, width)
    logits = inputs[0].requires_grad_()
    experts, weights = torch_op(op)(*inputs, *attributes.values())
    assert not experts.requires_grad
    seed = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((weights * seed).sum(), logits)
    wide = logits.detach().double().requires_grad_()
    expected = plain_weights(op, wide, experts, weights != 0, attributes)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    (theirs,) = torch.autograd.grad((expected * seed).sum(), wide)
    torch.testing.assert_close(gradient.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("op", "width", "attributes"), CASES)
def test_every_type_of_logits_and_none(op: str, width: int, attributes: dict[str, Any]) -> None:
    """float64 by torch's own gradcheck; half precision is computed in float32, and fake tensors say so."""
    logits, *bias = make_inputs(op, width, tokens=6)
    wide = (logits + torch.rand(logits.shape, generator=torch.Generator().manual_seed(3))).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch_op(op)(x, *bias, *attributes.values())[1], wide)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        narrow = logits.to(dtype).requires_grad_()
        arguments = (narrow, *bias, *attributes.values())
        torch.library.opcheck(torch_op(op).default, arguments, test_utils=("test_schema", "test_faketensor"))
        experts, weights = torch_op(op)(*arguments)
        expected = torch_op(op)(logits.to(dtype).float(), *bias, *attributes.values())
        assert weights.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close((experts, weights.float()), expected)
        assert torch.autograd.grad(weights.sum(), narrow)[0].dtype == dtype
    nobody = torch_op(op)(logits[:0], *bias, *attributes.values())
    assert [tuple(each.shape) for each in nobody] == [(0, attributes["top_k"])] * 2


@pytest.mark.parametrize(("op", "width", "attributes"), [CASES[1], CASES[5], CASES[7]])
def test_torch_finds_no_fault_in_the_registration(op: str, width: int, attributes: dict[str, Any]) -> None:
    """Schema, autograd registration, fake tensors. opcheck adds up outputs, whole numbers first, which torch refuses:
    what it would check by tracing is checked here by `aot_eager`, forward and backward with a dynamic shape."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = make_inputs(op, width, tokens=6)
    inputs[0].requires_grad_()
    torch.library.opcheck(torch_op(op).default, (*inputs, *attributes.values()), test_utils=checks)

    def call(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = torch_op(op)(logits * 2, *inputs[1:], *attributes.values())
        return experts, weights

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 3):
        logits = inputs[0][:tokens].detach().requires_grad_()
        results = []
        for function in (call, compiled):
            experts, weights = function(logits)
            results.append((experts, weights, torch.autograd.grad(weights.square().sum(), logits)[0]))
        torch.testing.assert_close(*results)


def make_experts(count: int = 5, hidden: int = 6, inner: int = 4, tokens: int = 9, k: int = 2) -> tuple[Any, ...]:
    torch.manual_seed(1)
    chosen = torch.stack([torch.randperm(count - 1)[:k] for _ in range(tokens)])  # nobody chooses the last
    gate_up, down = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    return torch.randn(tokens, hidden), chosen, torch.rand(tokens, k), gate_up, down


def plain_experts(x: Any, chosen: Any, weights: Any, gate_up: Any, down: Any) -> torch.Tensor:
    both = torch.einsum("tkoh,th->tko", gate_up[chosen], x)
    inner = torch.nn.functional.silu(both[..., 0::2]) * both[..., 1::2]
    return (torch.einsum("tkhi,tki->tkh", down[chosen], inner) * weights.unsqueeze(-1)).sum(dim=1)


def test_experts_and_their_gradients_equal_plain_torch() -> None:
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in make_experts()]
    wanted = [tensor.requires_grad_() for tensor in inputs if tensor.is_floating_point()]
    ours, theirs = torch.ops.moedge.experts(*inputs), plain_experts(*inputs)
    torch.testing.assert_close(ours, theirs)
    seed = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * seed).sum(), wanted), torch.autograd.grad((theirs * seed).sum(), wanted)
    )
    torch.library.opcheck(torch.ops.moedge.experts.default, tuple(make_experts()))


def test_experts_from_projections_that_stand_apart() -> None:
    gate, up, down = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    experts = torch_ops.Experts.from_projections(gate, up, down)
    x, chosen, weights = torch.randn(2, 2, 6), torch.tensor([[0], [1], [2], [1]]), torch.rand(4, 1)
    rows, of = x.reshape(4, 6), chosen[:, 0]
    gates, ups = (torch.einsum("tih,th->ti", stack[of], rows) for stack in (gate, up))
    expected = torch.einsum("thi,ti->th", down[of], torch.nn.functional.silu(gates) * ups) * weights
    torch.testing.assert_close(experts(x, chosen, weights), expected.view(2, 2, 6))
    text = (
        "Experts: gate [3, 4, 6], up [3, 4, 6], down [3, 4, 6] do not fit; use gate and up [E, I, H] and down [E, H, I]"
    )
    with pytest.raises(UsageError, match=re.escape(text)):
        torch_ops.Experts.from_projections(gate, up, up)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_experts": 4, "top_k": 5}, "TopKGate: num_experts_per_tok 5 exceeds the 4 experts"),
        ({"num_experts": 8, "top_k": 2, "n_group": 3}, "n_group 3 does not divide the 8 experts"),
        ({"num_experts": 60, "top_k": 2, "scoring": "binary"}, "60 experts are not the 64 that codes of 6 bits name"),
        ({"num_experts": 8, "top_k": 2, "scoring": "binary", "n_group": 2}, "binary codes have no groups"),
        ({"num_experts": 8, "top_k": 2, "scoring": "cosine"}, "unknown scoring 'cosine'; use one of softmax, sigmoid"),
        ({"num_experts": 8, "top_k": 2.5}, "TopKGate: top_k 2.5 is no whole number of at least 1"),
        ({"num_experts": -8, "top_k": 2}, "TopKGate: num_experts -8 is no whole number of at least 1"),
        ({"num_experts": 8, "top_k": 2, "routed_scaling_factor": float("nan")}, "routed_scaling_factor nan is no"),
    ],
)
def test_figures_that_contradict_are_refused_where_the_gate_is_made(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        torch_ops.TopKGate(16, **arguments)


def test_sizes_and_shapes_that_do_not_fit_are_refused() -> None:
    for sizes in ((0, 8, 8), (4, 8.0, 8), (4, 8, -8)):
        with pytest.raises(UsageError, match="^Experts: .* is no whole number of at least 1$"):
            torch_ops.Experts(*sizes)  # type: ignore[arg-type]
    x, chosen, weights, gate_up, down = make_experts()
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :5], chosen, weights), "x [9, 5], gate_up [5, 8, 6], down [5, 6, 4] do not fit; use x [T, H]"),
        ((x, chosen[:7], weights), "x [9, 6], experts [7, 2], weights [9, 2] do not fit; use x [T, H]"),
        ((x, chosen - 4, weights), "expert -4 is chosen, and there are 5: 0 to 4"),
        ((x, chosen + 4, weights), "is chosen, and there are 5: 0 to 4"),
    ]
    for inputs, text in cases:
        with pytest.raises(UsageError, match=re.escape(text)):
            torch.ops.moedge.experts(*inputs, gate_up, down)
    sigmoid, logits = torch.ops.moedge.sigmoid_topk_gate, torch.zeros(3, 8)
    with pytest.raises(UsageError, match=r"SigmoidTopKGate: \[7\] is not a number for each of 8 experts"):
        sigmoid(logits, torch.zeros(7), 2, 1, 1, 1, 1.0)
    with pytest.raises(UsageError, match="SigmoidTopKGate: logits of 3 axes; flatten them to 2"):
        sigmoid(logits.view(3, 2, 4), torch.zeros(4), 2, 1, 1, 1, 1.0)


def blocks(language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """docs/torch.md, run from top to bottom in an empty folder."""
    folder = tmp_path_factory.mktemp("torch")
    names: dict[str, Any] = {"__name__": "document"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile("\n".join(blocks()), str(DOCUMENT), "exec"), names)
    return folder, names


@pytest.mark.filterwarnings("ignore")
def test_the_document_runs_and_its_model_learns(document: tuple[Path, dict[str, Any]]) -> None:
    losses = document[1]["losses"]
    assert losses[-1] < losses[0] / 2
    assert len(blocks()[0].strip().splitlines()) <= 70


@pytest.mark.filterwarnings("ignore")
def test_the_documents_commands_give_the_models_greedy_text(document: tuple[Path, dict[str, Any]]) -> None:
    import moedge

    folder, names = document
    (folder / "my_model.py").write_text(blocks()[0], encoding="utf-8")
    (commands,) = blocks("sh")
    script = commands.replace("moedge ", f"{sys.executable} -m moedge ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = b"one token goes"
    with moedge.load(folder / "bundle") as engine, torch.no_grad():
        assert list(text) == engine.tokenize(text.decode())
        while len(text) < 54:
            text += bytes([int(names["model"](torch.tensor([list(text)]))[0, -1].argmax())])
        generation = engine.generate("one token goes", max_new_tokens=40)
        assert "one token goes" + "".join(generation) == text.decode()
    assert done.stdout.splitlines()[-1] == text[14:].decode()
    assert text.startswith(b"one token goes to few experts")


@pytest.mark.filterwarnings("ignore")
def test_the_exported_graph_calls_functions_it_carries(document: tuple[Path, dict[str, Any]]) -> None:
    folder, names = document
    model = onnx.load(folder / "model.onnx")
    calls = [node.op_type for node in model.graph.node if node.domain == "moedge"]
    gates = ["SoftmaxTopKGate", "SigmoidTopKGate", "BinaryCodeGate"]
    assert calls == [op for gate in gates for op in (gate, "Experts")]
    assert {function.name for function in model.functions if function.domain == "moedge"} == {*gates, "Experts"}
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString())
    for shape in ((1, 1), (2, 33)):
        tokens = torch.randint(0, 256, shape)
        (logits,) = session.run(None, {"input_ids": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), names["model"](tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"optimize": False}, {"opset_version": 18}, {"opset_version": 23}])
def test_other_options_of_the_exporter(options: dict[str, Any]) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = torch_ops.TopKGate(8, 4, 2, scoring="sigmoid"), torch_ops.Experts(4, 8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts(x, *self.gate(x))

    layer, x = Layer().eval(), torch.randn(3, 8)
    table = torch_ops.translation_table()
    program = torch.onnx.export(layer, (x,), dynamo=True, custom_translation_table=table, verbose=False, **options)
    assert program is not None
    if "optimize" in options:
        torch_ops.add_functions(program)
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-4, atol=1e-5)


def test_torch_is_imported_with_torch_ops_only() -> None:
    code = "import sys, moedge, moedge.export, moedge.export.gating; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from moedge.export import torch_ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch is not installed (needed to use moedge.export.torch_ops); install it: pip install" in done.stderr
