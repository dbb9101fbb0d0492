"""Lowered and packed weights of networks, kept until a parameter or buffer changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as nn_module

from ..errors import NotCovered
from ..lower import FusedNetwork, lower
from .cpu_layout import describe

if TYPE_CHECKING:
    from ..network import ResidualNetwork


class Watch:
    """Sees whether a model's modules, their settings, parameters or buffers are replaced, moved or written to.

    Values are compared by their checksum, because writes through `p.data` or NumPy count no version: about 0.05 ms per
    megabyte, looked at before every forward.  Tensors elsewhere than on the CPU are trusted to count their versions.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = tuple(model.modules())
        # A module's own attributes: its tensors, its submodules, and settings such as a stride or a patched forward.
        self._places: list[dict[str, Any]] = [
            d for m in self._modules for d in (m.__dict__, m._modules, m._parameters, m._buffers)
        ]
        tensors = [t for m in self._modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None]
        self._near = [t for t in tensors if t.device.type == "cpu"]
        self._far = [t for t in tensors if t.device.type != "cpu" and not t.is_inference()]
        self._hooks = [d for m in self._modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks]
        self._held = list(self._objects())
        self._then = self._contents()

    def _objects(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._places))

    def _contents(self) -> tuple[list[tuple[int, int]], int]:
        checksum: int = torch.ops.resens_fast.cpu_checksum(self._near, torch.get_num_threads())
        return [(t.data_ptr(), t._version) for t in self._far], checksum

    def changed(self) -> bool:
        same = sum(map(len, self._places)) == len(self._held) and all(map(is_, self._objects(), self._held))
        return not same or self._contents() != self._then

    def plain(self) -> bool:
        """Whether all modules are in eval mode and none has a forward hook."""
        return not any(self._hooks) and not any(map(attrgetter("training"), self._modules))


class Packed:
    """One network in one state: its lowered form, or why it has none, and its weights as the kernels read them."""

    def __init__(self, net: ResidualNetwork) -> None:
        self.watch = Watch(net.model)
        self.reason: str | None = None
        self.layout = self.raw = torch.empty(0, device="cpu")
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
