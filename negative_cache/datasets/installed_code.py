"""A real retrieval dataset on every machine: the documented functions of the installed packages.

A query is the summary of a function's docstring. Its positive candidate is the function's signature
and body. The source files of the standard library and of the installed packages are parsed once,
and never run. Later the pairs are loaded from a file in a cache folder.

```python
corpus = installed_code.load()
summaries, codes = corpus.pairs("train")
to_ids = installed_code.text_to_ids(codes)
train = tf.data.Dataset.from_tensor_slices({"query": summaries, "candidate": codes})
train = train.batch(256).map(lambda x: {name: to_ids(text) for name, text in x.items()})
```

`_extract` and `_summary` find the pairs. `_store` reads and writes the file. `_text` turns text
into ids. This module combines them.
"""

import dataclasses
import hashlib
import json
import os
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from negative_cache.datasets import _extract, _store, _summary
from negative_cache.datasets._text import split_identifiers, text_to_ids

__all__ = ["SPLITS", "Corpus", "load", "split_identifiers", "text_to_ids"]

SPLITS = ("train", "validation", "test")
"""Names of the splits. `Corpus.split` holds positions in this tuple."""

_VALIDATION_PERCENT = 10
_TEST_PERCENT = 10
_COLUMNS = ("names", "summaries", "codes")
_EXCLUDED_PACKAGE = "negative_cache"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """N pairs of a summary and the code that it describes. Summaries are unique, and so are codes.

    The arrays of strings have dtype object. TensorFlow takes them directly, and index arrays select
    from them, as in `corpus.codes[corpus.test]`.
    """

    summaries: np.ndarray
    """[N] str: the queries."""
    codes: np.ndarray
    """[N] str: the candidates."""
    names: np.ndarray
    """[N] str: qualified names such as `json.decoder.JSONDecoder.decode`."""
    split: np.ndarray
    """[N] int8: position in `SPLITS`."""

    def __len__(self) -> int:
        return len(self.summaries)

    @property
    def train(self) -> np.ndarray:
        """[n] int64: rows of the training split, ascending."""
        return self.indices("train")

    @property
    def validation(self) -> np.ndarray:
        """[n] int64: rows of the validation split, ascending."""
        return self.indices("validation")

    @property
    def test(self) -> np.ndarray:
        """[n] int64: rows of the test split, ascending."""
        return self.indices("test")

    def indices(self, split: str) -> np.ndarray:
        """Returns the rows of a split.

        Args:
          split: One of `SPLITS`.

        Returns:
          [n] int64, ascending.

        Raises:
          ValueError: If there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {SPLITS}, received {split!r}.")
        return np.flatnonzero(self.split == SPLITS.index(split))

    def pairs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the queries and candidates of a split. Equal positions are pairs.

        Args:
          split: One of `SPLITS`.

        Returns:
          Summaries [n] str and codes [n] str.

        Raises:
          ValueError: If there is no such split.
        """
        rows = self.indices(split)
        return self.summaries[rows], self.codes[rows]


def load(
    cache_dir: str | os.PathLike | None = None,
    *,
    roots: Sequence[str | os.PathLike] | None = None,
    refresh: bool = False,
    verbose: int = 1,
) -> Corpus:
    """Loads the dataset, from the cache if it is there.

    The cache holds one file for each environment. The name of the file depends on the interpreter,
    the installed distributions with their versions, and the version of the extraction. With `roots`
    it depends on the paths, sizes and times of the files instead of the distributions. Files of
    past environments are not removed.

    The order of pairs is deterministic. The split of a pair is a hash of its summary alone, so a
    query stays in its split if packages change.

    Args:
      cache_dir: Folder of the cache. Default: `$XDG_CACHE_HOME/negative_cache`, or
        `~/.cache/negative_cache` if the variable is not set.
      roots: Folders to search, for instance the folder of your own code. Default: the standard
        library and the site-packages of the running interpreter.
      refresh: If True, parse again and overwrite the cache.
      verbose: 0 is silent, 1 shows a progress bar while parsing, 2 one line.

    Returns:
      The pairs.

    Raises:
      ValueError: If a root is not a folder, if the roots have no documented function, or if
        `verbose` is not 0, 1 or 2.
    """
    if verbose not in (0, 1, 2):
        raise ValueError(f"`verbose` must be 0, 1 or 2, received {verbose!r}.")
    if roots is None:
        folders = _default_roots()
        sources, fingerprint = None, _environment_fingerprint(folders)
    else:
        folders = _checked_roots(roots)
        sources = _extract.find_sources(folders, _EXCLUDED_PACKAGE)
        fingerprint = _files_fingerprint(folders, sources)
    folder = _default_cache_dir() if cache_dir is None else os.fspath(cache_dir)
    path = os.path.join(folder, f"installed_code-{_cache_key(fingerprint)}.npz")

    columns = None if refresh else _read_cache(path)
    if columns is None:
        if sources is None:
            sources = _extract.find_sources(folders, _EXCLUDED_PACKAGE)
        columns = _parse(sources, verbose)
        if not len(columns["summaries"]):
            raise ValueError(
                f"Found no documented function in the {len(sources)} Python files of {folders}."
            )
        try:
            _store.save(path, columns)
        except OSError as error:
            warnings.warn(f"Cannot write the cache, will parse again: {error}", stacklevel=2)
    split = np.array([_split(summary) for summary in columns["summaries"]], np.int8)
    split.setflags(write=False)
    return Corpus(split=split, **columns)


