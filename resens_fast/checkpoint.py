"""What a training run leaves in its folder: the checkpoint it resumes from, metrics.csv, and finally weights and card.

Every file is replaced atomically: a reader sees the old one or the new one, also after a kill or on a full disk.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ModelError, first_line

History = list[dict[str, float]]


@dataclass
class Checkpoint:
    """The state of a run in checkpoint.pt: network, optimizer, schedule, random numbers, history and recipe."""

    folder: Path
    recipe: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @property
    def path(self) -> Path:
        """The checkpoint itself."""
        return self.folder / "checkpoint.pt"

    def begin(self, resume: bool) -> History:
        """Makes the folder, or with `resume` takes up the run in it; the rows of the epochs that are done.

        Raises ModelError for a folder that holds a run when `resume` is not given, and for a checkpoint that is
        damaged or of another recipe or network.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ModelError(f"{self.folder} is a file: name a folder for the training run")
        if not self.path.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                raise ModelError(
                    f"the folder {self.folder} cannot be made ({reason.strerror}): choose another"
                ) from None
            return []
        if not resume:
            raise ModelError(
                f"{self.folder} already holds a training run: resume it (--resume) or choose another folder"
            )
        saved = self._read()
        for key in {**self.recipe, **saved["recipe"]}:
            now, before = self.recipe.get(key), saved["recipe"].get(key)
            if before != now:
                raise ModelError(
                    f"{self.folder} was trained with {key} = {before}, not {now}: resume it with the same options or "
                    "choose another folder"
                )
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError:
            raise ModelError(
                f"{self.path} holds another network than the one to be trained: choose another folder"
            ) from None
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"])
        return saved["history"]

    def save(self, history: History) -> None:
        """Replaces checkpoint.pt and metrics.csv by the state after the last row of `history`."""
        state = {
            "recipe": self.recipe,
            "history": history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
        }
        replace(self.path, lambda path: torch.save(state, path))
        replace(self.folder / "metrics.csv", lambda path: _write_csv(path, history))

    def _read(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            missing = {"recipe", "history", "model", "optimizer", "schedule", "random"} - saved.keys()
        except Exception as reason:  # RuntimeError, EOFError, UnpicklingError, KeyError ... for damaged files
            raise ModelError(f"{self.path} is damaged ({type(reason).__name__}): delete it to start again") from None
        if missing:
            raise ModelError(f"{self.path} is no checkpoint of a training run: it lacks {', '.join(sorted(missing))}")
        return saved


def finish(folder: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Writes weights.safetensors (float32) and card.json, with the hash of the weights in the card."""
    from safetensors.torch import save

    content = save({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()})
    known = {
        **card,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    replace(folder / "weights.safetensors", lambda path: path.write_bytes(content))
    replace(folder / "card.json", lambda path: path.write_text(json.dumps(known, indent=1) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path` and moves it there when it is complete; ModelError if that fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as reason:  # torch.save turns a full disk into a RuntimeError
        raise ModelError(
            f"{path} cannot be written ({first_line(reason)}): free some space or choose another folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(path: Path, history: History) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
