"""Fewer nodes for onnxruntime's CPU where our own ops run: what stands between the products goes into them.

A node costs a few microseconds whatever it computes, and a layer has thirty. After the lowering, linears of one input
become one `Projections`, a dense MLP one `Mlp`, a router and its gate `Router`; all take the norm of their input and
the residual sum before it along. A router, its experts and what tokens share become one `Moe`
(runtime/kernels/step_ops.cpp, moe_ops.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ...runtime.kernels import DOMAIN
from ._canonical import Rewriter, as_float, attributes_of, find_calls, linear_matrix

_MOST_MATRICES = 3  # of `Projections`
_SUM, _NORM = {"Projections": 1, "Mlp": 1, "Router": 3}, 4  # where an op gives the residual sum, and `Router` the norm
_MLP_INPUTS, _ROUTER_INPUTS, _EXPERTS_INPUTS = 9, 6, 8  # of `Mlp` without what is added to it; of what `Moe` is made of
_SIGMOID = {"SoftmaxTopKGate": 0, "SigmoidTopKGate": 1}


def lower_router(rewriter: Rewriter, call: ir.Node) -> list[ir.Value] | None:
    """A gate with the router before it as one op: values of experts and weights; None where it must stay as it is."""
    logits, bias = call.inputs[0], None
    assert logits is not None
    node = logits.producer()
    if call.op_type not in _SIGMOID or node is None:
        return None
    if node.op_type == "Add":
        bias, inner = node.inputs[1], node.inputs[0]
        node = inner.producer() if inner is not None else None
    if node is None or node.op_type != "MatMul" or linear_matrix(node).bits:
        return None
    matrix: ir.Value | None = linear_matrix(node).data
    if matrix is not None and matrix.dtype != ir.DataType.BFLOAT16:
        matrix = as_float(rewriter, matrix)
    inputs = [node.inputs[0], None, None, matrix, bias, *call.inputs[1:]]
    attributes = {"sigmoid": _SIGMOID[call.op_type], **attributes_of(call)}
    attributes["routed_scaling_factor"] = float(attributes["routed_scaling_factor"])
    _, experts, weights = rewriter.ops("Router", inputs, 3, domain=DOMAIN, **attributes)
    return [experts, weights]


def fuse_steps(rewriter: Rewriter) -> None:
    """Merge nodes of a graph that is lowered to our ops."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = rewriter.model.graph
    RemoveUnusedNodesPass()(rewriter.model)  # a router that an op has taken would still read its norm
    for call in find_calls(rewriter.model, "SwiGLU"):
        _fuse_mlp(rewriter, call)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in _own(graph, "Linear"):
        assert node.inputs[0] is not None
        readers.setdefault(node.inputs[0], []).append(node)
    for linears in readers.values():
        for alike in _sort_alike(linears):
            for start in range(0, len(alike), _MOST_MATRICES):
                _fuse_linears(rewriter, alike[start : start + _MOST_MATRICES])
    for node in _own(graph, "Mlp"):
        _take_shared(rewriter, node)
    for kind in ("Router", "Projections", "Mlp"):
        for node in _own(graph, kind):
            _take_norm(rewriter, node)
    for node in _own(graph, "Router"):
        _fuse_mixture(rewriter, node)
    graph.sort()


def _own(graph: ir.Graph, kind: str) -> list[ir.Node]:
    return [node for node in graph if _is_own(node, kind)]


def _fuse_mlp(rewriter: Rewriter, call: ir.Node) -> None:
    """gate_up, `SwiGLU` and down as one op, where nothing stands between them and their codes are alike."""
    first = call.inputs[0].producer() if call.inputs[0] is not None else None
    second = _only_reader(call.outputs[0])
    if first is None or second is None or not _is_linear(first) or not _is_linear(second):
        return
    if _only_reader(first.outputs[0]) is not call or _bits(first) != _bits(second):
        return
    matrices = [value for node in (first, second) for value in _fill(node.inputs[1:], 3)]
    inputs = [first.inputs[0], None, None, *matrices]
    y = rewriter.op("Mlp", inputs, domain=DOMAIN, bits=_bits(first))
    _replace(rewriter, [first, call, second], second.outputs, [y])


