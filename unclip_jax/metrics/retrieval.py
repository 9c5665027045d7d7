"""Recall at k: how often the right candidate is among the k nearest.

Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 3.1.

Ties are settled by expectation: with g candidates better than the target and t
others equal to it, a random order of the equal ones puts the target among the
first k with probability clip((k - g) / (t + 1), 0, 1). A model that gives one
embedding to everything is therefore exactly at chance, k / M.

Only the target itself is a hit. Where several pictures have one caption, that
caption as a query can find but one of them, and their equal captions share the
hit as candidates: the recall is a lower bound, and chance stays k / M.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unclip_jax.metrics import similarity as similarity_lib

# Rows that go through a matrix product at once: bounds memory to _BLOCK x M.
_BLOCK = 1024


class Ranks(NamedTuple):
  """Where the target of each query stands among the candidates."""

  better: np.ndarray  # int [L], candidates strictly before the target
  tied: np.ndarray  # int [L], other candidates equal to the target


def rank_targets(
  similarity: np.ndarray, targets: np.ndarray, *, tie_tolerance: float = 0.0
) -> Ranks:
  """Ranks the target of every query by similarity.

  Args:
    similarity: [L, M], higher = nearer. NaN is farther than all numbers.
    targets: int [L], the right candidate of each query.
    tie_tolerance: candidates within this distance of the target's similarity
      count as equal to it.
  """
  similarity = np.where(np.isnan(similarity), -np.inf, similarity)
  own = similarity[np.arange(len(targets)), targets][:, None]
  better = (similarity > own + tie_tolerance).sum(axis=1)
  at_least = (similarity >= own - tie_tolerance).sum(axis=1)
  return Ranks(better, at_least - better - 1)


def rank_pairs(
  queries: np.ndarray, candidates: np.ndarray, *, tie_tolerance: float = 1e-6
) -> Ranks:
  """Ranks candidate i for query i by the cosine.

  Args:
    queries: [L, D], any norm.
    candidates: [M, D] with M >= L, any norm.
    tie_tolerance: in cosine; the default is above float32 rounding, so that
      equal captions embedded in different batches tie.

  Raises:
    ValueError: more queries than candidates.
  """
  if len(queries) > len(candidates):
    raise ValueError(f"{len(queries)} queries, {len(candidates)} candidates")
  queries = similarity_lib.normalize(queries)
  candidates = similarity_lib.normalize(candidates)
  blocks = [
    rank_targets(
      queries[start : start + _BLOCK] @ candidates.T,
      np.arange(start, min(start + _BLOCK, len(queries))),
      tie_tolerance=tie_tolerance,
    )
    for start in range(0, len(queries), _BLOCK)
  ]
  return Ranks(*(np.concatenate(part) for part in zip(*blocks)))


def recall_at_k(ranks: Ranks, k: int) -> float:
  """The expected share of queries with their target among the first k."""
  hits = np.clip((k - ranks.better) / (ranks.tied + 1), 0.0, 1.0)
  return float(hits.mean())


def chance_at_k(num_candidates: int, k: int) -> float:
  """Recall at k of a random order."""
  return min(k / num_candidates, 1.0)
