"""A worker that runs the last blocks of `docs/distributed.md`, which are for several of them.

`python -m negative_cache.tests.page_of_workers` is a worker, under Keras 2. It takes a step with
the page's own loop, too, and prints its loss, and sums of weights before and after it, as JSON.
"""

import json

import numpy as np
import tensorflow as tf

from negative_cache.tests import test_docs
from negative_cache.tests.pages import blocks


def sum_of_weights(model):
    """Of the squares, so that steps up and down do not cancel."""
    return sum(float(np.sum(np.square(each))) for each in model.trainable_variables)


def main():
    # Before any tensor is made.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    names = test_docs.reader()
    batches = names["pairs"].batch(8)
    names.update(
        the_strategy=strategy,
        tower=names["candidate_tower"],
        specs={"title": tf.io.FixedLenFeature([], tf.string)},
        data=batches.repeat(),
        batch=next(iter(batches)),
    )
    for code in blocks(test_docs.DOCS / "distributed.md")[test_docs.NUM_BLOCKS["distributed.md"] :]:
        code = code.replace("tf.distribute.MultiWorkerMirroredStrategy()", "the_strategy")
        exec(compile(test_docs.in_small(code), "distributed.md", "exec"), names)
    model = names["model"]
    # After `fit`, before the page's own loop.
    steps, pool = int(model.optimizer.iterations.numpy()), model.task.pool
    weights = [sum_of_weights(model)]
    loss = float(names["train"](names["batch"]))
    weights.append(sum_of_weights(model))
    filled = int(np.sum(model.task.cache.filled_on_any_replica()))
    result = {"steps": steps, "pool": pool, "loss": loss, "weights": weights, "filled": filled}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
