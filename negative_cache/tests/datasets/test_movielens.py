"""What `datasets.movielens` reads, refuses and splits."""

import re

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.datasets import movielens
from negative_cache.tests.datasets.movielens_files import MOVIES, RATINGS, generate, movie, write

# Reading.


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_line_end", ["", None, "\n\r\n\n"])
def test_reads_every_rating_in_the_order_of_the_file(tmp_path, line_end, last_line_end):
    data = movielens.load(write(tmp_path, line_end=line_end, last_line_end=last_line_end))
    assert len(data) == 5
    assert data.user_ids.tolist() == ["196", "7", "196", "22", "7"]
    assert data.movie_titles.tolist() == [
        "Toy Story (1995)",
        "Misérables, Les (1995)",
        "Chasing Amy (1997)",
        "unknown",
        "Chasing Amy (1997)",
    ]
    assert data.ratings.tolist() == [3.0, 5.0, 1.0, 4.0, 2.0]
    assert data.timestamps.tolist() == [881250949, 891717742, 878887116, 880606923, 886397596]
    # In the order of u.item; the title of 246 and 268 once.
    assert data.unique_titles.tolist() == [
        "Toy Story (1995)",
        "Misérables, Les (1995)",
        "unknown",
        "Chasing Amy (1997)",
    ]


def test_arrays_have_the_documented_dtypes_and_are_read_only(tmp_path):
    data = movielens.load(str(write(tmp_path)))
    dtypes = {name: str(array.dtype) for name, array in vars(data).items()}
    assert dtypes == {
        "user_ids": "object",
        "movie_titles": "object",
        "ratings": "float32",
        "timestamps": "int64",
        "unique_titles": "object",
    }
    assert not any(array.flags.writeable for array in vars(data).values())


def test_a_movie_without_ratings_is_a_candidate(tmp_path):
    data = movielens.load(write(tmp_path, movies=[*MOVIES, movie(3, "Four Rooms (1995)")]))
    assert data.unique_titles[-1] == "Four Rooms (1995)"


def test_only_line_feeds_end_lines(tmp_path):
    # Python's `splitlines` would end lines at all three.
    title = "next line \x85 form feed \x0c separator \x1c"
    data = movielens.load(write(tmp_path, movies=[movie(1, title)], ratings=RATINGS[:1]))
    assert data.unique_titles.tolist() == data.movie_titles.tolist() == [title]


def test_integers_mean_their_values(tmp_path):
    data = movielens.load(write(tmp_path, ratings=["007\t01\t3\t0"]))
    assert data.user_ids.tolist() == ["7"]
    assert data.movie_titles.tolist() == ["Toy Story (1995)"]


# Refusing.


@pytest.mark.parametrize(
    ("line", "wanted", "received"),
    [
        ("196\t1\t3", "4 fields separated by tabs", r"3 in '196\t1\t3'"),
        ("196\t1\t3\t881250949\t", "4 fields separated by tabs", "5 in"),
        ("196::1::3::881250949", "4 fields separated by tabs", "1 in '196::1::3::881250949'"),
        ("", "4 fields separated by tabs", "1 in ''"),
        ("me\t1\t3\t881250949", "an integer as user id", "'me'"),
        ("196\t1.0\t3\t881250949", "an integer as item id", "'1.0'"),
        ("196\t1\t3.5\t881250949", "an integer as rating", "'3.5'"),
        ("196\t1\t3\t-1", "an integer as timestamp", "'-1'"),
        # What `int` would take: a space, an underscore, and too much for an int64.
        (" 196\t1\t3\t881250949", "an integer as user id", "' 196'"),
        ("196\t1\t3\t881_250", "an integer as timestamp", "'881_250'"),
        ("196\t1\t3\t9223372036854775808", "an integer as timestamp", "'9223372036854775808'"),
        ("196\t1\t0\t881250949", "a rating of 1 to 5", "'0'"),
        ("196\t1\t6\t881250949", "a rating of 1 to 5", "'6'"),
        ("196\t2\t3\t881250949", "the id of a movie in u.item", "item id 2"),
        ("x" * 1000, "4 fields separated by tabs", f"1 in '{'x' * 80}…'"),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_malformed_rating_is_refused_by_file_and_line(tmp_path, line, wanted, received, line_end):
    write(tmp_path, ratings=[*RATINGS[:2], line, *RATINGS[2:]], line_end=line_end)
    message = f"{tmp_path / 'u.data'}, line 3: wanted {wanted}, received {received}"
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "wanted", "received"),
    [
        ("2|GoldenEye (1995)", "24 fields separated by |", "2 in '2|GoldenEye (1995)'"),
        (movie(2, "GoldenEye (1995)") + "|0", "24 fields separated by |", "25 in '2|Golden"),
        (movie(2, "Golden|Eye (1995)"), "24 fields separated by |", "25 in '2|Golden"),
        (movie("tt2", "GoldenEye (1995)"), "an integer as movie id", "'tt2'"),
        # A superscript is a digit to `str.isdigit`, and a byte of Latin-1.
        (movie("²", "GoldenEye (1995)"), "an integer as movie id", "'²'"),
        (movie(2, ""), "a title", "''"),
        (movie(2, "  "), "a title", "'  '"),
        (movie(1175, "GoldenEye (1995)"), "every movie id once", "1175 again"),
        (movie("01", "GoldenEye (1995)"), "every movie id once", "01 again"),
        (movie(2, "GoldenEye (1995)") + "2", "19 genre flags, each 0 or 1", "'0|0|"),
    ],
)
def test_a_malformed_movie_is_refused_by_file_and_line(tmp_path, line, wanted, received):
    write(tmp_path, movies=[*MOVIES, line])
    message = f"{tmp_path / 'u.item'}, line 6: wanted {wanted}, received {received}"
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.load(tmp_path)


