"""A study as a folder: what is written where, atomically, and how it is read back and compared before it is resumed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from .engines.base import Tally
from .errors import StudyError, first_line
from .gradient_study import GradientStudy, Norms
from .structure import Structure
from .study import Part, Study, check_contiguous
from .sweep import Sweep

FORMAT = 2
_TEMPORARY = ".unfinished"
# What must be in a manifest to open and to resume it.
_MANIFEST = {
    "network": ("fingerprint", "structure"),
    "sweep": ("digest",),
    "data": ("images",),
    "engine": ("name", "dtype"),
}


class StudyFolder:
    """The files of one study."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest_path = self.path / "manifest.json"
        self.sweep_path = self.path / "sweep.parquet"
        self.parts_path = self.path / "parts"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from writing into the same study; where the system has no file locks, nothing is
        kept.
        """
        try:
            before = {self.path, *self.path.glob("*")} if self.path.exists() else set()
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise StudyError(f"{self.path} is a file; give a folder for the study") from None
        except OSError as error:
            raise StudyError(f"cannot make the folder {self.path}: {error.strerror}") from None
        except ValueError as error:  # a name with a null byte
            raise StudyError(f"cannot make the folder {str(self.path)!r}: {error}") from None
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with self._open_lock() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StudyError(
                    f"another process is writing the study in {self.path}; wait for it or choose another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            try:
                yield
            finally:
                if not self.manifest_path.exists():
                    self._tidy(before)

    def _tidy(self, before: set[Path]) -> None:
        """After a refusal: no lock file, sweep or folder stays behind that was not there before."""
        with suppress(OSError):
            for path in {self.path / ".lock", self.sweep_path} - before:
                path.unlink(missing_ok=True)
            if self.path not in before:
                self.path.rmdir()

    def _open_lock(self) -> IO[bytes]:
        try:
            return open(self.path / ".lock", "ab")
        except OSError as error:
            raise StudyError(f"cannot write in {self.path}: {error.strerror}") from None

    def exists(self) -> bool:
        """Whether there is a study; StudyError when the folder holds other things instead."""
        if self.manifest_path.exists():
            return True
        if self.path.is_dir():
            others = [p.name for p in self.path.iterdir() if not self._ours(p)]
            if others:
                raise StudyError(
                    f"{self.path} holds other files ({others[0]}) and no study; choose an empty or a new folder"
                )
        return False

    def _ours(self, path: Path) -> bool:
        """Whether a study that was killed before it had a manifest may have left this file."""
        if path == self.sweep_path:
            return _is_sweep(path)
        return path.name == ".lock" or path.name.endswith(_TEMPORARY)

    def create(self, manifest: dict[str, Any], sweep: Sweep) -> None:
        """Start a study: the sweep first, the manifest last, so that a folder with a manifest is a study."""
        self._write_table(self.sweep_path, _sweep_columns(sweep), {})
        self.write_manifest(manifest)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        data = json.dumps(manifest, indent=2).encode()
        self._atomic(self.manifest_path, lambda temporary: temporary.write_bytes(data))

    def write_part(self, part: Part) -> None:
        self._atomic_mkdir()
        columns = {"configuration": np.arange(len(part.tally[0])), **part.tally.columns()}
        extra = {"start": str(part.start), "stop": str(part.stop), "hash": part.hash}
        extra["digest"] = _digest(extra, columns)
        self._write_table(self.parts_path / f"{part.start:09d}-{part.stop:09d}.parquet", columns, extra)

    def read(self) -> Study:
        manifest = self.read_manifest()
        try:
            sweep = self._read_sweep(manifest)
        except StudyError:
            raise
        except Exception as error:
            raise StudyError(
                f"{self.sweep_path} is damaged or missing ({_short(error)}); delete {self.path} and evaluate again"
            ) from None
        if sweep.digest != manifest["sweep"]["digest"]:
            raise StudyError(
                f"{self.sweep_path} is not the sweep that {self.manifest_path.name} names; delete {self.path} "
                "and evaluate again"
            )
        gradients = "gradients" in manifest
        parts = self.read_parts(len(sweep), Norms if gradients else Tally)
        study = (GradientStudy if gradients else Study)(manifest, sweep, parts, self.path)
        if study.images != manifest["data"]["images"]:  # parts were deleted since, perhaps because one was damaged
            manifest["complete"] = False
        return study

    def read_manifest(self) -> dict[str, Any]:
        if not self.manifest_path.is_file():
            raise StudyError(f"{self.path} holds no study: there is no {self.manifest_path.name} in it")
        try:
            manifest = json.loads(self.manifest_path.read_text())
            version = manifest["format"]
            for key, names in _MANIFEST.items():
                for name in names:
                    manifest[key][name]
            float(manifest["seconds"]), bool(manifest["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{self.manifest_path} is damaged ({_short(error)}); delete {self.path} and evaluate again"
            ) from None
        if version != FORMAT:
            raise StudyError(
                f"{self.manifest_path} has the format {version}, this version reads {FORMAT}; use the version "
                "that wrote it"
            )
        assert isinstance(manifest, dict)
        return manifest

    def read_parts(self, configurations: int, kind: type[Tally] | type[Norms]) -> list[Part]:
        import pyarrow.parquet as pq

        parts = []
        for path in sorted(self.parts_path.glob("*.parquet")) if self.parts_path.is_dir() else []:
            try:
                table = pq.read_table(path)
                extra = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
                columns = {name: _values(table.column(name)) for name in table.column_names}
                if extra.pop("digest") != _digest(extra, columns):
                    raise ValueError("its contents are not what was written")
                tally = kind.from_columns(columns)
                part = Part(int(extra["start"]), int(extra["stop"]), extra["hash"], tally)
            except Exception as error:
                raise StudyError(
                    f"{path} is damaged ({_short(error)}); delete it and the parts after it, and evaluate again"
                ) from None
            if len(tally[0]) != configurations:
                raise StudyError(
                    f"{path} has {len(tally[0])} configurations, the sweep {configurations}; it belongs to "
                    "another study"
                )
            parts.append(part)
        return check_contiguous(parts, self.path)

    def _read_sweep(self, manifest: dict[str, Any]) -> Sweep:
        import pyarrow.parquet as pq

        structure = Structure.from_dict(manifest["network"]["structure"])
        table = pq.read_table(self.sweep_path)

        def rows(name: str, dtype: Any) -> Any:
            return _values(table.column(name)).astype(dtype).reshape(-1, len(structure))

        return Sweep(
            structure,
            rows("order", np.int16),
            rows("gates", np.float32),
            tuple(table.column("kind").to_pylist()),
            table.column("k").to_numpy().astype(np.int64),
        )

    def _atomic_mkdir(self) -> None:
        try:
            self.parts_path.mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"cannot write in {self.path}: {error.strerror}") from None

    def _write_table(self, path: Path, columns: dict[str, Any], metadata: dict[str, str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: _column(values) for name, values in columns.items()})
        table = table.replace_schema_metadata(metadata)
        self._atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))

    def _atomic(self, path: Path, write: Callable[[Path], object]) -> None:
        """The file appears whole or not at all, whatever happens to the process or the disk."""
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            write(temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StudyError(
                    f"no space left to write {path}; free some and run the same call again, finished parts are kept"
                ) from None
            raise StudyError(f"cannot write {path}: {error.strerror or error}") from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _sweep_columns(sweep: Sweep) -> dict[str, Any]:
    return {
        "configuration": np.arange(len(sweep)),
        "kind": list(sweep.kind),
        "k": sweep.k,
        "order": sweep.orders,
        "gates": sweep.gates,
    }


def _column(values: Any) -> Any:
    """An array [C] as it is, an array [C, n] as a column of lists of n."""
    import pyarrow as pa

    if np.ndim(values) != 2:
        return values
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _values(column: Any) -> Any:
    """The array that `_column` was given; strings as objects."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        return column.combine_chunks().values.to_numpy().reshape(len(column), -1)
    return column.to_numpy()


def _short(error: BaseException) -> str:
    return first_line(error)[:120]


def _digest(extra: dict[str, str], columns: dict[str, Any]) -> str:
    """A hash of all that a part says: Parquet itself does not notice a flipped bit."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name, values in columns.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _is_sweep(path: Path) -> bool:
    import pyarrow.parquet as pq

    try:
        return {"configuration", "order", "gates", "kind", "k"} <= set(pq.read_schema(path).names)
    except Exception:  # someone's own file of that name
        return False
