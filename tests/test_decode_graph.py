"""What one decode step of each family reads and does, counted in the graph: no clock is asked."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from family_cases import FAMILIES, make_model, save_model

import moedge
from moedge.bundle import Bundle
from moedge.profiles.shape import ModelShape, bytes_per_token
from moedge.runtime import kernels
from moedge.runtime.preflight import read_engine

STOCK = "model.onnx"
GRAPHS = (STOCK, kernels.own_name(STOCK))
# Nodes a layer of the stock graph and of that of our own ops, everything outside of the layers counted in.
MOST_NODES = {
    "deepseek": (32, 9),
    "deepseek_v2": (52, 9),
    "deepseek_v3": (66, 10),
    "gpt_oss": (39, 8),
    "granitemoe": (37, 11),
    "mixtral": (38, 9),
    "olmoe": (37, 14),
    "phimoe": (53, 37),
    "qwen2_moe": (37, 8),
    "qwen3_moe": (40, 9),
}
# On the way from codes of 6 bits to what a stock kernel takes.
MAKERS = ("SixBitPlanes", "Float8Scales", "Reshape")
# What may take a cache: products with it and the kernels that update it in place. Shapes read nothing.
READERS = {"FusedMatMul", "MatMul", "GroupQueryAttention", "Shape", "GroupedAttention", "LatentAttention"}


@pytest.fixture(scope="module", params=sorted(MOST_NODES))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model = make_model(family, next(iter(FAMILIES[family].configurations)))
    save_model(model, family, folder / "checkpoint")
    moedge.export(folder / "checkpoint", folder / "bundle", weights="int4", group_size=16, verify=False)
    moedge.build(folder / "bundle", "cpu", kv_cache="fp32")  # what stock graphs have by themselves
    return family, Bundle.open(folder / "bundle")


def load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.engine_dir("cpu") / name, load_external_data=False)


def nbytes(tensor: onnx.TensorProto) -> float:
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        size = 0.5
    return math.prod(tensor.dims) * size


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes that a step runs: onnxruntime runs what is made of constants alone once, when it loads the graph."""
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if set(node.input) <= constant:
            constant |= set(node.output)
    return sum(not set(node.output) <= constant for node in graph.node)


def made_of(node: onnx.NodeProto, given: onnx.TensorProto) -> onnx.TensorProto:
    """The constant that a node makes of another: its type, and how many there are."""
    *lead, width = given.dims
    if node.op_type == "SixBitPlanes":
        lead, width = lead[1:], width * 4
    kind = onnx.TensorProto.FLOAT if node.op_type in ("Cast", "Float8Scales") else given.data_type
    return onnx.TensorProto(data_type=kind, dims=[*lead, width])


def read_by_a_step(graph: onnx.GraphProto, shape: ModelShape) -> float:
    """Bytes of the weights that one token reads: of a stack of experts its own, of a table its row, once a reader.

    What widens scales, or codes of 6 bits, is run once, when the graph is loaded.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    total = 0.0
    for node in graph.node:
        given = tensors.get(node.input[0])
        if given is not None and (node.op_type in MAKERS or given.data_type == onnx.TensorProto.FLOAT16):
            tensors[node.output[0]] = made_of(node, given)
            continue
        for place, name in enumerate(node.input):
            if name not in tensors:
                continue
            share = 1.0
            experts = range(6, 14) if node.op_type == "Moe" else range(len(node.input))
            if node.op_type in ("QMoE", "Experts", "BiasedExperts", "Moe") and place in experts:
                assert tensors[name].dims[0] == shape.experts, f"{name} is no stack of experts"
                share = shape.experts_per_token / shape.experts
            elif node.op_type == "Gather" and place == 0:
                share = 1 / tensors[name].dims[0]
            total += share * nbytes(tensors[name])
    return total


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.usefixtures("compiled")
def test_a_step_reads_what_it_must_and_no_more(
    name: str, engine: tuple[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = engine
    if name == STOCK:
        monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)
    ideal = bytes_per_token(bundle.manifest, context=0)
    found = read_by_a_step(load(bundle, name).graph, ModelShape.from_manifest(bundle.manifest))
    assert 0.98 * ideal <= found <= 1.02 * ideal


@pytest.mark.parametrize("name", GRAPHS)
def test_the_cache_is_read_where_it_lies(name: str, engine: tuple[str, Bundle]) -> None:
    """Our own attention takes all layers' caches of a kind in one input, each layer its own part of it."""
    _, bundle = engine
    graph, entries = load(bundle, name).graph, read_engine(bundle, "cpu").cache
    layers = bundle.config["num_hidden_layers"]
    caches = {value.name: value for value in graph.input if value.name.startswith(("cache.", "past."))}
    kinds = {entry.name.rpartition(".")[0] for entry in entries}
    assert len(caches) == (len(entries) if name == STOCK else len(kinds)) > 0
    readers = [node for node in graph.node if caches.keys() & set(node.input)]
    assert {node.op_type for node in readers} <= READERS
    if name != STOCK:
        assert caches.keys() == {f"past.{kind}" for kind in kinds}
        assert {value.type.tensor_type.shape.dim[0].dim_value for value in caches.values()} == {layers}
        given = [{each.name: each for each in node.attribute} for node in readers]
        assert sorted(attributes["layer"].i for attributes in given) == list(range(layers))


def test_nodes_of_a_layer(engine: tuple[str, Bundle]) -> None:
    family, bundle = engine
    layers = bundle.config["num_hidden_layers"]
    stock, own = (count_nodes(load(bundle, name).graph) / layers for name in GRAPHS)
    most_stock, most_own = MOST_NODES[family]
    assert most_stock - 1 < stock <= most_stock
    assert most_own - 1 < own <= most_own


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("lanes", [1, 2])
def test_cuts_are_alike(engine: tuple[str, Bundle], lanes: int) -> None:
    """Where a session says so, logits and routes have the same bits however the text is cut into steps."""
    family, bundle = engine
    with moedge.load(bundle, "cpu", threads=1, lanes=lanes) as loaded:
        # Not with a product of float weights, a gate in stock nodes, or angles that follow the length.
        assert loaded.session.cuts_alike == (family not in ("phimoe", "deepseek"))
        ids = np.random.default_rng(77).integers(0, loaded.info.vocab_size, 45)
        told = []
        for cuts in ([], [1], [44], [13, 14, 29], [31], list(range(1, 45))):
            session, logits, weights = loaded.begin(), [], []
            for part in np.split(ids, cuts):
                logits.append(session.step(part, np.arange(len(part))).copy())
                weights.append(session.routing.weights.copy())
            told.append((np.concatenate(logits).tobytes(), np.concatenate(weights, axis=1).tobytes()))
        assert not loaded.session.cuts_alike or len(set(told)) == 1


def test_no_output_is_made_that_nobody_reads(engine: tuple[str, Bundle]) -> None:
    """Each costs onnxruntime a microsecond a run."""
    _, bundle = engine
    graph = load(bundle, kernels.own_name(STOCK)).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    unread = {name for node in graph.node for name in node.output if name} - read
    assert not unread
