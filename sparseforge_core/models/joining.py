"""Products of one input are one product: queries, keys and values of a block, or gate and up, there and back.

A model's matrices stay what they are, each with its mask; while a block is compiled, those that multiply the same input
are laid side by side in the compute precision, which costs nothing where they are masked and cast anyway. One large
product keeps a GPU busier than three small ones, reads the input once, and adds up the input's gradient in the
product's own float32 instead of rounding each part first.

This works on the graph of forward and backward together, before they are parted:

    y_i = x W_i^T            becomes   y = x [W_1; W_2]^T, and slices of y
    dx = dy_1 W_1 + dy_2 W_2           dx = [dy_1, dy_2] [W_1; W_2]
    dW_i = dy_i^T x                    dW = [dy_1, dy_2]^T x, and slices of dW
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils import _pytree as pytree

Node = Any
"""An `fx.Node`, whose arguments are of a union of types that no check could narrow."""

aten = torch.ops.aten
MM, PERMUTE, CAT, SLICE, ADD = (
    aten.mm.default,
    aten.permute.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.add.Tensor,
)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
UNARY = (*RESHAPES, PERMUTE, torch.ops.prims.convert_element_type.default)
"""What is done to an input on its way into each of its products, and undone to its gradient on the way back."""
SWAPPED = [1, 0]


class Join(CustomGraphPass):
    """The pass, as torch.compile takes it: `options={"joint_custom_pre_pass": Join()}`."""

    def __call__(self, graph: fx.Graph) -> None:
        join(graph)

    def uuid(self) -> str:
        """What compiled code is kept under: another one where this file is another."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass
class _Product:
    """One y = x W^T, and the products of its backward where there is one."""

    forward: Node
    weight: Node
    to_input: Node | None = None
    to_weight: Node | None = None


def join(graph: fx.Graph) -> int:
    """Join what can be; returns how many groups of products that were."""
    products = [node for node in graph.nodes if node.op == "call_function" and node.target is MM]
    names = {side: _name(side) for node in products for side in node.args}
    late = _after_products(graph)
    groups: dict[Hashable, list[_Product]] = {}
    for node in products:
        source, factor = node.args
        if _swaps(factor) and factor.args[0] not in late and not _swaps(source):
            groups.setdefault((names[source], _dtype(node)), []).append(_Product(node, factor.args[0]))
    joined = [group for group in groups.values() if len(group) > 1]
    made: set[Node] = set()
    for group in joined:
        _find_backward(group, products, names)
        made |= _join(graph, group)
    if joined:
        stable_topological_sort(graph)
        graph.eliminate_dead_code()
        _refresh(graph, made)
        graph.lint()
    return len(joined)


def _name(node: Node) -> Hashable:
    """What a node is, whichever of several equal chains of views and casts it comes by."""
    if isinstance(node, fx.Node) and node.target in UNARY:
        arguments: tuple[Node, ...] = node.args
        first, *rest = arguments
        if node.target is PERMUTE and rest == [SWAPPED] and _swaps(first):
            return _name(first.args[0])
        target = RESHAPES[0] if node.target in RESHAPES else node.target
        return target, _name(first), repr(rest)
    named: Hashable = node
    return named


