"""Differentiable augmentation: what each part does, and to whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.losses import diff_augment
from unclip_jax.utils import errors

B, SIZE = 64, 8
PARTS = dict(
  brightness=0.5, saturation=1.0, contrast=0.5, translation=0.25, cutout=0.5
)
# No value is 0, and no two pictures are alike.
IMAGE = np.random.default_rng(0).uniform(0.1, 1, (B, SIZE, SIZE, 3))
IMAGE = IMAGE.astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), B)


def augment(image=IMAGE, rng=KEYS, **strengths):
  return jax.jit(diff_augment.DiffAugment(**strengths))(image, rng)


def test_without_strengths_pictures_are_what_they_were():
  np.testing.assert_array_equal(augment(), IMAGE)


@pytest.mark.parametrize("name", ["brightness", "saturation", "contrast"])
def test_little_strength_changes_little(name):
  change = np.abs(augment(**{name: 1e-3}) - IMAGE).max()
  assert 1e-5 < change < 2e-3


def test_brightness_is_one_number_a_picture_within_its_bound():
  added = np.asarray(augment(brightness=0.5) - IMAGE)
  np.testing.assert_allclose(added, added[:, :1, :1, :1] + 0 * added, atol=1e-6)
  assert -0.5 < added.min() < -0.4 and 0.4 < added.max() < 0.5


def test_saturation_keeps_the_grey_of_each_pixel():
  image = np.asarray(augment(saturation=1.0))
  np.testing.assert_allclose(image.mean(-1), IMAGE.mean(-1), atol=1e-6)
  factors = image.std(-1) / IMAGE.std(-1)
  np.testing.assert_allclose(
    factors, factors[:, :1, :1] + 0 * factors, rtol=1e-2, atol=1e-3
  )
  assert factors.min() < 0.2 and 1.8 < factors.max() < 2.01


def test_contrast_keeps_the_mean_of_each_picture():
  axes = (1, 2, 3)
  image = np.asarray(augment(contrast=0.5))
  np.testing.assert_allclose(image.mean(axes), IMAGE.mean(axes), atol=1e-6)
  factors = image.std(axes) / IMAGE.std(axes)
  assert 0.5 < factors.min() < 0.6 and 1.4 < factors.max() < 1.5


def test_translation_shifts_and_fills_with_zeros():
  image = np.asarray(augment(translation=0.25))
  shifts = set()
  padded = np.pad(IMAGE, ((0, 0), (2, 2), (2, 2), (0, 0)))
  for b in range(B):
    found = [
      (y, x)
      for y in range(5)
      for x in range(5)
      if np.array_equal(image[b], padded[b, y : y + SIZE, x : x + SIZE])
    ]
    assert len(found) == 1
    shifts |= set(found)
  assert len(shifts) > 15  # of 25


def test_cutout_is_a_square_that_the_edge_may_cut():
  cut = np.asarray(augment(cutout=0.5)) == 0
  assert (cut.all(-1) == cut.any(-1)).all()
  cut = cut[..., 0]
  rows, columns = cut.any(2), cut.any(1)
  np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None])
  for sides in (rows, columns):
    lengths = sides.sum(1)
    assert set(lengths) == {2, 3, 4}
    assert (np.abs(np.diff(np.pad(sides, ((0, 0), (1, 1))))).sum(1) == 2).all()
  np.testing.assert_array_equal(augment(cutout=0.5)[~cut], IMAGE[~cut])


def test_a_picture_draws_from_its_own_key_alone():
  whole = augment(**PARTS)
  part = augment(IMAGE[3:7], KEYS[3:7], **PARTS)
  np.testing.assert_allclose(part, whole[3:7], atol=1e-6)
  other = augment(np.concatenate([IMAGE[:1]] * 3), KEYS[:3], **PARTS)
  assert np.abs(other[1] - other[0]).max() > 0.1
  from_one = augment(rng=jax.random.key(0), **PARTS)
  np.testing.assert_array_equal(from_one, whole)


def test_the_gradient_goes_through_to_what_is_shown():
  """By finite differences, along a random direction."""
  policy = diff_augment.DiffAugment(**PARTS)
  rng = np.random.default_rng(1)
  weights, direction = rng.normal(size=(2, *IMAGE.shape)).astype("f4")

  @jax.jit
  def total(image):
    return jnp.sum(weights * policy(image, KEYS))

  grads = jax.grad(total)(IMAGE)
  # Linear in the picture: the difference is exact but for rounding.
  slope = total(IMAGE + 0.5 * direction) - total(IMAGE - 0.5 * direction)
  np.testing.assert_allclose(jnp.sum(grads * direction), slope, rtol=1e-3)
  assert (np.abs(grads).max(axis=(1, 2, 3)) > 0).all()


def test_a_strength_out_of_range_is_a_user_error():
  with pytest.raises(errors.UserError, match="cutout is 2"):
    diff_augment.DiffAugment(cutout=2)
