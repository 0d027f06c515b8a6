"""A graph that torch.onnx.export wrote, made canonical: weights by name in weights.bin, gates and experts by layer.

Layer N is the N-th call of `moedge.Experts`. What torch folded (a transposed weight) or merged (equal weights) is
found again by content, so that every parameter is stored once, as the module holds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import WEIGHTS
from ..errors import UsageError
from .checkpoint import Checkpoint, TensorEntry
from .functions import DOMAIN
from .gating import list_gates
from .graph import DTYPES, IR_VERSION, load_functions
from .layout import Layout, Slot, Stored
from .weights import Piece, Precision, Role, Weight

_RANKS = ("head", "embedding", "router", "linear", "other")  # which role counts of a weight that has several
Array = np.ndarray[Any, Any]
# What may stand between a router's product and its gate.
_SAME_NUMBERS = ("Cast", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_BETWEEN = (*_SAME_NUMBERS, "Add")


class TensorSource(Checkpoint):
    """Tensors in memory, read as those of a checkpoint are."""

    def __init__(self, name: str, tensors: dict[str, Array]) -> None:
        place = Path(name)
        entries = {key: TensorEntry(place, value.dtype, value.shape, 0, value.nbytes) for key, value in tensors.items()}
        super().__init__(place, {}, entries)
        self.tensors = tensors

    def read(
        self, name: str, start: int = 0, stop: int | None = None, view: tuple[int, ...] | None = None
    ) -> Array:
        values = self.tensors[name] if view is None else self.tensors[name].reshape(view)
        return values[start:stop] if values.ndim else values

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name and content."""
        digest = hashlib.sha256()
        for name, values in sorted(self.tensors.items()):
            digest.update(f"{name}:{values.shape}:".encode() + _digest(values))
        return digest.hexdigest()


@dataclass(frozen=True)
class ExpertsCall:
    """One call of `moedge.Experts`: its node and the sizes of its weights."""

    node: ir.Node
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int


@dataclass
class _Use:
    """How the graph uses a weight: by which nodes, and whether torch had it transposed."""

    kinds: set[str] = field(default_factory=set)
    role: Role = "other"


@dataclass
class TorchGraph:
    """The graph before its weights have their places. `plan`: what is to be stored; `held`: module names by weight."""

    model: ir.Model
    layers: list[ExpertsCall]
    plan: list[Weight]
    source: TensorSource
    held: dict[str, list[str]]
    sites: list[_Site]
    notes: list[str]

    def build(self, layout: Layout, base_dir: Path) -> ir.Model:
        """Point the graph at weights.bin in `base_dir`, dequantizing where codes are stored; to be called once."""
        writer = _Writer(self.model, layout, base_dir)
        # A node that is replaced takes its inputs along: what it reads is put right before that.
        for site in sorted(self.sites, key=lambda site: site.kind in ("linear", "table")):
            writer.rewrite(site)
        return writer.finish()

    def describe_gates(self, domain: str) -> list[dict[str, Any]]:
        """The manifest's "gating": each gate with its attributes and the layers that have it."""
        found: list[dict[str, Any]] = []
        for layer, call in enumerate(self.layers):
            gate = call.node.inputs[1].producer() if call.node.inputs[1] is not None else None
            if gate is None or gate.domain != DOMAIN:
                continue
            entry = {"op": f"{domain}.{gate.op_type}", "attributes": _plain_attributes(gate)}
            known = next((each for each in found if {k: each[k] for k in entry} == entry), None)
            if known is None:
                found.append({"op": entry["op"], "layers": [layer], "attributes": entry["attributes"]})
            else:
                known["layers"].append(layer)
        return found


@dataclass(frozen=True)
class _Site:
    """One input of one node that is a stored weight. `kind`: linear, table, experts or other."""

    node: ir.Node
    index: int
    kind: str
    name: str


def canonicalize(model: ir.Model, module: Any, name: str) -> TorchGraph:
    """Find the layers and the weights of an exported graph; `module`: what was exported.

    Raises:
        UsageError: it has no experts, or layers whose experts differ in number.
    """
    _strip(model)
    layers = _find_layers(model, name)
    _name_layers(layers)
    return _Planner(model, module, layers, name).plan()


