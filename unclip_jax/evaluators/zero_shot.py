"""Zero-shot classification: a picture's class by its nearest class caption.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4 (a class is the
mean of the text embeddings of its prompts). Deviation: the prompts of a class
are the captions of the split's examples of that class, and an example's own
caption is left out of its class: no picture is ever recognised by the text
that was written for it. A class with one example has no prompt left for it, so
that such examples are not classified; their class stays a wrong answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import similarity
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Accuracy; `predict` gives `image_embed` and `text_embed` [B, D].

  The class of an example is the batch entry `label` (int [B]) where the data
  has one, else `info(index)[class_field]`.

  Attributes:
    class_field: the entry of `info` that names the class.
    max_examples: stop after that many; None = the whole split.
  """

  class_field: str = "group"
  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields accuracies, each with what knowing no picture would give.

    `accuracy` is compared with `chance` (always the most frequent class),
    `class_accuracy` (the mean over classes) with `class_chance` (1 / classes);
    `num_classes` and `count` (classified examples) are counts.

    Raises:
      UserError: the classes are unknown, or fewer than two, or none has two
        examples.
    """
    embeds: dict[str, list[np.ndarray]] = {"image_embed": [], "text_embed": []}
    labels: list[Any] = []
    for predictions, batch in base.walk(predict, batches, self.max_examples):
      for name, rows in embeds.items():
        rows.append(base.require(predictions, name, "prediction"))
      labels.extend(self._labels(batch, info))
    if not labels:
      raise errors.UserError(base.NOTHING)
    classes, label = np.unique(labels, return_inverse=True)
    sizes = np.bincount(label)
    if len(classes) < 2 or sizes.max() < 2:
      raise errors.UserError(
        f"zero_shot needs two classes and one with two examples, and "
        f"'{self.class_field}' gives {len(classes)} classes for {len(label)} "
        "examples: evaluate more examples or choose another class_field"
      )
    text_embed = similarity.normalize(np.concatenate(embeds["text_embed"]))
    image_embed = similarity.normalize(np.concatenate(embeds["image_embed"]))
    sums = np.zeros((len(classes), text_embed.shape[1]))
    np.add.at(sums, label, text_embed)

    cosines = image_embed @ similarity.normalize(sums).T
    rows = np.arange(len(label))
    cosines[rows, label] = similarity.cosine(
      image_embed, sums[label] - text_embed
    )
    counted = sizes[label] > 1
    hits = (cosines.argmax(axis=1) == label)[counted]
    label = label[counted]
    per_class = [hits[label == c].mean() for c in np.unique(label)]
    yield "accuracy", float(hits.mean())
    yield "chance", float(np.bincount(label).max() / len(label))
    yield "class_accuracy", float(np.mean(per_class))
    yield "class_chance", 1.0 / len(classes)
    yield "num_classes", float(len(classes))
    yield "count", float(len(label))

  def _labels(
    self, batch: base.Arrays, info: base.Info | None
  ) -> Iterable[Any]:
    """The class of every row."""
    if "label" in batch:
      return batch["label"]
    if info is None:
      raise errors.UserError(
        "zero_shot needs the classes of the examples, and this data has "
        "neither 'label' in its batches nor example_info: drop the evaluator"
      )
    known = [info(int(i)) for i in base.require(batch, "index", "batch")]
    if self.class_field not in known[0]:
      raise errors.UserError(
        f"zero_shot.class_field '{self.class_field}' is unknown to the data, "
        f"which has {sorted(known[0])}: choose one of those"
      )
    return [str(entry[self.class_field]) for entry in known]
