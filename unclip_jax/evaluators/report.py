"""The figures of a whole text-to-picture model, each beside its chance level.

Not one evaluator but three, run on the predict functions of a pipeline:
retrieval by CLIP, the prior's cosines, and whether pictures drawn from the
captions alone are nearest to their true ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.evaluators import base, nearest_match, prior_report, retrieval


def report(
  predict_fns: Mapping[str, base.Predict],
  data: data_pipeline.DataPipeline,
  *,
  split: str,
  num_embeds: int,
  num_images: int,
  draw_batch_size: int = 25,
) -> dict[str, dict[str, Any]]:
  """Retrieval, the prior's cosines and nearest matches, as plain numbers.

  Args:
    predict_fns: `embed`, `prior` and `text_to_image`, as a pipeline has them.
    split: of the data, which gives `clip_image` and `image`.
    num_embeds: examples for the first two; fewer where the split has fewer.
    num_images: captions that are drawn.
    draw_batch_size: pictures drawn at once.

  Returns:
    `retrieval`, `prior` and `nearest_match`; the last holds a picture `grid`
    of all true and drawn pairs.
  """
  runs = {
    "retrieval": (retrieval.Evaluator(), "embed", num_embeds, 100),
    "prior": (prior_report.Evaluator(), "prior", num_embeds, 100),
    "nearest_match": (
      nearest_match.Evaluator(num_grid=num_images),
      "text_to_image",
      num_images,
      draw_batch_size,
    ),
  }
  results = {}
  for name, (evaluator, pred, count, batch_size) in runs.items():
    if pred not in predict_fns:  # there may be no prior
      continue
    batches = data.eval_batches(split, batch_size, count)
    results[name] = dict(evaluator.run(predict_fns[pred], batches, None))
  return results
