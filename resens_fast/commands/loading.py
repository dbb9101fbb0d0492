"""MODEL and --data: a shipped network, a trained folder or `module:factory` with a checkpoint, and its images."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, EngineError, ModelError, ResensError
from . import architecture

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..network import ResidualNetwork

NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
)  # where checkpoints of other codebases keep their weights


@dataclass
class Loaded:
    """A network and its images, ready to evaluate; `name` and `data_name` are for titles and messages."""

    name: str
    net: ResidualNetwork
    data: Any
    data_name: str


def load(
    model: str,
    data: str,
    checkpoint: Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Loaded:
    """The network MODEL wrapped, and the test images of `data` normalised for it.

    Raises ModelError, DataError or WrapError with the sentence to print.
    """
    from .. import data as datasets
    from .. import models
    from ..wrap import wrap

    card: dict[str, Any]
    if ":" in model and not architecture.is_trained(model):
        network = from_factory(model)
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        else:
            print(f"no --checkpoint: the weights are those that {model} makes", flush=True)
        if (mean is None) != (std is None):
            raise DataError("--mean and --std belong together: give both or neither")
        card = {"name": model}
        if mean is not None and std is not None:
            card |= {"mean": mean, "std": std}
        if size is not None:
            card["input_shape"] = (_channels(network) or 3, *size)
        elif data.startswith("folder:"):
            card["input_shape"] = wrap(network.eval()).structure.input_shape
    else:
        for value, option in ((checkpoint, "--checkpoint"), (mean, "--mean"), (std, "--std"), (size, "--image-size")):
            if value is not None:
                raise ModelError(f"{option} is for networks given as module:factory; {model} brings its own")
        if architecture.is_trained(model):
            card = read_card(Path(model))
            network = architecture.build(card)
            load_checkpoint(network, Path(model) / "weights.safetensors")
        else:
            network, card = models.load(model), dict(models.card(model))
        card["name"] = model
    images = datasets.open(data, card=card, limit=limit)
    check_channels(network, images, model)
    net = wrap(network.eval(), example=images[0][0][None])
    count = len(images.classes)
    if count != net.structure.classes:
        raise DataError(
            f"{images.name} has {count} class{'es' * (count != 1)}, but {model} tells {net.structure.classes} apart: "
            "its labels would not mean the same; choose the data that the network was trained on"
        )
    return Loaded(model, net, images, images.name)


def check_channels(network: nn.Module, images: Any, model: str) -> None:
    """Raises DataError when the images have another number of channels than the network reads."""
    have, want = images[0][0].shape[0], _channels(network)
    if want is not None and have != want:
        raise DataError(
            f"{images.name} has images of {have} channel{'s' * (have != 1)}, but {model} takes {want}: "
            "choose another data set or network"
        )


def read_card(folder: Path) -> dict[str, Any]:
    """What `resens train` noted about the network in a folder.  Raises ModelError when it is damaged."""
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({_short(error)}): train again or restore it") from None
    if not isinstance(card, dict):
        raise ModelError(f"{path} is damaged (no object in it): train again or restore it")
    return card


def _channels(network: nn.Module) -> int | None:
    """The channels that the first convolution reads, or None if there is none."""
    from torch import nn

    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def from_factory(spec: str) -> nn.Module:
    """The network that `module:factory` or `path/to/file.py:factory` makes when called without arguments.

    Modules are looked for in the current folder too.  Raises ModelError that says what was not found or went wrong.
    """
    from torch import nn

    where, _, attribute = spec.rpartition(":")
    try:
        module = _import(where)
    except ModelError:
        raise
    except Exception as error:  # whatever the user's file raises while it is imported
        raise ModelError(
            f"importing {where} for {spec} failed with {_short(error)}: correct the module or its name"
        ) from None
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if factory is None:
        raise ModelError(
            f"{where} has nothing called {attribute!r}: write module:factory with a function that returns the network"
        )
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise ModelError(f"{spec} is a {type(factory).__name__}, not a function that returns a network")
        try:
            factory = factory()
        except ResensError:
            raise
        except Exception as error:  # whatever the user's function raises
            raise ModelError(f"{spec}() failed with {_short(error)}: it has to work without arguments") from None
    if not isinstance(factory, nn.Module):
        raise ModelError(f"{spec}() returned a {type(factory).__name__}, not a torch.nn.Module")
    return factory


def _import(where: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ModelError(f"there is no file {where}")
        described = importlib.util.spec_from_file_location(path.stem, path)
        assert described is not None and described.loader is not None
        module = importlib.util.module_from_spec(described)
        sys.modules.setdefault(path.stem, module)  # classes defined in it can then be pickled and found by name
        sys.path.insert(0, str(path.resolve().parent))
        described.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not look there, `python -m` does
    return importlib.import_module(where)


def _short(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}{f' ({first[:160]})' if first else ''}"


def load_checkpoint(network: nn.Module, path: Path) -> None:
    """Copy the weights in a .safetensors, .pt or .pth file into the network; nothing in the file is executed.

    A leading `module.` is dropped (DataParallel).
    Raises ModelError that names the first keys or shape that do not fit.
    """
    found = _read(path)
    if found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    own = network.state_dict()
    # PyTorch before 0.4.1 kept no such counter, and nothing in eval mode reads it.
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in own]
    if missing or unexpected:
        parts = [f"it lacks {_first(missing)}"] * bool(missing) + [f"the network has no {_first(unexpected)}"] * bool(
            unexpected
        )
        raise ModelError(f"{path} does not fit the network: {' and '.join(parts)}")
    for key, value in found.items():
        if tuple(value.shape) != tuple(own[key].shape):
            raise ModelError(
                f"{path} does not fit the network: {key} has the shape {list(value.shape)}, the network's has "
                f"{list(own[key].shape)}"
            )
    network.load_state_dict(found, strict=False)


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


def _read(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty: the checkpoint was not written or not fetched completely")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # damaged files raise RuntimeError, EOFError, UnpicklingError, SafetensorError, KeyError ...
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise ModelError(
                f"{path} holds more than tensors and is not loaded: save model.state_dict() instead"
            ) from None
        raise ModelError(
            f"{path} is no readable checkpoint ({_short(error)}): it is damaged or of another format"
        ) from None
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ModelError(f"{path} holds no state_dict: save model.state_dict() in it")
    return content


def torch_dtype(name: str | None) -> torch.dtype | None:
    """float32, float64, bfloat16 or float16 as torch's dtype; None for None."""
    import torch

    known = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise EngineError(f"there is no dtype {name!r}: choose {', '.join(known)}")
    return None if name is None else known[name]


def one_device(names: str | None) -> str | None:
    """As torch_device, where several devices cannot share the work."""
    if names is not None and "," in names:
        raise EngineError(f"--device {names} names several devices, and this command uses one: give one of them")
    return torch_device(names)


def torch_device(names: str | None) -> str | None:
    """The name of the first device, if this machine has them all.  Raises EngineError otherwise."""
    from ..engines.several import devices

    return None if names is None else str(devices(names)[0])
