import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import _clustering
from negative_cache.ops._clustering import lloyd, max_groups, partition


def blobs(rng, num_points, num_blobs, dim=4, spread=0.05):
    """Points around well separated centres, and the centre of each."""
    labels = rng.integers(num_blobs, size=num_points)
    centres = 10.0 * rng.standard_normal([num_blobs, dim])
    points = centres[labels] + spread * rng.standard_normal([num_points, dim])
    return points.astype("f"), labels


def squared_distances(points, centres):
    points, centres = points.astype("d"), centres.astype("d")
    return ((points[:, np.newaxis] - centres) ** 2).sum(axis=2)


def mean_squared_radius(points, groups):
    """The mean squared distance of a point to the mean of its group."""
    total = 0.0
    for group in np.unique(groups):
        members = points[groups == group].astype("d")
        total += ((members - members.mean(axis=0)) ** 2).sum()
    return total / len(points)


def check_groups(groups, num_points, max_size, fill):
    assert groups.dtype == np.int32 and groups.shape == (num_points,)
    sizes = np.bincount(groups)
    assert len(sizes) <= max_groups(num_points, max_size, fill)
    # Contiguous numbers, and no group too large.
    assert np.all(sizes > 0) and np.all(sizes <= max_size)


ADVERSARIAL = {
    "equal": lambda rng, n: np.ones([n, 3], "f"),
    "giant": lambda rng, n: np.concatenate(
        [np.zeros([n - n // 20, 3], "f"), 99 * rng.standard_normal([n // 20, 3]).astype("f")]
    ),
    "few values": lambda rng, n: rng.integers(0, 2, [n, 3]).astype("f"),
    "geometric": lambda rng, n: (10.0 ** -np.linspace(0, 30, n))[:, np.newaxis].astype("f"),
    "far from zero": lambda rng, n: (1e4 + rng.standard_normal([n, 3])).astype("f"),
    "spread out": lambda rng, n: rng.standard_normal([n, 3]).astype("f"),
}


class TestLloyd:
    @given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 12))
    def test_every_point_is_assigned_to_its_nearest_centre(self, seed, num_points, num_clusters):
        rng = np.random.default_rng(seed)
        points = rng.standard_normal([num_points, 3]).astype("f")
        assignment, centres = lloyd(points, num_clusters, iterations=3, rng=rng)
        assert assignment.dtype == np.int32 and centres.dtype == np.float32
        assert centres.shape == (num_clusters, 3)
        distances = squared_distances(points, centres)
        np.testing.assert_allclose(
            distances[np.arange(num_points), assignment], distances.min(axis=1), atol=1e-5
        )

    def test_converges_to_a_fixed_point(self):
        rng = np.random.default_rng(0)
        points = rng.standard_normal([500, 3]).astype("f")
        assignment, centres = lloyd(points, 8, iterations=100, rng=rng)
        means = [points[assignment == cluster].mean(axis=0) for cluster in range(8)]
        np.testing.assert_allclose(centres, means, atol=1e-5)

    def test_starts_empty_clusters_again(self):
        rng = np.random.default_rng(0)
        # Of twelve first centres hardly one is drawn from the 60 points that are not at zero.
        points = np.concatenate([np.zeros([9000, 4]), rng.standard_normal([60, 4])]).astype("f")
        assignment, _ = lloyd(points, 12, iterations=20, rng=rng)
        assert len(np.unique(assignment)) == 12

    @given(st.integers(0, 2**31), st.integers(0, 60), st.integers(1, 12), st.integers(0, 3))
    def test_no_cluster_exceeds_its_capacity(self, seed, num_points, num_clusters, slack):
        rng = np.random.default_rng(seed)
        points = rng.integers(-2, 3, [num_points, 2]).astype("f")
        max_size = -(-num_points // num_clusters) + slack
        assignment, _ = lloyd(points, num_clusters, iterations=2, rng=rng, max_size=max_size)
        assert np.bincount(assignment, minlength=num_clusters).max() <= max_size

    def test_equal_points_fill_one_cluster_after_the_other(self):
        # More clusters than there are rounds in which a cluster is filled.
        points = np.ones([200, 2], "f")
        assignment, _ = lloyd(points, 100, iterations=1, rng=np.random.default_rng(0), max_size=2)
        np.testing.assert_array_equal(np.bincount(assignment), np.full([100], 2))

    def test_an_overfull_cluster_keeps_its_nearest_points(self):
        # Centres at the means 0.6 and 10: the five points near zero are one too many, and the
        # farthest of them goes to the other cluster, although not the last by number.
        points = np.array([[0.0], [2.0], [0.3], [0.4], [0.3], [10.0]], "f")
        for seed in range(8):
            rng = np.random.default_rng(seed)
            assignment, centres = lloyd(points, 2, iterations=10, rng=rng, max_size=4)
            near = int(np.argmin(centres))
            np.testing.assert_allclose(np.sort(centres[:, 0]), [0.6, 10.0], rtol=1e-6)
            np.testing.assert_array_equal(assignment == near, [1, 0, 1, 1, 1, 0])

    def test_a_constraint_that_does_not_bind_changes_nothing(self):
        points, _ = blobs(np.random.default_rng(0), 200, 5)
        free, _ = lloyd(points, 5, iterations=5, rng=np.random.default_rng(1))
        bound, _ = lloyd(points, 5, iterations=5, rng=np.random.default_rng(1), max_size=200)
        np.testing.assert_array_equal(free, bound)

    def test_fewer_points_than_clusters_each_have_their_own(self):
        points = np.arange(5, dtype="f")[:, np.newaxis]
        assignment, centres = lloyd(points, 8, iterations=3, rng=np.random.default_rng(0))
        np.testing.assert_allclose(centres[assignment], points)
        assert len(np.unique(assignment)) == 5
        assignment, centres = lloyd(points[:0], 8, iterations=3, rng=np.random.default_rng(0))
        assert assignment.shape == (0,) and centres.shape == (8, 1)

    def test_blocks_do_not_change_the_result(self, monkeypatch):
        points = np.random.default_rng(0).standard_normal([300, 3]).astype("f")
        expected = lloyd(points, 7, iterations=4, rng=np.random.default_rng(1), max_size=50)
        monkeypatch.setattr(_clustering, "_BLOCK_ENTRIES", 64)
        actual = lloyd(points, 7, iterations=4, rng=np.random.default_rng(1), max_size=50)
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_allclose(actual[1], expected[1], atol=1e-5)

    @pytest.mark.parametrize(
        ("shape", "num_clusters", "max_size", "message"),
        [
            ([9, 2], 2, 4, "num_clusters = 2, max_size = 4 and 9 points"),
            ([9, 2], 0, None, "`num_clusters` must be at least 1. Received: 0"),
            ([9], 2, None, r"`points` must have shape \[n, d\]. Received shape: \(9,\)"),
        ],
    )
    def test_refuses_what_does_not_fit(self, shape, num_clusters, max_size, message):
        with pytest.raises(ValueError, match=message):
            lloyd(
                np.zeros(shape, "f"),
                num_clusters,
                iterations=1,
                rng=np.random.default_rng(0),
                max_size=max_size,
            )


class TestPartition:
    @pytest.fixture(autouse=True)
    def _small_stages(self, monkeypatch):
        """Stages so small that a thousand points need several."""
        monkeypatch.setattr(_clustering, "_MAX_FLAT_GROUPS", 8)
        monkeypatch.setattr(_clustering, "_MAX_FAN_OUT", 6)

    @given(
        st.integers(0, 2**31),
        st.sampled_from(sorted(ADVERSARIAL)),
        st.one_of(st.integers(0, 40), st.integers(900, 1000)),
        st.sampled_from([1, 2, 7, 1000]),
        st.sampled_from([0.3, 0.85, 1.0]),
    )
    def test_every_point_is_in_one_of_few_small_groups(self, seed, kind, n, max_size, fill):
        rng = np.random.default_rng(seed)
        placed = []
        groups = partition(
            ADVERSARIAL[kind](rng, n), max_size, fill=fill, rng=rng, on_progress=placed.append
        )
        check_groups(groups, n, max_size, fill)
        assert sum(placed) == n

    def test_bound_is_the_mean_size(self):
        # 100 / (0.5 * 8) = 25; a fill that is less than one point of a group is one point.
        assert max_groups(100, 8, 0.5) == 25
        assert max_groups(101, 8, 0.5) == 26
        assert max_groups(100, 1, 0.5) == 100
        assert max_groups(0, 8, 0.5) == 0

    def test_points_that_fit_into_one_group_are_one(self):
        points = np.random.default_rng(0).standard_normal([8, 3]).astype("f")
        groups = partition(points, 8, fill=1.0, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(groups, np.zeros([8]))

    def test_groups_are_coherent(self, monkeypatch):
        rng = np.random.default_rng(0)
        points = rng.standard_normal([4000, 3]).astype("f")
        monkeypatch.setattr(_clustering, "_MAX_FLAT_GROUPS", 64)
        monkeypatch.setattr(_clustering, "_MAX_FAN_OUT", 64)
        groups = partition(points, 16, fill=0.7, rng=rng)
        flat, _ = lloyd(points, max_groups(4000, 16, 0.7), iterations=20, rng=rng)
        assert mean_squared_radius(points, groups) < 1.25 * mean_squared_radius(points, flat)

    def test_separated_clusters_are_not_mixed(self):
        rng = np.random.default_rng(0)
        points, labels = blobs(rng, 900, 3)
        groups = partition(points, 50, fill=0.5, rng=rng)
        blobs_of_groups = [np.unique(labels[groups == group]).size for group in np.unique(groups)]
        assert max(blobs_of_groups) == 1

    @given(st.integers(0, 2**31))
    def test_rng_determines_the_result(self, seed):
        points = np.random.default_rng(0).standard_normal([300, 3]).astype("f")
        first, second = (
            partition(points, 5, fill=0.8, rng=np.random.default_rng(seed)) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
    def test_other_dtypes_are_computed_in_float32(self, dtype, tmp_path):
        points = np.random.default_rng(0).standard_normal([500, 3]).astype(dtype)
        mapped = np.memmap(tmp_path / "points", dtype, "w+", shape=points.shape)
        mapped[:] = points
        expected = partition(points.astype("f"), 9, fill=0.8, rng=np.random.default_rng(1))
        for array in (points, mapped):
            groups = partition(array, 9, fill=0.8, rng=np.random.default_rng(1))
            np.testing.assert_array_equal(groups, expected)

    def test_few_bytes_are_read_at_a_time(self, monkeypatch):
        points = np.random.default_rng(0).standard_normal([500, 3]).astype("f")
        reads = []

        class Recorder:
            ndim, shape = points.ndim, points.shape

            def __len__(self):
                return len(points)

            def __getitem__(self, rows):
                reads.append(len(points[rows]))
                return points[rows]

        # Room for four groups of nine points; the samples of at most six clusters have 24.
        monkeypatch.setattr(_clustering, "_MAX_FLAT_BYTES", 4 * 9 * 3 * 4)
        monkeypatch.setattr(_clustering, "_SAMPLE_SIZE", 4)
        monkeypatch.setattr(_clustering, "_BLOCK_ENTRIES", 60)
        groups = partition(Recorder(), 9, fill=1.0, rng=np.random.default_rng(1))
        check_groups(groups, 500, 9, 1.0)
        assert max(reads) <= 4 * 9

    @pytest.mark.parametrize(
        ("shape", "max_size", "fill", "message"),
        [
            ([9], 4, 0.5, r"`points` must have shape \[n, d\]. Received shape: \(9,\)"),
            ([9, 2], 0, 0.5, "`max_size` must be at least 1. Received: 0"),
            ([9, 2], 4, 0.0, r"`fill` must lie in \(0, 1\]. Received: 0.0"),
            ([9, 2], 4, 1.1, r"`fill` must lie in \(0, 1\]. Received: 1.1"),
        ],
    )
    def test_refuses_what_does_not_fit(self, shape, max_size, fill, message):
        with pytest.raises(ValueError, match=message):
            partition(np.zeros(shape, "f"), max_size, fill=fill, rng=np.random.default_rng(0))


def test_one_flat_stage_is_as_good_as_flat_clustering():
    """A capacity costs little where sizes are uneven: groups of 64 against unbounded clusters."""
    rng = np.random.default_rng(0)
    points = (rng.standard_normal([8000, 16]) * 0.7 ** np.arange(16)).astype("f")
    groups = partition(points, 64, fill=0.66, rng=rng)
    flat, _ = lloyd(points, max_groups(8000, 64, 0.66), iterations=10, rng=rng)
    assert mean_squared_radius(points, groups) < 1.05 * mean_squared_radius(points, flat)
