"""FID and its like: are drawn pictures, as a set, like the true ones?

One pass of a network (`config.evals.NAME.features`, unclip_jax/features.py)
over true and drawn pictures gives all of them; sources and definitions are in
metrics/frechet.py, kernel.py, manifold.py and inception.py.

The FID of N pictures is too high by about a constant over N (Chong & Forsyth
2020, arXiv 1911.07023): compare figures of one N, 50,000 in most papers and
30,000 of MS-COCO's captions in Ramesh et al. (section 5.4). With fewer, look at
the KID, which has no bias.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

import numpy as np

from unclip_jax.evaluators import base
from unclip_jax.metrics import frechet, inception, kernel, manifold
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`predict` gives `features` and `true_features` [B, D].

  Attributes:
    reference: .npz file with `mu` [D] and `sigma` [D, D], the statistics of
      the true pictures that the FID is taken to, as pytorch-fid and
      guided-diffusion write them; None: those of the split.
    k: of precision, recall, density and coverage.
    max_examples: stop after that many; None = the whole split.
  """

  reference: str | None = None
  k: int = 5
  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields the figures of the whole split.

    `fid`; `kid`, of all pictures or, where they are more than 1000, over 100
    subsets of 1000 with their `kid_std`; `precision`, `recall`, `density` and
    `coverage`; where `predict` gives `logits_unbiased`, `inception_score` with
    `inception_score_std` (10 parts, or fewer of 1000 pictures) and
    `inception_score_true`, that of the true pictures; `count`.

    Raises:
      UserError: too few examples, or the reference does not fit.
    """
    del info
    reference = self._reference()
    rows: dict[str, list[np.ndarray]] = {}
    moments: dict[str, frechet.Moments] = {}
    for predictions, _ in base.walk(predict, batches, self.max_examples):
      for name in ("features", "true_features"):
        found = base.require(predictions, name, "prediction")
        rows.setdefault(name, []).append(found)
        new = frechet.Moments.of(found)
        moments[name] = moments[name].merge(new) if name in moments else new
      for name in ("logits_unbiased", "true_logits_unbiased"):
        if name in predictions:
          rows.setdefault(name, []).append(predictions[name])
    if not rows:
      raise errors.UserError(base.NOTHING)
    whole = {name: np.concatenate(parts) for name, parts in rows.items()}
    drawn, true = whole["features"], whole["true_features"]
    N = len(drawn)
    if self.k >= N:
      raise errors.UserError(
        f"fid compares neighbours up to the {self.k}th and got {N} examples:"
        " evaluate more"
      )
    if reference is None:
      yield (
        "fid",
        frechet.distance(moments["true_features"], moments["features"]),
      )
    else:
      yield "fid", self._distance(*reference, moments["features"])
    if N > 1000:
      mean, std = kernel.kid(true, drawn)
      yield "kid", mean
      yield "kid_std", std
    else:
      yield "kid", kernel.polynomial_mmd(true, drawn)
    yield from manifold.prdc(true, drawn, self.k).items()
    if "logits_unbiased" in whole:
      splits = min(10, max(1, N // 1000))
      mean, std = inception.score(whole["logits_unbiased"], num_splits=splits)
      yield "inception_score", mean
      yield "inception_score_std", std
      of_true = whole["true_logits_unbiased"]
      yield (
        "inception_score_true",
        inception.score(of_true, num_splits=splits)[0],
      )
    yield "count", float(N)

  def _reference(self) -> tuple[np.ndarray, np.ndarray] | None:
    """mu and sigma of the file."""
    if self.reference is None:
      return None
    if not os.path.isfile(self.reference):
      raise errors.UserError(f"fid.reference: there is no {self.reference}")
    try:
      with np.load(self.reference, allow_pickle=False) as arrays:
        return arrays["mu"], arrays["sigma"]
    except (KeyError, ValueError, OSError) as e:
      raise errors.UserError(
        f"fid.reference {self.reference} is no .npz file with mu and sigma: {e}"
      ) from e

  def _distance(
    self, mean: np.ndarray, covariance: np.ndarray, drawn: frechet.Moments
  ) -> float:
    try:
      return frechet.distance_of(mean, covariance, drawn.mean, drawn.covariance)
    except ValueError as e:
      raise errors.UserError(
        f"fid.reference {self.reference} is of another network's features: {e}"
      ) from e
