"""Runs whose cache covers a corpus."""

import negative_cache as nc
from negative_cache.tests.retrieval_runs.inputs import NUM_CANDIDATES
from negative_cache.tests.retrieval_runs.options import (
    IN_BATCH,
    drift,
    explicit_with_ids,
    fill_again,
    known_padded,
    make_index,
    refresh,
    sample_weight,
)
from negative_cache.tests.retrieval_runs.training import Run

CORPUS = (
    Run("corpus", dict, corpus=dict, in_tests=True),
    Run("corpus in graph", lambda: {**IN_BATCH, "num_negatives": 2}, corpus=dict, in_graph=True),
    Run(
        "corpus, four rows refreshed a step",
        lambda: {
            "refresh_fraction": 0.17,
            "num_negatives": 2,
            "probe_size": 4,
            "probe_every": 2,
            "exact_query_gradient": False,
        },
        corpus=dict,
        num_further=2,
        in_tests=True,
    ),
    Run(
        "corpus, a row refreshed every third step, no write-back",
        lambda: {"refresh_fraction": 0.015, "write_back": False, **IN_BATCH},
        corpus=dict,
        in_tests=True,
    ),
    Run(
        "corpus, the same in graph, with a corrector and probes",
        lambda: {
            "refresh_fraction": 0.015,
            "write_back": False,
            "corrector": nc.Corrector(hidden_units=6, drift_loss="cross_entropy"),
            "probe_size": 3,
            "probe_every": 3,
        },
        corpus=dict,
        before_step=drift,
        in_graph=True,
    ),
    Run(
        "corpus of strings, known positives, explicit negatives, margin",
        lambda: {"false_negative_margin": 0.2},
        kind="title",
        corpus=lambda: {"embedding_dtype": "float16"},
        arguments=(known_padded, explicit_with_ids),
    ),
    Run(
        "corpus of single tensors, ids on the host, not saved",
        lambda: {"refresh_fraction": 0.1},
        kind="tensor",
        corpus=lambda: {"on_host": ["candidate"], "saved": False},
        arguments=(sample_weight,),
        in_graph=True,
    ),
    Run(
        "corpus filled again, refreshed, with a row that is refused",
        lambda: {"corrector": nc.Corrector(hidden_units=6)},
        corpus=dict,
        tower={"broken": NUM_CANDIDATES - 1},
        before_step=lambda training, step: (fill_again(training, step), refresh(training, step)),
    ),
    Run(
        "corpus and index",
        lambda: {"num_negatives": 2, "refresh_fraction": 0.1, "false_negative_margin": 0.3},
        corpus=lambda: {"index": make_index()},
        arguments=(known_padded,),
    ),
    Run(
        "corpus and index, no write-back, in graph, with a corrector",
        lambda: {"write_back": False, "corrector": nc.Corrector(hidden_units=6), **IN_BATCH},
        corpus=lambda: {"index": make_index()},
        before_step=drift,
        in_graph=True,
        in_tests=True,
    ),
    Run(
        "corpus and coded index",
        lambda: {"num_negatives": 2},
        corpus=lambda: {"index": make_index(store_embeddings=False, residual_bytes=2)},
        in_tests=True,
    ),
    Run(
        "corpus and index without residuals, bfloat16, in graph",
        lambda: {"exact_query_gradient": False, **IN_BATCH},
        corpus=lambda: {
            "index": make_index(store_embeddings=False, residual_bytes=0),
            "embedding_dtype": "bfloat16",
        },
        in_graph=True,
    ),
)
