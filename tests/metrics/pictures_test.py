import jax
import numpy as np
import pytest

from unclip_jax.metrics import pictures, retrieval


def random_pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.uniform(-1.0, 1.0, (count, size, size, 3)).astype(np.float32)


def test_area_resize_by_a_whole_factor_is_the_block_mean():
  images = random_pictures(2, 12)
  expected = images.reshape(2, 4, 3, 4, 3, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(
    pictures.area_resize(images, 4, 4), expected, atol=1e-6
  )


def test_area_resize_by_a_fraction_keeps_the_mean_and_splits_pixels():
  row = np.array([0.0, 0.3, 0.9]).reshape(1, 1, 3, 1)
  # Halves of 1.5 pixels: (0 + 0.5 * 0.3) / 1.5 and (0.5 * 0.3 + 0.9) / 1.5.
  resized = pictures.area_resize(row, 1, 2)
  np.testing.assert_allclose(resized.ravel(), [0.1, 0.7])
  images = random_pictures(1, 13)
  np.testing.assert_allclose(
    pictures.area_resize(images, 5, 7).mean(), images.mean(), atol=1e-6
  )


def test_area_resize_enlarges_by_repeating():
  images = random_pictures(1, 3)
  np.testing.assert_allclose(
    pictures.area_resize(images, 6, 9),
    images.repeat(2, axis=1).repeat(3, axis=2),
    atol=1e-7,
  )


def test_match_nearest_finds_shuffled_pictures_of_another_size():
  true = random_pictures(12, 32)
  order = np.random.default_rng(1).permutation(12)
  drawn = pictures.area_resize(true, 16, 16)
  drawn = drawn.repeat(4, axis=1).repeat(4, axis=2)  # 64 px
  right = pictures.match_nearest(drawn, true)
  np.testing.assert_array_equal(right.better, 0)
  assert retrieval.recall_at_k(right, 1) == 1.0
  wrong = pictures.match_nearest(drawn[order], true)
  hits = (order == np.arange(12)).mean()
  np.testing.assert_allclose(retrieval.recall_at_k(wrong, 1), hits)


def test_match_nearest_is_brute_force():
  drawn, true = random_pictures(9, 8, seed=1), random_pictures(9, 8, seed=2)
  ranks = pictures.match_nearest(drawn, true, size=4)
  small = [x.reshape(9, 4, 2, 4, 2, 3).mean(axis=(2, 4)) for x in (drawn, true)]
  for i in range(9):
    errors = ((small[0][i] - small[1]) ** 2).mean(axis=(1, 2, 3))
    assert ranks.better[i] == (errors < errors[i]).sum()


def test_equal_true_pictures_share_the_match():
  true = random_pictures(4, 16)
  true[1] = true[0]
  ranks = pictures.match_nearest(true, true)
  np.testing.assert_array_equal(ranks.tied, [1, 1, 0, 0])
  np.testing.assert_allclose(retrieval.recall_at_k(ranks, 1), 0.75)


def test_psnr():
  a = np.zeros((3, 4, 4, 3), np.float32)
  b = a.copy()
  b[0] += 0.2  # mean square 0.04, peak 2: 10 log10(4 / 0.04) = 20 dB
  b[1] += 2.0  # the whole range: 0 dB
  np.testing.assert_allclose(pictures.psnr(a, b), [20.0, 0.0, 100.0], atol=1e-5)
  with pytest.raises(ValueError, match="differ in shape"):
    pictures.psnr(a, b[:, :2])


def test_bilinear_resize_is_the_one_of_jax():
  images = random_pictures(2, 4)
  np.testing.assert_allclose(
    pictures.bilinear_resize(images, 8, 8),
    jax.image.resize(images, (2, 8, 8, 3), "bilinear"),
    atol=1e-6,
  )


def test_make_grid_places_every_picture():
  images = random_pictures(5, 4)
  grid = pictures.make_grid(images, 3, padding=1, padding_value=-0.5)
  assert grid.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
  assert grid.dtype == np.float32
  np.testing.assert_array_equal(grid[1:5, 1:5], images[0])
  np.testing.assert_array_equal(grid[1:5, 11:15], images[2])
  np.testing.assert_array_equal(grid[6:10, 6:10], images[4])
  np.testing.assert_array_equal(grid[6:10, 11:15], -0.5)
  np.testing.assert_array_equal(grid[0], -0.5)


def test_make_grid_is_square_by_default_and_always_a_picture():
  images = np.full((9, 2, 2, 3), 3.0)
  images[0] = np.nan
  grid = pictures.make_grid(images, padding=0)
  assert grid.shape == (6, 6, 3)
  np.testing.assert_array_equal(grid[:2, :2], 0.0)
  np.testing.assert_array_equal(grid[2:], 1.0)


def test_ssim_of_equal_inverted_and_constant_pictures():
  images = random_pictures(2, 16)
  np.testing.assert_allclose(pictures.ssim(images, images), 1.0)
  inverted = pictures.ssim(0.5 + 0.1 * images, 0.5 - 0.1 * images)
  assert np.all(inverted < -0.2) and np.all(inverted >= -1.0)
  # Without variance only the means count: (2 m n + c) / (m^2 + n^2 + c).
  grey, white = np.zeros((1, 12, 12, 3)), np.ones((1, 12, 12, 3))
  expected = 0.02**2 / (1 + 0.02**2)
  np.testing.assert_allclose(pictures.ssim(grey, white), expected, atol=1e-9)


def test_ssim_is_its_definition_at_every_window():
  a, b = random_pictures(2, 13)[..., :1]
  offsets = np.indices((11, 11)) - 5
  window = np.exp(-(offsets**2).sum(axis=0) / (2 * 1.5**2))
  window /= window.sum()
  values = []
  for i, j in np.ndindex(3, 3):
    x, y = (p[i : i + 11, j : j + 11, 0].astype(np.float64) for p in (a, b))
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cov = (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values.append(
      (2 * mx * my + c1)
      * (2 * cov + c2)
      / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    )
  found = pictures.ssim(a[None], b[None])
  np.testing.assert_allclose(found, [np.mean(values)], rtol=1e-6)


def test_ssim_needs_room_for_its_window():
  with pytest.raises(ValueError, match="11 pixels"):
    pictures.ssim(random_pictures(1, 10), random_pictures(1, 10))
