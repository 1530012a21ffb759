"""The one module that knows which Keras is running.

`tf.keras` is Keras 3, or Keras 2 (the `tf_keras` package) if `TF_USE_LEGACY_KERAS=1`. The rest of
the package imports `keras` from here. What differs between the two versions belongs here.
"""

import contextlib
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow import keras

_backend = os.environ.get("KERAS_BACKEND", "tensorflow")
if _backend != "tensorflow":
    raise ImportError(
        "negative_cache trains TensorFlow models and needs the TensorFlow backend of Keras, but the"
        f" environment says KERAS_BACKEND={_backend!r}. Unset it, or set KERAS_BACKEND=tensorflow,"
        " before Python starts."
    )

try:
    IS_KERAS_2 = keras.layers.Layer.__module__.startswith("tf_keras")
except ImportError as error:
    raise ImportError(
        "TF_USE_LEGACY_KERAS asks for Keras 2, which is not installed: run `pip install tf-keras`"
        " (the extra `negative-cache[keras2]`; with TF-Recommenders `[tfrs]`), or unset it to use"
        " Keras 3."
        if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True")
        else f"TensorFlow finds no Keras: run `pip install keras`. It says: {error}"
    ) from error

if not IS_KERAS_2 and keras.backend.backend() != "tensorflow":
    raise ImportError(
        "negative_cache needs the TensorFlow backend of Keras, but the Keras configuration file"
        f" chooses {keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before Python starts."
    )


