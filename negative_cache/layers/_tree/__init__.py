"""The state of a `TreeIndex` and its upkeep; the mathematics is in `negative_cache.ops.tree`."""
