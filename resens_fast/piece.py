"""A part of a traced network: the operations between some inputs and one output, run against the live model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from resens_fast.roles import roles


def ancestors(out: fx.Node, stops: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node that `out` needs, itself included, not going through `stops`."""
    seen: set[fx.Node] = set(stops)
    edge = set(seen)
    stack = [out]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen - edge


class Piece:
    """The sub-graph from `inputs` to `out` of a traced graph, as a function of (model, *tensors).

    It holds no parameters: modules, parameters and buffers are looked up in the model at each call. It never writes
    into its inputs: where the network works in place on one, a copy is made first, unless the caller owns the tensor.
    """

    def __init__(self, out: fx.Node, inputs: Sequence[fx.Node], model: nn.Module) -> None:
        self.inputs = tuple(inputs)
        self.out = out
        needed = ancestors(out, inputs)
        self.nodes = tuple(node for node in out.graph.nodes if node in needed)
        self.identity = out in inputs
        self.model_parameters = _parameters(self.nodes, model)
        self.roles = {node: roles(node, model) for node in self.nodes}
        self._safe = self._compile(True)
        writes = any(node.meta.get("writes") for node in self.nodes)
        self._own = self._compile(False) if writes else self._safe

    def _compile(self, protect: bool) -> Callable[..., Any]:
        return compile_graph(*self.graph(protect))

    def graph(self, protect: bool = True) -> tuple[fx.Graph, fx.Node]:
        """A fresh graph of this piece and its output node; `protect` copies inputs that would be written into."""
        graph = fx.Graph()
        env = {node: graph.placeholder(f"x{i}") for i, node in enumerate(self.inputs)}
        shared = set(self.inputs)  # nodes that may share memory with an input
        for node in self.nodes:
            copies = {
                m: graph.call_method("clone", (env[m],)) for m in node.meta.get("writes", ()) if protect and m in shared
            }
            env[node] = graph.node_copy(node, lambda m, c=copies: c.get(m, env[m]))  # type: ignore[misc]
            if any(m in shared and m not in copies for m in node.meta.get("alias", ())):
                shared.add(node)
        return graph, env[self.out]

    def __call__(self, model: nn.Module, *inputs: torch.Tensor, own: bool = False) -> torch.Tensor:
        if self.identity:
            return inputs[0]
        result: torch.Tensor = (self._own if own else self._safe)(model, *inputs)
        return result

    def path(self) -> tuple[fx.Node, ...]:
        """The operations on tensors of the flow, without parameters and sizes."""
        return tuple(node for node in self.nodes if node.op != "get_attr" and "shape" in node.meta)

    def chain(self) -> tuple[str, ...] | None:
        """The roles along the piece if it is one chain of operations, else None."""
        steps: list[str] = []
        previous: set[fx.Node] = set(self.inputs)
        for node in self.path():
            if previous != {m for m in node.all_input_nodes if m.op != "get_attr" and "shape" in m.meta}:
                return None
            steps += self.roles[node]
            previous = {node}
        return tuple(steps)


def compile_graph(graph: fx.Graph, out: fx.Node) -> Callable[..., Any]:
    """The graph as a Python function of (model, *inputs)."""
    graph.output(out)
    code = graph.python_code("self")
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<resens_fast piece>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


def _parameters(nodes: Iterable[fx.Node], model: nn.Module) -> frozenset[str]:
    """Qualified names of the parameters that the nodes use."""
    names: set[str] = set()
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module":
            names.update(f"{target}.{name}" for name, _ in model.get_submodule(target).named_parameters())
        elif node.op == "get_attr" and isinstance(attribute(model, target), nn.Parameter):
            names.add(target)
    return frozenset(names)


def attribute(model: nn.Module, path: str) -> Any:
    """The parameter, buffer or other member of a model under a qualified name."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
