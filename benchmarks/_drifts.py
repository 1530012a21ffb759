"""Drifts of embeddings that are known maps, growing over the steps of a training."""

import numpy as np

DIM, STEPS, PER_STEP, HELD_OUT = 64, 300, 128, 4_000


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def points(rng, count, centres, basis):
    """[count, d] around the centres; variances along the basis are in proportion to 1 / k."""
    spectrum = np.arange(1, DIM + 1) ** -0.5
    noise = 0.8 * spectrum * rng.normal(size=(count, DIM))
    return unit((centres[rng.integers(len(centres), size=count)] * spectrum + noise) @ basis)


def orthogonal(rng):
    return np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]


class Drift:
    """Where all rows are at each step: norm(M_s x + s σ ε), s = step / steps, ε of each row.

    `move(x, s)` is M_s x. Nothing is written back: the rows are as old as the training.
    """

    writes_back = False

    def __init__(self, rng, start, noise):
        self.start = start
        self.noise = (noise / DIM) ** 0.5 * rng.normal(size=start.shape)

    def move(self, x, share):
        return x

    def fresh(self, rows, step):
        share = step / STEPS
        return unit(self.move(self.start[rows], share) + share * self.noise[rows])

    def best(self, stale, written, step):
        """[n, d], where a stale embedding is expected now by who knows the map."""
        return unit(self.move(stale, step / STEPS))


class Rotation(Drift):
    """By 0.5 rad, in 32 planes at random; noise of variance 0.02."""

    def __init__(self, rng, start, noise=0.02, angle=0.5):
        super().__init__(rng, start, noise)
        self.angle, basis = angle, orthogonal(rng)
        half = DIM // 2
        planes = np.zeros((DIM, DIM))
        planes[np.arange(half), np.arange(half) + half] = 1.0
        self.generator = basis @ (planes - planes.T) @ basis.T

    def move(self, x, share):
        angle = share * self.angle
        return x @ (np.cos(angle) * np.eye(DIM) + np.sin(angle) * self.generator).T


class Linear(Drift):
    """x + s B x."""

    def __init__(self, rng, start, noise):
        super().__init__(rng, start, noise)
        self.matrix = self.make(rng)

    def move(self, x, share):
        return x + share * x @ self.matrix.T


class Scaling(Linear):
    """Each of 64 axes at random by a factor of its own, lognormal of 0.7; variance 0.02."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.02)

    def make(self, rng):
        basis, factors = orthogonal(rng), np.exp(0.7 * rng.normal(size=DIM))
        return (basis * (factors - 1.0)) @ basis.T


class LowRank(Linear):
    """I + 2 U Vᵀ of rank 4, orthonormal U and V; noise of variance 0.1."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.1)

    def make(self, rng):
        return 2.0 * orthogonal(rng)[:, :4] @ orthogonal(rng)[:, :4].T


class Nonlinear(Drift):
    """x + 0.5 f(x), f a network at random, W₂ tanh(2 W₁ √d x), 128 hidden units; variance 0.02."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.02)
        self.inner = 2.0 * rng.normal(size=(DIM, 128))
        outer = rng.normal(size=(128, DIM))
        lengths = np.square(np.tanh(start[:2000] @ self.inner) @ outer).sum(1).mean() ** 0.5
        self.outer = 0.5 / lengths * outer

    def move(self, x, share):
        return x + share * np.tanh(x @ self.inner) @ self.outer


class Shift(Drift):
    """x + c, the same c of length 0.5 for all; noise of variance 0.02."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.02)
        self.shift = 0.5 * unit(rng.normal(size=DIM))

    def move(self, x, share):
        return x + share * self.shift


class PureNoise(Drift):
    """Nothing but noise, of variance 0.25."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.25)


class Aged(Drift):
    """Rotations R_t x; rows are written back when they are revealed, so that their ages differ."""

    writes_back = True

    def fresh(self, rows, step):
        noise = step / STEPS * self.noise[rows]
        return unit(self.start[rows] @ self.rotations[step].T + noise)

    def best(self, stale, written, step):
        result = np.empty_like(stale)
        for then in np.unique(written):
            of_then = written == then
            since = self.rotations[step] @ self.rotations[then].T
            result[of_then] = stale[of_then] @ since.T
        return unit(result)


class OfAge(Aged):
    """exp(age A), 1.2 rad over all steps: the drift is linear in age; noise of variance 0.02."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.02)
        rotation = Rotation(rng, start, angle=1.2)
        self.rotations = [rotation.move(np.eye(DIM), t / STEPS).T for t in range(STEPS + 1)]


class Wandering(Aged):
    """Each step a further rotation at random: ‖drift‖² is linear in age; variance 0.02."""

    def __init__(self, rng, start):
        super().__init__(rng, start, noise=0.02)
        self.rotations = [np.eye(DIM)]
        for _ in range(STEPS):
            half = rng.normal(size=(DIM, DIM)) * (0.0022 / (2 * DIM)) ** 0.5 / 2
            half -= half.T
            step = np.linalg.solve(np.eye(DIM) - half, np.eye(DIM) + half)
            self.rotations.append(step @ self.rotations[-1])


DRIFTS = {
    "rotation": Rotation,
    "scaling": Scaling,
    "low rank": LowRank,
    "nonlinear": Nonlinear,
    "shift": Shift,
    "pure noise": PureNoise,
    "of age": OfAge,
    "wandering": Wandering,
}
