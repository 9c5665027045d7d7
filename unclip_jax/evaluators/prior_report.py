"""How near a prior's image embeddings are to the true ones.

Every cosine of CLIP embeddings is high, so the figure comes with two levels to
compare it with: the same drawn embeddings beside the wrong true ones, and the
caption's own text embedding in place of the drawn one (Ramesh et al. 2022,
arXiv 2204.06125, section 5.1: what the prior has to beat).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import retrieval, similarity
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Cosines of `image_embed` (drawn), `true_image_embed`, `text_embed` [B, D].

  All three are CLIP's own vectors, not in a prior's normalised space.

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
    """Yields means over the examples.

    `cosine` (drawn, true), `cosine_shuffled` (drawn, another's true),
    `cosine_text` (text, true), `norm_ratio` (drawn / true length, 1 = right),
    `r1` (the share of drawn embeddings nearest to their own true one among
    all) with `chance_r1`, and `count`.

    Raises:
      UserError: fewer than two examples.
    """
    del info
    embeds, _ = base.collect(
      predict,
      batches,
      outputs=("image_embed", "true_image_embed", "text_embed"),
      max_examples=self.max_examples,
    )
    drawn, true = embeds["image_embed"], embeds["true_image_embed"]
    if len(drawn) < 2:
      raise errors.UserError(
        "prior_report compares with a shuffled pairing and got one example: "
        "evaluate two or more"
      )
    norms = [
      np.linalg.norm(x.astype(np.float64), axis=-1) for x in (drawn, true)
    ]
    ranks = retrieval.rank_pairs(drawn, true)
    yield "cosine", float(similarity.cosine(drawn, true).mean())
    yield (
      "cosine_shuffled",
      float(similarity.shuffled_cosine(drawn, true, self.seed).mean()),
    )
    yield (
      "cosine_text",
      float(similarity.cosine(embeds["text_embed"], true).mean()),
    )
    yield "norm_ratio", float(norms[0].mean() / norms[1].mean())
    yield "r1", retrieval.recall_at_k(ranks, 1)
    yield "chance_r1", retrieval.chance_at_k(len(true), 1)
    yield "count", float(len(true))
