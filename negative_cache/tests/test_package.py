"""Tests of how the package is laid out, and of the names that it has."""

import ast
import pathlib
import re

import pytest
import setuptools

import negative_cache as nc

ROOT = pathlib.Path(nc.__file__).parent
# From the bottom up; what is in one line may import what is in it or in a line before. Handlers
# are layers: published modules that hold a `Cache`.
LEVELS = (
    ("_compat", "_validation", "_features", "_towers", "version"),
    ("ops",),
    ("negative_cache", "losses", "retrieval_fns", "filter_fns", "util"),
    ("layers", "handlers", "metrics"),
    ("models", "callbacks", "backup", "batching", "evaluation", "datasets"),
    ("",),
    ("demo",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if "tests" not in path.parts)


def parts_imported(path):
    """What a module imports of the package: the first name after the package's, "" for itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "negative_cache":
            yield from (alias.name if alias.name in LEVEL_OF else "" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("negative_cache."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ("".join(name[1:2]) for name in names if name[0] == "negative_cache")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    level = LEVEL_OF["" if own == "__init__" else own]
    upwards = [name for name in parts_imported(path) if LEVEL_OF[name] > level]
    assert not upwards


def test_four_private_modules_at_the_top():
    names = {path.stem for path in ROOT.glob("_*.py")} | {path.name for path in ROOT.glob("_*/")}
    private = {name for name in names if not name.startswith("__")}
    assert private == {"_compat", "_validation", "_features", "_towers"}


def test_ops_and_their_tests_know_no_keras():
    # So they are tested under one Keras only: see `tests/conftest.py`.
    for folder in (ROOT / "ops", ROOT / "tests" / "ops"):
        paths = set(folder.rglob("*.py"))
        assert paths
        for path in paths:
            assert not re.search("keras|_compat\\b", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "name", ["negative_cache", "losses", "handlers", "retrieval_fns", "filter_fns", "util"]
)
def test_published_modules_are_attributes(name):
    assert getattr(nc, name).__name__ == f"negative_cache.{name}"
    assert name in nc.__all__


def test_public_names_are_there():
    for module in (nc, nc.batching, nc.evaluation, nc.layers, nc.ops):
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_folder_is_shipped():
    found = setuptools.find_packages(ROOT.parent, include=["negative_cache*"])
    folders = {path.parent for path in MODULES}
    assert {".".join(path.relative_to(ROOT.parent).parts) for path in folders} <= set(found)
