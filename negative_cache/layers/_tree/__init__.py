"""The state of a `TreeIndex` and its maintenance. `ops.tree` has the functions of tensors."""
