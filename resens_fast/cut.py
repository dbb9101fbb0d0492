"""Cut a traced graph into stem, blocks and head at the nodes through which all data flows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx, nn

from resens_fast.errors import WrapError
from resens_fast.piece import ancestors
from resens_fast.roles import ADDS, is_add, is_product, one_minus, operands, roles


@dataclasses.dataclass
class Element:
    """What lies between two neighbouring cut points: one operation, or several paths that meet in `end`."""

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    steps: tuple[str, ...]
    branch: fx.Node | None = None  # the two sides of a residual element
    shortcut: fx.Node | None = None
    transform: fx.Node | None = None  # a highway's gate t
    owner: str = ""  # module that runs this block and no other, "" when there is none

    @property
    def residual(self) -> bool:
        return self.branch is not None

    @property
    def parametrised(self) -> bool:
        return any(step in ("conv", "norm", "linear", "other") for step in self.steps)


@dataclasses.dataclass
class BlockCut:
    """One block as nodes of the traced graph: x -> p (prologue) -> shortcut, branch -> sum -> y (closing)."""

    x: fx.Node
    p: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    sum: fx.Node
    y: fx.Node
    name: str
    gateable: bool = True
    transform: fx.Node | None = None


@dataclasses.dataclass
class NetworkCut:
    image: fx.Node
    stem: fx.Node
    blocks: list[BlockCut]
    logits: fx.Node


def cut(graph: fx.Graph, model: nn.Module) -> NetworkCut:
    """Stem, blocks and head of a traced graph; raises WrapError when there are no blocks."""
    elements = _elements(graph, model)
    image = next(node for node in graph.nodes if node.op == "placeholder")
    for element in elements:
        _split_sides(element, graph, model)
    blocks = [i for i, element in enumerate(elements) if element.residual]
    if not blocks:
        return _cut_sequential(image, elements)
    _name_owners([elements[i] for i in blocks], model)
    bounds = [_first_prologue(elements, blocks[0])]
    for here, after in zip(blocks, [*blocks[1:], None], strict=True):
        bounds.append(_closing_end(elements, here, after))
    cuts: list[BlockCut] = []
    for i, (begin, end) in zip(blocks, itertools.pairwise(bounds), strict=True):
        e = elements[i]
        assert e.branch is not None
        assert e.shortcut is not None
        x = elements[begin].start
        cuts.append(
            BlockCut(
                x,
                e.start,
                e.shortcut,
                e.branch,
                e.end,
                elements[end - 1].end,
                e.owner or f"block{len(cuts)}",
                True,
                e.transform,
            )
        )
    return NetworkCut(image, cuts[0].x, cuts, elements[-1].end)


def _elements(graph: fx.Graph, model: nn.Module) -> list[Element]:
    """Walk the nodes in order and close an element wherever a single value is alive."""
    live: dict[fx.Node, int] = {}
    elements: list[Element] = []
    start: fx.Node | None = None
    nodes: list[fx.Node] = []
    for node in graph.nodes:
        depends = [m for m in node.all_input_nodes if m in live]
        for m in depends:
            live[m] -= 1
        if node.op == "output":
            break
        if node.op != "placeholder":
            nodes.append(node)
            if not depends:
                continue  # a parameter or constant: not part of the flow
        for m in [m for m in depends if live[m] == 0]:
            del live[m]
        live[node] = len(node.users)
        if len(live) == 1 and "shape" in node.meta:
            if start is not None:
                steps = tuple(step for n in nodes for step in roles(n, model))
                elements.append(Element(start, node, tuple(nodes), steps))
            start, nodes = node, []
    if len(live) > 1 or start is None or nodes:
        raise WrapError(
            "the model's output does not come from one image tensor alone; wrap() needs images in and logits out"
        )
    return elements


def _split_sides(e: Element, graph: fx.Graph, model: nn.Module) -> None:
    """Find shortcut and branch of an element that ends in a sum of two paths from its start."""
    if len(e.end.meta.get("shape", ())) != 4 or _lerp(e, graph) or not is_add(e.end):
        return
    sides = operands(e.end)
    from_start = all(isinstance(s, fx.Node) and (s is e.start or e.start in _reach(s, e)) for s in sides)
    if not from_start or sides[0] is sides[1]:
        return
    if _highway(e, sides, graph, model):
        return
    identity = [s for s in sides if _is_start(s, e.start)]
    order = sorted(_addends(e), key=lambda s: (s not in identity, not _is_start(s, e.start), *_weight(s, e, model)))
    e.shortcut = order[0]
    if e.shortcut in sides:
        e.branch = sides[sides[0] is e.shortcut]
    else:  # (x + f) + g is x + (f + g)
        e.branch = functools.reduce(lambda a, b: _insert(graph, e, operator.add, a, b), order[1:])
    e.transform = _gate_of(e.branch, e.shortcut)


def _addends(e: Element) -> list[fx.Node]:
    """The two or more paths from the element's start that its end sums up.

    A sum in which one addend is made from the other is a residual of its own inside a path, and stays whole.
    """
    found: list[fx.Node] = []
    stack = list(operands(e.end))[::-1]
    while stack:
        node = stack.pop()
        pair = operands(node) if node is not e.start and is_add(node) and len(node.users) == 1 else ()
        shapes = {m.meta.get("shape") if isinstance(m, fx.Node) else None for m in pair}
        if shapes == {e.end.meta["shape"]}:
            paths = [{m, *_reach(m, e)} for m in pair]
            if all(e.start in path for path in paths) and not any(
                m in path and m is not e.start for m, path in zip(pair, paths[::-1], strict=True)
            ):
                stack += pair[::-1]
                continue
        found.append(node)
    return found


def _gate_of(branch: fx.Node, shortcut: fx.Node) -> fx.Node | None:
    """t, where the branch is t * (f - shortcut) already."""
    if is_product(branch):
        for t, d in (operands(branch), operands(branch)[::-1]):
            nodes = isinstance(d, fx.Node) and isinstance(t, fx.Node)
            if nodes and _target(d) in ("sub", "sub_", "subtract") and operands(d)[1:] == (shortcut,):
                return t
    return None


def _lerp(e: Element, graph: fx.Graph) -> bool:
    """torch.lerp(x, f, t) is x + t * (f - x)."""
    if _target(e.end) != "lerp" or len(e.end.args) != 3 or not all(isinstance(a, fx.Node) for a in e.end.args):
        return False
    s, f, t = e.end.args
    return _gated(e, s, f, t, graph)  # type: ignore[arg-type]


def _highway(e: Element, sides: Sequence[fx.Node], graph: fx.Graph, model: nn.Module) -> bool:
    """t * f + s * (1 - t), in any order of the operands, also with the carry gate c = 1 - t learned instead of t."""
    if not all(is_product(side) for side in sides):
        return False
    readings: list[tuple[Any, Any, Any, Any]] = []
    for one, other in (tuple(sides), tuple(sides)[::-1]):
        for gate, f in (operands(one), operands(one)[::-1]):
            for rest, s in (operands(other), operands(other)[::-1]):
                nodes = all(isinstance(v, fx.Node) for v in (gate, f, rest, s))
                if nodes and gate is not rest and one_minus(rest) is gate:
                    readings += [(gate, f, rest, s), (rest, s, gate, f)]
    if not readings:
        return False
    # Of the two readings the carried side is the block's input, or else the lighter one.
    t, f, _, s = min(readings, key=lambda r: (not _is_start(r[3], e.start), _weight(r[3], e, model)))
    return _gated(e, s, f, t, graph)


def _gated(e: Element, s: fx.Node, f: fx.Node, t: fx.Node, graph: fx.Graph) -> bool:
    difference = _insert(graph, e, operator.sub, f, s)
    e.shortcut, e.branch, e.transform = s, _insert(graph, e, operator.mul, t, difference), t
    return True


def _insert(graph: fx.Graph, e: Element, operation: Callable[..., Any], a: fx.Node, b: fx.Node) -> fx.Node:
    """A node of our own at the element's end."""
    with graph.inserting_before(e.end):
        node = graph.call_function(operation, (a, b))
    node.meta = {"owner": e.end.meta["owner"], "shape": e.end.meta["shape"], "writes": (), "alias": ()}
    return node


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _reach(node: fx.Node, e: Element) -> set[fx.Node]:
    inside = ancestors(node, [e.start])
    return {m for n in inside for m in n.all_input_nodes}


