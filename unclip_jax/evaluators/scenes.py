"""Does a drawn picture show the scene that was asked for?

What is in it is read (metrics/scene.py, which defines the scores) and compared
with the scene that the data knows. Each mean stands beside its `chance_` level,
which is what the same pictures get for the scenes of other examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import pictures, scene, similarity
from unclip_jax.utils import errors, scenes


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores of scenes; `predict` gives `image`, the batches hold `index`.

  Attributes:
    max_examples: stop after that many; None = the whole split.
    num_grid: examples shown in `grid`; 0 = no grid.
  """

  max_examples: int | None = None
  num_grid: int = 0

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields the mean of every score with its chance level, count, and grid.

    Means are over the examples that a score asks something of; one that asks
    nothing of any example is left out. The grid shows what was asked for, what
    was drawn and what was read in it, from left to right.

    Raises:
      UserError: the data knows no scenes, or fewer than two examples.
    """
    predicted, given = base.collect(
      predict,
      batches,
      outputs=("image",),
      inputs=("index",),
      max_examples=self.max_examples,
    )
    known = [info(int(i)) if info else {} for i in given["index"]]
    if "scene" not in known[0] or len(known) < 2:
      raise errors.UserError(
        "the evaluator scenes needs two examples or more of data that knows its"
        " scenes (unclip_jax.data.shapes): evaluate more, or drop it"
      )
    true = [entry["scene"] for entry in known]
    found = [scene.read(image) for image in predicted["image"]]
    others = [true[i] for i in similarity.derangement(len(true))]
    for prefix, wanted in (("", true), ("chance_", others)):
      rows = [scene.compare(a, b) for a, b in zip(found, wanted, strict=True)]
      for name in scene.NAMES:
        values = np.array([row[name] for row in rows])
        if not np.isnan(values).all():
          yield f"{prefix}{name}", float(np.nanmean(values))
    yield "count", float(len(true))
    if self.num_grid:
      drawn = predicted["image"][: self.num_grid]
      side = drawn.shape[1]
      wanted, read = (_render(x[: len(drawn)], side) for x in (true, found))
      shown = np.concatenate([wanted, drawn, read], axis=2)
      yield "grid", pictures.make_grid(shown)


def _render(these: Sequence[scenes.Scene], side: int) -> np.ndarray:
  return np.stack([scenes.render(s, side) for s in these]) / 127.5 - 1.0
