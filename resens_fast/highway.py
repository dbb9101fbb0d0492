"""Highway networks: how far the transform gates of their blocks are open.

Veit et al. 2016, section 3.2: the gates of trained highway networks are biased towards the skip.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from .errors import ModelError, WrapError
from .images import ImageReader
from .jobs import Bar
from .network import ResidualNetwork

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 128


@torch.no_grad()
def gates(net: ResidualNetwork, data: Any, progress: bool = True) -> pd.DataFrame:
    """The transform gate t of every highway block over a data set, in eval mode: 0 skips the branch, 1 transforms.

    data: what `evaluate` takes; labels are not used.  A row per highway block: block, name, stage, mean and sd over
    all images, channels and pixels, sd_images (of the per-image means: how much the gate depends on the image), and
    the smallest (low) and largest (high) value.  Raises WrapError for a network that is not wrapped, ModelError for
    one without highway blocks or with gates that are not finite, DataError for images that do not fit.
    """
    import pandas as pd

    if not isinstance(net, ResidualNetwork):
        raise WrapError(f"a wrapped network is needed, not {type(net).__name__}; call resens_fast.wrap(model) first")
    found = [block for block in net.blocks if block.recipe.transform is not None]
    if not found:
        raise ModelError(
            f"{type(net.model).__name__} has no highway blocks, so no transform gates: its blocks are "
            f"{', '.join(sorted(set(net.structure.kinds)))}"
        )
    per_image: dict[int, list[torch.Tensor]] = {block.index: [] for block in found}  # rows of mean, square, low, high
    reader = ImageReader(data, net.structure)
    with _eval(net), Bar(f"gates of {len(found)} blocks", 1, reader.total, 0, progress) as bar:
        while len(images := reader.take(_BATCH)[0]):
            state = net.stem(images.to(net.device, net.dtype, memory_format=torch.channels_last))
            for block in net.blocks:
                t = block.transform(block.prologue(state))
                if t is not None:
                    t = t.flatten(1).double()
                    per_image[block.index].append(
                        torch.stack([t.mean(1), t.square().mean(1), t.amin(1), t.amax(1)]).cpu()
                    )
                state = block.run(state)
            if advance := bar.advance(len(images)):
                advance(1.0)
    rows = []
    for block in found:
        mean, square, low, high = torch.cat(per_image[block.index], 1)
        if not bool(square.isfinite().all()):
            raise ModelError(f"the transform gate of block {block.index} ({block.name}) is not finite on these images")
        rows.append(
            {
                "block": block.index,
                "name": block.name,
                "stage": block.stage,
                "mean": float(mean.mean()),
                "sd": float((square.mean() - mean.mean() ** 2).clamp(min=0).sqrt()),
                "sd_images": float(mean.std(correction=0)),
                "low": float(low.min()),
                "high": float(high.max()),
            }
        )
    return pd.DataFrame(rows)


@contextlib.contextmanager
def _eval(net: ResidualNetwork) -> Any:
    """Eval mode, with the network's own flags restored afterwards."""
    flags = {module: module.training for module in net.model.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
