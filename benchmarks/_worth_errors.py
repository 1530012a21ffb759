"""A second text set that every machine has: error messages, and the functions that raise them.

A query is the text of a message that the source of an installed package raises, warns of or logs,
such as "axes must be unique". Its positive candidate is the function around it, without its
docstring and without the texts of all messages in it, so that the words of the query are not there
to be found. A message belongs to one function, and a function may have several messages. All pairs
of a file are in one split.
"""

import ast
import hashlib
import os
import pathlib
import sysconfig
import tempfile
from typing import NamedTuple

import numpy as np

from negative_cache._compat import keras
from negative_cache.datasets import _extract, _store, installed_code

MIN_WORDS, MAX_CODE_CHARS = 4, 2000
# Names of functions and methods whose arguments are messages.
_LOGS = frozenset(("warn", "warning", "error", "info", "debug", "exception", "critical", "fatal"))
_VERSION = 1


class Errors(NamedTuple):
    """M messages and N functions.

    `owners` [M] int64 is the function of each message, and `split` [M] int8 its position in
    `installed_code.SPLITS`.
    """

    messages: np.ndarray
    codes: np.ndarray
    owners: np.ndarray
    split: np.ndarray


def load() -> Errors:
    """The pairs, out of the folder for temporary files if they are there."""
    roots = list(dict.fromkeys(os.path.realpath(path) for path in _roots()))
    sources = _extract.find_sources(roots, "negative_cache")
    key = repr((_VERSION, [(source.path, os.stat(source.path).st_size) for source in sources]))
    folder = pathlib.Path(tempfile.gettempdir()) / "negative_cache_benchmarks"
    path = folder / f"errors-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        _store.save(str(path), _parse(sources))
    columns = _store.load(str(path), ("messages", "codes", "split"))
    codes, owners = np.unique(columns["codes"], return_inverse=True)
    return Errors(columns["messages"], codes, owners, columns["split"].astype(np.int8))


def _roots() -> list[str]:
    paths = sysconfig.get_paths()
    return [paths["stdlib"], paths["purelib"], paths["platlib"]]


def _parse(sources) -> dict[str, list[str]]:
    bar = keras.utils.Progbar(len(sources), unit_name="file")
    codes, files, found = {}, [], {}
    for number, source in enumerate(sources, 1):
        for code, messages in _functions(source):
            if code not in codes:
                codes[code] = len(codes)
                files.append(source.module)
            for message in messages:
                found.setdefault(message, set()).add(codes[code])
        bar.update(number)
    # A message of several functions has no one answer.
    pairs = [(message, owners.pop()) for message, owners in found.items() if len(owners) == 1]
    texts = list(codes)
    return {
        "messages": [message for message, _ in pairs],
        "codes": [texts[owner] for _, owner in pairs],
        "split": [str(_split(files[owner])) for _, owner in pairs],
    }


def _functions(source):
    """(code, messages) of the outermost functions and methods of a file that have messages."""
    try:
        tree = ast.parse(pathlib.Path(source.path).read_text("utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    stack = [tree]
    while stack:
        node = stack.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            continue
        blank = _BlankMessages()
        node = blank.visit(node)
        if blank.messages:
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                node.body = node.body[1:]
            node.decorator_list = []
            code = ast.unparse(node)[:MAX_CODE_CHARS].encode("utf-8", "ignore").decode()
            yield code, sorted(blank.messages)


class _BlankMessages(ast.NodeTransformer):
    """Takes the texts out of what is raised, warned of and logged, and keeps them."""

    def __init__(self):
        self.messages = set()

    def visit_Raise(self, node):
        return self._blank(node, [node.exc] if isinstance(node.exc, ast.Call) else [])

    def visit_Call(self, node):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        return self._blank(node, [node]) if name in _LOGS else self.generic_visit(node)

    def _blank(self, node, calls):
        texts = []
        for call in calls:
            for part in ast.walk(call):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    texts.append(part.value)
                    part.value = ""
        message = " ".join(" ".join(texts).split()).encode("utf-8", "ignore").decode()
        if len(message.split()) >= MIN_WORDS:
            self.messages.add(message)
        return node


def _split(module: str) -> int:
    percent = int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big") % 100
    name = "validation" if percent < 10 else "test" if percent < 20 else "train"
    return installed_code.SPLITS.index(name)
