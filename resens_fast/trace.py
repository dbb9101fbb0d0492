"""Trace a model with torch.fx in eval mode into a functional graph whose nodes know their module and their shape."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from resens_fast.errors import WrapError, first_line

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class _Untraceable(Exception):
    """A module whose forward cannot be traced; it becomes a leaf and the trace starts again."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


def _is_torch_leaf(module: nn.Module) -> bool:
    """Whether it is, or inherits from, a layer of torch.nn (a parametrized convolution is still a convolution)."""
    if isinstance(module, CONTAINERS):
        return False
    layers = (cls for cls in type(module).__mro__ if cls is not nn.Module and issubclass(cls, nn.Module))
    return any(cls.__module__.startswith(("torch.nn.modules", "torch.ao.nn")) for cls in layers)


class Tracer(fx.Tracer):
    """Keeps the layers of torch.nn whole, inlines what is not registered, and notes the module that runs each node."""

    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.owners: list[str] = [""]
        self.inputs = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or _is_torch_leaf(m):
            return True
        # A module with nothing inside and one input (a padding lambda, drop-path) is one operation. One with several
        # inputs may be the very add we look for.
        empty = next(m.children(), None) is None and next(m.parameters(), None) is None
        return empty and self.inputs <= 1

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:  # built inside forward: no registered module, so its operations belong to the caller
            return forward(*args, **kwargs)
        self.inputs = sum(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.owners.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(path, first_line(error)) from error
        finally:
            self.owners.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.owners[-1]
        return node


def _normalise(graph: fx.Graph, model: nn.Module) -> None:
    """Remove what computes nothing: assertions, unused inputs, plain identities, dead code."""
    for node in reversed(graph.nodes):
        is_assert = node.op == "call_function" and "assert" in getattr(node.target, "__name__", "")
        if is_assert:
            node.replace_all_uses_with(node.all_input_nodes[0] if node.all_input_nodes else None)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise _Untraceable(_user_owner(node), "it makes a constant tensor inside forward")
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output", "call_module") or _writes(n))
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users][::-1]:
        if node is not next(iter(graph.nodes)):
            graph.erase_node(node)


def _user_owner(node: fx.Node) -> str:
    return next((str(user.meta.get("owner", "")) for user in node.users), "")


def _writes(node: fx.Node) -> bool:
    """Whether a node without readers may still matter because it writes into one of its inputs."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and node.op != "call_module"
    return in_place or node.target is operator.setitem


class _Probe:
    """Runs the graph once and notes shapes, which nodes write into which tensors, and which share memory."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.runner = fx.Interpreter(model, garbage_collect_values=False, graph=graph)
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def run(self, example: torch.Tensor) -> None:
        env = self.runner.env
        self.runner.args_iter = iter((example,))
        for node, here in self.position.items():
            tensors = {m: v for m, v in env.items() if isinstance(v, torch.Tensor)}
            before = {m: v._version for m, v in tensors.items()}
            result = env[node] = self.runner.run_node(node)
            changed = [m for m, version in before.items() if tensors[m]._version != version]
            self._note(node, [m for m in node.all_input_nodes if m in tensors], changed, result)
            for m in changed:
                self._rewire(node, m, tensors[m], result)
            for m in [m for m in env if all(self.position[user] <= here for user in m.users)]:
                del env[m]

    def _note(self, node: fx.Node, inputs: list[fx.Node], changed: list[fx.Node], result: Any) -> None:
        node.meta["writes"] = tuple(m for m in inputs if m in changed)
        node.meta["alias"] = ()
        if isinstance(result, torch.Tensor):
            env = self.runner.env
            memory = result.untyped_storage().data_ptr()
            node.meta["shape"] = tuple(result.shape)
            node.meta["alias"] = tuple(m for m in inputs if env[m].untyped_storage().data_ptr() == memory)
            node.meta["nothing"] = len(inputs) == 1 and result is env[inputs[0]] and not changed
        elif isinstance(result, int):
            node.meta["int"] = result

    def _rewire(self, n: fx.Node, m: fx.Node, old: torch.Tensor, new: Any) -> None:
        """After n wrote into m, whoever reads m later reads n's result, so that the graph needs no memory order."""
        late = [user for user in m.users if self.position[user] > self.position[n]]
        if not late and m.op != "get_attr":
            return
        same = isinstance(new, torch.Tensor) and new.data_ptr() == old.data_ptr()
        if m.op == "get_attr" or not same or new.shape != old.shape or new.stride() != old.stride():
            raise _Untraceable(n.meta["owner"], f"{n.name} writes into {m.name}, which is read again in another form")
        m.replace_all_uses_with(n, delete_user_cb=lambda user: user in late)


def _move_batch_sizes(graph: fx.Graph) -> None:
    """Read a batch size where it is used: `x.size(0)` of an early tensor would tie the whole network together."""
    for node in list(graph.nodes):
        method = node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)
        shape = node.target is operator.getitem and node.args[1] == 0 and _is_shape(node.args[0])
        if not (method or shape):
            continue
        for user in list(node.users):
            first = user.args[0] if user.args else None
            usable = isinstance(first, fx.Node) and first.meta.get("shape", (None,))[0] == node.meta.get("int")
            if usable and first is not node:
                with graph.inserting_before(user):
                    size = graph.call_method("size", (first, 0))
                size.meta = {**node.meta, "owner": user.meta["owner"]}
                user.replace_input_with(node, size)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    attribute = node.target is getattr and str(node.args[1]) == "shape"
    return attribute or (node.op == "call_method" and node.target == "size" and len(node.args) == 1)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of forward that have a default: they keep it, so that `if targets is not None` can be followed."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.VAR_KEYWORD}


def trace(model: nn.Module, example: torch.Tensor) -> tuple[fx.Graph, dict[str, str]]:
    """The functional graph of `model` (already in eval mode and a private copy) on `example` [B, C, H, W].

    Every node carries `owner` (path of the module whose forward ran it), `shape`, `writes` (inputs it modifies),
    `alias` (inputs whose memory it shares) and `nothing` (it returned its input). Also returned: the modules that had
    to stay whole, with the reason. Raises WrapError with the place where the forward cannot be followed.
    """
    leaves: dict[str, str] = {}
    while True:
        try:
            graph = Tracer(frozenset(leaves)).trace(model, _defaults(model))
            _normalise(graph, model)
            with torch.no_grad():
                _Probe(model, graph).run(example)
            graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
            _move_batch_sizes(graph)
            return graph, leaves
        except _Untraceable as failure:
            if failure.path in leaves or not failure.path:
                where = f"module {failure.path}" if failure.path else "the model's own forward"
                raise WrapError(f"{where} cannot be traced: {failure.reason}") from failure
            leaves[failure.path] = failure.reason
        except WrapError:
            raise
        except Exception as error:
            raise WrapError(f"the model's forward cannot be traced: {first_line(error)}") from error
