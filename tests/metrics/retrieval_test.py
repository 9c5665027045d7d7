"""Recall at k against brute force and known permutations."""

import itertools

import numpy as np
import pytest

from unclip_jax.metrics import retrieval


def brute_force(queries: np.ndarray, candidates: np.ndarray, k: int) -> float:
  hits = 0
  for i, query in enumerate(queries):
    cosines = [
      query @ c / (np.linalg.norm(query) * np.linalg.norm(c))
      for c in candidates
    ]
    hits += i in np.argsort(cosines)[::-1][:k]
  return hits / len(queries)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_is_that_of_brute_force(k):
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(20, 4))
  candidates = np.concatenate(
    [queries + rng.normal(size=(20, 4)), rng.normal(size=(10, 4))]
  )
  recall = retrieval.recall_at_k(retrieval.rank_pairs(queries, candidates), k)
  assert 0.0 < recall < 1.0
  np.testing.assert_allclose(recall, brute_force(queries, candidates, k))


def test_known_permutation():
  # Query i finds candidate i first for 0 and 1, second for 2 and 3.
  similarity = np.array(
    [[4, 3, 2, 1], [1, 4, 3, 2], [4, 1, 3, 2], [2, 4, 1, 3]], float
  )
  ranks = retrieval.rank_targets(similarity, np.arange(4))
  np.testing.assert_array_equal(ranks.better, [0, 0, 1, 1])
  np.testing.assert_array_equal(ranks.tied, 0)
  assert retrieval.recall_at_k(ranks, 1) == 0.5
  assert retrieval.recall_at_k(ranks, 2) == 1.0
  other = retrieval.rank_targets(similarity, np.array([3, 0, 0, 1]))
  np.testing.assert_array_equal(other.better, [3, 3, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_count_as_the_mean_over_all_orders(k):
  similarity = np.array([5.0, 3.0, 3.0, 3.0, 1.0])
  hits = []
  for order in itertools.permutations(range(5)):
    # A stable sort of a shuffled list: equal ones in the shuffled order.
    ranked = sorted(order, key=lambda j: -similarity[j])
    hits.append(2 in ranked[:k])
  ranks = retrieval.rank_targets(similarity[None], np.array([2]))
  np.testing.assert_allclose(retrieval.recall_at_k(ranks, k), np.mean(hits))


def test_collapsed_embeddings_are_at_chance():
  same = np.ones((8, 3))
  noisy = same + 1e-4 * np.random.default_rng(0).normal(size=(8, 3))
  ranks = retrieval.rank_pairs(same, noisy)
  np.testing.assert_array_equal(ranks.tied, 7)
  for k in (1, 5, 20):
    np.testing.assert_allclose(
      retrieval.recall_at_k(ranks, k), retrieval.chance_at_k(8, k)
    )
  assert retrieval.chance_at_k(8, 1) == 0.125
  assert retrieval.chance_at_k(8, 20) == 1.0


def test_norms_do_not_matter():
  rng = np.random.default_rng(1)
  queries, candidates = rng.normal(size=(2, 12, 5))
  scales = rng.uniform(0.1, 10.0, size=(12, 1))
  a = retrieval.rank_pairs(queries, candidates)
  b = retrieval.rank_pairs(queries * scales, candidates / scales)
  np.testing.assert_array_equal(a.better, b.better)


def test_nan_is_never_a_hit():
  similarity = np.array([[np.nan, 0.1, 0.2], [np.nan, 0.5, 0.1]])
  ranks = retrieval.rank_targets(similarity, np.array([0, 1]))
  np.testing.assert_array_equal(ranks.better, [2, 0])


def test_blocks_change_nothing(monkeypatch):
  queries, candidates = np.random.default_rng(2).normal(size=(2, 11, 4))
  whole = retrieval.rank_pairs(queries, candidates)
  monkeypatch.setattr(retrieval, "_BLOCK", 4)
  blocks = retrieval.rank_pairs(queries, candidates)
  np.testing.assert_array_equal(whole.better, blocks.better)


def test_more_queries_than_candidates_are_refused():
  with pytest.raises(ValueError, match="3 queries, 2 candidates"):
    retrieval.rank_pairs(np.ones((3, 2)), np.ones((2, 2)))