def _strip(model: ir.Model) -> None:
    """Take out what torch notes of where the user's source lies."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _find_layers(model: ir.Model, name: str) -> list[ExpertsCall]:
    layers: list[ExpertsCall] = []
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type != "Experts":
            continue
        gate_up, down = (value.const_value if value is not None else None for value in node.inputs[3:5])
        if gate_up is None or down is None:
            raise UsageError(
                f"{name}: the weights of Experts number {len(layers)} are computed in forward; "
                "keep them as the parameters that torch_ops.Experts has"
            )
        count, hidden, inner = down.shape.numpy()
        gate = _find_gate(node.inputs[1])
        if gate is None:
            raise UsageError(
                f"{name}: Experts number {len(layers)} is not called with what a torch_ops.TopKGate gave; route with "
                "one, or with an op of torch.ops.moedge (docs/torch.md)"
            )
        layers.append(ExpertsCall(node, count, hidden, inner, gate.attributes["top_k"].as_int()))
    if not layers:
        raise UsageError(
            f"{name}: the model has no mixture of experts that moedge knows; build it with torch_ops.TopKGate and "
            "torch_ops.Experts (docs/torch.md)"
        )
    shapes = [(layer.num_experts, layer.top_k) for layer in layers]
    if len(set(shapes)) > 1:
        raise UsageError(
            f"{name}: its layers have different mixtures (experts, experts per token): {shapes}; a bundle has one"
        )
    return layers


def _name_layers(layers: list[ExpertsCall]) -> None:
    for layer, call in enumerate(layers):
        gate = call.node.inputs[1].producer()  # type: ignore[union-attr]
        assert gate is not None
        call.node.name = f"layers.{layer}.experts"
        call.node.outputs[0].name = f"layers.{layer}.experts"
        gate.name = f"layers.{layer}.gate"
        for value, what in zip(gate.outputs, ("experts", "weights"), strict=False):
            value.name = f"layers.{layer}.gate.{what}"


class _Planner:
    """Matches initializers with the module's tensors and decides how each is stored."""

    def __init__(self, model: ir.Model, module: Any, layers: list[ExpertsCall], name: str) -> None:
        self.model, self.name, self.layers = model, name, layers
        self.tensors = _read_tensors(module)
        self.by_content: dict[tuple[Any, ...], list[str]] = {}
        for key, values in self.tensors.items():
            self.by_content.setdefault((values.shape, _digest(values)), []).append(key)
        self.routers = {id(value) for layer in layers for value in _routers(layer)}
        self.sites: list[_Site] = []
        self.uses: dict[str, _Use] = {}
        self.experts: list[Weight] = []
        self.held: dict[str, list[str]] = {}
        self.inline: set[str] = set()

    def plan(self) -> TorchGraph:
        for value in list(self.model.graph.initializers.values()):
            self._place(value)
        plan = [*self.experts]
        for key, use in self.uses.items():
            plan.append(Weight(key, self.tensors[key].shape, use.role, _precision(use), ((self._piece(key),),)))
        used = {key for keys in self.held.values() for key in keys} | self.inline
        unused = [key for key in self.tensors if key not in used]
        notes = [f"{len(unused)} tensors of the model are not in its graph, first {unused[0]}"] if unused else []
        return TorchGraph(
            self.model, self.layers, plan, TensorSource(self.name, self.tensors), self.held, self.sites, notes
        )

    def _piece(self, key: str, entry: int | None = None) -> Piece:
        return Piece(key, self.tensors[key].shape, entry=entry)

    def _place(self, value: ir.Value) -> None:
        """Find what an initializer is and where it goes; small constants and whole numbers stay in the graph."""
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or not len(tensor.shape):
            return
        array = tensor.numpy()
        keys, transposed = self.by_content.get((array.shape, _digest(array)), []), False
        if not keys and array.ndim == 2:
            keys, transposed = self.by_content.get((array.shape[::-1], _digest(array.T)), []), True
        if not keys:
            return
        for node, index in list(value.uses()):
            self._place_use(keys, node, index, transposed)

    def _place_use(self, keys: list[str], node: ir.Node, index: int, transposed: bool) -> None:
        key = keys[0]
        if (node.domain, node.op_type) == (DOMAIN, "Experts") and index in (3, 4):
            layer = next(place for place, call in enumerate(self.layers) if call.node is node)
            part = ("gate_up", "down")[index - 3]
            name = f"layers.{layer}.experts.{part}.weight"
            shape = self.tensors[key].shape
            units = tuple((self._piece(key, entry),) for entry in range(shape[0]))
            group_with = (self.layers[layer].intermediate_size,) if part == "gate_up" else (shape[1],)
            self.experts.append(Weight(name, shape, "experts", "linear", units, group_with))
            self.held[name] = keys
            self.sites.append(_Site(node, index, "experts", name))
            return
        turned = transposed != (node.op_type == "Transpose" and _is_turn(node))
        users = node.outputs[0].uses() if node.op_type == "Transpose" else [(node, index)]
        for user, place in list(users):
            kind = _kind_of(user, place, turned)
            if kind == "other" and transposed:
                self.inline.update(keys)  # folded for something else: it stays in the graph as torch wrote it
                continue
            site = _Site(node, index, kind, key) if kind == "other" else _Site(user, place, kind, key)
            self._note_use(key, site.node, kind)
            self.held[key] = keys
            self.sites.append(site)

    def _note_use(self, key: str, node: ir.Node, kind: str) -> None:
        use = self.uses.setdefault(key, _Use())
        use.kinds.add(kind)
        role: Role = "other"
        if kind == "table":
            role = "embedding"
        elif kind == "linear":
            is_head = _reaches(node.outputs[0], {id(value) for value in self.model.graph.outputs})
            is_router = _reaches(node.outputs[0], self.routers)
            role = "head" if is_head else "router" if is_router else "linear"
        elif node.domain == DOMAIN:
            role = "router"  # a gate's correction bias
        use.role = min(use.role, role, key=_RANKS.index)


