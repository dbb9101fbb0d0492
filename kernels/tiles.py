"""How large the tiles are: a default for every shape and architecture, and what this machine has measured.

The defaults come from the resources of the compiled kernels (tests/test_triton_compile.py keeps them within a table):
no spills but those by which ptxas buys another program, and enough of these to hide the reads. `python -m
resens_fast.kernels.tune` times the candidates on the card at hand and keeps the fastest in a file of this machine;
nothing is ever tuned by itself, so the first call costs only the compilation.

BLOCK_K is no choice: it decides the order of the sums, so it follows from the shape alone and a tuned machine adds up
in the same order as any other. (Within a product of BLOCK_K the card's matrix instruction does, and another tile may
take another one.)
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from ..errors import EngineError
from .pack import ConvShape, width


@dataclass(frozen=True)
class Tile:
    """A tile of block_m pixels and block_n channels, and how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def block_k(channels: int, dtype: torch.dtype) -> int:
    """Channels multiplied at a time: the largest power of two that divides the stored channels, at most 128 bytes."""
    stored = width(channels)
    return min(stored & -stored, 128 // dtype.itemsize)


def _block_n(channels: int, most: int) -> int:
    """Channels of a tile. Every tile reads its pixels anew, which costs about as much as 32 channels of products."""
    stored = width(channels)
    return min((b for b in (16, 32, 64, 128) if b <= most), key=lambda b: (-(-stored // b) * (b + 32), b))


@functools.cache
def default(channels: int, dtype: torch.dtype, capability: int) -> Tile:
    """For `channels` output channels; capability is 80 for sm_80, and so on.

    fp32 runs on the ordinary units, where every operand passes through registers: small tiles, and the same with TF32.
    On sm_90 and sm_100 a product of 128 pixels by 128 channels is issued by two groups of four warps, elsewhere by
    eight single ones. A fourth stage fits only there: a program of sm_86, sm_89 or sm_120 gets 99 KB of shared memory,
    and on sm_80 one of 64 channels would be alone on its multiprocessor.
    """
    if dtype == torch.float32:
        return Tile(64, _block_n(channels, 32), 4, 2)
    n = _block_n(channels, 128)
    stages = 4 if 90 <= capability < 120 else 3
    return Tile(128, n, 8 if n == 128 else 4, stages)


def candidates(channels: int, dtype: torch.dtype, capability: int) -> list[Tile]:
    """What tuning tries, the default first."""
    first = default(channels, dtype, capability)
    most = width(channels)
    sizes = [(m, n) for m in (64, 128, 256) for n in (16, 32, 64, 128) if n <= most and m * n <= 2**14]
    return [first] + [
        tile
        for m, n in sizes
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if (tile := Tile(m, n, warps, stages)) != first and m >= 16 * warps
    ]


def key(shape: ConvShape, dtype: torch.dtype, prologue: bool, shortcut: int) -> str:
    """What a measured tile is filed under; the image size matters only for timing, but there it does."""
    size = f"{shape.c}x{shape.n}x{shape.height}x{shape.width} k{shape.kernel} s{shape.stride}"
    return f"{size} {str(dtype).removeprefix('torch.')} p{int(prologue)} s{shortcut}"


def cache_file(device: torch.device) -> Path:
    """One file per card and Triton version; RESENS_FAST_CACHE names another folder than ~/.cache/resens_fast."""
    import triton

    # os.path leaves ~ as it is where there is no home, and then there are no tiles.
    folder = Path(os.path.expanduser(os.environ.get("RESENS_FAST_CACHE") or "~/.cache/resens_fast"))
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return folder / f"tiles-{name}-triton-{triton.__version__}.json"


@functools.cache
def measured(file: Path) -> dict[str, Tile]:
    """The tiles in a cache file; none if there is no file. EngineError names a damaged one."""
    if not file.exists():
        return {}
    try:
        found = {name: Tile(**values) for name, values in json.loads(file.read_text()).items()}
        for name, tile in found.items():
            if not all(type(v) is int and 0 < v <= 1024 for v in astuple(tile)) or any(
                v & (v - 1) for v in (tile.block_m, tile.block_n, tile.warps)
            ):
                raise ValueError(f"{name} has {tile}")
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(f"{file} is damaged ({error}); delete it") from None
    return found


def save(file: Path, tiles: dict[str, Tile]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({name: asdict(tile) for name, tile in sorted(tiles.items())}, indent=1))
    partial.replace(file)
    measured.cache_clear()
    choose.cache_clear()


@functools.cache
def of_device(channels: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The default on this device."""
    if device.type != "cuda":  # the interpreter
        return default(channels, dtype, 90)
    major, minor = torch.cuda.get_device_capability(device)
    return default(channels, dtype, 10 * major + minor)


@functools.cache
def choose(shape: ConvShape, dtype: torch.dtype, device: torch.device, prologue: bool, shortcut: int) -> Tile:
    """The tile for a convolution on this device: measured if it has been, else the default."""
    known = measured(cache_file(device)) if device.type == "cuda" else {}
    return known.get(key(shape, dtype, prologue, shortcut)) or of_device(shape.n, dtype, device)
