"""Takes files from outside `docs/` that pages link to into the site.

On GitHub a page links to `../benchmarks/README.md`. The site has these files at
`benchmarks/README.md`, below its root, and the links are changed to that.
"""

import pathlib
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
FILES = (
    "benchmarks/*.md",
    "benchmarks/*.py",
    "benchmarks/results/**/*.png",
    "examples/*.py",
    "colab/*.ipynb",
)
LINKS_OUTSIDE = r"\]\(\.\./(?=(?:benchmarks|examples|colab)/)"


def on_files(files, config):
    """Adds the pages and files of other folders."""
    for path in (path for pattern in FILES for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return Files(list(files))


def on_page_markdown(markdown, page, config, files):
    """Changes links that leave `docs/`, or come into it, to where the files are in the site."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown.replace("](../docs/", "](../")
    return re.sub(LINKS_OUTSIDE, "](", markdown)
