"""What holds for a `TreeIndex` after any sequence of changes, computed from its variables."""

import numpy as np

from negative_cache.ops.tree.cut import COUNT, ERROR, RADIUS, SPREAD


def leaves_below(index, depth: int) -> dict[int, list[int]]:
    """Address of each node of level `depth` -> the leaves below it."""
    state, shape = index._state, index.tree_shape
    children = state.children[str(depth)].numpy().reshape(-1)
    nodes = {int(address): [int(children[address])] for address in np.flatnonzero(children >= 0)}
    if depth == shape.num_levels - 1:
        return nodes
    width, below = shape.widths[depth + 1], leaves_below(index, depth + 1)
    return {
        address: [
            leaf
            for child in range(block * width, (block + 1) * width)
            for leaf in below.get(child, [])
        ]
        for address, (block,) in nodes.items()
    }


def check_tree(index, vectors: dict[int, np.ndarray], *, spread_tolerance: float = 1e-3) -> None:
    """Asserts that `index` is a tree of the candidates `vectors`, with the statistics it states."""
    state, shape = index._state, index.tree_shape
    members, position = state.members.numpy(), state.position.numpy()
    slots = np.flatnonzero(members.reshape(-1) >= 0)
    present = members.reshape(-1)[slots]
    assert sorted(present.tolist()) == sorted(vectors), "every candidate is in exactly one leaf"
    expected = np.full(shape.capacity, -1)
    expected[present] = slots
    np.testing.assert_array_equal(position, expected)
    assert int(index.num_candidates) == len(vectors)

    for depth in range(shape.num_levels):
        below = str(depth + 1)
        children = state.children[str(depth)].numpy().reshape(-1)
        owners = state.owners[below].numpy()
        nodes = np.flatnonzero(children >= 0)
        np.testing.assert_array_equal(owners[children[nodes]], nodes)
        assert np.sum(owners >= 0) == len(nodes), "an owned block has one owner"
        free = state.free[below].numpy()[: int(state.num_free[below].numpy())]
        np.testing.assert_array_equal(np.sort(free), np.flatnonzero(owners < 0))

        means = state.mean[str(depth)].numpy().astype(np.float64).reshape(-1, shape.dim)
        stats = state.stats[str(depth)].numpy().astype(np.float64).reshape(-1, 4)
        covered = leaves_below(index, depth)
        assert not np.any(stats[children < 0]), "what is no node has no candidates"
        for address, leaves in covered.items():
            ids = members[leaves]
            ids = ids[ids >= 0]
            assert stats[address, COUNT] == len(ids)
            if not len(ids):
                assert not np.any(stats[address])
                continue
            rows = np.stack([vectors[i] for i in ids.tolist()]).astype(np.float64)
            distances = np.linalg.norm(rows - means[address], axis=1)
            assert stats[address, RADIUS] >= distances.max()
            off = np.linalg.norm(rows.mean(axis=0) - means[address])
            assert stats[address, ERROR] >= off, (depth, address, len(ids), stats[address], off)
            np.testing.assert_allclose(
                stats[address, SPREAD],
                np.mean(distances**2),
                atol=spread_tolerance * max(np.sum(rows**2, axis=1).max(), 1e-30),
            )


def log_partition(queries: np.ndarray, vectors: dict[int, np.ndarray]) -> np.ndarray:
    """[B] log Σ exp⟨x, y⟩ in float64; -inf over nothing."""
    if not vectors:
        return np.full(len(queries), -np.inf)
    rows = np.stack(list(vectors.values())).astype(np.float64)
    return np.logaddexp.reduce(np.asarray(queries, np.float64) @ rows.T, axis=1)
