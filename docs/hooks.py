"""Takes files from outside `docs/` that pages link to into the site, and typesets formulas.

On GitHub a page links to `../benchmarks/README.md`. The site has these files at
`benchmarks/README.md`, below its root, and the links are changed to that.

Formulas are LaTeX in those of GitHub's forms that Markdown leaves alone: between $` and `$ in a
line, or in a block ```math. The site has them as MathML, which needs no scripts and no network.
"""

import html
import pathlib
import re

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError
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
# As Markdown leaves them: a block (`custom_fences` in `mkdocs.yml`), or code between two dollars
# with the punctuation that it shares a line with.
FORMULA = re.compile(
    r'<div class="math">(?P<block>.*?)</div>'
    r"|(?P<before>\(?)\$<code>(?P<inline>[^<]*)</code>\$(?P<after>[^\s<]*)",
    re.DOTALL,
)
LATEX = LatexToMathML(fancy_error=False)


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


def on_page_content(content, page, config, files):
    """Changes formulas from LaTeX to MathML. One that cannot be read ends the build."""

    def typeset(formula):
        is_block = formula["block"] is not None
        latex = html.unescape(formula["block"] if is_block else formula["inline"])
        try:
            mathml = LATEX.convert_with_local_state(latex, displaystyle=is_block)
        except LatexError as error:
            problem = f"{page.file.src_uri}: cannot read the formula `{latex.strip()}`: {error}"
            raise PluginError(problem) from error
        if is_block:
            return f'<div class="math">{mathml}</div>'
        return f'<span class="math">{formula["before"]}{mathml}{formula["after"]}</span>'

    return FORMULA.sub(typeset, content)
