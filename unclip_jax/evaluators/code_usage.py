"""How much of a codebook is used (van den Oord et al. 2017, arXiv 1711.00937).

Over the codes of all examples of a split together, where a loss sees a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Statistics of codes; `predict` gives `image_tokens` [B, K].

  Attributes:
    num_codes: size of the codebook.
    max_examples: stop after that many; None = the whole split.
  """

  num_codes: int
  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields used and perplexity.

    `used` is the share of codes that occur at all; `perplexity` the exp of the
    entropy of their frequencies, 1 to num_codes.
    """
    del info
    predicted, _ = base.collect(
      predict, batches, ("image_tokens",), max_examples=self.max_examples
    )
    tokens = predicted["image_tokens"].reshape(-1)
    counts = np.bincount(tokens, minlength=self.num_codes)
    yield "used", float(np.mean(counts > 0))
    probs = counts[counts > 0] / counts.sum()
    yield "perplexity", float(np.exp(-np.sum(probs * np.log(probs))))
