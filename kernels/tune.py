"""Times candidate tiles for the convolutions of a CIFAR ResNet's blocks on the card at hand and keeps the fastest.

    python -m resens_fast.kernels.tune [--depth 110] [--dtype bfloat16]

Tuning is asked for, never done in passing: it takes minutes, most of them for compiling. What it keeps changes times
and, where another matrix instruction takes over, the last bit of results; studies made before and after are not
bitwise equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from . import launch, tiles
from .pack import Packed, width

IMAGES, STEPS = 256, 4


def measure(run: Callable[[], None]) -> float:
    """Milliseconds of one run on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=30))


def tune(
    packed: Packed, capability: int, timer: Callable[[Callable[[], None]], float] = measure, images: int = IMAGES
) -> dict[str, tiles.Tile]:
    """The fastest tile of every convolution of every group, under the names that `tiles.choose` looks for."""
    best: dict[str, tiles.Tile] = {}
    device, dtype = packed.device, packed.dtype
    states = torch.zeros(2 * STEPS, images * packed.state_elements, device=device, dtype=dtype)
    rows = torch.tensor([[step, STEPS + step, 0] for step in range(STEPS)], dtype=torch.int32, device=device)
    table = (rows, torch.ones(STEPS, device=device, dtype=torch.float32))
    for group in packed.groups:
        for index, (shape, weights) in enumerate(zip(group.shape.convs, group.convs, strict=True)):
            constants = launch.conv_constants(group.shape, index, shape, dtype)
            name = tiles.key(shape, dtype, constants["PROLOGUE"], constants["SHORTCUT"])
            if name in best:
                continue
            inner = width(shape.c) * shape.height * shape.width * images
            source = states if constants["FROM_STATE"] else states.new_zeros(STEPS, inner)
            target = states if constants["LAST"] else states.new_empty(STEPS, images * shape.out_elements)
            times = {}
            for tile in tiles.candidates(shape.n, dtype, capability):

                def run(tile: tiles.Tile = tile) -> None:
                    launch.launch_conv(
                        source, target, states, table, weights, group, constants, tile, 0, STEPS, images  # noqa: B023
                    )

                try:
                    times[tile] = timer(run)
                except Exception as error:
                    # A candidate may ask for more shared memory than the card has; every other error is one.
                    if type(error).__name__ != "OutOfResources":
                        raise
            best[name] = min(times, key=times.__getitem__)
    return best


def main() -> None:
    import resens_fast as rf
    from resens_fast.errors import ResensError
    from resens_fast.lower import lower

    from .pack import pack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    try:
        models = [rf.models.resnet(arguments.depth, preactivation=form).eval() for form in (True, False)]
    except ResensError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no GPU on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    file = tiles.cache_file(device)
    major, minor = torch.cuda.get_device_capability(device)
    try:
        found = dict(tiles.measured(file))
        tiles.save(file, found)  # that it cannot be written is better known now than after minutes
    except (ResensError, OSError) as error:
        parser.error(f"the tiles cannot be kept: {error}")
    for model in models:
        packed = pack(lower(rf.wrap(model)), device, getattr(torch, arguments.dtype))
        found |= tune(packed, 10 * major + minor)
    tiles.save(file, found)
    print(f"{len(found)} tiles in {file}")


if __name__ == "__main__":
    main()
