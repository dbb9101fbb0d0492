"""Lowered and packed weights of networks, kept until a parameter or buffer changes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from ..errors import NotCovered
from ..lower import FusedNetwork, lower
from .cpu_layout import describe

if TYPE_CHECKING:
    from ..network import ResidualNetwork


def state_key(net: ResidualNetwork) -> Hashable:
    """Changes when a parameter or buffer is replaced or written to (load_state_dict, an optimiser's step, `.to`)."""
    key: list[Hashable] = []
    for module in net.model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                # Tensors made under inference_mode count no versions; their values have to do.
                version = float(tensor.double().sum()) if tensor.is_inference() else tensor._version
                key.append((id(tensor), tensor.data_ptr(), version))
    return tuple(key)


class Packed:
    """One network in one state: its lowered form, or why it has none, and its weights as the kernels read them."""

    def __init__(self, net: ResidualNetwork, key: Hashable) -> None:
        self.key = key
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


_CACHE: weakref.WeakKeyDictionary[torch.nn.Module, Packed] = weakref.WeakKeyDictionary()


def packed(net: ResidualNetwork) -> Packed:
    """The packed form of the network's present state; lowered again only when something changed."""
    key = state_key(net)
    found = _CACHE.get(net.model)
    if found is None or found.key != key:
        found = _CACHE[net.model] = Packed(net, key)
    return found
