"""Which parameters of a test run under both Kerases."""

from collections.abc import Collection, Iterable

import pytest


def under_both(some: Collection[str], of_all: Iterable[str]) -> list:
    """The names `of_all` as parameters, of which those of `some` run under both Kerases."""
    return [
        name if name in some else pytest.param(name, marks=pytest.mark.one_keras) for name in of_all
    ]
