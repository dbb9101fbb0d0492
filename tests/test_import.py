"""The package imports with nothing but torch and numpy."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
LATE = (
    "pandas", "pyarrow", "matplotlib", "scipy", "torchvision", "tqdm", "typer", "rich", "sklearn", "timm", "PIL",
    "safetensors", "triton",
)  # fmt: skip


def test_import_needs_only_torch_and_numpy() -> None:
    """Every other package is hidden in a fresh process, and a plan is made there."""
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class Hiding(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] in {LATE!r} else super().find_spec(name, path, target)

        import torch, numpy, torch.fx   # torch looks for some of them itself, and does without
        for loaded in [m for m in sys.modules if m.partition(".")[0] in {LATE!r}]:
            del sys.modules[loaded]
        sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
        import resens_fast as rf
        import resens_fast.kernels, resens_fast.doctor
        net = rf.wrap(rf.models.resnet(8))
        try:
            import pandas
        except ModuleNotFoundError:
            print(rf.plan(net, rf.sweeps.single(net)).words)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]
