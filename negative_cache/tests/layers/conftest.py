"""What tests of several layers ask for."""

import pytest

from negative_cache.layers import tree_index as tree_index_module


@pytest.fixture(params=[4096, 12], ids=["one level", "many levels"])
def root_width(request, monkeypatch):
    """Trees of one node level, and of several."""
    monkeypatch.setattr(tree_index_module, "_MAX_ROOT_WIDTH", request.param)
    return request.param
