"""Clustering of millions of vectors into clusters of bounded size, in NumPy on the host.

`lloyd` is k-means. `partition` applies it in stages, to divide millions of vectors into small
groups of neighbours. Both read `points` [n, d] one block at a time and compute in float32. The
points may have any floating dtype and may be memory-mapped. They must be finite. Distances are
Euclidean.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import sparse

# The largest number of scores, or of coordinates, in a block of points: 8 MiB fit into the
# processor's cache.
_BLOCK_ENTRIES = 2**21
# The largest number of groups that one k-means makes, and of bytes in its points. Every boundary
# between coarse clusters costs quality: a tenth or more for points that are hard to cluster.
_MAX_FLAT_GROUPS, _MAX_FLAT_BYTES = 2048, 2**28
# The largest number of clusters in a coarse stage. Two stages of 1024 make a million groups.
_MAX_FAN_OUT = 1024
# Points per cluster in the sample that a coarse stage is trained on.
_SAMPLE_SIZE = 128
_ITERATIONS = 8
# Rounds in which points leave overfull clusters. Few rounds suffice unless most points are equal.
_MAX_ROUNDS = 8


def lloyd(
    points: np.ndarray,
    num_clusters: int,
    *,
    iterations: int,
    rng: np.random.Generator,
    max_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """k-means by Lloyd's algorithm, starting from points drawn at random.

    A cluster that loses its last point starts again at a point drawn in proportion to the squared
    distance to its centre, as in k-means++. With fewer points than clusters, or with equal points,
    some clusters remain empty.

    Args:
      points: [n, d] float.
      num_clusters: k.
      iterations: number of times that the centres are moved.
      rng: draws the first centres, and new centres for empty clusters.
      max_size: the largest number of points in a cluster. A cluster with more points keeps the
        nearest ones; each of the rest goes to the nearest centre with room.

    Returns:
      assignment: [n] int32, the cluster of each point.
      centres: [k, d] float32, the centres that the assignment refers to.

    Raises:
      ValueError: if `num_clusters` is too small.
    """
    _check_points(points)
    num_points = len(points)
    if num_clusters < 1:
        raise ValueError(f"`num_clusters` must be at least 1. Received: {num_clusters}.")
    if max_size is not None and num_points > num_clusters * max_size:
        raise ValueError(
            "`num_clusters` clusters of `max_size` must hold all points. Received: num_clusters ="
            f" {num_clusters}, max_size = {max_size} and {num_points} points."
        )
    if not num_points:
        return np.zeros([0], np.int32), np.zeros([num_clusters, points.shape[1]], np.float32)
    rows = np.arange(num_points)
    # Every point is used once before any point is repeated.
    centres = read_rows(points, np.resize(rng.permutation(num_points), num_clusters))
    for _ in range(iterations):
        assignment, distances = _nearest(points, rows, centres)
        centres = _recentre(points, assignment, distances, centres, rng)
    assignment, distances = _nearest(points, rows, centres)
    if max_size is not None:
        capacities = np.full([num_clusters], max_size)
        _move_overflow(points, rows, centres, assignment, distances, capacities)
    return assignment, centres


def max_groups(num_points: int, max_size: int, fill: float) -> int:
    """The largest number of groups that `partition` makes: ⌈n / max(fill · max_size, 1)⌉."""
    return math.ceil(num_points / max(fill * max_size, 1.0))


def partition(
    points: np.ndarray,
    max_size: int,
    *,
    fill: float,
    rng: np.random.Generator,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Divides vectors into groups of neighbours, none larger than `max_size`.

    The points start with a budget of `max_groups` groups. If the budget is large, k-means on a
    sample makes coarse clusters. Each cluster gets a share of the budget in proportion to its
    number of points, and is divided in the same way. A small budget is spent by one `lloyd`. If a
    cluster has more points than its share has room for, it passes the farthest ones on to
    neighbouring clusters. So no group is ever added, and the bound on their number holds exactly.
    Groups with neighbouring numbers tend to be neighbours.

    Args:
      points: [n, d] float. They are not copied as a whole: the function needs 0.5 GB of memory
        plus about 30 bytes per point.
      max_size: the largest number of points in a group.
      fill: in (0, 1], the mean size of the groups as a fraction of `max_size`.
      rng: makes all random choices.
      on_progress: function of a number of points, called each time that so many more points have
        been assigned to groups.

    Returns:
      [n] int32, the group of each point. The groups are numbered 0, 1, … without a gap. There are
      at most `max_groups(n, max_size, fill)` of them, and rarely fewer unless many points are
      equal.

    Raises:
      ValueError: if `max_size` or `fill` is out of range.
    """
    _check_points(points)
    if max_size < 1:
        raise ValueError(f"`max_size` must be at least 1. Received: {max_size}.")
    if not 0.0 < fill <= 1.0:
        raise ValueError(f"`fill` must lie in (0, 1]. Received: {fill}.")
    num_points, dim = points.shape
    flat_budget = max(_MAX_FLAT_BYTES // (4 * max_size * max(dim, 1)), 2)
    flat_budget = min(flat_budget, _MAX_FLAT_GROUPS)
    groups = np.empty([num_points], np.int32)
    num_groups = 0
    waiting = [(np.arange(num_points, dtype=np.int32), max_groups(num_points, max_size, fill))]
    while waiting:
        rows, budget = waiting.pop()
        if budget > flat_budget:
            stages = math.ceil(math.log(budget, min(flat_budget, _MAX_FAN_OUT)))
            fan_out = math.ceil(budget ** (1.0 / stages))
            waiting += _split(points, rows, budget, fan_out, max_size, rng)
        elif rows.size:
            assignment, _ = lloyd(
                read_rows(points, rows), budget, iterations=_ITERATIONS, rng=rng, max_size=max_size
            )
            used, assignment = np.unique(assignment, return_inverse=True)
            groups[rows] = num_groups + assignment
            num_groups += used.size
            if on_progress is not None:
                on_progress(rows.size)
    return groups


def _split(
    points: np.ndarray,
    rows: np.ndarray,
    budget: int,
    fan_out: int,
    max_size: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, int]]:
    """One coarse stage: divides `rows` into `fan_out` clusters, and the `budget` among them."""
    sample_size = min(fan_out * _SAMPLE_SIZE, rows.size)
    sample = rows[rng.choice(rows.size, sample_size, replace=False, shuffle=False)]
    _, centres = lloyd(read_rows(points, sample), fan_out, iterations=_ITERATIONS, rng=rng)
    assignment, distances = _nearest(points, rows, centres)
    shares = _apportion(np.bincount(assignment, minlength=fan_out), budget)
    _move_overflow(points, rows, centres, assignment, distances, shares * max_size)
    parts = []
    for members, share in zip(_members(assignment, fan_out), shares):
        if 8 * share > 7 * budget:
            # Nearly all points are in this cluster: most of them are equal, and no number of
            # stages of k-means can separate them. Runs in the order of the distance to the centre
            # keep equal points together.
            order = members[np.argsort(distances[members], kind="stable")]
            parts += [(rows[run], runs_share) for run, runs_share in _runs(order, share, fan_out)]
        elif share:
            parts.append((rows[members], share))
    return parts


