"""The one mutable thing of a run, as an immutable pytree."""

from __future__ import annotations

from typing import Any

import flax
import jax

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds of the optimisation."""

  step: jax.Array  # [] int32, updates done
  params: PyTree
  model_state: PyTree  # batch_stats, codebooks, ...: {} if none
  opt_state: PyTree
  ema_params: PyTree  # float32 exponential moving average of params
