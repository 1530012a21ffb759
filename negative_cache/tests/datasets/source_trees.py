"""Small source trees for the tests of `datasets`, written for each test."""

import textwrap

from negative_cache.datasets import installed_code

SPECIMEN = '''
def specimen(x):
    """Keep this one real function."""
    return x + 1
'''


def write(root, files):
    """Writes {relative path: source text or bytes} under `root`."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
    return root


def load(tmp_path, files, **kwargs):
    root = write(tmp_path / "root", files)
    return installed_code.load(tmp_path / "cache", roots=[root], verbose=0, **kwargs)


def names(corpus):
    return list(corpus.names)


def rows(corpus):
    return list(zip(corpus.names, corpus.summaries, corpus.codes, corpus.split, strict=True))


def many(prefix, count):
    """Source of `count` functions whose summaries and bodies are all different."""
    return "\n".join(
        f"def {prefix}_{i}(x):\n"
        f'    """Compute the {prefix} number {i} of x."""\n'
        f"    return {prefix}(x, {i})\n"
        for i in range(count)
    )