def _apportion(sizes: np.ndarray, budget: int) -> np.ndarray:
    """[k] int, shares of a `budget` in proportion to `sizes` [k], by the largest remainders."""
    quotas = sizes * (budget / sizes.sum())
    shares = np.floor(quotas).astype(np.int64)
    largest_first = np.argsort(shares - quotas, kind="stable")
    shares[largest_first[: budget - shares.sum()]] += 1
    return shares


def _members(assignment: np.ndarray, num_clusters: int) -> list[np.ndarray]:
    """For each cluster, the positions in `assignment` [n] of its points."""
    # NumPy uses radix sort, which is faster, for 16-bit integers.
    order = np.argsort(assignment.astype(np.uint16), kind="stable")
    sizes = np.bincount(assignment, minlength=num_clusters)
    return np.split(order, np.cumsum(sizes)[:-1])


def _runs(order: np.ndarray, budget: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Divides `order` [n] into `count` runs, and the `budget` among them in proportion."""
    ends = np.arange(min(count, budget) + 1) * budget // min(count, budget)
    cuts = ends * order.size // budget
    for run in range(len(ends) - 1):
        yield order[cuts[run] : cuts[run + 1]], int(ends[run + 1] - ends[run])


def _move_overflow(
    points: np.ndarray,
    rows: np.ndarray,
    centres: np.ndarray,
    assignment: np.ndarray,
    distances: np.ndarray,
    capacities: np.ndarray,
) -> None:
    """Brings every cluster down to its capacity; changes `assignment` and `distances` in place.

    The points of overfull clusters are placed in rounds, so that no Python loop runs over points.
    In a round, each point asks for the nearest centre with room, and each centre takes the nearest
    of the points that ask for it, as many as it has room for. Points that are left after the last
    round go to any cluster with room.
    """
    sizes = np.bincount(assignment, minlength=len(centres))
    overfull = sizes > capacities
    room = np.where(overfull, capacities, capacities - sizes)
    asking = np.flatnonzero(overfull[assignment])
    for _ in range(_MAX_ROUNDS):
        if not asking.size:
            return
        taken = _take_nearest(assignment[asking], distances[asking], room)
        room -= np.bincount(assignment[asking[taken]], minlength=len(centres))
        asking = asking[~taken]
        open_clusters = np.flatnonzero(room)
        if asking.size:
            nearest, distances[asking] = _nearest(points, rows[asking], centres[open_clusters])
            assignment[asking] = open_clusters[nearest]
    # Points that ask for the same cluster stay together: most of them are equal.
    asking = asking[np.argsort(assignment[asking], kind="stable")]
    assignment[asking] = np.repeat(np.arange(len(centres)), room)[: asking.size]


def _take_nearest(clusters: np.ndarray, distances: np.ndarray, room: np.ndarray) -> np.ndarray:
    """[n] bool, whether each point is among the `room[cluster]` nearest points of its cluster."""
    order = np.lexsort([distances, clusters])
    ordered = clusters[order]
    rank = np.arange(order.size) - np.searchsorted(ordered, ordered)
    taken = np.empty([order.size], bool)
    taken[order] = rank < room[ordered]
    return taken


def _nearest(
    points: np.ndarray, rows: np.ndarray, centres: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of `centres` [k, d] to each of `rows` [n], and its squared distance.

    ‖x - c‖² = ‖x‖² - 2(⟨x, c⟩ - ½‖c‖²), and only the term in parentheses depends on the centre.
    Points and centres are taken relative to the mean centre, which reduces rounding errors if all
    points are far from zero.

    Returns:
      nearest: [n] int32.
      distances: [n] float32.
    """
    nearest = np.empty([rows.size], np.int32)
    distances = np.empty([rows.size], np.float32)
    origin = centres.mean(axis=0)
    centres = centres - origin
    half_norms = 0.5 * np.einsum("kd,kd->k", centres, centres)
    scores_buffer = np.empty([_block_size(points, len(centres)), len(centres)], np.float32)
    for part, block in _blocks(points, rows, len(centres)):
        block -= origin
        scores = np.matmul(block, centres.T, out=scores_buffer[: len(block)])
        scores -= half_norms
        nearest[part] = scores.argmax(axis=1)
        best = scores[np.arange(len(block)), nearest[part]]
        distances[part] = np.einsum("nd,nd->n", block, block) - 2.0 * best
    # Rounding may have made a distance near zero negative.
    return nearest, np.maximum(distances, 0.0, out=distances)


def _recentre(
    points: np.ndarray,
    assignment: np.ndarray,
    distances: np.ndarray,
    centres: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """[k, d] float32, the means of the clusters.

    An empty cluster starts again at a point, drawn in proportion to the squared distance between
    the point and the centre of its cluster. If all distances are zero, it keeps its centre.
    """
    num_clusters = len(centres)
    sizes = np.bincount(assignment, minlength=num_clusters)
    sums = np.zeros(centres.shape, np.float64)
    for part, block in _blocks(points, np.arange(len(points)), num_clusters):
        columns = assignment[part]
        entries = (np.ones(columns.shape, np.float32), columns, np.arange(columns.size + 1))
        sums += sparse.csr_matrix(entries, [columns.size, num_clusters]).T @ block
    means = np.where(sizes[:, np.newaxis] > 0, sums / np.maximum(sizes, 1)[:, np.newaxis], centres)
    empty = np.flatnonzero(sizes == 0)
    total = distances.sum(dtype=np.float64)
    if empty.size and total > 0.0:
        drawn = rng.choice(len(points), empty.size, p=distances.astype(np.float64) / total)
        means[empty] = read_rows(points, drawn)
    return means.astype(np.float32)


def _blocks(
    points: np.ndarray, rows: np.ndarray, num_clusters: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields consecutive slices of `rows` [n], each with a float32 copy of its points."""
    size = _block_size(points, num_clusters)
    for start in range(0, rows.size, size):
        part = slice(start, start + size)
        yield part, read_rows(points, rows[part])


def _block_size(points: np.ndarray, num_clusters: int) -> int:
    return max(_BLOCK_ENTRIES // max(num_clusters, points.shape[1]), 1)


def read_rows(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of `rows` of the points, as float32."""
    return np.asarray(points[rows]).astype(np.float32, copy=False)


def _check_points(points: np.ndarray) -> None:
    if points.ndim != 2:
        raise ValueError(f"`points` must have shape [n, d]. Received shape: {points.shape}.")
