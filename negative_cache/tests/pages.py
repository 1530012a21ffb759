"""The Python of pages in Markdown."""

import re

import pytest


def blocks(page):
    """The code of each block that is marked as Python."""
    if not page.exists():
        pytest.skip("The README and its pages are not part of an installed package.")
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
