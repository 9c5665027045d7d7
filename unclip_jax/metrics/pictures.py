"""Numbers and arrangements of pictures: NHWC, float in [-1, 1].

`match_nearest` is the project's measure of whether a drawn picture is the right
one: both sides are averaged over areas down to a few pixels, where position
and colour survive and texture does not, and the nearest true picture in
squared error is looked up.
"""

from __future__ import annotations

import jax
import numpy as np
import scipy.ndimage

from unclip_jax.metrics import retrieval


def area_resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Averages over the area that each new pixel covers, float64.

  The ratio of the sizes may be any; a pixel that is covered in part counts in
  part. Enlarging by a whole factor repeats pixels.

  Args:
    images: [B, H, W, C].

  Returns:
    [B, height, width, C].
  """
  rows = _area_weights(images.shape[1], height)
  columns = _area_weights(images.shape[2], width)
  images = np.asarray(images, np.float64)
  images = np.einsum("hH,bHWc->bhWc", rows, images, optimize=True)
  return np.einsum("wW,bhWc->bhwc", columns, images, optimize=True)


def bilinear_resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Bilinear interpolation [B, H, W, C] -> [B, height, width, C], float32."""
  B, _, _, C = images.shape
  images = np.asarray(images, np.float32)
  return np.asarray(jax.image.resize(images, (B, height, width, C), "bilinear"))


def match_nearest(
  drawn: np.ndarray, true: np.ndarray, size: int = 16
) -> retrieval.Ranks:
  """Ranks true picture i among all by squared error to drawn picture i.

  Args:
    drawn: [B, H, W, C].
    true: [B, H', W', C]; the sizes may differ.
    size: both are area-averaged to size x size first.

  Returns:
    Ranks for `retrieval.recall_at_k`. True pictures that are equal tie.
  """
  drawn = area_resize(drawn, size, size).reshape(len(drawn), -1)
  true = area_resize(true, size, size).reshape(len(true), -1)
  squared_error = (
    (drawn**2).sum(axis=1)[:, None]
    + (true**2).sum(axis=1)[None, :]
    - 2.0 * drawn @ true.T
  ) / true.shape[1]
  # The tolerance is that of the expanded square in float64.
  return retrieval.rank_targets(
    -squared_error, np.arange(len(drawn)), tie_tolerance=1e-9
  )


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio [B] in decibels, peak to peak 2; at most 100.

  Args:
    a: [B, H, W, C] in [-1, 1].
    b: as `a`.

  Raises:
    ValueError: the shapes differ.
  """
  if a.shape != b.shape:
    raise ValueError(f"pictures {a.shape} and {b.shape} differ in shape")
  difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  mean_square = (difference**2).mean(axis=(1, 2, 3))
  # Equal pictures would be at infinity, which no mean survives.
  return 10.0 * np.log10(4.0 / np.maximum(mean_square, 4e-10))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Structural similarity [B], in [-1, 1]; 1 for equal pictures.

  Wang et al. 2004 ("Image quality assessment", IEEE TIP 13, section III.B): a
  Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, at
  every place where the window fits. Of each channel, then averaged, where the
  paper has grey pictures.

  Args:
    a: [B, H, W, C] in [-1, 1], of 11 pixels or more a side.
    b: as `a`.

  Raises:
    ValueError: the shapes differ, or a side is too short.
  """
  if a.shape != b.shape or min(a.shape[1:3]) < 11:
    raise ValueError(
      f"SSIM needs pictures of one shape and of 11 pixels or more a side, got"
      f" {a.shape} and {b.shape}"
    )
  window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  window /= window.sum()

  def local_mean(x: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
      x = scipy.ndimage.correlate1d(x, window, axis)
    return x[:, 5:-5, 5:-5]

  x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
  mean_x, mean_y = local_mean(x), local_mean(y)
  variances = local_mean(x**2 + y**2) - mean_x**2 - mean_y**2
  covariance = local_mean(x * y) - mean_x * mean_y
  c1, c2 = 0.02**2, 0.06**2  # (K L)^2, where the values' range L is 2
  similarity = (2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)
  similarity /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
  return similarity.mean(axis=(1, 2, 3))


def make_grid(
  images: np.ndarray,
  columns: int | None = None,
  *,
  padding: int = 2,
  padding_value: float = 0.5,
) -> np.ndarray:
  """Lays pictures out in rows, left to right and top to bottom.

  Args:
    images: [B, H, W, 3]; clipped to [-1, 1], NaN becomes 0 (grey).
    columns: pictures in a row; the default makes the grid about square.
    padding: pixels between pictures and around them.
    padding_value: their value, which also fills missing places.

  Returns:
    float32 [rows * (H + padding) + padding, columns * (W + padding) + padding,
    3] in [-1, 1].
  """
  B, H, W, C = images.shape
  columns = columns or int(np.ceil(np.sqrt(B)))
  rows = -(-B // columns)
  images = np.nan_to_num(np.asarray(images, np.float32), nan=0.0)
  grid = np.full(
    (rows * (H + padding) + padding, columns * (W + padding) + padding, C),
    padding_value,
    np.float32,
  )
  for i, image in enumerate(np.clip(images, -1.0, 1.0)):
    top = padding + (i // columns) * (H + padding)
    left = padding + (i % columns) * (W + padding)
    grid[top : top + H, left : left + W] = image
  return grid


def _area_weights(old: int, new: int) -> np.ndarray:
  """[new, old]: the share of each old pixel in the average of each new one."""
  edges = np.linspace(0.0, old, new + 1)
  pixels = np.arange(old)
  covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(
    edges[:-1, None], pixels
  )
  covered = np.clip(covered, 0.0, None)
  return covered / covered.sum(axis=1, keepdims=True)
