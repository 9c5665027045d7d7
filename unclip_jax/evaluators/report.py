"""The figures of a whole text-to-picture model, each beside its chance level.

Not one evaluator but several, run on the predict functions of a pipeline:
retrieval by CLIP, the prior's cosines, whether pictures drawn from the captions
alone are nearest to their true ones, and what other networks see in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.evaluators import (
  base,
  clip_score,
  fid,
  nearest_match,
  prior_report,
  retrieval,
)

# Puts a network behind a predict function that gives pictures.
Beside = Callable[[base.Predict, base.Info], base.Predict]

_BESIDE = {"fid": fid.Evaluator, "clip_score": clip_score.Evaluator}


def report(
  predict_fns: Mapping[str, base.Predict],
  data: data_pipeline.DataPipeline,
  *,
  split: str,
  num_embeds: int,
  num_images: int,
  draw_batch_size: int = 25,
  beside: Mapping[str, Beside] | None = None,
) -> dict[str, dict[str, Any]]:
  """Retrieval, the prior's cosines and nearest matches, as plain numbers.

  Args:
    predict_fns: `embed`, `prior` and `text_to_image`, as a pipeline has them.
    split: of the data, which gives `clip_image` and `image`.
    num_embeds: examples for the first two; fewer where the split has fewer.
    num_images: captions that are drawn.
    draw_batch_size: pictures drawn at once.
    beside: "fid" and "clip_score", those that are wanted -> their network.

  Returns:
    `retrieval`, `prior` and `nearest_match`, which holds a picture `grid` of
    all true and drawn pairs; and those of `beside`, of the same pictures.
  """
  predict_fns = dict(predict_fns)
  draw = _remembering(predict_fns["text_to_image"])
  predict_fns["text_to_image"] = draw
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
  for name, put in (beside or {}).items():
    predict_fns[name] = put(draw, lambda i: data.example_info(i, split))
    runs[name] = (_BESIDE[name](), name, num_images, draw_batch_size)
  results = {}
  for name, (evaluator, pred, count, batch_size) in runs.items():
    if pred not in predict_fns:  # there may be no prior
      continue
    batches = data.eval_batches(split, batch_size, count)
    results[name] = dict(evaluator.run(predict_fns[pred], batches, None))
  return results


def _remembering(predict: base.Predict) -> base.Predict:
  """`predict`, which draws no batch a second time."""
  known: dict[bytes, base.Arrays] = {}

  def remembered(batch: base.Arrays) -> base.Arrays:
    key = batch["index"].tobytes()
    if key not in known:
      known[key] = predict(batch)
    return known[key]

  return remembered
