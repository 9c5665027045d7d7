import numpy as np
import pytest

from unclip_jax.metrics import inception


def test_score_is_one_where_all_pictures_look_alike():
  logits = np.tile(np.random.default_rng(0).normal(size=7), (20, 1))
  mean, std = inception.score(logits, num_splits=4)
  np.testing.assert_allclose([mean, std], [1.0, 0.0], atol=1e-12)


def test_score_is_the_number_of_classes_that_are_sure_and_even():
  logits = 1e3 * np.eye(5)[np.arange(40) % 5]
  assert inception.score(logits, seed=None, num_splits=8)[0] == pytest.approx(5)


def test_score_is_its_definition():
  logits = np.random.default_rng(0).normal(size=(11, 4))
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  expected = []
  for part in (p[:5], p[5:]):
    kl = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
    expected.append(np.exp(kl.mean()))
  mean, std = inception.score(logits, num_splits=2, seed=None)
  np.testing.assert_allclose(
    [mean, std], [np.mean(expected), np.std(expected)], rtol=1e-12
  )
  # Another order has other parts.
  assert inception.score(logits, num_splits=2, seed=3)[1] != pytest.approx(std)
  with pytest.raises(ValueError, match=r"\[1, 11\]"):
    inception.score(logits, num_splits=12)
