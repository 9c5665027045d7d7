"""How far each drawn picture is from its true one, in a network's eyes.

The squared distance of the features of the two. Any network does
(unclip_jax/features.py). LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) is
of this form: features are then a network's layers, each place's channels of
length 1, times the root of the layer's weights over its number of places, all
of them in one row. Its weights do not come with the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import similarity
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`predict` gives `features` and `true_features` [B, D].

  Attributes:
    max_examples: stop after that many; None = the whole split.
    seed: of the wrong pairing, which is the same at every call.
  """

  max_examples: int | None = None
  seed: int = 0

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields the means `distance` and `distance_shuffled`, and `count`.

    The latter is of drawn pictures and other true ones.

    Raises:
      UserError: fewer than two examples.
    """
    del info
    found, _ = base.collect(
      predict,
      batches,
      outputs=("features", "true_features"),
      max_examples=self.max_examples,
    )
    drawn, true = (np.asarray(x, np.float64) for x in found.values())
    if len(drawn) < 2:
      raise errors.UserError(
        "perceptual compares with a shuffled pairing and got one example: "
        "evaluate two or more"
      )
    others = true[similarity.derangement(len(true), self.seed)]
    for name, wanted in (("distance", true), ("distance_shuffled", others)):
      yield name, float(((drawn - wanted) ** 2).sum(axis=1).mean())
    yield "count", float(len(drawn))
