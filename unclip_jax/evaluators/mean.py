"""The mean of per-example numbers (losses, accuracies) over a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Averages everything that `predict` yields.

  A prediction [B] is averaged over the real examples of all batches, in
  float64; one without a batch dimension (a temperature, say) counts once for
  each real example of its batch.

  Attributes:
    max_examples: stop after that many; None = the whole split.
  """

  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields every name that `predict` yields with its mean (see `base`).

    Raises:
      UserError: a prediction has more than one dimension, or no example is
        real.
    """
    del info
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for predictions, batch in base.walk(predict, batches, self.max_examples):
      count = len(next(iter(batch.values())))
      for name, value in predictions.items():
        if value.ndim > 1:
          raise errors.UserError(
            f"the mean evaluator needs one number per example: '{name}' has "
            f"shape {value.shape}; choose another 'pred' in config.evals"
          )
        rows = np.broadcast_to(value.astype(np.float64), (count,))
        sums[name] = sums.get(name, 0.0) + float(rows.sum())
        counts[name] = counts.get(name, 0) + count
    if not counts:
      raise errors.UserError(base.NOTHING)
    for name, total in sums.items():
      yield name, total / counts[name]
