import numpy as np
import pytest

from unclip_jax.metrics import manifold


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def direct(true: np.ndarray, drawn: np.ndarray, k: int) -> dict[str, float]:
  """The definitions, ball by ball."""

  def radii(x):
    return [np.sort(np.linalg.norm(x - p, axis=1))[k] for p in x]

  r_true, r_drawn = radii(true), radii(drawn)
  inside_true = np.array(
    [[np.linalg.norm(d - t) < r for t, r in zip(true, r_true)] for d in drawn]
  )
  inside_drawn = np.array(
    [[np.linalg.norm(d - t) < r for d, r in zip(drawn, r_drawn)] for t in true]
  )
  return {
    "precision": inside_true.any(axis=1).mean(),
    "recall": inside_drawn.any(axis=1).mean(),
    "density": inside_true.sum(axis=1).mean() / k,
    "coverage": inside_true.any(axis=0).mean(),
  }


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 1024])
def test_prdc_is_its_definition(k, block, monkeypatch):
  monkeypatch.setattr(manifold, "_BLOCK", block)
  true, drawn = random(40, 5) + 1e3, 0.7 * random(25, 5, seed=1) + 1e3 + 0.4
  found = manifold.prdc(true, drawn, k)
  assert found == pytest.approx(direct(true, drawn, k))
  assert all(0.05 < x < 2 for x in found.values())


def test_a_set_beside_itself_is_perfect():
  x = random(60, 4)
  found = manifold.prdc(x, x, 5)
  assert found["precision"] == found["recall"] == found["coverage"] == 1.0
  # A ball holds its picture and 4 others; the fifth lies on the surface, where
  # rounding decides.
  assert 1.0 <= found["density"] <= 1.2


def test_sets_apart_share_nothing():
  found = manifold.prdc(random(30, 4), random(30, 4, seed=1) + 100.0)
  assert set(found.values()) == {0.0}


def test_dropped_modes_cost_recall_and_coverage_alone():
  true = np.concatenate([random(50, 4), random(50, 4, seed=1) + 100.0])
  found = manifold.prdc(true, random(100, 4, seed=2))
  assert found["precision"] > 0.8 and found["density"] > 0.8
  assert found["recall"] < 0.51 and found["coverage"] < 0.51


def test_k_must_fit():
  with pytest.raises(ValueError, match=r"\[1, 5\)"):
    manifold.prdc(random(5, 2), random(9, 2), 5)
