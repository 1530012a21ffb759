"""A tree over the embeddings of candidates: construction, maintenance, cuts and draws.

| Module       | Contents                                                                    |
| ------------ | --------------------------------------------------------------------------- |
| `shape`      | the sizes of a tree's arrays, fixed when it is made                         |
| `build`      | construction of a tree by clustering, in NumPy                              |
| `cut`        | the arrays of a tree, and a query's cut through it with bounds on its mass  |
| `sampling`   | draws from the softmax through a cut, and search for the best candidates    |
| `routing`    | the leaf that a vector belongs to                                           |
| `statistics` | the statistics of a node, and their update when its candidates change       |
| `law`        | the exact law of the draws, for tests                                       |

The layer `negative_cache.layers.TreeIndex` holds the variables.
"""
