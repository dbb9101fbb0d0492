"""What a sweep and a plan need to know about a network: names and shapes of its blocks, no tensors, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The blocks of a network in order; every tuple has one entry per block.

    `shapes_in` and `shapes_out` are (channels, height, width) of the state at the images' size `input_shape`.
    A block is `deletable` when its shortcut alone gives a state of the right shape, `gateable` when a real gate may
    scale its branch, and it `drops` when deleting it leaves the state exactly as it was, so that nothing has to run.
    """

    names: tuple[str, ...]
    stages: tuple[int, ...]
    kinds: tuple[str, ...]
    transitions: tuple[bool, ...]
    deletable: tuple[bool, ...]
    drops: tuple[bool, ...]
    gateable: tuple[bool, ...]
    shapes_in: tuple[Shape, ...]
    shapes_out: tuple[Shape, ...]
    input_shape: Shape
    classes: int

    def __post_init__(self) -> None:
        n = len(self.names)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("input_shape", "classes") and len(value) != n:
                raise ValueError(f"{field.name} has {len(value)} entries for {n} blocks; give one per block")

    def __len__(self) -> int:
        return len(self.names)

    def exchangeable(self, i: int, j: int) -> bool:
        """Whether blocks i and j may change places: equal shapes, and neither of them is a transition."""
        same = self.shapes_in[i] == self.shapes_in[j] and self.shapes_out[i] == self.shapes_out[j]
        return same and not self.transitions[i] and not self.transitions[j]

    @property
    def choosable(self) -> tuple[bool, ...]:
        """Whether a path may go through the block's branch or around it; every path enters the others."""
        return tuple(a and b for a, b in zip(self.deletable, self.gateable, strict=True))

    @property
    def digest(self) -> str:
        """The sha256 of everything above: two networks with the same digest accept the same sweeps."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """Plain lists and numbers, for a manifest in JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Structure:
        """From `to_dict`, also after a round trip through JSON."""

        def tuples(value: object) -> object:
            return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value

        return cls(**{name: tuples(value) for name, value in values.items()})  # type: ignore[arg-type]
