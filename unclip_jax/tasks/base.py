"""What the trainer asks of a task: the contract, and how a config builds one.

A task is a frozen dataclass with a network (`model`), the frozen upstream
tasks by name (`upstream`), and exactly the keys of `config.task` as fields.
Everything that is about pictures, text or diffusion is in tasks and below;
the trainer calls the hooks of `Task` and knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from unclip_jax.utils import config as config_lib

PyTree = Any
Batch = Mapping[str, jax.Array]
Variables = dict[str, PyTree]  # {"params": ..., **model_state}
Frozen = Mapping[str, PyTree]  # upstream variables and tables, by name
PredictFn = Callable[
  [Variables, Frozen, Batch, jax.Array], dict[str, jax.Array]
]


class LossOutput(NamedTuple):
  """What `Task.loss` returns."""

  loss: jax.Array  # [B], before averaging
  metrics: dict[str, jax.Array]  # name -> [B] or []
  model_state: PyTree  # new batch_stats, codebooks, ...: {} if none


class Task(Protocol):
  """One training objective. Implementations are frozen dataclasses."""

  # True: the loss of one example depends on the others. See CoupledTask.
  batch_coupled: bool

  def init(self, rng: jax.Array, batch: Batch, frozen: Frozen) -> Variables:
    """The network's variables; `batch` gives shapes and dtypes."""

  def prepare(
    self, frozen: Frozen, batches: Iterable[Batch]
  ) -> dict[str, PyTree]:
    """Tables computed once from data before training ({} if none).

    They are stored in every checkpoint and join `frozen` under their names.
    Traceable, and their shapes do not depend on the number of batches.
    """

  def loss(
    self,
    variables: Variables,
    frozen: Frozen,
    batch: Batch,
    rng: jax.Array,
    *,
    step: jax.Array,
    train: bool,
  ) -> LossOutput:
    """The objective for one batch; pure.

    A diffusion task takes its `timesteps` [B] from the batch, if they are
    there, in place of drawing them.
    """

  def sample(
    self,
    variables: Variables,
    frozen: Frozen,
    batch: Batch,
    rng: jax.Array | None,
    **options: Any,
  ) -> dict[str, jax.Array]:
    """Draws from the trained model, conditioned on `batch`; pure.

    `rng` is one key, one key per example, or None where `options` hold every
    draw (`noise`).
    """

  def predict_fns(self) -> dict[str, PredictFn]:
    """What evaluators may ask for, by name."""


class CoupledTask(Task, Protocol):
  """A task whose loss couples the examples of a batch: `batch_coupled` is True.

  Its `loss` is `coupled_loss` of what `encode` gives for the batch, which lets
  the trainer encode a batch in parts that fit into memory (gradients.py). It
  has no model state.
  """

  def encode(
    self,
    variables: Variables,
    frozen: Frozen,
    batch: Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> PyTree:
    """What the loss needs of each example, [B, ...]; no example sees another.

    Pure: the same key draws the same.
    """

  def coupled_loss(
    self, variables: Variables, frozen: Frozen, outputs: PyTree
  ) -> LossOutput:
    """The objective from the outputs [B, ...] of the whole batch; pure.

    Parameters that it reads itself (a scale of the logits) get their gradient
    here; SAM does not perturb them.
    """


class StandaloneTask(Task, Protocol):
  """A task whose model is of use by itself: `unclip sample` takes its run.

  `direction` says what `sample` makes of what: "text_to_image" (`image` of
  `text_tokens` and `text_mask`), "image_to_image" or "image_to_text".
  """

  direction: str
  sample_options: Mapping[str, Any]  # defaults of `sample`


@runtime_checkable
class AdaptedTask(Task, Protocol):
  """A task whose parameters only adapt those of an upstream model, `base`.

  Whoever loads such a model gets the plain one that it stands for
  (upstream.py).
  """

  def merge(self, variables: Variables, frozen: Frozen) -> Variables:
    """The variables of the plain model, as numpy arrays.

    Bit for bit the same on every machine, since models are told apart by
    fingerprints.
    """


def build(
  config: ml_collections.ConfigDict, upstream: Mapping[str, Task] | None = None
) -> Task:
  """Builds the task that a config names.

  Args:
    config: `model_name` and `task_name` are module paths that hold a `Model`
      and a `Task`; `model` and `task` are their fields.
    upstream: the tasks of `config.frozen`, by name.

  Raises:
    UserError: a module is missing, or a field is unknown to it.
  """
  model = config_lib.instantiate(config.model_name, "Model", config.model)
  task = config_lib.import_module(config.task_name).Task
  return config_lib.construct(
    task, config.task, where="config.task", model=model, upstream=upstream or {}
  )


def fit_x_start_mse(
  task: Any,
  variables: Variables,
  frozen: Frozen,
  batches: Iterable[Batch],
  rng: jax.Array,
) -> jax.Array:
  """The table of diffusion.gaussian.AnalyticVariance, by Monte Carlo.

  Args:
    task: has a `diffusion` process and gives the metric `mse`.
    batches: of one size B; row after row takes the next timestep, so that with
      n T / B of them every timestep gets n examples.

  Returns:
    float32 [T].
  """
  process = task.diffusion
  T = process.num_timesteps

  @jax.jit
  def mse(
    variables: Variables, frozen: Frozen, batch: Batch, rng: jax.Array
  ) -> jax.Array:
    step = jnp.zeros((), jnp.int32)
    output = task.loss(variables, frozen, batch, rng, step=step, train=False)
    return output.metrics["mse"]

  sums, counts = np.zeros(T), np.zeros(T)
  for i, batch in enumerate(batches):
    B = len(jax.tree.leaves(batch)[0])
    timesteps = (i * B + np.arange(B)) % T
    inputs = {**batch, "timesteps": jnp.asarray(timesteps, jnp.int32)}
    errors = mse(variables, frozen, inputs, jax.random.fold_in(rng, i))
    np.add.at(sums, timesteps, errors)
    np.add.at(counts, timesteps, 1)
  return jnp.asarray(process.x_start_mse(sums / counts), jnp.float32)


def text(batch: Batch) -> dict[str, jax.Array]:
  """`text_tokens` and `text_mask` of a batch, by name."""
  return {name: batch[name] for name in ("text_tokens", "text_mask")}


def loss_predict_fn(task: Task) -> PredictFn:
  """The evaluation loss as `{name: [B]}`, for the `mean` evaluator."""

  def predict(
    variables: Variables, frozen: Frozen, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    output = task.loss(
      variables, frozen, batch, rng, step=jnp.zeros((), jnp.int32), train=False
    )
    per_example = {k: v for k, v in output.metrics.items() if v.ndim == 1}
    return {**per_example, "loss": output.loss}

  return predict
