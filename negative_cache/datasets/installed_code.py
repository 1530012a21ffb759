"""A real retrieval dataset on every machine: the documented functions of the installed packages.

A query is the summary of a function's docstring; its one right candidate is the function's
signature and body. The source files of the standard library and of the installed packages are
parsed, never run, and only once: after that the pairs come from a file in a cache folder.

```python
corpus = installed_code.load()
summaries, codes = corpus.pairs("train")
to_ids = installed_code.text_to_ids(codes)
train = tf.data.Dataset.from_tensor_slices({"query": summaries, "candidate": codes})
train = train.batch(256).map(lambda x: {name: to_ids(text) for name, text in x.items()})
```

`_extract` and `_summary` decide what is a pair, `_store` reads and writes the file, `_text` turns
text into ids; here they are put together.
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
"""Names of the splits; `Corpus.split` holds positions in this tuple."""

_VALIDATION_PERCENT = 10
_TEST_PERCENT = 10
_COLUMNS = ("names", "summaries", "codes")
_EXCLUDED_PACKAGE = "negative_cache"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """N pairs of a summary and the code that it describes. No summary and no code comes twice.

    The arrays of strings have dtype object: TensorFlow takes them as they are, and index arrays
    select from them, as in `corpus.codes[corpus.test]`.
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
        """Rows of a split.

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
        """Queries and candidates of a split, row by row.

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

    The cache holds one file for each environment: its name depends on the interpreter, on the
    installed distributions and their versions, and on the version of the extraction. With `roots`
    it depends on the paths, sizes and times of the files instead of the distributions. Files of
    past environments are not removed.

    The order is deterministic. A pair's split is a hash of its summary alone, so that no change of
    packages moves a query from one split to another.

    Args:
      cache_dir: Folder of the cache. Default: `$XDG_CACHE_HOME/negative_cache`, else
        `~/.cache/negative_cache`.
      roots: Folders to walk, such as that of your own code. Default: the standard library and the
        site-packages of the running interpreter.
      refresh: Parse again and overwrite the cache.
      verbose: 0 is silent, 1 shows a progress bar while parsing, 2 one line.

    Returns:
      The pairs.

    Raises:
      ValueError: If a root is not a folder, if there is no documented function in any of them, or
        if `verbose` is not one of 0, 1 and 2.
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
    """Position in `SPLITS`, from the summary only: a new version of the body stays where it is."""
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
        # Late, as parsing needs no TensorFlow.
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
        warnings.warn(f"Parsing again, as the cache is damaged: {error}", stacklevel=3)
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
    """The installed distributions, as `name-version.dist-info`: what they install has these names.

    Read from the folders, not with `importlib.metadata`, which opens every distribution's metadata
    and raises at the broken ones that interrupted upgrades leave behind.
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
    """The standard library, then every folder that this interpreter installs packages in."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    return _unique_folders(root for root in roots if os.path.isdir(root))


def _unique_folders(folders: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(os.path.realpath(folder) for folder in folders))


def _default_cache_dir() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # The XDG specification: relative paths are invalid, ignore them.
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "negative_cache")
