"""Strings to words and to ids."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.datasets import installed_code
from negative_cache.tests.datasets.source_trees import load, many

# Text to ids.

EXAMPLES = {
    "parseHTTPResponse_v2": "parse http response v 2",
    "HTTPResponse": "http response",
    "snake_case__name_": "snake case name",
    "getXAndY": "get x and y",
    "ABcDEf": "a bc d ef",
    "aBcDeF": "a bc de f",
    "float32x2": "float 32 x 2",
    "HTTP2Server": "http 2 server",
    "x = f(a,b)[0]; # done!": "x f a b 0 done",
    "  two\n\twords ": "two words",
    "don't": "don t",
    "ALLCAPS": "allcaps",
    "GrößeÄndern": "größe ändern",
    "漢字": "漢字",
    "": "",
    "!?": "",
}


def decoded(tensor):
    return [text.decode() for text in tensor.numpy().ravel()]


def test_split_identifiers():
    texts = tf.constant(list(EXAMPLES))
    expected = list(EXAMPLES.values())
    result = installed_code.split_identifiers(texts)
    assert decoded(result) == expected
    column = installed_code.split_identifiers(texts[:, tf.newaxis])
    assert column.shape == (len(EXAMPLES), 1) and decoded(column) == expected
    assert decoded(tf.function(installed_code.split_identifiers)(texts)) == expected
    assert installed_code.split_identifiers("aB").numpy() == b"a b"


def test_text_to_ids_eager_and_in_a_dataset():
    # "sort" three times, "list" twice, "the" once: ids 2, 3, 4.
    layer = installed_code.text_to_ids(["sortList", "sort_list", "SORT the"], sequence_length=4)
    texts = ["list SORT", "sort unseen the sort the list", ""]
    expected = [[3, 2, 0, 0], [2, 1, 4, 2], [0, 0, 0, 0]]
    np.testing.assert_array_equal(layer(tf.constant(texts)), expected)
    np.testing.assert_array_equal(layer(tf.constant(texts)[:, tf.newaxis]), expected)
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(3).map(layer)
    assert dataset.element_spec.shape[1] == 4
    np.testing.assert_array_equal(next(iter(dataset)), expected)


def test_text_to_ids_takes_the_corpus_as_it_is(tmp_path):
    corpus = load(tmp_path, {"m.py": many("f", 200)})
    summaries, codes = corpus.pairs("train")
    layer = installed_code.text_to_ids(codes, vocabulary_size=10, sequence_length=8)
    dataset = tf.data.Dataset.from_tensor_slices({"query": summaries, "candidate": codes})
    batch = next(iter(dataset.batch(16).map(lambda x: {k: layer(v) for k, v in x.items()})))
    assert batch["query"].shape == batch["candidate"].shape == (16, 8)
    assert len(layer.get_vocabulary()) == 10 and np.max(batch["candidate"]) < 10


def test_text_to_ids_shares_a_vocabulary():
    first = installed_code.text_to_ids(["a a a b b c"], sequence_length=3)
    second = installed_code.text_to_ids(vocabulary=first.get_vocabulary(), sequence_length=5)
    np.testing.assert_array_equal(second(tf.constant(["c b a d"])), [[4, 3, 2, 1, 0]])
    small = installed_code.text_to_ids(
        vocabulary=first.get_vocabulary(), vocabulary_size=4, sequence_length=4
    )
    np.testing.assert_array_equal(small(tf.constant(["c b a d"])), [[1, 3, 2, 1]])


def test_text_to_ids_in_a_model_masks_padding_and_is_saved(tmp_path):
    layer = installed_code.text_to_ids(["one two three"], vocabulary_size=5, sequence_length=6)
    embedding = tf.keras.layers.Embedding(5, 2, mask_zero=True)
    inputs = tf.keras.Input(shape=(), dtype="string")
    outputs = tf.keras.layers.GlobalAveragePooling1D()(embedding(layer(inputs)))
    model = tf.keras.Model(inputs, outputs)
    texts = tf.constant(["one", "oneOne three"])
    rows_ = np.asarray(embedding(layer(texts)))
    expected = [rows_[0, 0], rows_[1, :3].mean(axis=0)]  # Without the zeros that pad.
    np.testing.assert_allclose(model(texts), expected, rtol=1e-5)
    path = str(tmp_path / "model.keras")
    model.save(path)
    np.testing.assert_allclose(tf.keras.models.load_model(path)(texts), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "received neither"),
        ({"texts": ["a"], "vocabulary": ["a"]}, "received both"),
        ({"texts": "a b"}, "`texts` .* got 'a b'"),
        ({"texts": []}, "`texts` .* got "),
        ({"vocabulary": []}, "`vocabulary` .* got "),
        ({"texts": ["a"], "vocabulary_size": 2}, "`vocabulary_size` .* received 2"),
        ({"texts": ["a"], "sequence_length": 0}, "`sequence_length` .* received 0"),
    ],
)
def test_text_to_ids_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        installed_code.text_to_ids(**kwargs)