@keras.utils.register_keras_serializable("negative_cache")
class RunningMean(keras.metrics.Mean):
    """A mean over an epoch that is not saved in Keras files: each epoch starts a new mean.

    Keras 2 cannot load the saved mean under a strategy with several replicas.
    """

    def save_own_variables(self, store: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Reads nothing."""


_HDF5 = (".h5", ".hdf5")
_IN_HDF5 = (
    "The old HDF5 format of Keras holds no cache. Save the model as a '.keras' file, or its weights"
    " as a '.weights.h5' file. Received: {!r}."
)


if IS_KERAS_2:

    def _refuse_jit(model: keras.Model) -> None:
        # Keras 3 trains such a model without XLA and warns. Keras 2 does not check.
        for layer in model._flatten_layers():
            if not getattr(layer, "supports_jit", True):
                raise ValueError(
                    f"XLA cannot compile the layer {layer.name!r}: it has strings, features that"
                    " are kept `on_host`, or a `TreeIndex` on a CPU. Compile without"
                    " `jit_compile=True`, or look strings up before they enter the model."
                )

    class Model(keras.Model):
        """`keras.Model` that passes `training` to `compute_loss` and logs the loss.

        Keras 3 does both by itself.
        """

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._loss_tracker = RunningMean(name="loss")
            if isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
                # Logs are results of metrics, which are those of all workers. Keras would add them
                # up over the workers.
                self.distribute_reduction_method = "first"

        def make_train_function(self, force: bool = False) -> Callable:
            if self._jit_compile:
                _refuse_jit(self)
            return super().make_train_function(force)

        def train_step(self, data: Any) -> dict[str, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            self._loss_tracker.update_state(loss * _num_replicas(), sample_weight=_batch_size(x))
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return self.get_metrics_result()

        def test_step(self, data: Any) -> dict[str, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            y_pred = self(x, training=False)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=False)
            self._loss_tracker.update_state(loss * _num_replicas(), sample_weight=_batch_size(x))
            return self.get_metrics_result()

        def save(
            self,
            filepath: str | os.PathLike,
            overwrite: bool = True,
            save_format: str | None = None,
            **kwargs: Any,
        ) -> None:
            if str(filepath).endswith(_HDF5) or save_format in ("h5", "hdf5"):
                raise ValueError(_IN_HDF5.format(filepath))
            super().save(filepath, overwrite, save_format, **kwargs)

        def save_weights(
            self,
            filepath: str | os.PathLike,
            overwrite: bool = True,
            save_format: str | None = None,
            options: Any = None,
        ) -> None:
            name = str(filepath)
            # Weights under the name of a whole model are written in the old format too.
            is_old = name.endswith((*_HDF5, ".keras")) or save_format in ("h5", "hdf5", "keras")
            if is_old and not name.endswith(".weights.h5"):
                raise ValueError(_IN_HDF5.format(filepath))
            super().save_weights(filepath, overwrite, save_format, options)

    def refuse_folder(layer: keras.layers.Layer) -> None:
        """Raises an error if `model.save` is writing a folder for `load_model`.

        `tf.saved_model.save` and `export` write the same kind of folder, for serving.
        """
        from tf_keras.src.saving.legacy.saved_model import utils

        if utils.in_tf_saved_model_scope():
            raise ValueError(
                "From a folder Keras 2 would not load the state of the optimizer nor, with most"
                f" towers, the cache of the layer {layer.name!r}. Save the model as a '.keras'"
                " file. For serving there are `model.export` and `tf.saved_model.save`."
            )

    def _batch_size(x: Any) -> tf.Tensor:
        return tf.shape(tf.nest.flatten(x)[0])[0]

    def prepare_to_restore(model: keras.Model) -> None:
        """Creates the variables that must exist before TensorFlow can restore them: none."""

    def set_first_epoch(model: keras.Model, epoch: int | None) -> None:
        """Makes the next `fit` start with `epoch`, or as usual if `epoch` is None."""
        counters = types.SimpleNamespace(
            maybe_load_initial_counters_from_ckpt=lambda *args, **kwargs: (epoch, 0)
        )
        model._training_state = None if epoch is None else counters

    def all_variables(model: keras.Model) -> list[tf.Variable]:
        """Returns the variables that TensorFlow does not find in the model by itself: none."""
        return []

    def metric_variables(model: keras.Model) -> list[tf.Variable]:
        """Returns the variables of the metrics that every epoch resets."""
        return [variable for metric in model.metrics for variable in metric.variables]

    def steps_per_execution(model: keras.Model) -> int:
        """Returns the number of batches that one call of `model.train_function` reads."""
        return int(tf.convert_to_tensor(model._steps_per_execution))

else:

    class Model(keras.Model):  # type: ignore[no-redef]  # One class for each Keras.
        """`keras.Model` whose `fit` takes strings under a strategy, and refuses several workers."""

        def _maybe_symbolic_build(
            self, iterator: Iterator | None = None, data_batch: Any = None
        ) -> None:
            strategy = self.distribute_strategy
            num_replicas = strategy.num_replicas_in_sync
            is_of_workers = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
            if is_of_workers and num_replicas > len(strategy.extended.worker_devices):
                raise ValueError(
                    "Keras 3 has no `fit` and no `evaluate` for several workers. Train in a loop of"
                    " your own, or with Keras 2 (TF_USE_LEGACY_KERAS=1). Received a model of a"
                    f" `{type(strategy).__name__}` with {num_replicas} replicas."
                )
            # Keras would average the replicas' batches to get one of the right shape, and strings
            # have no average.
            if iterator is not None and num_replicas > 1:
                _, _, batches = next(iter(iterator))
                data_batch = tf.nest.map_structure(
                    lambda values: strategy.experimental_local_results(values)[0],
                    next(batches),
                )
                iterator = None
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

        def save(self, filepath: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
            if str(filepath).endswith(_HDF5):
                raise ValueError(_IN_HDF5.format(filepath))
            super().save(filepath, *args, **kwargs)

    def refuse_folder(layer: keras.layers.Layer) -> None:
        """Raises an error if Keras would not load what it writes: it writes no folders."""

    def prepare_to_restore(model: keras.Model) -> None:
        """Creates the variables that must exist before TensorFlow can restore them: all."""
        if not model.built:
            raise ValueError(
                "The model must be built before `fit`, so that it can be restored: call it on a"
                f" batch first, as in `model(next(iter(dataset)))`. Received: {model!r}."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

    def set_first_epoch(model: keras.Model, epoch: int | None) -> None:
        """Makes the next `fit` start with `epoch`, or as usual if `epoch` is None."""
        model._initial_epoch = epoch

    def all_variables(model: keras.Model) -> list[tf.Variable]:
        """Returns the variables that TensorFlow does not find in the model by itself.

        These are the variables of metrics and the states of random generators.
        """
        return [variable.value for variable in model.variables + model.metrics_variables]

    def metric_variables(model: keras.Model) -> list[tf.Variable]:
        """Returns the variables of the metrics that every epoch resets."""
        return [variable.value for metric in model.metrics for variable in metric.variables]

    def steps_per_execution(model: keras.Model) -> int:
        """Returns the number of batches that one call of `model.train_function` reads."""
        return model.steps_per_execution


def deserialize(config: Any) -> Any:
    """Calls `keras.utils.deserialize_keras_object` on a config that comes from an untrusted file.

    Keras 2 imports any module that the config of a function names, so a file could call any
    function. Here a function must belong to Keras, be registered as serializable, or be given as a
    custom object.

    Args:
      config: the config of an object.

    Returns:
      The object.

    Raises:
      ValueError: if `config` names any other function.
    """
    if isinstance(config, dict) and config.get("class_name") == "function":
        module = config.get("module") or "builtins"
        if module != "builtins" and module.split(".")[0] not in ("keras", "tf_keras"):
            raise ValueError(
                "A file can only name functions that are registered"
                " (`keras.utils.register_keras_serializable`) or given as custom objects. Received:"
                f" {config.get('config')!r} of the module {module!r}."
            )
    return keras.utils.deserialize_keras_object(config)


@contextlib.contextmanager
def kept_losses(network: Callable) -> Iterator[None]:
    """Makes a context in which calls of a layer do not change the losses that it has added.

    Keras clears the losses of a layer and of all layers inside it when the layer is called from
    outside, and each call adds new losses.

    Args:
      network: a layer, or a function, which has no losses.
    """
    layers = network._flatten_layers() if isinstance(network, keras.layers.Layer) else ()
    names = ("_losses", "_eager_losses") if IS_KERAS_2 else ("_losses",)
    kept = [(layer, name, list(getattr(layer, name))) for layer in layers for name in names]
    try:
        yield
    finally:
        for layer, name, losses in kept:
            getattr(layer, name)[:] = losses


def _num_replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def scale_loss_for_distribution(loss: tf.Tensor) -> tf.Tensor:
    """Divides a replica's mean loss by the number of replicas, as the optimizer sums gradients."""
    return loss / tf.cast(_num_replicas(), loss.dtype)
