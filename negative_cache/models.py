"""`DualEncoder`: two towers and a retrieval task as one `keras.Model`."""

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from negative_cache import _compat, _features, _towers
from negative_cache._compat import keras
from negative_cache._features import Features, Specs
from negative_cache._towers import Tower
from negative_cache.layers.retrieval import Retrieval

_INPUTS = "inputs"


@keras.utils.register_keras_serializable("negative_cache")
class DualEncoder(_compat.Model):
    """A two-tower model that `fit` trains on pairs of a query and its positive candidate.

    A batch is a dictionary, alone or as x of (x, y, sample_weight). The model ignores y. Entries:

    * `"query"`: features of B queries for `query_network`.
    * `"candidate"`: features of N >= B candidates. Row i is the positive of query i.
    * `"negative"`, optional: features [B, M, ...] of M explicit negatives of each query. Lists of
      different lengths are `tf.RaggedTensor`s, or padded tensors with a `"negative_mask"` [B, M]
      bool. If the features include the task's `candidate_id_key`, then `remove_accidental_hits` or
      `"known_positive_ids"` leaves out negatives that are positives of their query.
    * `"known_positive_ids"`, optional: [B, P] ids of further positives of each query, see
      `CachedRetrieval`.
    * `"candidate_sampling_probability"`, optional: [N] float, see `CachedRetrieval`.

    Compile the model with an optimizer and without a loss, because the task computes the loss.
    Calling the model returns the embeddings of a batch, `{"query": [B, d], "candidate": [N, d]}`.

    Under a `MultiWorkerMirroredStrategy` of several workers only the `fit` of Keras 2 works. With
    Keras 3 write the training loop yourself: `compute_loss` is the loss of a replica.

    Save the model like any Keras model. The cache is saved too, unless the task has
    `save_cache=False`. A `.keras` file can be loaded under these conditions:

    * Keras must know your own tower classes and functions such as a `score_transform`
      (`keras.saving.register_keras_serializable`, `get_config`).
    * The two towers share no layers, or they are the same object.

    `save` refuses towers that share layers. `.weights.h5` files have no such conditions.
    `docs/saving.md` has a table of all formats.

    Args:
      query_network: layer or model, query features -> [B, d].
      candidate_network: layer or model, candidate features -> [N, d]. It is the candidate network
        of `task`.
      task: a `CachedRetrieval` or `Retrieval` whose `reduction` is not "none".

    Raises:
      ValueError: if the task's loss is not a scalar.

    Examples:
      >>> task = CachedRetrieval(candidate_tower, specs, cache_size=65536)
      >>> model = DualEncoder(query_tower, candidate_tower, task)
      >>> model.compile(optimizer="adam")
      >>> model.fit(pairs.batch(128))
    """

    def __init__(
        self, query_network: Tower, candidate_network: Tower, task: Retrieval, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if task.reduction == "none":
            raise ValueError(
                "The task of a `DualEncoder` must return a scalar loss. Received a task with"
                f" `reduction={task.reduction!r}`."
            )
        self.query_network = query_network
        self.candidate_network = candidate_network
        self.task = task
        self._input_specs: dict[str, Specs] | None = None

    def call(
        self, inputs: Mapping[str, Features], training: bool | None = None
    ) -> dict[str, tf.Tensor]:
        """Embeds a batch: `{"query": [B, d], "candidate": [N, d]}`, and `"negative": [B, M, d]`."""
        _check_inputs(inputs)
        if self._input_specs is None:
            self._input_specs = {
                key: _features.specs_of_any_size(inputs[key]) for key in ("query", "candidate")
            }
        embeddings = {
            "query": _towers.embed(self.query_network, inputs["query"], training),
            "candidate": _towers.embed(self.candidate_network, inputs["candidate"], training),
        }
        # The cache must exist before a checkpoint can restore it.
        self.task.build_cache(embeddings["candidate"].shape[1])
        if "negative" in inputs:
            negatives, _ = _pad(inputs["negative"])
            embeddings["negative"] = self._embed_negatives(negatives, training)
        return embeddings

    def compute_loss(
        self,
        x: Mapping[str, Features] | None = None,
        y: tf.Tensor | None = None,
        y_pred: Mapping[str, tf.Tensor] | None = None,
        sample_weight: tf.Tensor | None = None,
        training: bool = True,
    ) -> tf.Tensor:
        """Computes the task's loss on the embeddings `y_pred` of a batch `x`."""
        del y
        # The defaults are those of Keras, which always passes both arguments.
        assert x is not None and y_pred is not None
        loss = self.task(
            y_pred["query"],
            y_pred["candidate"],
            x["candidate"],
            sample_weight=sample_weight,
            candidate_sampling_probability=x.get("candidate_sampling_probability"),
            negative_embeddings=y_pred.get("negative"),
            **self._negatives_arguments(x),
            training=training,
            compute_metrics=not training,
        )
        if self.task.reduction != "sum":
            loss = _compat.scale_loss_for_distribution(loss)
        # The losses of regularizers, and losses that layers of the towers have added.
        for extra in self.losses:
            loss += _compat.scale_loss_for_distribution(tf.cast(extra, loss.dtype))
        return loss

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        logs = super().test_step(data)
        return self.task.evaluation_logs(logs)

    def get_metrics_result(self) -> dict[str, tf.Tensor]:
        # Keras calls this when an epoch ends, outside of the graph.
        self.task.check_popularity()
        return super().get_metrics_result()

    def get_config(self) -> dict[str, Any]:
        _check_apart(self)
        serialize = keras.utils.serialize_keras_object
        same = self.task.candidate_network is self.candidate_network
        return {
            **super().get_config(),
            "query_network": serialize(self.query_network),
            # None stands for the task's network, so that loading does not create a second one.
            "candidate_network": None if same else serialize(self.candidate_network),
            "task": serialize(self.task),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DualEncoder":
        config = dict(config)
        for name in ("query_network", "candidate_network", "task"):
            config[name] = _compat.deserialize(config[name])
        if config["candidate_network"] is None:
            config["candidate_network"] = config["task"].candidate_network
        return cls(**config)

    def get_build_config(self) -> dict[str, str] | None:
        if self._input_specs is None:
            return None
        return {_INPUTS: json.dumps(_describe_specs(self._input_specs))}

    def build_from_config(self, config: Mapping[str, str] | None) -> None:
        if config and _INPUTS in config:
            self(_example_batch(json.loads(config[_INPUTS])), training=False)

    def save(self, filepath: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes the model as `keras.Model.save` does, if it can be trained on after loading.

        Raises:
          ValueError: if it could not be: if the towers share layers, or the format is one of the
            older ones of Keras.
        """
        # Before a file of this name is written over.
        _check_apart(self)
        super().save(filepath, *args, **kwargs)

    def export(
        self, filepath: str | os.PathLike, format: str = "tf_saved_model", **kwargs: Any
    ) -> None:
        """Writes a SavedModel with the endpoints `embed_query` and `embed_candidate` and no cache.

        The inputs of the endpoints have the names of the features. The input of a tower that takes
        a single tensor is called "features".

        Args:
          filepath: the folder to write.
          format: "tf_saved_model", the only supported format.
          **kwargs: further arguments of `keras.export.ExportArchive.write_out`.

        Raises:
          ValueError: if the model has not seen a batch yet, so that the features are unknown, or if
            `format` is not supported.
        """
        if format != "tf_saved_model":
            raise ValueError(f"`format` must be 'tf_saved_model'. Received: {format!r}.")
        if self._input_specs is None:
            raise ValueError(
                "The model must have seen a batch before `export`. Call or fit it first."
            )
        archive = keras.export.ExportArchive()
        for name, network in (("query", self.query_network), ("candidate", self.candidate_network)):
            archive.track(network)
            # Traced here, because Keras 3 takes no specs of ragged and sparse features.
            function = _towers.compile_tower(network, [_name_specs(self._input_specs[name])])
            function.get_concrete_function()
            archive.add_endpoint(f"embed_{name}", function)
        archive.write_out(str(filepath), **kwargs)

    def _negatives_arguments(self, inputs: Mapping[str, Features]) -> dict[str, tf.Tensor | None]:
        """Returns the task's arguments about explicit negatives and known positives of a batch."""
        known = {"known_positive_ids": inputs.get("known_positive_ids")}
        if "negative" not in inputs:
            return known
        negatives, mask = _pad(inputs["negative"])
        if mask is not None and "negative_mask" in inputs:
            raise ValueError('Ragged lists need no "negative_mask". Received both.')
        key = self.task.candidate_id_key
        ids = None if key is None else _features.as_dict(negatives).get(key)
        return {**known, "negative_ids": ids, "negative_mask": inputs.get("negative_mask", mask)}

    def _embed_negatives(self, features: Features, training: bool | None) -> tf.Tensor:
        """Returns [B, M, d] embeddings of features [B, M, ...]."""
        flat = tf.nest.map_structure(_merge_first_dimensions, features)
        embeddings = _towers.embed(self.candidate_network, flat, training)
        batch_and_count = tf.shape(tf.nest.flatten(features)[0])[:2]
        return tf.reshape(embeddings, tf.concat([batch_and_count, [embeddings.shape[1]]], axis=0))


def _check_apart(model: DualEncoder) -> None:
    """Refuses towers that share a part: Keras would make two of it."""
    towers = [model.query_network]
    if model.candidate_network is not model.query_network:
        towers.append(model.candidate_network)
    towers += model.task.own_networks
    seen: set[int] = set()
    shared = []
    for tower in towers:
        layers = list(tower._flatten_layers()) if isinstance(tower, keras.layers.Layer) else []
        shared += [layer.name for layer in layers if id(layer) in seen and _has_state(layer)]
        seen |= {id(layer) for layer in layers}
    if shared:
        raise ValueError(
            "A configuration, and so a '.keras' file, cannot say that the towers share layers. Save"
            " the weights instead, with `model.save_weights('model.weights.h5')` or a"
            f" `tf.train.Checkpoint`. Received towers that share: {shared}."
        )


def _has_state(layer: keras.layers.Layer) -> bool:
    """Whether there is more to a layer than its configuration."""
    try:
        if layer.variables:
            return True
    except ValueError:
        # Keras 2 does not say of a model that is not built.
        return True
    return hasattr(layer, "save_assets") and layer.get_config().get("vocabulary") is None


def _pad(features: Features) -> tuple[Features, tf.Tensor | None]:
    """Pads ragged features, and returns features [B, M, ...] and a mask [B, M] bool of real rows.

    The mask is None if no feature is ragged.
    """
    ragged = [part for part in tf.nest.flatten(features) if isinstance(part, tf.RaggedTensor)]
    if not ragged:
        return features, None
    lengths = ragged[0].row_lengths()
    for part in ragged[1:]:
        same = tf.debugging.assert_equal(
            part.row_lengths(), lengths, "The ragged features of negatives must be of one length."
        )
        with tf.control_dependencies([] if same is None else [same]):
            lengths = tf.identity(lengths)
    mask = tf.sequence_mask(lengths)
    return tf.nest.map_structure(
        lambda part: part.to_tensor() if isinstance(part, tf.RaggedTensor) else part, features
    ), mask


def _merge_first_dimensions(values: tf.Tensor) -> tf.Tensor:
    """Reshapes [B, M, ...] to [B * M, ...]."""
    return tf.reshape(values, tf.concat([[-1], tf.shape(values)[2:]], axis=0))


def _name_specs(specs: Specs) -> Specs:
    """Gives the specs of features their names, which become the names of a signature's inputs."""
    if not isinstance(specs, Mapping):
        return specs
    return {
        key: tf.TensorSpec(spec.shape, spec.dtype, name=key)
        if isinstance(spec, tf.TensorSpec)
        else spec
        for key, spec in specs.items()
    }


_REQUIRED = frozenset(("query", "candidate"))
_OPTIONAL = frozenset(
    ("negative", "negative_mask", "known_positive_ids", "candidate_sampling_probability")
)


def _check_inputs(inputs: Mapping[str, Features]) -> None:
    if not isinstance(inputs, Mapping) or not set(inputs) >= _REQUIRED:
        received = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f'A batch must be a dictionary with "query" and "candidate". Received: {received}.'
        )
    unknown = sorted(set(inputs) - _REQUIRED - _OPTIONAL)
    if unknown or ("negative_mask" in inputs and "negative" not in inputs):
        raise ValueError(
            'A batch has "query" and "candidate", and may have'
            f' {sorted(_OPTIONAL)}, the mask only with "negative". Received: {sorted(inputs)}.'
        )


def _describe_specs(specs: Specs | list[Specs] | tuple[Specs, ...]) -> dict[str, Any] | list:
    """Describes the shapes and dtypes of a nest of features by JSON values."""
    if isinstance(specs, Mapping):
        return {name: _describe_specs(part) for name, part in specs.items()}
    if isinstance(specs, list | tuple):
        return [_describe_specs(part) for part in specs]
    description = [specs.shape.as_list(), specs.dtype.name]
    if isinstance(specs, tf.RaggedTensorSpec):
        return [specs.ragged_rank, "ragged", *description]
    return ["sparse", *description] if isinstance(specs, tf.SparseTensorSpec) else description


def _example_batch(description: dict[str, Any] | list) -> Features | list[Features]:
    """Makes a batch of one row of the features that `_describe_specs` has described."""
    if isinstance(description, Mapping):
        return {name: _example_batch(part) for name, part in description.items()}
    if not isinstance(description[-1], str):
        return [_example_batch(part) for part in description]
    *kind, shape, dtype = description
    shape = [size or 1 for size in shape]
    values = _features.blank(shape, dtype)
    if "ragged" in kind:
        return tf.RaggedTensor.from_tensor(values, ragged_rank=kind[0])
    return tf.sparse.from_dense(values) if "sparse" in kind else values
