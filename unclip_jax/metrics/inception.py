"""The Inception score: are drawn pictures clear, and are they diverse?

Salimans et al. 2016 (arXiv 1606.03498, section 4): exp E KL(p(y|x) || p(y)) of
the classes y that a classifier sees in pictures x, between 1 (every picture
looks the same to it) and the number of classes. Barratt & Sharma 2018 (arXiv
1801.01973) say how it depends on the number of splits, and why it means little
for pictures unlike ImageNet's.
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.special


def score(
  logits: np.ndarray, *, num_splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
  """Mean and standard deviation of the score over parts of the pictures.

  Args:
    logits: [N, K]; the classifier's bias is left out, as in the released code
      (`logits_unbiased` of models/inception.py).
    num_splits: into how many parts, of N / num_splits pictures.
    seed: of the order of the pictures, which is torch-fidelity's with that
      seed; None: as they come.

  Raises:
    ValueError: fewer pictures than splits.
  """
  N = len(logits)
  if not 1 <= num_splits <= N:
    raise ValueError(f"num_splits {num_splits} must be in [1, {N}]")
  if seed is not None:
    logits = logits[np.random.RandomState(seed).permutation(N)]
  log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
  edges = np.arange(num_splits + 1) * N // num_splits
  scores = []
  for start, stop in itertools.pairwise(edges):
    part = log_p[start:stop]
    marginal = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
    divergence = (np.exp(part) * (part - marginal)).sum(axis=1)
    scores.append(np.exp(divergence.mean()))
  return float(np.mean(scores)), float(np.std(scores))
