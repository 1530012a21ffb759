"""A tree over the embeddings of candidates: how it is built, kept up, cut and drawn from.

| Module       | What it holds                                                               |
| ------------ | --------------------------------------------------------------------------- |
| `shape`      | the sizes of a tree's arrays, fixed when it is made                         |
| `build`      | which candidates share a leaf, and which nodes a parent, in NumPy           |
| `cut`        | the arrays of a tree, and a query's cut through it with bounds of its mass  |
| `sampling`   | draws from the softmax by way of a cut, and search for the best candidates  |
| `routing`    | where in the tree a vector belongs                                          |
| `statistics` | what a node keeps of its candidates, and how it changes with them           |
| `law`        | the exact law of draws, for those who check it                              |

The layer `negative_cache.layers.TreeIndex` holds the variables.
"""