def _take_shared(rewriter: Rewriter, node: ir.Node) -> None:
    """The gate of a shared expert, and the sum with the experts, go into its `Mlp`."""
    gone, y, share = [node], node.outputs[0], None
    product = _only_reader(y)
    if product is not None and product.op_type == "Mul" and not product.domain:
        gate = _find_share(_other_input(product, y), node.inputs[0])
        if gate is None:
            return
        gone, share, y = [*gone, product, *gate], gate[0].inputs[1], product.outputs[0]
    add = _only_reader(y)
    if add is None or add.op_type != "Add" or add.domain:
        return
    experts = _other_input(add, y)
    source = experts.producer() if experts is not None else None
    if source is None or not _is_own(source, "Experts"):
        return
    inputs = [*_fill(node.inputs, _MLP_INPUTS), experts, share]
    new = rewriter.op("Mlp", inputs, domain=DOMAIN, **attributes_of(node))
    _replace(rewriter, [*gone, add], add.outputs, [new])


def _find_share(value: ir.Value | None, x: ir.Value | None) -> list[ir.Node] | None:
    """`Gemm` of x with a row [1, H] and its `Sigmoid`, whose output is `value`; None where it is something else."""
    sigmoid = value.producer() if value is not None else None
    if sigmoid is None or sigmoid.op_type != "Sigmoid" or _only_reader(sigmoid.outputs[0]) is None:
        return None
    product = sigmoid.inputs[0].producer() if sigmoid.inputs[0] is not None else None
    if product is None or product.op_type != "Gemm" or _only_reader(product.outputs[0]) is None:
        return None
    return [product, sigmoid] if product.inputs[0] is x else None


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _sort_alike(linears: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Linears of one input by what their activations are quantized like: bits and group."""
    kinds: dict[tuple[int, Any], list[ir.Node]] = {}
    for node in linears:
        scales = node.inputs[2]
        assert scales is not None and scales.shape is not None
        kinds.setdefault((_bits(node), scales.shape[1]), []).append(node)
    return list(kinds.values())


def _fuse_linears(rewriter: Rewriter, linears: list[ir.Node]) -> None:
    """Linears of one input, and what is added to what they give where that is a constant."""
    inputs: list[ir.Value | None] = [linears[0].inputs[0], None, None]
    old_nodes, old_values = [], []
    for node in linears:
        operands, after = _fill(node.inputs[1:], 3), _bias_after(node)
        old_nodes += [node] if after is None else [node, after]
        old_values.append((after or node).outputs[0])
        bias = None if after is None else after.inputs[1]
        inputs += [*operands, bias]
    outputs = 1 if len(linears) == 1 else len(linears) + 1
    values = rewriter.ops("Projections", _trim(inputs), outputs, domain=DOMAIN, bits=_bits(linears[0]))
    given = [values[0], *values[2:]]
    _leave_out(values, given)  # the residual sum, which is not there yet
    _replace(rewriter, old_nodes, old_values, given)


def _bias_after(node: ir.Node) -> ir.Node | None:
    """The node that adds a stored vector to a linear's output."""
    after = _only_reader(node.outputs[0])
    if after is None or after.op_type != "Add" or after.domain or after.inputs[0] is not node.outputs[0]:
        return None
    bias = after.inputs[1]
    source = bias.producer() if bias is not None else None
    stored = source.inputs[0] if source is not None and source.op_type == "Cast" else bias
    return after if stored is not None and stored.const_value is not None else None


def _take_norm(rewriter: Rewriter, node: ir.Node) -> None:
    """The norm of a node's input, and the residual sum before that, go into the node."""
    x = node.inputs[0]
    norm = x.producer() if x is not None else None
    if x is None or norm is None or norm.op_type != "RMSNormalization" or x.is_graph_output():
        return
    if norm.attributes.get_int("axis", -1) != -1:
        return
    others = [use.node for use in x.uses() if use.node is not node]
    if others and node.op_type != "Router":
        return
    summed = norm.inputs[0]
    assert summed is not None
    add = summed.producer()
    if add is not None and (add.op_type != "Add" or add.domain or summed.is_graph_output() or _adds_constant(add)):
        add = None
    gone, sources = [node, norm], [summed, None]
    kept = {"epsilon": float(norm.attributes.get_float("epsilon", 1e-5))}
    if add is not None:
        gone.append(add)
        sources = [add.inputs[0], add.inputs[1]]
        scaled = _scaled(sources[1])
        if scaled is not None:
            product, sources[1], kept["residual_scale"] = scaled
            gone.append(product)
    place = _SUM[node.op_type]
    count = max(len(node.outputs), place + 1 if add is not None else 0, _NORM + 1 if others else 0)
    inputs = [*sources, norm.inputs[1], *node.inputs[3:]]
    new = rewriter.ops(node.op_type, inputs, count, domain=DOMAIN, **attributes_of(node), **kept)
    old, given = [], []
    for index, value in enumerate(node.outputs):
        if value.name:
            old.append(value)
            given.append(new[index])
    if add is not None:
        old.append(summed)
        given.append(new[place])
    if others:
        old.append(x)
        given.append(new[_NORM])
    _leave_out(new, given)
    _replace(rewriter, gone, old, given)


def _scaled(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None, float] | None:
    """A product of a value, and nothing else, with a stored number: the node, the value and the number."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Mul" or node.domain or _only_reader(value) is None:
        return None
    x, factor = node.inputs
    if factor is None or factor.const_value is None or factor.const_value.size != 1:
        return None
    return node, x, float(factor.const_value.numpy().item())


def _fuse_mixture(rewriter: Rewriter, router: ir.Node) -> None:
    """A router, its experts and the MLP that adds them to what tokens share, as one op where they read one input."""
    logits, chosen, weights = router.outputs[:3]
    normed = router.outputs[_NORM] if len(router.outputs) > _NORM else router.inputs[0]
    readers = [use.node for use in chosen.uses() if _is_own(use.node, "Experts")]
    if len(readers) != 1 or list(logits.uses()) or logits.is_graph_output():
        return
    experts = readers[0]
    if experts.inputs[0] is not normed or experts.inputs[1] is not chosen or experts.inputs[2] is not weights:
        return
    attributes = {**attributes_of(router), **attributes_of(experts), "shared_bits": _bits(experts)}
    inputs = [*_fill(router.inputs, _ROUTER_INPUTS), *_fill(experts.inputs[3:], _EXPERTS_INPUTS)]
    gone, y = [router, experts], experts.outputs[0]
    mlp = _only_reader(y)
    if mlp is not None and _is_own(mlp, "Mlp") and mlp.inputs[0] is normed and mlp.inputs[_MLP_INPUTS] is y:
        gone, y = [*gone, mlp], mlp.outputs[0]
        inputs += [*mlp.inputs[3:_MLP_INPUTS], *mlp.inputs[_MLP_INPUTS + 1 :]]
        attributes["shared_bits"] = _bits(mlp)
    new = rewriter.ops("Moe", _trim(inputs), _NORM + 2, domain=DOMAIN, **attributes)
    old = {y: new[-1], **dict(zip(router.outputs[1:], new[1:-1], strict=False))}
    read = [value for value in old if value.is_graph_output() or any(use.node not in gone for use in value.uses())]
    _leave_out(new, [old[value] for value in read])
    _replace(rewriter, gone, read, [old[value] for value in read])


def _leave_out(outputs: Sequence[ir.Value], used: Sequence[ir.Value]) -> None:
    """Outputs without a name are not computed."""
    for value in outputs:
        if value not in used:
            value.name = ""


def _adds_constant(add: ir.Node) -> bool:
    return any(value is None or value.const_value is not None for value in add.inputs)


def _replace(rewriter: Rewriter, gone: list[ir.Node], old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Put the nodes made since the last replacement in the place of several, in which `old` become `new`."""
    graph, order = rewriter.model.graph, list(rewriter.model.graph)
    first = min(gone, key=order.index)
    rewriter.replace_all(first, gone, old, new)
    assert all(node not in gone for node in graph)


def _is_linear(node: ir.Node) -> bool:
    return _is_own(node, "Linear")


def _is_own(node: ir.Node, kind: str) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, kind)


def _bits(node: ir.Node) -> int:
    return node.attributes["bits"].as_int()


def _fill(values: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    return [*values, *[None] * (count - len(values))]


def _trim(values: list[ir.Value | None]) -> list[ir.Value | None]:
    """Without those at the end that are not there."""
    while values[-1] is None:
        values.pop()
    return values


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
