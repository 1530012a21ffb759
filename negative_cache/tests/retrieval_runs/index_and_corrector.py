"""Runs of a cache that streams with an index or a corrector, and of the Nyström correctors."""

import negative_cache as nc
from negative_cache.tests.retrieval_runs.inputs import CACHE_SIZE, DIM, squashed
from negative_cache.tests.retrieval_runs.options import (
    BY_ID,
    IN_BATCH,
    drift,
    make_index,
    warm_start,
)
from negative_cache.tests.retrieval_runs.training import Run

INDEX_AND_CORRECTOR = (
    # An index.
    Run(
        "index",
        lambda: {"index": make_index(capacity=CACHE_SIZE), "num_negatives": 2, **IN_BATCH, **BY_ID},
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "index, margin, transform, sampled query gradient, in graph",
        lambda: {
            "index": make_index(capacity=CACHE_SIZE),
            "false_negative_margin": 0.3,
            "score_transform": squashed,
            "exact_query_gradient": False,
        },
        in_graph=True,
    ),
    # Correctors.
    Run(
        "corrector",
        lambda: {"cache_size": 20, "corrector": nc.Corrector(hidden_units=6), "num_negatives": 2},
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "corrector of unit embeddings, probes, none",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, drift_loss="both", warmup_steps=1),
            "reduction": "none",
            "probe_size": 3,
            "probe_every": 2,
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.3),
        },
        tower={"unit": True},
        before_step=drift,
    ),
    Run(
        "corrector with content",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, content_key="content"),
            "refresh_fraction": 0.3,
            "embedding_dim": DIM,
            **IN_BATCH,
        },
        kind="content",
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "corrector and index, in graph",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, learning_rate_multiplier=2.0),
            "index": make_index(capacity=20),
            "num_negatives": 2,
        },
        in_graph=True,
        before_step=drift,
    ),
    Run(
        "Nyström, landmarks encoded",
        lambda: {
            "cache_size": 20,
            "corrector": nc.NystromCorrector(5),
            "num_negatives": 2,
            "refresh_fraction": 0.1,
        },
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "Nyström, uniform landmarks, corpus",
        lambda: {"corrector": nc.NystromCorrector(6, landmarks="uniform", num_encoded=2)},
        corpus=dict,
        before_step=drift,
    ),
    Run(
        "Nyström, k-means++, linear kernel, in graph",
        lambda: {
            "corrector": nc.NystromCorrector(4, landmarks="k-means++", kernel="linear"),
            **IN_BATCH,
        },
        corpus=dict,
        in_graph=True,
        before_step=drift,
    ),
)
