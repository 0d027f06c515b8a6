"""Users' torch models of other makes: each exported, built and run, its logits those of the module itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("onnxscript", reason="torch exports by onnxscript")

from torch import Tensor, nn  # noqa: E402

import moedge  # noqa: E402
from moedge.export import torch_ops  # noqa: E402
from moedge.export.torch_model import export_torch_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB, HIDDEN = 80, 32
IDS = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()


class Mixture(nn.Module):
    """The choices take another shape on their way, and each expert has a bias of the user's own."""

    def __init__(self, gate: nn.Module, experts: torch_ops.Experts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.bias = nn.Parameter(torch.randn(8, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, (HIDDEN,))
        experts, weights = (each.view(*x.shape[:2], 2) for each in self.gate(h))
        biases = (self.bias[experts] * weights.unsqueeze(-1)).sum(dim=2)
        return x + self.experts(h, experts.flatten(0, 1), weights.flatten(0, 1)) + biases.to(x.dtype)


class LoadAware(nn.Module):
    """A router with a bias, and a load that stays what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 8)
        self.register_buffer("load", torch.arange(8.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).view(-1, 8).softmax(dim=-1)
        experts, weights, _ = torch.ops.moedge.load_aware_gate(scores, scores, self.load, 2, 1, 1.5, 0.1, 1.25, 0.99)
        return experts, weights


class Model(nn.Module):
    """Positions are looked up, what mixes tokens is a convolution, the answer is a dict."""

    def __init__(self, mixtures: nn.Module) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(40, HIDDEN)
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, 3)
        self.mixtures = mixtures
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = x + self.convolution(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return {"logits": 30 * torch.tanh(self.head(self.mixtures(x)) / 30)}


def build_every_gate() -> Model:
    gates: list[nn.Module] = [
        torch_ops.TopKGate(HIDDEN, 8, 2, n_group=4, topk_group=2, norm_topk_prob=False, routed_scaling_factor=1.7),
        torch_ops.TopKGate(HIDDEN, 8, 2, scoring="sigmoid", n_group=2),
        torch_ops.TopKGate(HIDDEN, 8, 2, scoring="binary"),
        LoadAware(),
    ]
    return Model(nn.Sequential(*[Mixture(gate, torch_ops.Experts(8, HIDDEN, 24)) for gate in gates]))


def build_shared() -> Model:
    """bfloat16, in training mode with dropout, and one mixture three times."""
    experts = torch_ops.Experts(8, HIDDEN, 24)
    mixture = Mixture(nn.Sequential(nn.LayerNorm(HIDDEN), torch_ops.TopKGate(HIDDEN, 8, 2)), experts)
    model = Model(nn.Sequential(mixture, nn.Dropout(0.5), mixture, nn.Sequential(mixture)))
    return model.to(torch.bfloat16).train()


@pytest.mark.parametrize(("build", "layers"), [(build_every_gate, 4), (build_shared, 3)])
def test_the_engine_gives_the_modules_logits(build: Any, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = build()
    export_torch_model(copy.deepcopy(model), tmp_path / "b", weights="fp32")
    moedge.build(tmp_path / "b", "cpu")
    with torch.no_grad():
        expected = model.float().eval()(torch.tensor([IDS]))["logits"][0].numpy()
    with moedge.load(tmp_path / "b", threads=1) as engine:
        np.testing.assert_allclose(engine.logits(IDS), expected, atol=1e-4)
        assert engine.routing(IDS).experts.shape == (layers, len(IDS), 2)
    assert sum("bias" in name for name in dict(model.named_parameters())) >= 3
