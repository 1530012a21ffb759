"""What is a pair and what is skipped, and what broken files do: nothing."""

import builtins
import importlib.util
import os
import textwrap

import pytest

from negative_cache.datasets import _extract
from negative_cache.tests.datasets.source_trees import SPECIMEN, load, many, names, write

# What a pair is.


def test_pair_is_first_sentence_and_code_without_docstring_and_decorators(tmp_path):
    source = '''
    class Reader:
        @functools.cache
        async def read(self, path: str,
                       mode="r"):
            """Read the whole ``file`` at
            a path. More is not told.

            Args:
              path: A path.
            """  # Slow!

            # Opened as text.
            if path:
                return open(path, mode)
    '''
    corpus = load(tmp_path, {"pkg/__init__.py": "", "pkg/io.py": source})
    assert names(corpus) == ["pkg.io.Reader.read"]
    assert corpus.summaries[0] == "Read the whole file at a path."
    assert corpus.codes[0] == (
        'async def read(self, path: str,\n               mode="r"):\n'
        "    # Slow!\n\n"
        "    # Opened as text.\n    if path:\n        return open(path, mode)"
    )


def test_code_positions_count_bytes_and_form_feeds(tmp_path):
    # `ast` counts columns in UTF-8 bytes, and a form feed ends no line.
    source = '# \f\ndef f(é="ü"): "Größe of the old één house."; return é + "ß"\n'
    corpus = load(tmp_path, {"a.py": source})
    assert corpus.codes[0] == 'def f(é="ü"):\n    return é + "ß"'


def test_code_is_bounded(tmp_path):
    body = "\n".join(f"    x = x * {i}" for i in range(1_000))
    source = f'def long(x):\n    """Multiply by very many numbers."""\n{body}\n    return x\n'
    corpus = load(tmp_path, {"a.py": source})
    assert 1_900 < len(corpus.codes[0]) <= _extract.MAX_CODE_CHARS


@pytest.mark.parametrize(
    "body",
    [
        "",
        "pass",
        "...",
        "raise NotImplementedError('subclass')",
        "del x\n    raise NotImplementedError",
        "return",
        "return None",
        "return 3",
        "return -1",
        "return 'text'",
        "return ()",
        "return {}",
        "return self._value.other",
        "super().f(x)",
        "return super().f(x)",
        "return super(A, self).f(x)",
        "'another string'",
    ],
)
def test_trivial_body_is_skipped(tmp_path, body):
    source = f'def f(self, x):\n    """Do the thing that is done."""\n    {body}\n'
    assert names(load(tmp_path, {"a.py": source + SPECIMEN})) == ["a.specimen"]


@pytest.mark.parametrize(
    "body",
    [
        "return x + 1",
        "return self.f(x)",
        "return [x]",
        "return {1: x}",
        "self.x = x",
        "super().f(x)\n    self.x = 1",
        "yield x",
        "if x:\n        raise ValueError(x)",
    ],
)
def test_body_with_content_is_kept(tmp_path, body):
    source = f'def f(self, x):\n    """Do the thing that is done."""\n    {body}\n'
    assert names(load(tmp_path, {"a.py": source})) == ["a.f"]


@pytest.mark.parametrize(
    "path",
    [
        "tests/a.py",
        "pkg/test/a.py",
        "test_a.py",
        "a_test.py",
        "pkg/linear_test_util.py",
        "conftest.py",
        ".hidden/a.py",
        "site-packages/a.py",
        "__pycache__/a.py",
        "negative_cache/a.py",
        "gen_math_ops.py",
        "a_pb2.py",
        "a.txt",
    ],
)
def test_file_is_skipped(tmp_path, path):
    corpus = load(tmp_path, {path: many("skipped", 2), "kept.py": SPECIMEN})
    assert names(corpus) == ["kept.specimen"]


