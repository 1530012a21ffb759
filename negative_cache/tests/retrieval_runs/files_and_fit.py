"""Runs that go on from a file or a configuration, inside of a model, or on two replicas."""

import numpy as np

import negative_cache as nc
from negative_cache.tests.retrieval_runs.inputs import DIM, as_features, squashed
from negative_cache.tests.retrieval_runs.options import (
    BY_ID,
    IN_BATCH,
    drift,
    from_own_configuration,
    make_index,
    make_metrics,
    restore,
)
from negative_cache.tests.retrieval_runs.training import FittedRun, ReplicatedRun, Run

FILES = (
    Run(
        "restored from a checkpoint",
        lambda: {"embedding_dim": DIM, "num_negatives": 2, **make_metrics()},
        before_step=restore,
    ),
    Run(
        "restored from a checkpoint without the cache",
        lambda: {"embedding_dim": DIM, "save_cache": False, **IN_BATCH},
        before_step=restore,
    ),
    Run(
        "from its own configuration",
        lambda: {
            **make_metrics(),
            **IN_BATCH,
            **BY_ID,
            "embedding_dim": DIM,
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=5),
            "score_transform": squashed,
            "false_negative_margin": 0.2,
        },
        before_step=lambda training, step: (
            from_own_configuration(training, step),
            drift(training, step),
        ),
    ),
)
MORE_FILES = (
    Run(
        "restored from a checkpoint, frequencies",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "use_lru": False,
            "candidate_id_key": "id",
            "embedding_dim": DIM,
        },
        before_step=restore,
    ),
    Run(
        "restored from a checkpoint, corpus, index, corrector, learned temperature",
        lambda: {
            "corrector": nc.Corrector(hidden_units=6),
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7),
            "refresh_fraction": 0.1,
        },
        corpus=lambda: {"index": make_index()},
        before_step=lambda training, step: (restore(training, step), drift(training, step)),
    ),
)
FIT = (
    FittedRun(
        "fit, a tower with a loss of its own",
        lambda: {**IN_BATCH, "num_negatives": 2},
        tower={"penalty": 0.01},
    ),
    FittedRun(
        "fit, streaming, warm start",
        lambda: {**IN_BATCH, **BY_ID, **make_metrics()},
        callbacks=lambda: [nc.CacheWarmStart([as_features("id", np.arange(7))], verbose=0)],
    ),
    FittedRun(
        "fit, corpus, corrector, refreshes",
        lambda: {"corrector": nc.Corrector(hidden_units=6), "refresh_fraction": 0.1},
        corpus=dict,
        callbacks=lambda: [nc.CacheRefresh(every_steps=3, batch_size=7, verbose=0)],
    ),
)
REPLICATED = (
    ReplicatedRun("two replicas", lambda: {**IN_BATCH, **BY_ID, **make_metrics()}),
    ReplicatedRun(
        "two replicas, one pool", lambda: {**IN_BATCH, **BY_ID, "pool": "replicas", "num_draws": 3}
    ),
    ReplicatedRun(
        "two replicas, corpus",
        lambda: {"refresh_fraction": 0.1, "num_negatives": 2, "probe_size": 3, "probe_every": 3},
        corpus=dict,
    ),
)
