"""Takes files from outside `docs/` that pages link to into the site.

On GitHub a page links to `../benchmarks/README.md`. The site has these files at
`benchmarks/README.md`, below its root, and the links are changed to that.
"""

import pathlib
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["benchmarks/README.md"]
FILES = "examples/*.py", "benchmarks/*.py"
FOLDERS_OUTSIDE = r"\]\(\.\./(?=(?:benchmarks|examples)/)"


def on_files(files, config):
    """Adds the pages and files of other folders."""
    found = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    for path in [ROOT / page for page in PAGES] + found:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return Files(list(files))


def on_page_markdown(markdown, page, config, files):
    """Changes links that leave `docs/`, or come into it, to where the files are in the site."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](../docs/", "](../")
    return re.sub(FOLDERS_OUTSIDE, "](", markdown)
