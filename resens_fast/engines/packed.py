"""Lowered and packed weights of networks, kept until a parameter or buffer changes."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotCovered
from ..lower import FusedNetwork, lower
from .cpu_layout import describe

if TYPE_CHECKING:
    from ..network import ResidualNetwork


class Watch:
    """Sees whether a model's modules, parameters or buffers are replaced, moved or written to (load_state_dict, an
    optimiser's step, `.to`). Looking costs a few hundred nanoseconds a module: it is done before every forward.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = tuple(model.modules())
        self._places: list[dict[str, Any]] = [d for m in self._modules for d in (m._modules, m._parameters, m._buffers)]
        self._tensors = [
            t for m in self._modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None
        ]
        # Tensors made under inference_mode count no versions; their values have to do.
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._uncounted = [t for t in self._tensors if t.is_inference()]
        self._hooks = [d for m in self._modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._then = self._now()

    def _now(self) -> tuple[list[Any], ...]:
        # Identities mean something because everything that is looked at is also held.
        return (
            list(map(id, chain.from_iterable(map(dict.values, self._places)))),
            list(map(torch.Tensor.data_ptr, self._tensors)),
            list(map(attrgetter("_version"), self._counted)),
            [float(t.double().sum()) for t in self._uncounted],
        )

    def changed(self) -> bool:
        return self._now() != self._then

    def plain(self) -> bool:
        """Whether all modules are in eval mode and none has a forward hook."""
        return not any(self._hooks) and not any(map(attrgetter("training"), self._modules))


class Packed:
    """One network in one state: its lowered form, or why it has none, and its weights as the kernels read them."""

    def __init__(self, net: ResidualNetwork) -> None:
        self.watch = Watch(net.model)
        self.reason: str | None = None
        self.layout = self.raw = torch.empty(0)
        self._packed: dict[tuple[str, bool], torch.Tensor] = {}
        self._transposed: dict[str, torch.Tensor] = {}
        try:
            self.fused: FusedNetwork | None = lower(net)
            self.layout, self.raw = describe(self.fused)
        except NotCovered as reason:
            self.fused, self.reason = None, str(reason)

    def weights(self, isa: str, rounded: bool) -> torch.Tensor:
        """uint8, for one instruction set and operand type. Raises ValueError for an unknown instruction set."""
        if (isa, rounded) not in self._packed:
            self._packed[isa, rounded] = torch.ops.resens_fast.cpu_pack(self.layout, self.raw, isa, rounded)
        return self._packed[isa, rounded]

    def transposed(self, isa: str) -> torch.Tensor:
        """uint8, the float32 weights of the blocks' transposes, which only gradients need."""
        if isa not in self._transposed:
            self._transposed[isa] = torch.ops.resens_fast.cpu_pack_transposed(self.layout, self.raw, isa)
        return self._transposed[isa]


def packed(net: ResidualNetwork) -> Packed:
    """The packed form of the network's present state; lowered again only when something changed."""
    found: Packed | None = net.__dict__.get("_packed")  # not through the wrapper, whose attributes are the model's
    if found is None or found.watch.changed():
        found = net.__dict__["_packed"] = Packed(net)
    return found