@pytest.mark.parametrize("name", ["u.data", "u.item"])
def test_a_binary_file_is_refused(tmp_path, name):
    lines = (write(tmp_path) / name).read_bytes().split(b"\n")
    lines[1] = b"\x1f\x8b\x00\x00"
    (tmp_path / name).write_bytes(b"\n".join(lines))
    message = f"{tmp_path / name}, line 2: wanted text, received a NUL byte"
    with pytest.raises(ValueError, match=re.escape(message)):
        movielens.load(tmp_path)


@pytest.mark.parametrize("name", ["u.data", "u.item"])
@pytest.mark.parametrize("content", [b"", b"\r\n\n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (write(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is empty")):
        movielens.load(tmp_path)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    get_it = (
        " Wanted: a folder with the files u.data and u.item of MovieLens 100K. Download and unpack"
        " it from https://grouplens.org/datasets/movielens/100k."
    )
    path = write(tmp_path / "ml-100k")

    def refused(folder, state):
        with pytest.raises(FileNotFoundError) as error:
            movielens.load(folder)
        assert str(error.value) == f"{str(folder)!r} {state}.{get_it}"

    refused(tmp_path / "nowhere", "is not a folder")
    refused(path / "u.data", "is not a folder")
    refused(tmp_path, "has no u.data and no u.item")
    (path / "u.item").unlink()
    refused(path, "has no u.item")
    (path / "u.item").mkdir()
    refused(path, "has no u.item")


# Splitting.


def pairs(dataset):
    return [
        (example["user_id"].decode(), example["movie_title"].decode())
        for example in dataset.as_numpy_iterator()
    ]


@pytest.fixture
def data(tmp_path):
    return movielens.load(generate(tmp_path, num_users=40, num_movies=30, num_ratings=503))


def test_the_split_is_a_partition_of_80_and_20_percent(data):
    train, test = data.split(seed=1)
    # 80% of 503 is 402.4.
    assert len(train) == 402 and len(test) == 101
    everything = sorted(zip(data.user_ids, data.movie_titles))
    assert sorted(pairs(train) + pairs(test)) == everything


def test_the_split_is_the_documented_shuffle(data):
    # Spelled out a second time, as any other would change the results of every user.
    order = np.random.RandomState(1).permutation(503)
    rows = [(data.user_ids[i], data.movie_titles[i]) for i in order]
    train, test = data.split(seed=1)
    assert pairs(train) == rows[:402]
    assert pairs(test) == rows[402:]


def test_equal_seeds_give_equal_splits_and_others_do_not(data):
    train, test = data.split(seed=1)
    again_train, again_test = data.split(seed=1)
    assert pairs(train) == pairs(again_train) and pairs(test) == pairs(again_test)
    assert pairs(test) != pairs(data.split(seed=2)[1])
    # A dataset yields the same at every pass: it is the caller who shuffles for training.
    assert pairs(train) == pairs(train)


def test_examples_are_scalar_strings_also_where_a_part_is_empty(tmp_path):
    train, test = movielens.load(write(tmp_path, ratings=RATINGS[:1])).split()
    scalar = tf.TensorSpec([], tf.string)
    assert train.element_spec == test.element_spec == {"user_id": scalar, "movie_title": scalar}
    # 80% of one rating is none.
    assert pairs(train) == [] and pairs(test) == [("196", "Toy Story (1995)")]


def test_a_seed_out_of_range_is_refused(data):
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="[Ss]eed"):
            data.split(seed)