def _split(summary: str) -> int:
    """Returns a position in `SPLITS` that only depends on the summary, not on the code."""
    digest = hashlib.blake2b(_summary.key(summary).encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < _VALIDATION_PERCENT:
        return SPLITS.index("validation")
    if percent < _VALIDATION_PERCENT + _TEST_PERCENT:
        return SPLITS.index("test")
    return SPLITS.index("train")


def _parse(sources: Sequence[_extract.SourceFile], verbose: int) -> dict[str, np.ndarray]:
    progress = None
    if verbose and sources:
        # Imported here, because parsing needs no TensorFlow.
        import tensorflow as tf

        print(f"Reading the functions of {len(sources):,} Python files")
        progress = tf.keras.utils.Progbar(len(sources), verbose=verbose, unit_name="file")
    records = []
    for number, source in enumerate(sources, 1):
        records.extend(_extract.read_records(source))
        if progress is not None:
            progress.update(number)
    records = _extract.deduplicate(records)
    return {
        "names": _store.string_array([record.name for record in records]),
        "summaries": _store.string_array([record.summary for record in records]),
        "codes": _store.string_array([record.code for record in records]),
    }


def _read_cache(path: str) -> dict[str, np.ndarray] | None:
    try:
        return _store.load(path, _COLUMNS)
    except FileNotFoundError:
        return None
    except _store.CorruptFileError as error:
        warnings.warn(f"Parsing again, because the cache is damaged: {error}", stacklevel=3)
        return None


def _cache_key(fingerprint: object) -> str:
    description = [
        _extract.VERSION,
        sys.implementation.name,
        list(sys.version_info),
        sys.platform,
        fingerprint,
    ]
    return hashlib.blake2b(json.dumps(description).encode(), digest_size=8).hexdigest()


def _environment_fingerprint(roots: Sequence[str]) -> list[str]:
    """Returns the names of the installed distributions' folders, such as `name-version.dist-info`.

    The names are read from the folders. `importlib.metadata` would open every distribution's
    metadata, and fail for broken ones that interrupted upgrades leave behind.
    """
    return sorted(
        entry
        for root in roots
        for entry in os.listdir(root)
        if entry.endswith((".dist-info", ".egg-info"))
    )


def _files_fingerprint(roots: Sequence[str], sources: Sequence[_extract.SourceFile]) -> list:
    status = [(source.path, os.stat(source.path)) for source in sources]
    return [list(roots), [(path, stat.st_size, stat.st_mtime_ns) for path, stat in status]]


def _checked_roots(roots: Sequence[str | os.PathLike]) -> list[str]:
    if isinstance(roots, (str, bytes, os.PathLike)) or not len(roots):
        raise ValueError(f"`roots` must be a non-empty list of folders, received {roots!r}.")
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"`roots` must be folders, received {os.fspath(root)!r}.")
    return _unique_folders(os.fspath(root) for root in roots)


def _default_roots() -> list[str]:
    """Returns the standard library and every folder in which this interpreter installs packages."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    return _unique_folders(root for root in roots if os.path.isdir(root))


def _unique_folders(folders: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(os.path.realpath(folder) for folder in folders))


def _default_cache_dir() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # The XDG specification says to ignore relative paths.
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "negative_cache")
