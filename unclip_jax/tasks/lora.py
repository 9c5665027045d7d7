"""Adapters on a frozen model of any task (LoRA; models/lora.py).

`config.frozen.base` names the model: its own config gives its task, and its
upstream models and tables come with it. The objective, the draws and the
predict functions are that task's, of the adapted network. Only the adapters
are trained and saved; they are added to the kernels inside the jitted step,
which costs a matrix product of small rank for each kernel and a second copy of
the adapted kernels, and saves the optimizer's moments of the whole network.
Whoever loads the run gets the plain model (upstream.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from unclip_jax.models import lora
from unclip_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Task:
  """Does what the task of `base` does, with adapted kernels."""

  model: lora.Model
  upstream: Mapping[str, Any]

  @property
  def batch_coupled(self) -> bool:
    return self._base.batch_coupled

  @property
  def _base(self) -> Any:
    return self.upstream["base"]

  def _adapted(
    self, variables: base.Variables, frozen: base.Frozen
  ) -> tuple[base.Variables, base.Frozen]:
    """The variables and `frozen` that the base's task takes."""
    base_variables, base_frozen = _split(frozen)
    return self.model.apply(variables, base_variables), base_frozen

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del batch
    return self.model.init(rng, frozen["base"])

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}  # the base brings its own

  def loss(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    step: jax.Array,
    train: bool,
  ) -> base.LossOutput:
    output = self._base.loss(
      *self._adapted(variables, frozen), batch, rng, step=step, train=train
    )
    return output._replace(model_state={})  # the base's stays as it is

  def encode(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.PyTree:
    return self._base.encode(
      *self._adapted(variables, frozen), batch, rng, train=train
    )

  def coupled_loss(
    self, variables: base.Variables, frozen: base.Frozen, outputs: base.PyTree
  ) -> base.LossOutput:
    return self._base.coupled_loss(*self._adapted(variables, frozen), outputs)

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    **options: Any,
  ) -> dict[str, jax.Array]:
    return self._base.sample(
      *self._adapted(variables, frozen), batch, rng, **options
    )

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def adapted(predict_fn: base.PredictFn) -> base.PredictFn:
      def predict(
        variables: base.Variables,
        frozen: base.Frozen,
        batch: base.Batch,
        rng: jax.Array,
      ) -> dict[str, jax.Array]:
        return predict_fn(*self._adapted(variables, frozen), batch, rng)

      return predict

    return {k: adapted(fn) for k, fn in self._base.predict_fns().items()}

  def merge(
    self, variables: base.Variables, frozen: base.Frozen
  ) -> base.Variables:
    base_variables, _ = _split(frozen)
    return self.model.merge(variables, base_variables)


def _split(frozen: base.Frozen) -> tuple[base.Variables, base.Frozen]:
  """The base's variables, and what its own task gets as `frozen`."""
  variables = dict(frozen["base"])
  return variables, variables.pop("frozen", {})
