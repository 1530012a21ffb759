"""Which pairs share a query or a candidate."""

import dataclasses
import warnings

import numpy as np

from negative_cache import _batch_conflicts, _held_out, _pair_batches


@dataclasses.dataclass(frozen=True)
class Ids:
    """Who the queries and candidates of N pairs are: [N] int64 codes from 0 on, None if not known.

    Candidates that are not known are all different, as are queries.
    """

    queries: np.ndarray | None = None
    candidates: np.ndarray | None = None

    @classmethod
    def given(cls, num_pairs: int, query_ids, candidate_ids) -> "Ids":
        """Of ids [N], integers or strings."""
        return cls(
            _codes(query_ids, num_pairs, "query_ids"),
            _codes(candidate_ids, num_pairs, "candidate_ids"),
        )

    @classmethod
    def of(cls, pairs, query_id_key: str | None, candidate_id_key: str | None) -> "Ids":
        """Of the features of pairs."""
        keys = {"query": query_id_key, "candidate": candidate_id_key}
        return cls.given(
            _pair_batches.num_rows(pairs),
            *(
                None if key is None else _held_out.ids_of(pairs[name], key)
                for name, key in keys.items()
            ),
        )

    def warn_of_conflicts(self, batch_size: int) -> None:
        """Warns of candidates that are in too many pairs to be in each batch only once."""
        if self.candidates is None:
            return
        conflicts = _batch_conflicts.unavoidable_conflicts(self.candidates, batch_size)
        if conflicts:
            warnings.warn(
                f"{conflicts} of {len(self.candidates)} pairs will share a batch with another pair"
                f" of their candidate: one candidate is in {np.bincount(self.candidates).max()}"
                " pairs. Smaller batches, or `remove_accidental_hits` in the task, keep it from"
                " being its own negative.",
                stacklevel=3,
            )


def _codes(ids, num_pairs: int, name: str) -> np.ndarray | None:
    """[N] int64 codes from 0 on."""
    if ids is None:
        return None
    ids = _held_out.to_numpy(ids)
    if ids.shape != (num_pairs,) or ids.dtype.kind not in "iuO":
        raise ValueError(
            f"`{name}` must be integers or strings of shape [{num_pairs}]. Received dtype"
            f" {ids.dtype}, shape {ids.shape}."
        )
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


NOT_KNOWN = Ids()
