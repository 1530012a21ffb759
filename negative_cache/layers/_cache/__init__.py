"""The state of a `Cache` and its updates. `ops.cache_rows` has the functions of tensors."""
