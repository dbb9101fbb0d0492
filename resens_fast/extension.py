"""The compiled part of the package, ``resens_fast._C``: loaded if it fits this Python and this torch, explained if not.

setup.py writes ``_build.json`` beside the library. It is checked before anything is loaded, because a library built for
another torch does not fail politely: it crashes, or its symbols are missing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

FORMAT = 1
"""Version of _build.json; setup.py writes the same number."""

_REBUILD = "build it with `pip install --no-build-isolation --no-deps .` (or `make build`) in a checkout of resens_fast"


def check(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The build information in a folder and the reason why its library must not be loaded (None: it may).

    Nothing is loaded. A file that is missing, damaged or about another Python or torch is a reason.
    """
    path = folder / "_build.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"resens_fast._C is not built: {path} is missing; {_REBUILD}"
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read ({error}); {_REBUILD}"
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        return None, f"{path} is not build information of this version of resens_fast; {_REBUILD}"
    import torch

    for key, what, here in (
        ("python", "Python ABI", sysconfig.get_config_var("SOABI")),
        ("torch", "torch", str(torch.__version__)),
        ("cxx11_abi", "C++ ABI (_GLIBCXX_USE_CXX11_ABI)", torch.compiled_with_cxx11_abi()),
    ):
        if info.get(key) != here:
            return info, f"resens_fast._C was built for {what} {info.get(key)}, but this is {here}; {_REBUILD}"
    library = folder / str(info.get("library"))
    if not library.is_file():
        return info, f"resens_fast._C is not there: {library} is missing; {_REBUILD}"
    if library.stat().st_size != info.get("bytes"):
        return info, f"{library} is not the library that {path.name} describes (an interrupted build?); {_REBUILD}"
    return info, None


@functools.cache
def _load() -> tuple[ModuleType | None, dict[str, Any] | None, str | None]:
    if os.environ.get("RESENS_FAST_EXTENSION") == "0":
        return None, None, "resens_fast._C is switched off by RESENS_FAST_EXTENSION=0"
    info, why = check(Path(__file__).parent)
    if why is not None:
        return None, info, why
    try:
        return importlib.import_module("resens_fast._C"), info, None
    except (ImportError, OSError) as error:
        return None, info, f"resens_fast._C cannot be loaded ({error}); {_REBUILD}"


def module() -> ModuleType | None:
    """``resens_fast._C``, or None when ``reason()`` says why not."""
    return _load()[0]


def reason() -> str | None:
    """Why there is no compiled part, as one sentence; None when there is one."""
    return _load()[2]


def info() -> dict[str, Any]:
    """What setup.py wrote about the build: torch, cxx11_abi, python, isas, cuda, cuda_reason, architectures, compiler,
    sources (a hash); empty when nothing was built.
    """
    return dict(_load()[1] or {})


def stale() -> bool:
    """Whether this is a checkout whose csrc has changed since the library was built (it still loads)."""
    root = Path(__file__).parent.parent
    setup = root / "setup.py"
    wanted = _load()[1]
    if not wanted or not setup.is_file() or not (root / "csrc").is_dir():
        return False
    return source_hash(root) != wanted.get("sources")


def source_hash(root: Path) -> str:
    """One hash over the sources in a checkout; setup.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted([*(root / "csrc").rglob("*"), root / "setup.py"]):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py"):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
