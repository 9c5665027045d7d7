"""Are drawn pictures the right ones: nearest true picture on few pixels.

Each drawn picture is looked up among the true ones of the same examples, by
squared error after area averaging (metrics/pictures.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import pictures, retrieval


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Top-k matches; `predict` gives `image`, the batches hold the true `image`.

  Attributes:
    size: pixels of a side at which pictures are compared; drawn and true ones
      may have any sizes.
    ks: the k of top-k.
    max_examples: the number of candidates; None = the whole split.
    num_grid: pairs (true left, drawn right) shown in `grid`; 0 = no grid.
  """

  size: int = 16
  ks: tuple[int, ...] = (1, 5)
  max_examples: int | None = None
  num_grid: int = 0

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields top<k> and its chance_top<k>, count, and grid if asked for."""
    del info
    predicted, given = base.collect(
      predict,
      batches,
      outputs=("image",),
      inputs=("image",),
      max_examples=self.max_examples,
    )
    drawn, true = predicted["image"], given["image"]
    ranks = pictures.match_nearest(drawn, true, self.size)
    for k in self.ks:
      yield f"top{k}", retrieval.recall_at_k(ranks, k)
      yield f"chance_top{k}", retrieval.chance_at_k(len(true), k)
    yield "count", float(len(true))
    if self.num_grid:
      drawn, true = drawn[: self.num_grid], true[: self.num_grid]
      true = pictures.area_resize(true, *drawn.shape[1:3])
      yield "grid", pictures.make_grid(np.concatenate([true, drawn], axis=2))
