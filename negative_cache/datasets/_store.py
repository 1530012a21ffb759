"""Columns of strings in one `.npz` file, without pickle.

A column is two arrays: `<name>.bytes` [total] uint8, the UTF-8 of all its strings one after the
other, and `<name>.offsets` [n + 1] int64, where each begins. What the strings mean is not known
here.
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

# What `zipfile` and NumPy raise, depending on which bytes are wrong: flags of encryption or of
# unknown methods give a RuntimeError, a wild array shape a MemoryError.
_DAMAGE = (
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
    """A file that `save` did not write, or not all of it."""


def save(path: str, columns: Mapping[str, Sequence[str] | np.ndarray]) -> None:
    """Writes a file that at every moment is whole or not there, for readers in other processes too.

    Args:
      path: Where to write; its folder is made if need be.
      columns: Sequences of strings of one length, by name.

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
    # In the same folder, as a rename is atomic only within one file system.
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
    """Reads what `save` wrote.

    Args:
      path: The file.
      names: The columns that must be there.

    Returns:
      [n] arrays of str (dtype object), by name.

    Raises:
      FileNotFoundError: If there is no file.
      CorruptFileError: If it is cut off, altered, of another kind, or lacks a column.
    """
    try:
        # Reading a member verifies its checksum, so no altered byte gets past this block.
        with open(path, "rb") as file, zipfile.ZipFile(file):
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                columns = {
                    name: _decode(archive[f"{name}.bytes"], archive[f"{name}.offsets"])
                    for name in names
                }
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise CorruptFileError(f"{path} is not a whole string file: {error}") from error
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise CorruptFileError(f"{path} has columns of different lengths: {lengths}")
    return columns


def string_array(strings: Sequence[str]) -> np.ndarray:
    """A read-only [n] array that refers to the strings.

    Not NumPy's `U` type, which would give every string the width of the longest.
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
