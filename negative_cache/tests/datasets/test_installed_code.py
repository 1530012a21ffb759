"""Order, split, cache and errors of `datasets.installed_code`."""

import contextlib
import hashlib
import os

import numpy as np
import pytest

from negative_cache.datasets import _extract, _store, installed_code
from negative_cache.tests.datasets.source_trees import SPECIMEN, load, many, names, rows, write

# Order and split.


def test_order_is_by_root_then_path_then_line(tmp_path):
    files = {"b.py": many("b", 2), "a/z.py": many("z", 1), "a/c.py": many("c", 1)}
    one, two = write(tmp_path / "2", files), write(tmp_path / "1", {"d.py": many("d", 1)})
    corpus = installed_code.load(tmp_path / "cache", roots=[one, two], verbose=0)
    assert names(corpus) == ["b.b_0", "b.b_1", "a.c.c_0", "a.z.z_0", "d.d_0"]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    files = {f"{d}/{f}.py": many(d + f, 1) for d in "pqr" for f in "xyz"}
    expected = rows(load(tmp_path, files))
    walk = os.walk

    def reversed_walk(root):
        for folder, subfolders, names_ in walk(root):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(names_, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert rows(load(tmp_path, files, refresh=True)) == expected


def test_split_is_stable_when_files_are_added_and_bodies_change(tmp_path):
    before = load(tmp_path, {"m.py": many("old", 300)})
    old = dict(zip(before.summaries, before.split, strict=True))
    changed = many("old", 300).replace("return ", "return 2 * ")
    after = load(tmp_path, {"a.py": many("new", 300), "m.py": changed})
    new = dict(zip(after.summaries, after.split, strict=True))
    assert len(after) == 600 and after.codes[-1] != before.codes[-1]
    assert {summary: new[summary] for summary in old} == old


def test_split_is_a_partition_in_the_stated_proportions(tmp_path):
    corpus = load(tmp_path, {"m.py": many("f", 3_000)})
    parts = [corpus.train, corpus.validation, corpus.test]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(3_000))
    # Binomial: five standard deviations are 5 sqrt(3000 * 0.1 * 0.9) = 82.
    assert abs(len(parts[1]) - 300) < 82 and abs(len(parts[2]) - 300) < 82
    for split, part in zip(installed_code.SPLITS, parts, strict=True):
        summaries, codes = corpus.pairs(split)
        assert list(summaries) == [corpus.summaries[i] for i in part]
        assert list(codes) == [corpus.codes[i] for i in part]


def test_split_is_the_documented_hash(tmp_path):
    # Spelled out a second time, as any other hash would reshuffle the data of every user.
    corpus = load(tmp_path, {"m.py": many("f", 300)})
    for i, split in enumerate(corpus.split):
        text = f"compute the f number {i} of x"
        percent = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 100
        expected = "validation" if percent < 10 else "test" if percent < 20 else "train"
        assert installed_code.SPLITS[split] == expected


# Cache.


@pytest.fixture
def parse_count(monkeypatch):
    calls = []
    parse = installed_code._parse

    def counted(*args):
        calls.append(args)
        return parse(*args)

    monkeypatch.setattr(installed_code, "_parse", counted)
    return calls


def cache_file(tmp_path):
    (path,) = (tmp_path / "cache").iterdir()
    return path


def test_cache_round_trip(tmp_path, parse_count):
    files = {
        "a.py": many("a", 30),
        "é.py": 'def ü(x):\n  "Return the ß 漢 of all."\n  return x+1\n',
    }
    first = load(tmp_path, files)
    os.utime(tmp_path / "root" / "a.py", ns=(1, 1))
    second = load(tmp_path, {})
    os.utime(tmp_path / "root" / "a.py", ns=(1, 1))
    third = load(tmp_path, {})
    assert len(parse_count) == 2  # The time of a file changed once.
    assert rows(first) == rows(second) == rows(third)
    assert third.split.dtype == np.int8
    load(tmp_path, {}, refresh=True)
    assert len(parse_count) == 3


