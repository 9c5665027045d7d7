"""A network that only reads pictures: what its features are, metrics compare.

There is nothing to be trained or drawn: it is converted from public weights,
and evaluators get its features beside what is drawn (unclip_jax/features.py).
A model of one's own serves as well, whose `Model` returns (features [B, ...],
further outputs by name) for pictures [B, H, W, 3] in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from unclip_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Task:
  """Gives `features` of pictures; the rest of a task's hooks it has not."""

  model: nn.Module
  upstream: Mapping[str, Any]

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def features(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      del frozen, rng
      output, out = self.model.apply(variables, batch["image"])
      return {"features": output, **out}

    return {"features": features}
