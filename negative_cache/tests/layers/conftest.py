"""What tests of several layers ask for."""

import pytest

from negative_cache.layers._tree import make as make_module


@pytest.fixture(params=[4096, 12], ids=["one level", "many levels"])
def root_width(request, monkeypatch):
    """Trees of one node level, and of several."""
    monkeypatch.setattr(make_module, "_MAX_ROOT_WIDTH", request.param)
    return request.param
