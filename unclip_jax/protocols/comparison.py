"""One row of figures for any model that draws from captions.

The same for every family of models (configs/baselines), so that their rows
stand under each other: what a picture costs, whether it is found by its caption
among those of other captions, how like the true ones the pictures are as a set,
and how different those of one caption are. All is seen by the CLIP of
`--clip`, which should be one that no model stands on; with `--inception` the
sets are compared in its features.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

import jax

from unclip_jax.evaluators import base as evaluators
from unclip_jax.evaluators import fid
from unclip_jax.metrics import pictures, retrieval
from unclip_jax.protocols import base, diversity


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  num_images: captions of the split, one picture each.
  num_prompts, num_repeats: captions of which more pictures are drawn.
  num_shown: of the first captions the pictures are shown.
  num_timed: batches whose drawing is timed, after one that is not.
  """

  num_images: int = 500
  num_prompts: int = 50
  num_repeats: int = 4
  num_shown: int = 16
  num_timed: int = 3

  def run(self, subject: base.Subject) -> base.Result:
    """One row.

    `parameters` of all parts but a CLIP that only ranks; `seconds`, the median
    time of a picture of the subject's batches; `r1` and `r5`, recall of a
    caption's picture among all drawn, beside `chance_r1` and what the true
    pictures reach, `true_r1` and `true_r5`; `fid`, `kid`, `precision` and
    `recall`; `within`, as protocols/diversity.py. A row of pictures, `drawn`,
    and one of the true ones, `true`.
    """
    draw = subject.predict("text_to_image")
    seconds = self._seconds(subject, draw)
    seen = subject.look(draw, self.num_images, num_pictures=self.num_shown)
    again = subject.look_repeatedly(self.num_repeats, self.num_prompts)
    row: dict[str, float] = {
      "parameters": float(_num_parameters(subject.pipe)),
      "seconds": seconds,
    }
    for name, candidates in (
      ("", seen["image_embed"]),
      ("true_", seen["true_image_embed"]),
    ):
      ranks = retrieval.rank_pairs(seen["text_embed"], candidates)
      for k in (1, 5):
        row[f"{name}r{k}"] = retrieval.recall_at_k(ranks, k)
    row["chance_r1"] = retrieval.chance_at_k(len(seen["index"]), 1)
    found = base.measure(fid.Evaluator(), seen)
    row |= {k: found[k] for k in ("fid", "kid", "precision", "recall", "count")}
    row["within"] = diversity.spread(again["features"])["within"]
    batch = next(iter(subject.batches(self.num_shown)))
    true = batch["image"][batch["mask"]][: self.num_shown]
    shown = {
      name: pictures.make_grid(images, columns=len(images))
      for name, images in (("drawn", seen["image"]), ("true", true))
    }
    return base.Result([row], subject.networks(), (), shown)

  def _seconds(self, subject: base.Subject, draw: evaluators.Predict) -> float:
    """Median wall time of one picture, compilation left out."""
    batch = next(iter(subject.batches(subject.batch_size)))
    draw(batch)
    times = []
    for _ in range(self.num_timed):
      start = time.perf_counter()
      draw(batch)
      times.append(time.perf_counter() - start)
    return statistics.median(times) / len(batch["index"])


def _num_parameters(pipe: Any) -> int:
  """Of the parts that drawing takes."""
  drawing = {*pipe.stages}
  for name in pipe.stages:
    drawing |= {*pipe.parts[name].config.get("frozen", {})}
  return sum(
    math.prod(leaf.shape)
    for name, part in pipe.parts.items()
    if name in drawing
    for leaf in jax.tree.leaves(part.variables["params"])
  )
