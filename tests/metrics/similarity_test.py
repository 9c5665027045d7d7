import numpy as np
import pytest

from unclip_jax.metrics import similarity


def test_cosine_of_known_angles():
  a = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
  b = np.array([[5.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
  expected = [1.0, -1.0, 0.0, np.sqrt(0.5), 0.0]
  np.testing.assert_allclose(similarity.cosine(a, b), expected, atol=1e-12)


def test_normalize_keeps_zero_rows():
  rows = similarity.normalize(np.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]])


@pytest.mark.parametrize("size", [2, 3, 10, 101])
def test_a_derangement_moves_every_element_and_is_fixed(size):
  moved = similarity.derangement(size)
  np.testing.assert_array_equal(np.sort(moved), np.arange(size))
  assert (moved != np.arange(size)).all()
  np.testing.assert_array_equal(moved, similarity.derangement(size))


def test_derangement_depends_on_the_seed_and_needs_two():
  assert (similarity.derangement(50, 1) != similarity.derangement(50, 2)).any()
  with pytest.raises(ValueError, match="permutation of 1"):
    similarity.derangement(1)


def test_shuffled_cosine_never_meets_its_own_pair():
  a = np.eye(6)
  np.testing.assert_array_equal(similarity.cosine(a, a), 1.0)
  np.testing.assert_array_equal(similarity.shuffled_cosine(a, a), 0.0)
