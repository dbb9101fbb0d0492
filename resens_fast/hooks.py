"""Forward hooks, which variants of a network may pass by: they run through its operations, not through its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .network import ResidualNetwork


def passed_by(net: ResidualNetwork, fused: bool) -> str | None:
    """Which forward hook would not be called, and why; or None.

    `fused` engines call no module.  The others call those that the trace kept whole (convolutions, batch norms, what
    is inside a module that cannot be traced), but not the containers around them, such as a block.
    """
    hooked = [name for name, module in net.model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if not hooked:
        return None
    if fused:
        return f"module {hooked[0] or 'model'!r} has a forward hook, which folded parameters would pass by"
    called = {str(node.target) for node in net.recipe.stem.out.graph.nodes if node.op == "call_module"}
    for name in hooked:
        if not any(name == leaf or name.startswith(leaf + ".") for leaf in called):
            return (
                f"module {name or 'model'!r} has a forward hook, which no variant of the network would call: "
                "remove it, or register it on a module inside"
            )
    return None
