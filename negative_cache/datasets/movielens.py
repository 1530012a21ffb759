"""MovieLens 100K, read from the folder of its unpacked archive.

Nothing is downloaded. Get the archive at https://grouplens.org/datasets/movielens/100k. Its terms
of use do not allow redistribution. Two files are read, `u.data` with the ratings and `u.item` with
the movies.

```python
data = movielens.load("ml-100k")
train, test = data.split(seed=0)  # datasets of {"user_id": …, "movie_title": …}
movies = tf.data.Dataset.from_tensor_slices(data.unique_titles)
```

Both files are checked line by line. A training on a file that is truncated, re-encoded or from
another MovieLens release would run, but its results would be wrong.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import tensorflow as tf

from negative_cache.datasets import _store

__all__ = ["MovieLens", "load"]

_HOME = "https://grouplens.org/datasets/movielens/100k"
_FILES = ("u.data", "u.item")
_TRAIN_PERCENT = 80

# 18 digits always fit into an int64.
_INTEGER = re.compile(r"[0-9]{1,18}")
_RATING_FIELDS = ("user id", "item id", "rating", "timestamp")
_RATING = re.compile(r"([0-9]{1,18})\t([0-9]{1,18})\t([1-5])\t([0-9]{1,18})")
_NUM_GENRES = 19
_NUM_MOVIE_FIELDS = 5 + _NUM_GENRES


@dataclasses.dataclass(frozen=True, eq=False)
class MovieLens:
    """N ratings in the order of `u.data`, and the M titles of movies.

    Titles identify movies, as in the TF-Recommenders tutorials. A few titles are in `u.item` under
    two ids, and count as one movie. The arrays are read-only. Arrays of strings have dtype object,
    which TensorFlow takes directly.
    """

    user_ids: np.ndarray
    """[N] str: the users."""
    movie_titles: np.ndarray
    """[N] str: the rated movies."""
    ratings: np.ndarray
    """[N] float32: 1 to 5."""
    timestamps: np.ndarray
    """[N] int64: seconds since 1970."""
    unique_titles: np.ndarray
    """[M] str: every title of `u.item` once, in the order of the file, rated or not."""

    def __len__(self) -> int:
        return len(self.user_ids)

    def split(self, seed: int = 0) -> tuple[tf.data.Dataset, tf.data.Dataset]:
        """Shuffles the ratings and cuts them in two, as the TF-Recommenders tutorials do.

        Args:
          seed: The seed of the shuffle. Equal seeds give equal splits with every version of NumPy.

        Returns:
          The training set, which is ⌊80%⌋ of the ratings, and the test set with the other ratings.
          Elements are unbatched, `{"user_id": str scalar, "movie_title": str scalar}` with strings
          in UTF-8. Every rated movie is a positive, even if the rating is low.

        Raises:
          ValueError: If the seed is not in [0, 2³²).
        """
        # Unlike NumPy's newer generators, `RandomState` promises not to change its numbers.
        order = np.random.RandomState(seed).permutation(len(self))
        cut = len(self) * _TRAIN_PERCENT // 100
        return self._examples(order[:cut]), self._examples(order[cut:])

    def _examples(self, rows: np.ndarray) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(
            {"user_id": self.user_ids[rows], "movie_title": self.movie_titles[rows]}
        )


def load(folder: str | os.PathLike) -> MovieLens:
    """Reads and checks `u.data` and `u.item`.

    Args:
      folder: The folder with both files. In the archive it is called `ml-100k`.

    Returns:
      The ratings and the titles.

    Raises:
      FileNotFoundError: If there is no such folder, or one of the files is not in it.
      ValueError: If a line does not have the format of MovieLens 100K. Checked are the number of
        fields, integers, ratings of 1 to 5, that the id of a rated movie exists, and that every
        movie has one line with a title. The message names the file and the line.
    """
    folder = os.fspath(folder)
    missing = [name for name in _FILES if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        state = f"has no {' and no '.join(missing)}" if os.path.isdir(folder) else "is not a folder"
        raise FileNotFoundError(
            f"{folder!r} {state}. Wanted: a folder with the files {' and '.join(_FILES)} of"
            f" MovieLens 100K. Download and unpack it from {_HOME}."
        )
    ratings_path, movies_path = (os.path.join(folder, name) for name in _FILES)
    titles = _read_movies(movies_path)
    return _read_ratings(ratings_path, titles)


def _read_movies(path: str) -> dict[int, str]:
    """Reads movie id -> title, in the order of the file."""
    titles: dict[int, str] = {}
    for number, line in _lines(path):
        fields = line.split("|")
        if len(fields) != _NUM_MOVIE_FIELDS:
            wanted = f"{_NUM_MOVIE_FIELDS} fields separated by |"
            _refuse(path, number, wanted, f"{len(fields)} in {_quote(line)}")
        identifier, title, genres = fields[0], fields[1], fields[-_NUM_GENRES:]
        if not _INTEGER.fullmatch(identifier):
            _refuse(path, number, "an integer as movie id", _quote(identifier))
        if not title.strip():
            _refuse(path, number, "a title", _quote(title))
        if not set(genres) <= {"0", "1"}:
            flags = f"{_NUM_GENRES} genre flags, each 0 or 1"
            _refuse(path, number, flags, _quote("|".join(genres)))
        if int(identifier) in titles:
            _refuse(path, number, "every movie id once", f"{identifier} again")
        titles[int(identifier)] = title
    return titles


def _read_ratings(path: str, titles: dict[int, str]) -> MovieLens:
    user_ids, movie_titles, ratings, timestamps = [], [], [], []
    for number, line in _lines(path):
        match = _RATING.fullmatch(line)
        if match is None:
            _refuse_rating(path, number, line)
        user, item, rating, timestamp = map(int, match.groups())
        if item not in titles:
            _refuse(path, number, "the id of a movie in u.item", f"item id {item}")
        user_ids.append(str(user))
        movie_titles.append(titles[item])
        ratings.append(rating)
        timestamps.append(timestamp)
    return MovieLens(
        user_ids=_store.string_array(user_ids),
        movie_titles=_store.string_array(movie_titles),
        ratings=_read_only(np.array(ratings, np.float32)),
        timestamps=_read_only(np.array(timestamps, np.int64)),
        unique_titles=_store.string_array(list(dict.fromkeys(titles.values()))),
    )


def _refuse_rating(path: str, number: int, line: str) -> NoReturn:
    """Raises an error that says what is wrong with a line that is not a rating."""
    fields = line.split("\t")
    if len(fields) != len(_RATING_FIELDS):
        wanted = f"{len(_RATING_FIELDS)} fields separated by tabs"
        _refuse(path, number, wanted, f"{len(fields)} in {_quote(line)}")
    for name, field in zip(_RATING_FIELDS, fields):
        if not _INTEGER.fullmatch(field):
            _refuse(path, number, f"an integer as {name}", _quote(field))
    _refuse(path, number, "a rating of 1 to 5", _quote(fields[2]))


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of each line of a file, without line ends."""
    with open(path, "rb") as file:
        raw = file.read()
    nul = raw.find(b"\0")
    if nul >= 0:
        _refuse(path, raw.count(b"\n", 0, nul) + 1, "text", "a NUL byte, as binary files have")
    text = raw.decode("latin-1").rstrip("\r\n")
    if not text:
        raise ValueError(f"{path} is empty. Wanted: the file of MovieLens 100K, {_HOME}.")
    # `splitlines` would also split at some characters of Latin-1.
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r")


def _refuse(path: str, number: int, wanted: str, received: str) -> NoReturn:
    raise ValueError(f"{path}, line {number}: wanted {wanted}, received {received}.")


def _quote(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
