"""Runs whose cache streams, or that have none: losses, calls, dtypes and frequencies."""

import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.tests.retrieval_runs.inputs import CACHE_SIZE, DIM, NUM_CANDIDATES, squashed
from negative_cache.tests.retrieval_runs.options import (
    BY_ID,
    IN_BATCH,
    add_a_broken_one,
    default_training,
    explicit,
    explicit_with_ids,
    explicit_with_mask,
    known_padded,
    known_ragged,
    make_index,
    make_metrics,
    no_batch_metrics,
    no_metrics,
    probabilities,
    refresh,
    sample_weight,
    score_mask,
    warm_start,
    warm_start_with_probabilities,
)
from negative_cache.tests.retrieval_runs.training import Run

STREAMING = (
    # A cache that streams.
    Run("streaming", dict, in_tests=True),
    Run("streaming, in graph", dict, in_graph=True),
    Run("streaming, not LRU", lambda: {"use_lru": False}, before_step=warm_start, in_tests=True),
    Run(
        "streaming, three draws and the batch",
        lambda: {"num_negatives": 3, **IN_BATCH, "embedding_dim": DIM},
        in_tests=True,
    ),
    Run(
        "sampled query gradient",
        lambda: {"exact_query_gradient": False, "num_negatives": 2},
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "shared draws",
        lambda: {"num_draws": 5, **IN_BATCH, **BY_ID, "false_negative_margin": 0.1},
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "shared draws, sampled query gradient, in graph",
        lambda: {"num_draws": 3, "exact_query_gradient": False},
        in_graph=True,
        in_tests=True,
    ),
    Run(
        "sampled query gradient, in graph, with the batch",
        lambda: {"exact_query_gradient": False, **IN_BATCH},
        in_graph=True,
    ),
    Run(
        "hard negatives, margin, accidental hits, more candidates",
        lambda: {
            **IN_BATCH,
            **BY_ID,
            "num_hard_negatives": 2,
            "false_negative_margin": 0.1,
            "num_negatives": 2,
        },
        num_further=3,
        in_tests=True,
    ),
    Run(
        "negative margin, transform",
        lambda: {"false_negative_margin": -0.5, "score_transform": squashed, **IN_BATCH},
        before_step=warm_start,
    ),
    Run(
        "no temperature, transform, sampled query gradient",
        lambda: {
            "temperature": None,
            "score_transform": squashed,
            "exact_query_gradient": False,
        },
    ),
    Run(
        "learned temperature",
        lambda: {
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7, largest=2.0),
            **IN_BATCH,
        },
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "learned temperature, sampled query gradient, in graph",
        lambda: {
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7, largest=2.0),
            "exact_query_gradient": False,
        },
        in_graph=True,
    ),
    # What a call is given.
    Run(
        "weights, sum, metrics",
        lambda: {**IN_BATCH, "reduction": "sum", **make_metrics()},
        arguments=(sample_weight, score_mask),
        in_tests=True,
    ),
    Run(
        "weights, none",
        lambda: {"reduction": "none", **make_metrics(), "name": "second"},
        arguments=(sample_weight, default_training),
        num_further=2,
    ),
    Run("no reduction", lambda: {"reduction": None, **IN_BATCH}, arguments=(score_mask,)),
    Run(
        "metrics without the task's",
        lambda: {**make_metrics(), **IN_BATCH, **BY_ID},
        arguments=(no_metrics, score_mask),
    ),
    Run(
        "metrics without the batch's",
        lambda: {**make_metrics(), "metrics": keras.metrics.CosineSimilarity()},
        arguments=(no_batch_metrics,),
        in_graph=True,
    ),
    Run("explicit negatives", lambda: IN_BATCH, arguments=(explicit,)),
    Run(
        "explicit negatives with ids and mask",
        lambda: {**IN_BATCH, **BY_ID},
        arguments=(explicit_with_ids, score_mask),
        num_further=2,
        in_tests=True,
    ),
    Run(
        "explicit negatives, known positives, strings",
        lambda: {"candidate_id_key": "title", **IN_BATCH},
        kind="title",
        arguments=(explicit_with_ids, known_padded),
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "known positives, ragged, in graph",
        lambda: {**IN_BATCH, **BY_ID, "num_hard_negatives": 3},
        arguments=(known_ragged, explicit_with_ids),
        in_graph=True,
    ),
    Run(
        "known positives, ragged, strings, margin",
        lambda: {"candidate_id_key": "title", "false_negative_margin": 0.0, **IN_BATCH},
        kind="title",
        arguments=(known_ragged,),
        num_further=2,
    ),
    Run(
        "a single tensor",
        lambda: {**IN_BATCH, **BY_ID, "candidate_id_key": "candidate"},
        kind="tensor",
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "the tower is a function",
        dict,
        network=lambda tower: lambda features, training: tower(features, training=training),
    ),
    Run("a tower with a loss of its own", lambda: IN_BATCH, tower={"penalty": 0.01}),
    Run("seed left out", lambda: {"seed": ...}),
    # Dtypes.
    Run("bfloat16 cache", lambda: {"embedding_dtype": "bfloat16", **IN_BATCH}),
    Run(
        "float16 cache, index",
        lambda: {
            "embedding_dtype": tf.float16,
            "index": make_index(capacity=CACHE_SIZE, embedding_dtype="float16"),
        },
    ),
    Run(
        "mixed embeddings",
        lambda: {**IN_BATCH, **make_metrics()},
        tower={"output_dtype": "bfloat16"},
        query_dtype="float16",
        arguments=(explicit_with_mask,),
    ),
    # Corrections for frequency.
    Run(
        "frequency correction",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997, learning_rate=0.2),
            "use_lru": False,
            "candidate_id_key": "id",
        },
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "frequency correction of the default size, in batch",
        lambda: {
            "frequency_correction": True,
            "use_lru": False,
            **IN_BATCH,
            **BY_ID,
            "num_negatives": 2,
        },
        in_graph=True,
    ),
    Run(
        "frequency correction and probabilities",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "use_lru": False,
            "candidate_id_key": "id",
            **IN_BATCH,
            **make_metrics(),
        },
        arguments=(probabilities,),
        before_step=warm_start,
    ),
    Run(
        "frequency correction, no cache",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "cache_size": 0,
            "candidate_id_key": "title",
            **IN_BATCH,
        },
        kind="title",
    ),
    Run(
        "probabilities",
        lambda: {"use_lru": False},
        arguments=(probabilities,),
        before_step=warm_start_with_probabilities,
        in_tests=True,
    ),
    Run(
        "probabilities, in batch",
        lambda: {"use_lru": False, **IN_BATCH, **make_metrics(), "false_negative_margin": 0.1},
        arguments=(probabilities, sample_weight),
        before_step=warm_start,
        num_further=2,
        in_tests=True,
    ),
    # Without a cache.
    Run(
        "no cache",
        lambda: {"cache_size": 0, **IN_BATCH, **BY_ID, **make_metrics()},
        arguments=(score_mask, probabilities, known_padded),
        num_further=3,
        in_tests=True,
    ),
    Run("no cache, explicit negatives", lambda: {"cache_size": 0}, arguments=(explicit,)),
    # What else changes the rows.
    Run(
        "refreshes and rows that are refused",
        lambda: {"refresh_fraction": 0.2, **IN_BATCH, "probe_size": 2, "probe_every": 2},
        before_step=lambda training, step: (
            add_a_broken_one(training, step),
            refresh(training, step),
        ),
        tower={"broken": NUM_CANDIDATES - 1},
    ),
)
MORE_STREAMING = (
    Run(
        "a batch metric that sees every score",
        lambda: {
            **IN_BATCH,
            **BY_ID,
            "false_negative_margin": 0.5,
            "batch_metrics": [
                keras.metrics.CategoricalCrossentropy(from_logits=True, name="batch_loss")
            ],
        },
        arguments=(score_mask, sample_weight),
        num_further=2,
    ),
    Run(
        "probes of more rows than are filled at first",
        lambda: {"probe_size": 6, "probe_every": 1, "num_negatives": 2},
    ),
)
