"""Counter model of the CUDA tape kernel: how long a plan takes, from instruction counts and a card's rates alone.

    python benchmarks/roofline.py [--card h100] [--depth 110] [--width 16]

Counts follow csrc/cuda/geometry.cuh; tests compare them with the host harness (dynamic, exact) and with the compiled
SASS (static, exact). Times are estimates until measured. Three figures: `bound`, every unit overlaps every other;
`phased`, tensor cores and shared memory overlap within a convolution, element-wise phases and barriers stand alone;
`cautious`, no unit overlaps another. Needs Python only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

FIGURES = ("bound", "phased", "cautious")
WARPS = 8
RING_SLOTS = 4


@dataclass(frozen=True)
class Card:
    """Rates per multiprocessor and clock; those of mma.sync, not of wgmma or tcgen05."""

    name: str
    images: int  # per CTA, of networks of 16, 32 and 64 channels
    multiprocessors: int
    clock: float  # Hz, sustained
    mma: float  # clocks per m16n8k16 product
    l2_bytes: float  # per clock
    dense_peak: float  # FLOP/s, dense bf16 by the data sheet
    barrier: float = 40.0  # clocks from the last arrival to the first instruction after


CARDS = {
    # 62 % of wgmma's 2048 multiply-adds per clock, as measured by others on Hopper
    "h100": Card("H100 SXM", 2, 132, 1.70e9, 2048 / (0.62 * 2048), 32.0, 989e12),
    "a100": Card("A100 SXM", 1, 108, 1.41e9, 2.0, 32.0, 312e12),
    # mma.sync on Blackwell data-centre parts: taken as A100's rate per clock, for want of a source
    "b200": Card("B200", 2, 148, 1.80e9, 2.0, 32.0, 2250e12),
    "rtx4090": Card("RTX 4090", 1, 128, 2.50e9, 8.0, 24.0, 165e12),
}


@dataclass(frozen=True)
class Shape:
    """A stage as geometry.cuh lays it out."""

    channels: int
    side: int
    rows: int
    tiles: int
    sub_rows: int  # of the first convolution; 0: rolling, every row and weight is read once
    groups: int  # per chunk
    unroll: int

    @property
    def steps(self) -> int:
        return self.channels // 16

    @property
    def chunks(self) -> int:
        return 3 * self.steps // self.groups


def shape(images: int, stage: int, width: int = 16) -> Shape:
    """csrc/cuda/geometry.cuh, Geometry<stage, images, width>."""
    channels, side = width << stage, 32 >> stage
    rows = (8 * images, 4, 2 * images)[stage]
    tiles = 4 if width == 32 else 2 * images if stage == 1 else 2
    groups = (3, 2 if images == 1 else 3, 1 if images == 1 else 2)[stage]
    if width == 32:
        groups = (6, 3, 1)[stage]
    unroll = 1 if groups > 2 and rows * tiles >= 16 else groups
    sub_rows = rows if stage else 0 if width == 16 else 2
    return Shape(channels, side, rows, tiles, sub_rows, groups, unroll)


@dataclass
class Counts:
    """Warp instructions of one CTA (barriers: CTA-wide; bytes: weights from L2 or slots)."""

    mma: int = 0
    ldmatrix: int = 0
    lds128: int = 0
    sts32: int = 0
    cp_async: int = 0
    barriers: int = 0
    elementwise: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


def _chunks(count: int, size: int) -> Counts:
    sixteens = size // 16
    # A warp issues one cp.async for every pass in which it has an active lane.
    warps = sum(1 for start in range(0, sixteens, 32))
    return Counts(cp_async=count * warps, barriers=count, bytes=count * size)


def _convolution(s: Shape, sub_rows: int) -> Counts:
    sub_rows = sub_rows or s.rows
    loads = s.rows // sub_rows
    groups = 3 * s.steps
    return Counts(
        mma=WARPS * groups * 3 * s.rows * s.tiles,
        ldmatrix=WARPS * groups * loads * (sub_rows + 2),
        lds128=WARPS * groups * loads * 3 * s.tiles // 2,
    ) + _chunks(s.chunks, s.groups * 3 * s.steps * 512)


def identity(images: int, stage: int, width: int = 16) -> Counts:
    """An identity block that runs with gate 1."""
    s = shape(images, stage, width)
    registers = s.rows * s.tiles * 4
    # Per value: half a conversion each for x and the inner activation (with its ReLU); bias; closing ReLU.
    ends = Counts(sts32=WARPS * registers, elementwise=WARPS * registers * 3)
    return _convolution(s, s.sub_rows) + _convolution(s, s.rows) + ends


def transition(images: int, stage: int, projected: bool, width: int = 16) -> Counts:
    """A transition block into `stage` that runs; a projection reads the branch's input."""
    s, before = shape(images, stage, width), shape(images, stage - 1, width)
    groups = s.groups if (3 * before.steps) % s.groups == 0 else 1
    entry = Counts(
        mma=WARPS * 3 * before.steps * 3 * s.rows * s.tiles,
        ldmatrix=WARPS * 3 * before.steps * (2 * s.rows + 1),
        lds128=WARPS * 3 * before.steps * 3 * s.tiles // 2,
    ) + _chunks(3 * before.steps // groups, groups * 3 * s.steps * 512)
    if projected:
        entry += Counts(
            mma=WARPS * before.steps * s.rows * s.tiles,
            ldmatrix=WARPS * before.steps * s.rows,
            lds128=WARPS * before.steps * s.tiles // 2,
        ) + _chunks(1, before.steps * s.steps * 512)
    registers, leaving = s.rows * s.tiles * 4, before.rows * before.tiles * 4
    stores = WARPS * (leaving // 2 + registers // 2)
    ends = Counts(sts32=stores, elementwise=WARPS * (leaving + 4 * registers), barriers=3)
    return entry + _convolution(s, s.rows) + ends


def static_mma(images: int, width: int = 16) -> int:
    """mma in the compiled kernel: each loop's body once, as unrolled."""
    total = 0
    for stage in range(3):
        s = shape(images, stage, width)
        first = s.unroll * s.sub_rows or 3 * s.rows  # rolling: all rows and columns of the kernel in one piece
        total += 3 * s.tiles * (first + s.unroll * s.rows)
        if stage:  # enter_stage: projection, stride-2 convolution, second convolution
            total += s.rows * s.tiles * (1 + 3) + s.unroll * 3 * s.tiles * s.rows
    return total


def static_ldmatrix(images: int, width: int = 16) -> int:
    """ldmatrix in the compiled kernel."""
    total = 0
    for stage in range(3):
        s = shape(images, stage, width)
        first = s.unroll * (s.sub_rows + 2) if s.sub_rows else 3 * (s.rows + 2)
        total += first + s.unroll * (s.rows + 2)
        if stage:
            total += s.rows + 2 * s.rows + 1 + s.unroll * (s.rows + 2)
    return total


def static_lds128(images: int, width: int = 16) -> int:
    """Loads of weights in the compiled kernel, four registers each."""
    total = 0
    for stage in range(3):
        s = shape(images, stage, width)
        taps = 3 * s.tiles // 2
        total += taps * (s.unroll if s.sub_rows else 3) + taps * s.unroll
        if stage:
            total += s.tiles // 2 + taps + taps * s.unroll
    return total


@dataclass(frozen=True)
class Clocks:
    """Clocks of one CTA for one block, by unit."""

    tensor: float
    shared: float
    l2: float
    issue: float
    elementwise: float
    barriers: float

    @property
    def bound(self) -> float:
        return max(self.tensor, self.shared, self.l2, self.issue)

    @property
    def phased(self) -> float:
        return max(self.tensor, self.shared, self.l2) + self.elementwise + self.barriers

    @property
    def cautious(self) -> float:
        return self.tensor + self.shared + self.l2 + self.issue + self.barriers


def clocks(c: Counts, card: Card) -> Clocks:
    """128 bytes of shared memory, four instructions and `card`'s products per clock."""
    shared = 4 * (c.ldmatrix + c.lds128 + c.cp_async) + c.sts32
    issue = (c.mma + c.ldmatrix + c.lds128 + c.sts32 + c.cp_async + c.elementwise) / 4
    return Clocks(
        tensor=c.mma * card.mma,
        shared=shared,
        l2=c.bytes / card.l2_bytes,
        issue=issue,
        elementwise=(c.elementwise + c.sts32) / 4,
        barriers=c.barriers * card.barrier,
    )


def images_per_cta(card: Card, width: int = 16) -> int:
    """0 where the card's shared memory does not hold a wide image: then levels run."""
    return card.images if width == 16 else card.images // 2


def slot_clocks(card: Card, stage: int, width: int = 16) -> float:
    """A SAVE or a RESTORE of a state of `stage`, through L2."""
    return images_per_cta(card, width) * (width << stage) * (32 >> stage) ** 2 * 4 / card.l2_bytes


def network_clocks(card: Card, per_stage: int, figure: str = "phased", width: int = 16) -> float:
    """Clocks of one CTA for one tile through the intact network of 3 * per_stage blocks."""
    total, images = 0.0, images_per_cta(card, width)
    for stage in range(3):
        total += (per_stage - (stage > 0)) * getattr(clocks(identity(images, stage, width), card), figure)
        if stage:
            total += getattr(clocks(transition(images, stage, False, width), card), figure)
    return total + slot_clocks(card, 0, width)


def images_per_second(card: Card, per_stage: int = 18, figure: str = "phased", width: int = 16) -> float:
    """Intact networks per second on the whole card."""
    images = images_per_cta(card, width)
    return card.multiprocessors * images * card.clock / network_clocks(card, per_stage, figure, width)


def tape_seconds(
    card: Card, tape: Iterable[tuple[int, int]], stages: list[int], changes: list[bool], images: int, figure: str
) -> float:
    """Seconds for a plan's tape (op, argument as in csrc/plan.h) on `images` images; stages and changes per block."""
    total, stage, kept = 0.0, 0, {}
    for op, argument in tape:
        if op == 0:
            kept[argument] = stage
            total += slot_clocks(card, stage)
        elif op == 1:
            stage = kept[argument]
            total += slot_clocks(card, stage)
        elif op in (2, 3):
            stage = stages[argument]
            counts = transition(card.images, stage, True) if changes[argument] else identity(card.images, stage)
            total += getattr(clocks(counts, card), figure) * (1.0 if op == 2 else 0.3)
        else:
            total += 1500  # HEAD: pooling, 640 products, barriers; 1 % of a word
    waves = -(-images // (card.images * card.multiprocessors))
    return total * waves / card.clock


def table(card: Card, per_stage: int, width: int = 16) -> str:
    """A row per stage with clocks by unit, then images per second."""
    images = images_per_cta(card, width)
    if not images:
        return f"{card.name}: no tape kernel for {width} channels, its shared memory is too small; levels run"
    where = f"{images} image(s) per CTA, {card.multiprocessors} SMs at {card.clock / 1e9:.2f} GHz"
    columns = ("tensor", "shared", "L2", "issue", "element", "barrier", "bound", "phased")
    lines = [f"{card.name}: {where}; clocks per block (estimates, not measured)"]
    lines.append(f"{'block':<22}" + "".join(f"{c:>8}" for c in columns) + f"{'cautious':>9}")
    rows = [(f"{width << s} channels", identity(images, s, width)) for s in range(3)]
    rows += [(f"into {width << s} channels", transition(images, s, True, width)) for s in (1, 2)]
    for name, counts in rows:
        c = clocks(counts, card)
        values = (c.tensor, c.shared, c.l2, c.issue, c.elementwise, c.barriers, c.bound, c.phased)
        lines.append(f"{name:<22}" + "".join(f"{v:>8.0f}" for v in values) + f"{c.cautious:>9.0f}")
    flops = 2 * 2 * 9 * width * width * 1024 * 3 * per_stage
    for figure in FIGURES:
        rate = images_per_second(card, per_stage, figure, width)
        lines.append(
            f"{figure:<10}{rate:>12,.0f} images/s, {rate * flops / card.dense_peak:.0%} of the dense bf16 peak"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=[*CARDS, "all"], default="all")
    parser.add_argument("--depth", type=int, default=110, help="6 n + 2 for a network of 3 n blocks")
    parser.add_argument("--width", type=int, choices=[16, 32], default=16, help="channels of the first stage")
    arguments = parser.parse_args()
    chosen = CARDS.values() if arguments.card == "all" else [CARDS[arguments.card]]
    print("\n\n".join(table(card, (arguments.depth - 2) // 6, arguments.width) for card in chosen))


if __name__ == "__main__":
    main()
