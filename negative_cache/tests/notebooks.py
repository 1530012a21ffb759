"""Runs the notebooks of `colab/`, and writes them with their outputs.

    python -m negative_cache.tests.notebooks               # all of them, in full: some ten minutes
    python -m negative_cache.tests.notebooks quickstart    # one of them

A notebook runs in a kernel of its own, whose working directory is an empty folder.
"""

import argparse
import os
import pathlib
import re
import tempfile

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "colab"

# TensorFlow prints these lines before anything can tell it to be silent.
_NOISE = re.compile(r"^([IWE]\d{4} .*|WARNING: All log messages before .*)\n?", re.MULTILINE)


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: pathlib.Path, folder: pathlib.Path, **variables: str) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom, as a reader without any variables set would.

    Args:
      path: of the notebook, which is not written.
      folder: an empty one, to work in.
      **variables: of the environment.

    Returns:
      The notebook with the outputs of this run.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NOTEBOOK_QUICK", "TF_USE_LEGACY_KERAS", "TF_CPP_MIN_LOG_LEVEL")
    }
    environment |= {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow", **variables}
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    for cell in code_cells(notebook):
        cell.outputs = _tidy(cell.outputs)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell has printed."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def figures(cell: nbformat.NotebookNode) -> list[str]:
    """The PNGs that a cell shows, in base64."""
    pictures = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [picture for picture in pictures if picture]


def _tidy(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins what was printed in pieces, and leaves out what TensorFlow says about itself."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                output.text = _NOISE.sub("", output.text)
            if not output.text.strip():
                continue
            if kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
                continue
        kept.append(output)
    return kept


def _write(notebook: nbformat.NotebookNode, path: pathlib.Path) -> None:
    # The version of the Python that ran it would be a change in every run.
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


def main() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(names))
    chosen = parser.parse_args().names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"`name` must be one of {names}, received {sorted(unknown)}")
    for name in chosen:
        path = FOLDER / f"{name}.ipynb"
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            _write(execute(path, pathlib.Path(folder)), path)


if __name__ == "__main__":
    main()