@pytest.mark.parametrize("name", [b"caf\xe9.py", b"caf\xe9/a.py"])
def test_a_name_that_is_no_text_is_skipped(tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(many("skipped", 2))
    except OSError:
        pytest.skip("The file system takes no such name.")
    corpus = load(tmp_path, {"kept.py": SPECIMEN})
    assert names(corpus) == ["kept.specimen"]


@pytest.mark.parametrize(
    "path", ["contest.py", "latest.py", "testing.py", "pkg/negative_cache/a.py"]
)
def test_file_with_similar_name_is_kept(tmp_path, path):
    assert len(load(tmp_path, {path: SPECIMEN})) == 1


def test_test_functions_and_classes_are_skipped(tmp_path):
    template = (
        '    def m(self):\n        """Compute the class {0} of {0}."""\n        return {0}(self)\n'
    )
    classes = "".join(
        f"class {name}:\n{template.format(name)}"
        for name in ("TestA", "ATest", "ATestCase", "Testament", "Contest")
    )
    functions = many("test_thing", 1) + many("testify", 1)
    corpus = load(tmp_path, {"a.py": classes + functions})
    assert names(corpus) == ["a.Testament.m", "a.Contest.m", "a.testify_0"]


def test_nested_functions_and_overloads_are_skipped_and_conditional_ones_found(tmp_path):
    source = '''
    if X:
        try:
            pass
        except E:
            def outer(x):
                """Make the inner function of x."""
                def inner(y):
                    """Add the x and the y."""
                    return x + y
                return inner
    @typing.overload
    def over(x):
        """Choose one of the types."""
        return x + 1
    '''
    assert names(load(tmp_path, {"a.py": source})) == ["a.outer"]


def test_generated_file_is_skipped(tmp_path):
    header = "# This file is MACHINE GENERATED! Do not edit.\n"
    corpus = load(tmp_path, {"a.py": header + many("skipped", 2), "b.py": SPECIMEN})
    assert names(corpus) == ["b.specimen"]


# Duplicates.


def test_same_body_is_kept_once_modulo_whitespace(tmp_path):
    first = 'def f(x):\n    """Add one to the x."""\n    y = x + 1\n    return y\n'
    second = 'def g(x):\n  """Increment the number a bit."""\n  y = x+1\n\n  return y\n'
    corpus = load(tmp_path, {"b/a.py": second, "a/b.py": first})
    assert names(corpus) == ["a.b.f"]


def test_same_code_after_truncation_is_kept_once(tmp_path):
    body = "\n".join(f"    x = x * {i}" for i in range(1_000))
    source = "def f(x):\n    '''Multiply by the {0} numbers.'''\n{1}\n    return {0}\n"
    files = {f"{n}.py": source.format(n, body) for n in ("one", "two")}
    assert names(load(tmp_path, files)) == ["one.f"]


def test_same_summary_is_kept_once_up_to_case_and_punctuation(tmp_path):
    first = 'def f(x):\n    """Add one to the x."""\n    return x + 1\n'
    second = 'def g(x):\n    """add one to THE `x`"""\n    return 1 + x\n'
    corpus = load(tmp_path, {"a.py": second + first})
    assert names(corpus) == ["a.g"]


# Robustness.


def test_broken_files_are_ignored(tmp_path, recwarn):
    depth = 5_000
    files = {
        "syntax.py": "def f(:\n",
        "null.py": b"x = 1\0\n",
        "utf8.py": b'def f(x):\n    "Return \xff and \xfe."\n    return x + 1\n',
        "codec.py": "# coding: no_such_codec\n" + many("c", 1),
        "rot.py": "# coding: rot13\n" + many("r", 1),
        "deep.py": "x = " + "(" * depth + ")" * depth,
        "sum.py": "x = " + "+".join(["1"] * 50_000),
        "escape.py": 'X = "\\d"\nY = 1 is 1\n',
        "huge.py": many("huge", 1) + "#" * (_extract.MAX_FILE_BYTES + 1),
        "kept.py": SPECIMEN,
    }
    root = write(tmp_path / "root", files)
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    (root / "folder.py").mkdir()
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    assert names(load(tmp_path, {})) == ["kept.specimen"]
    assert not [w for w in recwarn if issubclass(w.category, SyntaxWarning | DeprecationWarning)]


def test_long_elif_chain_is_walked(tmp_path):
    chain = "if x == 0:\n    pass\n" + "".join(f"elif x == {i}:\n    pass\n" for i in range(80))
    source = chain + "else:\n" + textwrap.indent(textwrap.dedent(SPECIMEN), "    ")
    assert names(load(tmp_path, {"a.py": source})) == ["a.specimen"]


def test_coding_cookie_and_byte_order_mark(tmp_path):
    source = (
        'def {0}(x):\n    """Return the café of {0}."""\n    x = x + 1\n    return "{0} é" + x\n'
    )
    files = {
        "latin.py": ("# -*- coding: latin-1 -*-\n" + source.format("l")).encode("latin-1"),
        "bom.py": b"\xef\xbb\xbf" + source.format("b").replace("\n", "\r\n").encode(),
    }
    corpus = load(tmp_path, files)
    assert list(corpus.summaries) == ["Return the café of b.", "Return the café of l."]
    assert corpus.codes[1] == 'def l(x):\n    x = x + 1\n    return "l é" + x'
    assert corpus.codes[0] == 'def b(x):\n    x = x + 1\n    return "b é" + x'


def test_linked_file_comes_once(tmp_path):
    root = write(tmp_path / "root", {"a.py": SPECIMEN})
    target = write(tmp_path / "store", {"b.py": many("b", 1)}) / "b.py"
    (root / "b.py").symlink_to(target)
    (root / "c.py").symlink_to(target)
    assert [source.module for source in _extract.find_sources([str(root)], "x")] == ["a", "b"]


def test_parser_imports_neither_tensorflow_nor_numpy(monkeypatch):
    real_import = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.split(".")[0] not in ("tensorflow", "numpy", "keras"), name
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    spec = importlib.util.find_spec("negative_cache.datasets._extract")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