def test_cache_holds_no_pickle_and_leaves_no_temporary_file(tmp_path):
    load(tmp_path, {"a.py": SPECIMEN})
    with np.load(cache_file(tmp_path), allow_pickle=False) as archive:
        assert {str(archive[key].dtype) for key in archive} == {"uint8", "int64"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def drop_a_column(path):
    _store.save(path, {"names": ["a"], "summaries": ["b"]})


def shorten_a_column(path):
    _store.save(path, {"names": ["a"], "summaries": ["b"], "codes": []})


def pickle_a_column(path):
    with open(path, "wb") as file:
        np.savez(file, **{"names.bytes": np.array([{}], object)})


def shift_offsets(path):
    replace_offsets(path, lambda offsets: offsets + 1)


def cut_offsets(path):
    replace_offsets(path, lambda offsets: np.minimum(offsets, offsets[-1] - 1))


def swap_offsets(path):
    replace_offsets(path, lambda offsets: offsets[[0, 2, 1, *range(3, len(offsets))]])


def replace_offsets(path, function):
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["codes.offsets"] = function(arrays["codes.offsets"])
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_byte,
        drop_a_column,
        shorten_a_column,
        pickle_a_column,
        shift_offsets,
        cut_offsets,
        swap_offsets,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip file"),
        lambda path: np.save(path.open("wb"), np.arange(3)),
    ],
)
def test_damaged_cache_is_parsed_again_with_a_warning(tmp_path, parse_count, damage):
    expected = rows(load(tmp_path, {"a.py": many("a", 50)}))
    damage(cache_file(tmp_path))
    with pytest.warns(UserWarning, match="damaged"):
        assert rows(load(tmp_path, {})) == expected
    assert rows(load(tmp_path, {})) == expected
    assert len(parse_count) == 2


def test_no_flipped_byte_gets_through(tmp_path):
    path = str(tmp_path / "file.npz")
    strings = [f"string {i} of many" for i in range(200)]
    _store.save(path, {"a": strings})
    with open(path, "rb") as file:
        whole = file.read()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        with open(path, "wb") as file:
            file.write(damaged)
        # Some bytes of the container mean nothing, such as dates: then the strings are whole.
        with contextlib.suppress(_store.CorruptFileError):
            assert list(_store.load(path, ["a"])["a"]) == strings


def test_failed_write_leaves_the_old_file_and_warns(tmp_path, monkeypatch):
    expected = rows(load(tmp_path, {"a.py": SPECIMEN}))
    before = cache_file(tmp_path).read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        assert rows(load(tmp_path, {}, refresh=True)) == expected
    assert cache_file(tmp_path).read_bytes() == before


def test_cache_of_default_roots_follows_the_environment(tmp_path, monkeypatch, parse_count):
    root = write(tmp_path / "root", {"a.py": SPECIMEN, "numpy-2.0.dist-info/METADATA": ""})
    monkeypatch.setattr(installed_code, "_default_roots", lambda: [str(root)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def parsed_again():
        before = len(parse_count)
        installed_code.load(verbose=0)
        return len(parse_count) > before

    assert parsed_again()
    assert not parsed_again()
    (root / "numpy-2.0.dist-info").rename(root / "numpy-2.1.dist-info")
    assert parsed_again()
    write(root, {"scipy-1.0.dist-info/METADATA": ""})
    assert parsed_again()
    monkeypatch.setattr(_extract, "VERSION", _extract.VERSION + 1)
    assert parsed_again()
    monkeypatch.setattr("sys.version_info", (3, 99, 0, "final", 0))
    assert parsed_again()
    assert not parsed_again()
    assert len(list((tmp_path / "xdg" / "negative_cache").iterdir())) == 5


def test_relative_xdg_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert installed_code._default_cache_dir() == "/home/someone/.cache/negative_cache"


def test_default_roots_hold_the_standard_library_and_the_packages():
    roots = installed_code._default_roots()
    for module in (os, np):
        path = os.path.realpath(module.__file__)
        assert any(path.startswith(root + os.sep) for root in roots)
    assert len(set(roots)) == len(roots)


def test_progress_is_shown_only_if_asked_for(tmp_path, capsys):
    load(tmp_path, {"a.py": SPECIMEN})
    assert capsys.readouterr().out == ""
    roots = [tmp_path / "root"]
    installed_code.load(tmp_path / "cache", roots=roots, refresh=True, verbose=1)
    assert "1/1" in capsys.readouterr().out


# Errors.


@pytest.mark.parametrize("roots", ["/usr", b"/usr", [], ["/no/such/folder"], [__file__]])
def test_bad_roots(tmp_path, roots):
    with pytest.raises(ValueError, match="`roots` must be .* received"):
        installed_code.load(tmp_path, roots=roots, verbose=0)


def test_no_function_at_all(tmp_path):
    with pytest.raises(ValueError, match="no documented function in the 1 Python files"):
        load(tmp_path, {"a.py": "x = 1\n"})


def test_bad_verbose_and_split(tmp_path):
    with pytest.raises(ValueError, match="`verbose` .* received 'auto'"):
        installed_code.load(tmp_path, verbose="auto")
    with pytest.raises(ValueError, match="`split` .* received 'dev'"):
        load(tmp_path, {"a.py": SPECIMEN}).pairs("dev")
