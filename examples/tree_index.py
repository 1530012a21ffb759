"""Train against a whole corpus through a `TreeIndex`, in a custom loop.

    python examples/tree_index.py                 # 20,000 candidates, half a minute
    python examples/tree_index.py --candidates 200000

The candidates are points around cluster centres, and a query should find the one that it is a noisy
copy of. Row i of the index is candidate i. A step draws negatives for its queries from the softmax
over all candidates, encodes those alone, and tells the index where they are now. Nothing else is
ever encoded again after the first fill. In the end the index searches, beside the exact answer.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import negative_cache as nc

DIM, TEMPERATURE = 32, 0.05


class Tower(tf.keras.layers.Layer):
    """Features [n, d] -> unit embeddings [n, d], one matrix to learn."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=[shape[-1], DIM], initializer="glorot_uniform")

    def call(self, features):
        return tf.math.l2_normalize(tf.matmul(features, self.matrix), axis=1)


def make_data(num_candidates, rng):
    """Candidate features, and queries: a noisy copy of each, in other coordinates."""
    centres = rng.normal(size=[num_candidates // 50, DIM])
    features = centres[rng.integers(len(centres), size=num_candidates)]
    features = features + 0.5 * rng.normal(size=features.shape)
    rotation, _ = np.linalg.qr(rng.normal(size=[DIM, DIM]))
    queries = (features + 0.1 * rng.normal(size=features.shape)) @ rotation
    return features.astype(np.float32), queries.astype(np.float32)


def make_step(query_tower, candidate_tower, index, features, optimizer):
    """A training step: queries [B, d] and the rows [B] of their positives -> the loss."""
    row_numbers = tf.range(len(features), dtype=tf.int64)

    @tf.function
    def step(queries, rows):
        with tf.GradientTape() as tape:
            query_embeddings = query_tower(queries) / TEMPERATURE
            positives = candidate_tower(tf.gather(features, rows))
            sample = index.sample(query_embeddings, candidate_ids=row_numbers, positive_ids=rows)
            drawn = sample.indices[:, 0]
            negatives = candidate_tower(tf.gather(features, drawn))
            positive_score = tf.reduce_sum(query_embeddings * positives, axis=1)
            negative_score = tf.reduce_sum(query_embeddings * negatives, axis=1)
            # The log partition, with the gradient of the draw's score: an unbiased one, for draws
            # from the softmax, of log Z.
            log_partition = sample.log_partition + negative_score - tf.stop_gradient(negative_score)
            loss = tf.reduce_mean(tf.nn.softplus(log_partition - positive_score))
        variables = [*query_tower.trainable_variables, *candidate_tower.trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        for moved, embeddings in ((rows, positives), (drawn, negatives)):
            # A row that was drawn for two queries is left out the second time, and counted.
            index.update(moved, embeddings)
        return loss

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    tf.keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    features, queries = make_data(options.candidates, rng)
    query_tower, candidate_tower = Tower(), Tower()
    query_tower(queries[:1])

    index = nc.TreeIndex(options.candidates, DIM)
    index.index(candidate_tower(features))
    optimizer = tf.keras.optimizers.Adam(5e-3)
    step = make_step(query_tower, candidate_tower, index, tf.constant(features), optimizer)
    losses = []
    for _ in range(options.steps):
        rows = rng.choice(options.candidates, options.batch_size, replace=False)
        losses.append(float(step(tf.constant(queries[rows]), tf.constant(rows))))
    first, last = np.mean(losses[:20]), np.mean(losses[-20:])
    print(f"loss {first:.2f} in the first 20 steps, {last:.2f} in the last")

    # The index holds the embeddings of the steps that they were last drawn at. For search, fill it
    # with those of now.
    embeddings = candidate_tower(features)
    index.index(embeddings)
    some = tf.constant(queries[rng.choice(options.candidates, 256, replace=False)])
    some = query_tower(some)
    _, found = index.top_k(some, 10)
    exact = tf.math.top_k(tf.matmul(some, embeddings, transpose_b=True), 10).indices.numpy()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.numpy(), exact)])
    print(f"top 10 by the index: {recall:.1%} of the exact ones")
    lower, upper = index.log_partition_bounds(some, temperature=TEMPERATURE)
    print(f"log partition: bounds {np.mean(upper - lower):.2f} apart on average")


if __name__ == "__main__":
    main()
