"""From a trained `DualEncoder` to top-k serving, with the layers that serve already.

    python examples/serving.py --output served

trains a small model on generated pairs and writes two SavedModels:

* `served/towers`: the endpoints `embed_query` and `embed_candidate`, strings in, embeddings out,
  for those who keep the candidates in a vector database. There is no cache in it.
* `served/top_k`: strings in, the titles of the best candidates and their scores out. The search is
  `keras_rs.layers.BruteForceRetrieval` under Keras 3 and
  `tfrs.layers.factorized_top_k.BruteForce` under Keras 2 (`TF_USE_LEGACY_KERAS=1`).

Then it queries both as a server does: from another process, that has only TensorFlow.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import tensorflow as tf

import negative_cache as nc

NUM_USERS, NUM_MOVIES, TOP_K = 200, 1000, 5

CLIENT = """
import sys
import tensorflow as tf

towers, top_k = (tf.saved_model.load(path) for path in sys.argv[1:])
users = tf.constant(["user 3", "user 4"])
embeddings = towers.embed_query(users)
answer = top_k.serve(users)
best = answer["titles"][:, 0]
scores = tf.reduce_sum(embeddings * towers.embed_candidate(best), axis=1)
for user, titles in zip(users.numpy(), answer["titles"].numpy()):
    print(user.decode(), "->", ", ".join(title.decode() for title in titles))
tf.debugging.assert_near(scores, answer["scores"][:, 0], rtol=1e-4)
assert not {"negative_cache", "tensorflow_recommenders", "keras_rs"} & set(sys.modules)
"""


class TopK(tf.Module):
    """Users [n] string -> {"titles": [n, k] string, "scores": [n, k] float32}."""

    def __init__(self, query_tower, candidate_tower, titles):
        super().__init__()
        self.query_tower = query_tower
        if tf.keras.layers.Layer.__module__.startswith("tf_keras"):
            import tensorflow_recommenders as tfrs

            self.search = tfrs.layers.factorized_top_k.BruteForce(k=TOP_K)
            self.search.index(candidate_tower(titles), identifiers=titles)
            self.titles = None
        else:
            import keras_rs

            # Its identifiers are numbers: the rows of the titles.
            self.search = keras_rs.layers.BruteForceRetrieval(candidate_tower(titles), k=TOP_K)
            self.titles = tf.Variable(titles, trainable=False)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(self, users):
        scores, found = self.search(self.query_tower(users))
        return {
            "titles": found if self.titles is None else tf.gather(self.titles, found),
            "scores": scores,
        }


def make_tower(vocabulary):
    return tf.keras.Sequential(
        [
            tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None),
            tf.keras.layers.Embedding(len(vocabulary) + 1, 16),
        ]
    )


def train(users, titles, epochs):
    """Every user likes the movies of a taste, and every movie is of one taste."""
    rng = np.random.default_rng(0)
    liked = rng.integers(NUM_USERS, size=20000)
    movies = rng.integers(NUM_MOVIES // 10, size=20000) * 10 + liked % 10
    pairs = {"query": users[liked], "candidate": titles[movies]}

    query_tower, candidate_tower = make_tower(users), make_tower(titles)
    task = nc.CachedRetrieval(
        candidate_tower, tf.io.FixedLenFeature([], tf.string), cache_size=512, temperature=0.5
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model.compile(tf.keras.optimizers.Adam(0.01))
    model.fit(tf.data.Dataset.from_tensor_slices(pairs).batch(100), epochs=epochs, verbose=2)
    return model


def main():
    parser = argparse.ArgumentParser(description="Serve a dual encoder.")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a folder to write")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    users = np.array([f"user {i}" for i in range(NUM_USERS)])
    titles = np.array([f"movie {i} of taste {i % 10}" for i in range(NUM_MOVIES)])

    model = train(users, titles, args.epochs)
    folders = str(args.output / "towers"), str(args.output / "top_k")
    model.export(folders[0])
    tf.saved_model.save(TopK(model.query_network, model.candidate_network, titles), folders[1])
    subprocess.run([sys.executable, "-c", CLIENT, *folders], check=True)


if __name__ == "__main__":
    main()