def _precision(use: _Use) -> Precision:
    if "other" in use.kinds or use.role == "router":
        return "keep"
    return "table" if "table" in use.kinds else "linear"


def _kind_of(node: ir.Node, index: int, turned: bool) -> str:
    """What a node does with a matrix [out, in] (`turned`: as [in, out])."""
    if node.op_type == "Gather" and not node.domain and index == 0 and not turned:
        return "table" if node.attributes.get_int("axis", 0) == 0 else "other"
    if node.op_type == "MatMul" and not node.domain and index == 1 and turned:
        return "linear"
    if node.op_type == "Gemm" and not node.domain and index == 1:
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        straight = bool(node.attributes.get_int("transB", 0)) != turned and not node.attributes.get_int("transA", 0)
        return "linear" if plain and straight else "other"
    return "other"


def _is_turn(node: ir.Node) -> bool:
    return [*node.attributes.get_ints("perm", (1, 0))] == [1, 0]


def _find_gate(experts: ir.Value | None) -> ir.Node | None:
    """The gate that chose `experts`, which may have been put into another shape since."""
    node = experts.producer() if experts is not None else None
    while node is not None and not node.domain and node.op_type in _SAME_NUMBERS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.domain == DOMAIN and "top_k" in node.attributes else None


def _routers(layer: ExpertsCall) -> list[ir.Value]:
    gate = _find_gate(layer.node.inputs[1])
    assert gate is not None
    return [value for value in gate.inputs[:1] if value is not None]


def _reaches(value: ir.Value, targets: set[int]) -> bool:
    """Whether a value is one of `targets`, or becomes one by ops that change no product."""
    seen = 0
    while id(value) not in targets and seen < 8:
        users = [node for node, _ in value.uses()]
        if len(users) != 1 or users[0].op_type not in _BETWEEN or len(users[0].outputs) != 1:
            return False
        value, seen = users[0].outputs[0], seen + 1
    return id(value) in targets


def _read_tensors(module: Any) -> dict[str, Array]:
    """Every parameter, and buffers of one axis (a gate's bias), by the module's own names, in float32."""
    named = {**dict(module.named_parameters()), **{k: v for k, v in module.named_buffers() if v.dim() == 1}}
    floats = {key: value.detach() for key, value in named.items() if value.is_floating_point() and value.dim()}
    return {key: np.ascontiguousarray(value.float().numpy()) for key, value in floats.items()}


