"""Columns of strings in one `.npz` file, without pickle.

A column has two arrays. `<name>.bytes` [total] uint8 is the UTF-8 of all strings, concatenated.
`<name>.offsets` [n + 1] int64 are the positions where the strings begin, and the total.
"""

import contextlib
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The errors of `zipfile` and NumPy depend on the wrong bytes. For example, flags of encryption or
# of unknown methods raise a RuntimeError, and a huge array shape raises a MemoryError.
_DAMAGE_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class CorruptFileError(ValueError):
    """A file that `save` did not write, or did not write completely."""


def save(path: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
    """Writes a file atomically, so that a reader in any process sees all of it or none.

    Args:
      path: The file to write. Its folder is created if needed.
      columns: Column name -> strings. All columns have the same length.

    Raises:
      OSError: If the folder or the file cannot be written.
    """
    arrays: dict[str, Any] = {}
    for name, strings in columns.items():
        encoded = [string.encode() for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(item) for item in encoded], out=offsets[1:])
        arrays[f"{name}.bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}.offsets"] = offsets
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # The temporary file is in the same folder, because renaming is only atomic in one file system.
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def load(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads a file that `save` wrote.

    Args:
      path: The file.
      names: The columns to read.

    Returns:
      Column name -> [n] array of str (dtype object).

    Raises:
      FileNotFoundError: If there is no file.
      CorruptFileError: If the file is truncated, altered, of another kind, or lacks a column.
    """
    try:
        # Reading a member verifies its checksum, so this block detects every altered byte.
        with open(path, "rb") as file, zipfile.ZipFile(file):
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                columns = {
                    name: _decode(archive[f"{name}.bytes"], archive[f"{name}.offsets"])
                    for name in names
                }
    except FileNotFoundError:
        raise
    except _DAMAGE_ERRORS as error:
        raise CorruptFileError(f"{path} is not a whole string file: {error}") from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise CorruptFileError(f"{path} has columns of different lengths: {lengths}")
    return columns


def string_array(strings: Sequence[str]) -> np.ndarray:
    """Makes a read-only [n] array of dtype object that refers to the strings.

    NumPy's `U` dtype would give every string the width of the longest.
    """
    array = np.empty(len(strings), object)
    array[:] = strings
    array.setflags(write=False)
    return array


def _decode(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    if data.dtype != np.uint8 or offsets.dtype != np.int64 or data.ndim != 1 or offsets.ndim != 1:
        raise ValueError(
            f"arrays are {data.dtype} {data.shape} and {offsets.dtype} {offsets.shape}"
        )
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != data.size or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets do not divide {data.size} bytes")
    blob = data.tobytes()
    return string_array([blob[a:b].decode() for a, b in zip(bounds, bounds[1:], strict=False)])
