"""Extracts (summary, code) records from Python source files.

This module only uses the standard library. It parses source with `ast`, and never imports or
executes it. The steps are:

1. `find_sources` lists files.
2. `read_records` turns one file into records.
3. `deduplicate` keeps one record for every summary and every function body.
"""

import ast
import hashlib
import io
import os
import re
import stat
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from negative_cache.datasets import _summary

# Part of the cache key. Raise it if a change here or in `_summary` changes the records.
VERSION = 1

MAX_CODE_CHARS = 2_000
# Larger files are tables and generated code. They parse slowly and have few documented functions.
MAX_FILE_BYTES = 1 << 20

# `site-packages` folders are inside the standard library's folder, but are roots of their own.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "node_modules"}
)
_TEST_FILE = re.compile(r"(test_.*|.*_(tests?|test_utils?|test_lib|tstutils)|tests?|conftest)\.py")
_TEST_NAME = re.compile(r"(test|Test)(_.*|[A-Z].*)?|.*(_test|Test|Tests|TestCase|TestBase)")
_GENERATED_FILE = re.compile(r"gen_\w+_ops\.py|\w+_pb2(_grpc)?\.py")
_GENERATED_HEADER = re.compile(
    r"machine[- ]generated|auto(matically)?[- ]?generated|do not edit", re.IGNORECASE
)
_GENERATED_HEADER_CHARS = 600

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class SourceFile(NamedTuple):
    """A file to read, with its path on disk and the dotted name of its module."""

    path: str
    module: str


class Record(NamedTuple):
    """One documented function."""

    name: str
    """Qualified dotted name, such as `json.decoder.JSONDecoder.decode`."""
    summary: str
    """First sentence of the docstring, on one line, without markup."""
    code: str
    """Signature and body without decorators and docstring, at most `MAX_CODE_CHARS` characters."""
    body_key: bytes
    """Digest of the whole body without whitespace. It is equal for copies of one function."""


def find_sources(roots: Sequence[str], excluded_package: str) -> list[SourceFile]:
    """Lists the Python files under `roots`, in an order that does not depend on the file system.

    Args:
      roots: Folders as on an import path. Names of modules are relative to them.
      excluded_package: Name of a top-level package to leave out.

    Returns:
      Files in the order of `roots`, then of their paths. A file with two paths is listed once.
    """
    found = []
    seen = set()
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            # `os.walk` continues with the folders of this list, so it is changed in place.
            subfolders[:] = sorted(
                name
                for name in subfolders
                if name not in _SKIPPED_FOLDERS
                and not name.startswith(".")
                and not (folder == root and name == excluded_package)
            )
            for file in sorted(files):
                path = os.path.join(folder, file)
                # Links to files are followed, because some installers only make links. Links to
                # folders are not followed, so there are no cycles.
                real_path = os.path.realpath(path)
                relative = os.path.relpath(path, root)
                if not _is_encodable(relative) or real_path in seen:
                    continue
                if _is_candidate_file(path):
                    seen.add(real_path)
                    found.append(SourceFile(path, _module_name(relative)))
    return found


def _is_candidate_file(path: str) -> bool:
    file = os.path.basename(path)
    if not file.endswith(".py") or _TEST_FILE.fullmatch(file) or _GENERATED_FILE.fullmatch(file):
        return False
    try:
        status = os.stat(path)
    except OSError:  # For example, a dangling link.
        return False
    # A named pipe called x.py would block its reader forever.
    return stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES


