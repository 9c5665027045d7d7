"""Zero-shot classification: a picture's class by its nearest class prompts.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4: a class is the
mean of the text embeddings of its prompts, templates with the class's name put
in.

Without templates the prompts of a class are the captions of the split's
examples of that class, and an example's own caption is left out of its class:
no picture is ever recognised by the text that was written for it. A class with
one example has no prompt left for it, so that such examples are not classified;
their class stays a wrong answer.
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
    templates: prompts with {} for the name of a class, such as "a photo of a
      {}."; none: the captions of its examples.
    class_names: of the classes 0, 1, ... of `label`, for the templates; where
      the data has no `label` the class_field is the name.
    max_examples: stop after that many; None = the whole split.
  """

  class_field: str = "group"
  templates: tuple[str, ...] = ()
  class_names: tuple[str, ...] = ()
  max_examples: int | None = None

  def __post_init__(self) -> None:
    wrong = [x for x in self.templates if "{}" not in x]
    if wrong:
      raise errors.UserError(
        f"the zero_shot template '{wrong[0]}' has no place for the class: put "
        "{} into it"
      )

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
      UserError: the classes are unknown, or fewer than two; without templates,
        none has two examples; with them, the data has no tokenizer.
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
    if len(classes) < 2:
      raise errors.UserError(
        f"zero_shot needs two classes, and '{self.class_field}' gives one: "
        "evaluate more examples or choose another class_field"
      )
    image_embed = similarity.normalize(np.concatenate(embeds["image_embed"]))
    if self.templates:
      class_embed = self._of_templates(predict, batches, info, classes)
      cosines = image_embed @ class_embed.T
      counted = np.ones(len(label), bool)
    else:
      text_embed = np.concatenate(embeds["text_embed"])
      cosines, counted = self._of_captions(image_embed, text_embed, label)
    hits = (cosines.argmax(axis=1) == label)[counted]
    label = label[counted]
    per_class = [hits[label == c].mean() for c in np.unique(label)]
    yield "accuracy", float(hits.mean())
    yield "chance", float(np.bincount(label).max() / len(label))
    yield "class_accuracy", float(np.mean(per_class))
    yield "class_chance", 1.0 / len(classes)
    yield "num_classes", float(len(classes))
    yield "count", float(len(label))

  def _of_captions(
    self, image_embed: np.ndarray, text_embed: np.ndarray, label: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [N, classes], and which examples [N] can be classified."""
    sizes = np.bincount(label)
    if sizes.max() < 2:
      raise errors.UserError(
        f"zero_shot needs a class with two examples, and '{self.class_field}' "
        f"gives {len(sizes)} classes for {len(label)} examples: evaluate more "
        "examples, choose another class_field, or set templates"
      )
    text_embed = similarity.normalize(text_embed)
    sums = np.zeros((len(sizes), text_embed.shape[1]))
    np.add.at(sums, label, text_embed)
    cosines = image_embed @ similarity.normalize(sums).T
    rows = np.arange(len(label))
    cosines[rows, label] = similarity.cosine(
      image_embed, sums[label] - text_embed
    )
    return cosines, sizes[label] > 1

  def _of_templates(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
    classes: np.ndarray,
  ) -> np.ndarray:
    """Unit embeddings [classes, D] of the classes' names in the templates."""
    batch = next(iter(batches))
    if "label" in batch and len(self.class_names) <= classes.max():
      raise errors.UserError(
        f"zero_shot.class_names has {len(self.class_names)} names, and the "
        f"data has the label {classes.max()}: name them all"
      )
    known = info(int(batch["index"][0])) if info and "index" in batch else {}
    if "tokenizer" not in known:
      raise errors.UserError(
        "zero_shot.templates need data with a tokenizer, which this has not: "
        "leave them out"
      )
    names = [
      self.class_names[c] if "label" in batch else str(c) for c in classes
    ]
    prompts = [x.replace("{}", name) for name in names for x in self.templates]
    B, L = batch["text_tokens"].shape
    text_embeds = []
    for start in range(0, len(prompts), B):
      some = prompts[start : start + B]
      # The shapes of any other batch, so that nothing compiles again.
      filled = [*some, *[some[-1]] * (B - len(some))]
      text_tokens, text_mask = known["tokenizer"].encode(filled, L)
      text = {"text_tokens": text_tokens, "text_mask": text_mask}
      text_embed = predict({**batch, **text})["text_embed"]
      text_embeds.append(np.asarray(text_embed)[: len(some)])
    unit = similarity.normalize(np.concatenate(text_embeds))
    D = unit.shape[1]
    means = unit.reshape(len(names), len(self.templates), D).mean(axis=1)
    return similarity.normalize(means)

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
