"""Runs the notebooks of `colab/` in their small setting, and checks what is committed with them.

A notebook says which Keras it needs, if it needs one, and runs in a process of its own.
"""

import re

import nbformat
import pytest

from negative_cache._compat import IS_KERAS_2
from negative_cache.tests import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000

if not notebooks.FOLDER.exists():
    pytest.skip("The notebooks are not part of an installed package.", allow_module_level=True)

# Neither the files nor their kernels depend on the Keras of the tests.
pytestmark = pytest.mark.skipif(IS_KERAS_2, reason="Runs with the tests under Keras 3.")
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

# A sentence that a notebook prints -> the numbers in it, which hold in every setting.
CLAIMS = {
    "from_tf_recommenders": (r"^(\d+) lines, and the import", lambda lines: int(lines) < 10),
    "replicas_saving_serving": (
        r"^(\d+) of (\d+) arrays of weights and state are equal to the bit",
        lambda equal, number: equal == number != "0",
    ),
    "tree_index": (r"^bounds contain log Z for (\d+)% of", lambda percent: percent == "100"),
}


def check_claims(name, notebook):
    if name not in CLAIMS:
        return
    pattern, holds = CLAIMS[name]
    text = "".join(map(notebooks.printed, notebooks.code_cells(notebook)))
    found = re.search(pattern, text, re.MULTILINE)
    assert found and holds(*found.groups()), text


@each_notebook
def test_committed_with_the_outputs_of_one_run_in_order(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = notebooks.read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = notebooks.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(len(notebooks.figures(cell)) for cell in cells) >= 2
    assert any(map(notebooks.printed, cells))
    for cell in cells:
        # No error, and no warning of anybody's.
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert kinds <= {"stdout", "display_data"}, cell.outputs
    check_claims(path.stem, notebook)


@each_notebook
def test_no_output_names_a_folder_of_the_machine(path):
    texts = [
        text
        for cell in notebooks.code_cells(notebooks.read(path))
        for output in cell.outputs
        for text in (output.get("text"), output.get("data", {}).get("text/plain"))
        if text
    ]
    assert texts
    for text in texts:
        assert not re.search(r"(?<![\w.:/])(/[\w.~-]+){2,}|\b[A-Z]:\\", text), text


@each_notebook
def test_begins_with_its_title_and_the_cell_that_installs(path):
    notebook = notebooks.read(path)
    title, install = notebook.cells[:2]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert install.cell_type == "code" and not install.outputs
    assert 'find_spec("negative_cache") is None:\n    %pip install --quiet' in install.source
    assert 'os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL"' in install.source
    # Ids stay what they are when a notebook runs, so that a diff shows what has changed.
    expected = path.stem.replace("_", "-")
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(rf"{expected}-\d\d", cell_id) for cell_id in ids), ids


@each_notebook
@pytest.mark.slow
@pytest.mark.end_to_end
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # Files of the kernel, of IPython and of the data do not go to the user's folders.
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "empty"
    folder.mkdir()
    done = notebooks.execute(path, folder, NOTEBOOK_QUICK="1")
    for before, now in zip(
        notebooks.code_cells(notebooks.read(path)), notebooks.code_cells(done), strict=True
    ):
        assert bool(notebooks.printed(before)) == bool(notebooks.printed(now)), now.source
        assert len(notebooks.figures(before)) == len(notebooks.figures(now)), now.source
    check_claims(path.stem, done)


def test_the_list_of_notebooks_has_each_once():
    text = (notebooks.FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\w+\.ipynb)\)", text)
    assert sorted(listed) == [path.name for path in PATHS]