def _is_start(node: fx.Node, start: fx.Node) -> bool:
    """Whether a side is the block's input itself, seen through what does nothing in eval mode (dropout, drop-path)."""
    while node is not start and node.meta.get("nothing") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node is start


def _weight(side: fx.Node, e: Element, model: nn.Module) -> tuple[int, int, int]:
    """(convolutions on the longest path, parameters, operations) of a side: the lighter one is the shortcut."""
    inside = ancestors(side, [e.start])
    depth: dict[fx.Node, int] = {}
    parameters = 0
    for node in side.graph.nodes:
        if node not in inside:
            continue
        own = int("conv" in roles(node, model))
        depth[node] = own + max((depth.get(m, 0) for m in node.all_input_nodes), default=0)
        if node.op == "call_module":
            parameters += sum(p.numel() for p in model.get_submodule(str(node.target)).parameters())
    return depth.get(side, 0), parameters, len(inside)


def common_owner(paths: Iterable[str]) -> str:
    """The deepest module that contains all of them."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _name_owners(blocks: list[Element], model: nn.Module) -> None:
    """Give every block the deepest module that runs its branch and no other block, with its sum if possible."""
    levels: list[list[str]] = [[], [], []]
    for e in blocks:
        assert e.branch is not None
        inside = ancestors(e.branch, [e.start]) - {e.end}
        owners = [str(n.meta["owner"]) for n in inside]
        modules = [str(n.target) for n in inside if n.op == "call_module" and any(True for _ in _weights(n, model))]
        levels[0].append(common_owner([*owners, str(e.end.meta["owner"])]))
        levels[1].append(common_owner(owners))
        levels[2].append(common_owner(modules))
    taken: set[str] = set()
    for names in levels:
        count = Counter(names)
        for e, name in zip(blocks, names, strict=True):
            outer = any(other.startswith(name + ".") for other in names)
            if not e.owner and name and count[name] == 1 and not outer and name not in taken:
                e.owner = name
                taken.add(name)


def _weights(node: fx.Node, model: nn.Module) -> Iterable[nn.Parameter]:
    return model.get_submodule(str(node.target)).parameters()


def _inside(e: Element, owner: str) -> bool:
    path = str(e.end.meta["owner"])
    return bool(owner) and (path == owner or path.startswith(owner + "."))


def _first_prologue(elements: list[Element], first: int) -> int:
    """Index of the first element of the first block: what its own module runs before the paths part belongs to it."""
    begin = first
    while begin > 0 and _inside(elements[begin - 1], elements[first].owner):
        begin -= 1
    return begin


def _closing_end(elements: list[Element], here: int, after: int | None) -> int:
    """Index past the last element of a block: its module's own operations, else the activation right after the sum."""
    end = here + 1
    limit = len(elements) if after is None else after
    while end < limit and _inside(elements[end], elements[here].owner):
        end += 1
    if end > here + 1:
        return end
    while end < limit and elements[end].steps in (("relu",), ("act",)):
        if after is not None and _inside(elements[end], elements[after].owner):
            break
        end += 1
    return end


