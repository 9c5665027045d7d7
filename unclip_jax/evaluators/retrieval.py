"""Picture-caption retrieval among the examples of a split (CLIP's R@k).

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1. Only an example's
own index is a hit, also where several pictures have the same caption; equal
captions share the hit (see metrics/retrieval.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from unclip_jax.evaluators import base
from unclip_jax.metrics import retrieval


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """R@k in both directions; `predict` gives `image_embed`, `text_embed` [B, D].

  Attributes:
    ks: the k of R@k.
    max_examples: the number of candidates; None = the whole split.
  """

  ks: tuple[int, ...] = (1, 5)
  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields text_to_image_r<k>, image_to_text_r<k>, chance_r<k>, count."""
    del info
    embeds, _ = base.collect(
      predict,
      batches,
      outputs=("image_embed", "text_embed"),
      max_examples=self.max_examples,
    )
    image_embed, text_embed = embeds["image_embed"], embeds["text_embed"]
    text_to_image = retrieval.rank_pairs(text_embed, image_embed)
    image_to_text = retrieval.rank_pairs(image_embed, text_embed)
    for k in self.ks:
      yield f"text_to_image_r{k}", retrieval.recall_at_k(text_to_image, k)
      yield f"image_to_text_r{k}", retrieval.recall_at_k(image_to_text, k)
      yield f"chance_r{k}", retrieval.chance_at_k(len(image_embed), k)
    yield "count", float(len(image_embed))
