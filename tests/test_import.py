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

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {LATE!r}:
                    raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

        import torch, numpy, torch.fx   # torch looks for some of them itself, and does without
        for name in {LATE!r}:
            for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
                del sys.modules[loaded]
        sys.meta_path.insert(0, Hidden())
        import resens_fast as rf
        import resens_fast.kernels, resens_fast.doctor
        net = rf.wrap(rf.models.resnet(8))
        print(rf.plan(net, rf.sweeps.single(net)).words)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]