def _swaps(node: Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    return getattr(node, "target", None) is PERMUTE and list(node.args[1]) == SWAPPED


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _after_products(graph: fx.Graph) -> set[Node]:
    """Nodes that depend on a product: none of them is a weight."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.target is MM or any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _find_backward(group: list[_Product], products: list[Node], names: dict[Any, Hashable]) -> None:
    """Find the products of a group's backward, for all of its members or for none."""
    source = names[group[0].forward.args[0]]
    for product in group:
        wanted = _name(product.weight)
        back = [node for node in products if node is not product.forward and names[node.args[1]] == wanted]
        if len(back) != 1:
            break
        slope = names[back[0].args[0]]
        to_weight = [
            node
            for node in products
            if _swaps(node.args[0]) and _name(node.args[0].args[0]) == slope and names[node.args[1]] == source
        ]
        if len(to_weight) != 1:
            break
        product.to_input, product.to_weight = back[0], to_weight[0]
    if any(product.to_weight is None for product in group):
        for product in group:
            product.to_input = product.to_weight = None


def _join(graph: fx.Graph, group: list[_Product]) -> set[Node]:
    """Put one product in the place of a group's; returns the nodes made. Their order is put right later."""
    made: set[Node] = set()

    def call(target: Callable[..., Any], *arguments: Any) -> Node:
        node = graph.call_function(target, arguments)
        made.add(node)
        return node

    def parts(whole: Node, dim: int, nodes: list[Node]) -> None:
        ends = [0, *itertools.accumulate(node.meta["val"].shape[dim] for node in nodes)]
        for node, begin, end in zip(nodes, ends, ends[1:], strict=False):
            node.replace_all_uses_with(call(SLICE, whole, dim, begin, end))

    with graph.inserting_after(group[-1].forward):
        source = group[0].forward.args[0]
        weights = call(CAT, [product.weight for product in group], 0)
        outputs = call(MM, source, call(PERMUTE, weights, SWAPPED))
        back = [product.to_input for product in group if product.to_input is not None]
        to_weight = [product.to_weight for product in group if product.to_weight is not None]
        slopes = call(CAT, [node.args[0] for node in back], 1) if back else None
        if slopes is not None:
            taken = to_weight[0].args[1]
            parts(call(MM, call(PERMUTE, slopes, SWAPPED), taken), 0, to_weight)
            total = _sum_of(back)
            if total is not None:
                ends, chain = total
                found = call(MM, slopes, weights)
                for step in chain:
                    found = call(step.target, found, *step.args[1:])
                ends.replace_all_uses_with(found)
        parts(outputs, 1, [product.forward for product in group])
    return made


def _sum_of(nodes: list[Node]) -> tuple[Node, list[Node]] | None:
    """The node that is the sum of these after a chain of views and casts, and that chain; None if there is none."""
    chains = [_chain(node) for node in nodes]
    if len({tuple((step.target, repr(step.args[1:])) for step in chain) for chain in chains}) != 1:
        return None
    terms = {chain[-1] if chain else node for chain, node in zip(chains, nodes, strict=True)}
    if len(terms) != len(nodes):
        return None
    while len(terms) > 1:
        users = {user for term in terms if len(term.users) == 1 for user in term.users}
        sums = [
            user
            for user in users
            if user.target is ADD and not user.kwargs and set(user.args) <= terms and user.args[0] is not user.args[1]
        ]
        if not sums:
            return None
        terms = (terms - set(sums[0].args)) | {sums[0]}
    return terms.pop(), chains[0]


def _chain(node: Node) -> list[Node]:
    """The views and casts that follow a node, one after the other and used by nothing else."""
    found: list[Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in UNARY:
            break
        found.append(node)
    return found


def _refresh(graph: fx.Graph, changed: set[Node]) -> None:
    """Say of new nodes, and of what follows them, how it lies in memory now."""
    fake = detect_fake_mode([node.meta["val"] for node in graph.nodes if "val" in node.meta])
    assert fake is not None
    for node in graph.nodes:
        if node.op != "call_function" or (node not in changed and changed.isdisjoint(node.all_input_nodes)):
            continue
        if node.target is aten.view.default:  # a slice may lie so that no view of this shape is possible
            node.target = aten.reshape.default
        arguments = fx.map_arg((node.args, node.kwargs), lambda part: part.meta["val"])
        with fake:
            value = node.target(*arguments[0], **arguments[1])
        if node not in changed and _layout(value) == _layout(node.meta["val"]):
            continue
        node.meta["val"] = value
        changed.add(node)


def _layout(value: Any) -> list[Any]:
    return [
        (part.shape, part.stride(), part.dtype) if isinstance(part, torch.Tensor) else part
        for part in pytree.tree_leaves(value)
    ]