def _is_encodable(path: str) -> bool:
    """Whether a path can be encoded, because file names may contain any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _module_name(relative_path: str) -> str:
    parts = relative_path[: -len(".py")].split(os.sep)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def read_records(source: SourceFile) -> list[Record]:
    """Reads one file. A file that cannot be read or parsed has no records.

    Args:
      source: The file.

    Returns:
      The documented, non-trivial functions and methods, in the order of the file.
    """
    try:
        with open(source.path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES)
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        if _GENERATED_HEADER.search(text, 0, _GENERATED_HEADER_CHARS):
            return []
        with warnings.catch_warnings():
            # The user cannot fix invalid escapes in installed packages.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return []
    # `splitlines` would also split at form feeds, which `ast` does not count as line ends.
    lines = text.split("\n")
    records = (_record(name, node, lines) for name, node in _functions(tree, source.module))
    return [record for record in records if record is not None]


def _functions(tree: ast.Module, module: str) -> Iterator[tuple[str, _Function]]:
    """Yields functions and methods. Nested functions are part of the code around them."""
    # A stack replaces recursion, because generated code has `elif` chains of a thousand branches.
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        scope, node = stack.pop()
        if isinstance(node, _Function):
            if not _TEST_NAME.fullmatch(node.name):
                yield f"{scope}.{node.name}", node
            continue
        if isinstance(node, ast.ClassDef):
            if _TEST_NAME.fullmatch(node.name):
                continue
            scope = f"{scope}.{node.name}"
        children = [
            child
            for field in ("body", "handlers", "orelse", "finalbody")
            for child in getattr(node, field, ())
            if isinstance(child, (ast.stmt, ast.ExceptHandler))
        ]
        stack.extend((scope, child) for child in reversed(children))


def _record(name: str, node: _Function, lines: list[str]) -> Record | None:
    docstring = ast.get_docstring(node)
    if docstring is None or is_trivial(node.body[1:]) or _is_overload(node):
        return None
    summary = _summary.summarize(docstring)
    if summary is None:
        return None
    head, body = _split_source(node, lines)
    # Some codecs produce lone surrogates, which neither UTF-8 nor TensorFlow can represent.
    code = f"{head}\n{body}"[:MAX_CODE_CHARS].encode("utf-8", "ignore").decode()
    return Record(name, summary, code.rstrip(), _digest("".join(body.split())))


def is_trivial(body: Sequence[ast.stmt]) -> bool:
    """Whether statements do nothing that a summary could describe.

    Trivial statements are `pass`, `...`, `del`, `raise`, a bare `return`, and the call of a method
    of `super()`. A `return` of a constant, a name, an attribute or an empty container is trivial
    too.

    Args:
      body: The statements of a function after its docstring.

    Returns:
      True if there are no statements, or all are trivial.
    """
    return all(map(_is_trivial_statement, body))


def _is_trivial_statement(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Pass, ast.Raise, ast.Delete)):
        return True
    if isinstance(statement, (ast.Expr, ast.Return)):
        value = statement.value
        return value is None or _is_trivial_value(value) or _is_super_call(value)
    return False


def _is_trivial_value(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return not node.elts
    if isinstance(node, ast.Dict):
        return not node.keys
    return isinstance(node, (ast.Constant, ast.Name))


def _is_super_call(node: ast.expr) -> bool:
    match node:
        case ast.Await(value=value):
            return _is_super_call(value)
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")))):
            return True
    return False


def _is_overload(node: _Function) -> bool:
    return any(
        getattr(decorator, "attr", getattr(decorator, "id", None)) == "overload"
        for decorator in node.decorator_list
    )


def _split_source(node: _Function, lines: list[str]) -> tuple[str, str]:
    """Returns the source text before and after the docstring, dedented to column 0."""
    docstring = node.body[0]
    indent = node.col_offset
    head = _segment(lines, node.lineno, indent, docstring.lineno, docstring.col_offset)
    body = _segment(lines, *_end(docstring), *_end(node))
    # After the docstring its last line is empty, or has `; statement` or a comment.
    first, newline, rest = body.partition("\n")
    first = first.lstrip("; \t\f")
    body = f"    {first}{newline}{_dedent(rest, indent)}" if first else _dedent(rest, indent)
    return _dedent(head, indent).rstrip(), re.sub(r"\A(?:[ \t\f]*\n)+", "", body)


def _end(node: ast.stmt) -> tuple[int, int]:
    """Returns the line and column where a node ends, which `ast.parse` always sets."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset


def _segment(lines: list[str], line: int, column: int, end_line: int, end_column: int) -> str:
    """Returns the text between two positions of `ast`, with columns in bytes of UTF-8."""
    selected = lines[line - 1 : end_line]
    # The end is cut first, because cutting the start of a single line would move it.
    selected[-1] = selected[-1].encode()[:end_column].decode()
    selected[0] = selected[0].encode()[column:].decode()
    return "\n".join(selected)


def _dedent(text: str, columns: int) -> str:
    return re.sub(rf"(?m)^[ \t]{{1,{columns}}}", "", text) if columns else text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "ignore"), digest_size=16).digest()


def deduplicate(records: Iterable[Record]) -> list[Record]:
    """Keeps the first of the records that share a summary, a body, or the truncated code.

    If two records had the same summary, an evaluation would reject one of two right answers. If a
    function were vendored twice, the same text could be in two splits.

    Args:
      records: Records in a deterministic order.

    Returns:
      The records in which all three are unique. Summaries are compared without case and
      punctuation.
    """
    kept = []
    seen: set[tuple[str, bytes]] = set()
    for record in records:
        keys = {
            ("summary", _digest(_summary.key(record.summary))),
            ("body", record.body_key),
            ("code", _digest("".join(record.code.split()))),
        }
        if seen.isdisjoint(keys):
            seen |= keys
            kept.append(record)
    return kept
