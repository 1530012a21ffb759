"""Retrieval datasets. Neither downloads anything.

`installed_code` reads the installed Python packages, `movielens` a folder that the user has.
"""

from negative_cache.datasets import installed_code, movielens

__all__ = ["installed_code", "movielens"]
