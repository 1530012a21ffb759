"""Converts strings of English or source code to integer ids, with Keras's `TextVectorization`."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

_ADAPT_BATCH_SIZE = 512

# RE2 has no look-around, so a boundary is a pair of groups to separate. No character that ends a
# match can begin the next match of the same pattern, so one pass of each pattern finds all
# boundaries.
_BOUNDARIES = (
    (r"(\p{Lu}+)(\p{Lu}\p{Ll})", r"\1 \2"),  # HTTPResponse -> HTTP Response
    (r"(\p{Ll})(\p{Lu})", r"\1 \2"),  # parseHTTP -> parse HTTP
    (r"(\pL)(\pN)", r"\1 \2"),  # v2 -> v 2
    (r"(\pN)(\pL)", r"\1 \2"),  # 2d -> 2 d
    (r"[^\pL\pM\pN]+", " "),
)


@tf.keras.utils.register_keras_serializable(package="negative_cache")
def split_identifiers(text: tf.Tensor) -> tf.Tensor:
    """Converts text to lower case and separates the words of identifiers by single spaces.

    `"parseHTTPResponse_v2(x)"` becomes `"parse http response v 2 x"`. The function consists of
    TensorFlow ops, so it can be the argument `standardize` of `tf.keras.layers.TextVectorization`.
    A model that was saved with it can be loaded after this module is imported.

    Args:
      text: A string tensor of any shape, in UTF-8.

    Returns:
      A string tensor of the same shape.
    """
    text = tf.convert_to_tensor(text, tf.string)
    for pattern, replacement in _BOUNDARIES:
        text = tf.strings.regex_replace(text, pattern, replacement)
    return tf.strings.strip(tf.strings.lower(text, encoding="utf-8"))


def text_to_ids(
    texts: Sequence[str] | np.ndarray | None = None,
    *,
    vocabulary: Sequence[str] | None = None,
    vocabulary_size: int = 20_000,
    sequence_length: int = 128,
) -> "tf.keras.layers.TextVectorization":
    """Makes the layer that turns strings [n] or [n, 1] into ids [n, sequence_length] int64.

    Id 0 is padding, which `tf.keras.layers.Embedding(vocabulary_size, dim, mask_zero=True)` masks.
    Id 1 is any word outside the vocabulary. The layer works in `tf.data.Dataset.map` and in a
    model. For two towers with one vocabulary and two lengths:

    ```python
    code_ids = text_to_ids(corpus.codes[corpus.train], sequence_length=128)
    query_ids = text_to_ids(vocabulary=code_ids.get_vocabulary(), sequence_length=24)
    ```

    Args:
      texts: [n] strings of the training split. Their most frequent words become the vocabulary.
      vocabulary: Words to use instead, most frequent first.
      vocabulary_size: The maximum number of ids, including padding and unknown words.
      sequence_length: The number of words that are kept of each text. Shorter texts are padded.

    Returns:
      A `tf.keras.layers.TextVectorization` that is ready to be called.

    Raises:
      ValueError: If not exactly one of `texts` and `vocabulary` is given, if it is empty or a lone
        string, or if a size is too small.
    """
    if (texts is None) == (vocabulary is None):
        given = "neither" if texts is None else "both"
        raise ValueError(f"Give exactly one of `texts` and `vocabulary`, received {given}.")
    for name, value in (("texts", texts), ("vocabulary", vocabulary)):
        if value is not None and (isinstance(value, (str, bytes)) or len(value) == 0):
            raise ValueError(f"`{name}` must be a non-empty sequence of strings, got {value!r}.")
    if vocabulary_size < 3:
        raise ValueError(
            "`vocabulary_size` must be at least 3 (padding, unknown, one word), "
            f"received {vocabulary_size}."
        )
    if sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, received {sequence_length}.")
    if vocabulary is not None:
        words = [word for word in vocabulary if word not in ("", "[UNK]")]
        vocabulary = words[: vocabulary_size - 2]
    layer = tf.keras.layers.TextVectorization(
        max_tokens=vocabulary_size,
        standardize=split_identifiers,
        output_sequence_length=sequence_length,
        vocabulary=vocabulary,
    )
    if texts is not None:
        strings = tf.constant(np.asarray(texts, dtype=object), tf.string)
        layer.adapt(tf.data.Dataset.from_tensor_slices(strings).batch(_ADAPT_BATCH_SIZE))
    return layer
