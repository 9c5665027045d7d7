"""Bits per dimension of held-out data, in total and by timestep.

The variational bound of a diffusion model (diffusion/likelihood.py); lower is
better. Pictures count in bits of 8-bit levels, embeddings in bits of a density,
which may be below 0: a task's `vlb` says which. A model that was not trained on
the bound, with a fixed variance, may pay tens of bits next to the data, where
the least error of x_start is large beside the variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """The bound; `predict` gives `bits_per_dim`, `prior_term`, `terms`.

  Attributes:
    num_bins: parts of the terms after the first, 0 = next to the data. Equally
      many calls of the network go into each; the timesteps of later bins are
      more.
    max_examples: stop after that many; None = the whole split.
  """

  num_bins: int = 4
  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields means over the examples, in bits per dimension.

    `bits_per_dim` with its standard error `bits_per_dim_error`, and the parts
    that add up to it: `prior_term` (L_T), `reconstruction_term` (L_0) and
    `bin0`, `bin1`, ... Then `count`.
    """
    del info
    found, _ = base.collect(
      predict,
      batches,
      outputs=("bits_per_dim", "prior_term", "terms"),
      max_examples=self.max_examples,
    )
    found = {name: rows.astype(np.float64) for name, rows in found.items()}
    bits = found["bits_per_dim"]
    yield "bits_per_dim", float(bits.mean())
    yield "bits_per_dim_error", float(bits.std() / len(bits) ** 0.5)
    yield "prior_term", float(found["prior_term"].mean())
    terms = found["terms"].mean(axis=0)
    yield "reconstruction_term", float(terms[0])
    for i, part in enumerate(np.array_split(terms[1:], self.num_bins)):
      yield f"bin{i}", float(part.sum())
    yield "count", float(len(bits))
