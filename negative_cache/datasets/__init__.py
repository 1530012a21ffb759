"""Retrieval datasets. `installed_code` needs no download: it reads the installed packages."""

from negative_cache.datasets import installed_code

__all__ = ["installed_code"]
