"""Short trainings that between them use every option of `CachedRetrieval`, and what they compute.

A `Run` is one configuration: `record()` trains it for a few steps and returns losses, gradients and
states as arrays. Two parts of the repository use the same runs. `benchmarks/same_numbers.py`
compares two commits bit by bit, and `layers/test_recorded_values.py` compares with committed
values. Only public names are used here, so that the package runs as it is before and after a change
of the code behind them.
"""

from negative_cache.tests.retrieval_runs.corpus import CORPUS
from negative_cache.tests.retrieval_runs.files_and_fit import FILES, FIT, MORE_FILES, REPLICATED
from negative_cache.tests.retrieval_runs.index_and_corrector import INDEX_AND_CORRECTOR
from negative_cache.tests.retrieval_runs.inputs import NUM_QUERIES, NUM_STEPS
from negative_cache.tests.retrieval_runs.streaming import MORE_STREAMING, STREAMING

RUNS = (
    *STREAMING,
    *FILES,
    *INDEX_AND_CORRECTOR,
    *CORPUS,
    # What single changes of the code were seen to leave alone above.
    *MORE_STREAMING,
    *MORE_FILES,
    # Inside of a model, and on two replicas.
    *FIT,
    *REPLICATED,
)

__all__ = ["NUM_QUERIES", "NUM_STEPS", "RUNS"]