def _digest(values: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()


def _plain_attributes(node: ir.Node) -> dict[str, Any]:
    order = list_gates()[node.op_type].ATTRIBUTES
    return {name: node.attributes[name].value for name in order if name in node.attributes}


class _Writer:
    """Puts the stored weights into the graph, each made once where it is first needed."""

    def __init__(self, model: ir.Model, layout: Layout, base_dir: Path) -> None:
        self.model, self.graph, self.layout, self.base_dir = model, model.graph, layout, base_dir
        self.tape = ir.tape.Tape()
        self.made: dict[str, ir.Value] = {}

    def rewrite(self, site: _Site) -> None:
        node, stored = site.node, self.layout[site.name]
        if site.kind == "table":
            self._replace(node, self._rows(stored, node.inputs[1]))
        elif site.kind == "linear":
            y = self.tape.op("MatMul", [node.inputs[0], self._turned(stored)])
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                y = self.tape.op("Add", [y, node.inputs[2]])
            self._replace(node, y)
        else:
            node.replace_input_with(site.index, self._weight(stored))

    def finish(self) -> ir.Model:
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        first = next(iter(self.graph))
        self.graph.insert_before(first, self._constants)
        for function in load_functions({node.op_type for node in self._constants if node.domain == DOMAIN}):
            self.model.functions[function.identifier()] = function
        RemoveUnusedNodesPass()(self.model)
        self.model.ir_version = IR_VERSION
        self.model.producer_name, self.model.producer_version = "moedge", None
        self.graph.name = "torch"
        return self.model

    @property
    def _constants(self) -> list[ir.Node]:
        return [node for value in self.made.values() for node in [value.producer()] if node is not None]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        made = {id(each) for each in self._constants}
        nodes = [each for each in self.tape.nodes if id(each) not in made and each.graph is None]
        value.name, value.type, value.shape = old.name, old.type, old.shape
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], nodes, [old], [value])

    def _once(
        self, name: str, kind: str, inputs: list[ir.Value], *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        if name not in self.made:
            value = self.tape.op(kind, inputs, attributes, domain=domain)
            value.name = name
            self.made[name] = value
        return self.made[name]

    def _turned(self, stored: Stored) -> ir.Value:
        return self._once(f"{stored.weight.name}.turned", "Transpose", [self._weight(stored)], perm=[1, 0])

    def _weight(self, stored: Stored) -> ir.Value:
        """A stored weight in float32."""
        data, name = self._external(stored.data), f"{stored.weight.name}.float"
        if stored.data.dtype == "uint6":
            data = self._once(f"{stored.weight.name}.codes", "SixBitPlanes", [data], domain=DOMAIN)
        if stored.scales is not None and stored.zero_points is not None:
            scales = self._external(stored.scales)
            if stored.scales.dtype == "float16":
                scales = self._once(f"{scales.name}.float", "Cast", [scales], to=int(ir.DataType.FLOAT))
            elif stored.scales.dtype == "float8":
                scales = self._once(f"{scales.name}.float", "Float8Scales", [scales], domain=DOMAIN)
            inputs = [data, scales, self._external(stored.zero_points)]
            axis = len(stored.data.shape) - 1
            return self._once(name, "DequantizeLinear", inputs, axis=axis, block_size=stored.group_size)
        if stored.data.dtype == "float16":
            return self._once(name, "Cast", [data], to=int(ir.DataType.FLOAT))
        return data

    def _rows(self, stored: Stored, indices: ir.Value | None) -> ir.Value:
        """Rows of a table; a quantized one is dequantized after the look-up."""
        rows = self.tape.op("Gather", [self._external(stored.data), indices], {"axis": 0})
        if stored.scales is not None and stored.zero_points is not None:
            slots = (stored.scales, stored.zero_points)
            parts = [self.tape.op("Gather", [self._external(slot), indices], {"axis": 0}) for slot in slots]
            return self.tape.op("DequantizeLinear", [rows, *parts], {"axis": -1, "block_size": stored.group_size})
        if stored.data.dtype == "float16":
            return self.tape.op("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        return rows

    def _external(self, slot: Slot) -> ir.Value:
        existing = self.graph.initializers.get(slot.name)
        if existing is not None and isinstance(existing.const_value, ir.ExternalTensor):
            return existing
        if existing is not None:  # torch's own of that name, which is on its way out
            existing.name = f"{slot.name}.torch"
        dtype, shape = DTYPES[slot.dtype], ir.Shape(slot.tensor_shape)
        tensor = ir.ExternalTensor(
            WEIGHTS, slot.offset, slot.nbytes, dtype, shape=shape, name=slot.name, base_dir=self.base_dir
        )
        value = ir.Value(name=slot.name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value