def _cut_sequential(image: fx.Node, elements: list[Element]) -> NetworkCut:
    """Blocks of a network without shortcuts: convolution, norm, activation, then pooling as the closing."""
    convs = [i for i, e in enumerate(elements) if "conv" in e.steps]
    if len(convs) < 2 or any(
        _target(e.end) in ADDS for e in elements if len(e.nodes) > 1 and e.end.op != "call_module"
    ):
        raise WrapError(
            "nothing residual was found: no sum of two paths that start at one tensor, "
            "and fewer than two convolutions in a row"
        )
    stop = convs[-1] + 1
    while stop < len(elements) and not set(elements[stop].steps) & {"flatten", "linear", "gap", "adaptive", "other"}:
        stop += 1
    blocks: list[BlockCut] = []
    for begin, end in zip(convs, [*convs[1:], stop], strict=True):
        unit = elements[begin:end]
        free = len(unit)
        while free > 1 and not unit[free - 1].parametrised:
            free -= 1
        while free < len(unit) and not set(unit[free].steps) & {"maxpool", "avgpool", "adaptive", "drop"}:
            free += 1
        x, inner, y = unit[0].start, unit[free - 1].end, unit[-1].end
        owner = str(unit[0].end.target) if unit[0].end.op == "call_module" else unit[0].end.meta["owner"]
        name = owner or f"block{len(blocks)}"
        blocks.append(BlockCut(x, x, x, inner, inner, y, name, gateable=False))
    names = Counter(b.name for b in blocks)
    for i, block in enumerate(blocks):
        if names[block.name] > 1:
            block.name = f"block{i}"
    return NetworkCut(image, blocks[0].y, blocks[1:], elements[-1].end)
