"""Retrieval datasets. They download nothing.

`installed_code` reads the installed Python packages. `movielens` reads a folder of the user.
"""

from negative_cache.datasets import installed_code, movielens

__all__ = ["installed_code", "movielens"]
