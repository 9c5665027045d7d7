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


def test_clip_score_is_a_hundred_cosines_and_never_negative():
  image = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
  text = np.array([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.1]])
  expected = [100.0, 100.0 * 0.5**0.5, 0.0]
  np.testing.assert_allclose(similarity.clip_score(image, text), expected)


def test_directional_follows_the_change_and_not_the_place():
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, 3, 8))
  image /= np.linalg.norm(image, axis=1, keepdims=True)
  text /= np.linalg.norm(text, axis=1, keepdims=True)
  # Both moved by a reflection: the changes are parallel where the axis is one.
  axis = np.eye(8)[0]
  moved = [x - 2.0 * np.outer(x @ axis, axis) for x in (image, text)]
  found = similarity.directional(image, moved[0], text, moved[1])
  np.testing.assert_allclose(found, np.sign(image[:, 0] * text[:, 0]))
  back = similarity.directional(7 * image, moved[0], 3 * moved[1], text)
  np.testing.assert_allclose(back, -found)
  still = similarity.directional(image, image, text, moved[1])
  np.testing.assert_array_equal(still, 0.0)
