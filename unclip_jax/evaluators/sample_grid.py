"""A picture of what the model draws for the first examples of a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import pictures
from unclip_jax.utils import errors

# Part -> (where it comes from, its name there).
_PARTS = {
  "low_res": ("batch", "low_res"),
  "true": ("batch", "image"),
  "drawn": ("prediction", "image"),
}


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Draws a grid; `predict` gives `image`.

  The examples are the first ones, the same at every call. One place of the
  grid shows the parts of one example side by side, all at the size of the
  largest.

  Attributes:
    num_examples: how many are drawn.
    columns: examples in a row; None = about square.
    parts: what is shown of an example, from left to right: "low_res" (the
      batch's, enlarged), "true" (the batch's `image`), "drawn".
  """

  num_examples: int = 16
  columns: int | None = None
  parts: tuple[str, ...] = ("true", "drawn")

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields grid.

    Raises:
      UserError: an unknown part, or one that the batches lack.
    """
    del info
    unknown = set(self.parts) - set(_PARTS)
    if unknown or not self.parts:
      raise errors.UserError(
        f"sample_grid.parts {self.parts} must be taken from {tuple(_PARTS)}"
      )
    wanted = [_PARTS[part] for part in self.parts]
    predicted, given = base.collect(
      predict,
      batches,
      outputs=[name for where, name in wanted if where == "prediction"],
      inputs=[name for where, name in wanted if where == "batch"],
      max_examples=self.num_examples,
    )
    shown = [
      (predicted if where == "prediction" else given)[name]
      for where, name in wanted
    ]
    height = max(images.shape[1] for images in shown)
    width = max(images.shape[2] for images in shown)
    shown = [pictures.area_resize(images, height, width) for images in shown]
    yield (
      "grid",
      pictures.make_grid(np.concatenate(shown, axis=2), self.columns),
    )
