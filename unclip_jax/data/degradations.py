"""Corruption of an upsampler's conditioning.

Training an upsampler on clean low-resolution pictures makes it trust every
pixel of them, which a generated picture does not deserve. The first upsampler
of unCLIP sees its conditioning blurred by a Gaussian (Ramesh et al. 2022,
section 2.3, after SR3, arXiv 2104.07636).
"""

from __future__ import annotations

import numpy as np


def gaussian_blur(
  image: np.ndarray, *, kernel: int = 3, sigma: float = 0.6
) -> np.ndarray:
  """Blurs a picture; unCLIP's first upsampler: kernel 3, sigma 0.6.

  The border is mirrored without repeating the edge pixel.

  Args:
    image: [H, W, C] float32 of any range, H and W more than `kernel` // 2.
    kernel: width of the sampled Gaussian in pixels, odd.
    sigma: its standard deviation in pixels.

  Returns:
    [H, W, C] float32.
  """
  weights = gaussian_kernel(kernel, sigma)
  radius = kernel // 2
  for axis in (0, 1):
    pad = [(0, 0)] * image.ndim
    pad[axis] = (radius, radius)
    padded = np.pad(image, pad, mode="reflect")
    size = image.shape[axis]
    image = sum(
      weight * np.take(padded, range(i, i + size), axis)
      for i, weight in enumerate(weights)
    )
  return image


def gaussian_kernel(kernel: int, sigma: float) -> np.ndarray:
  """A sampled Gaussian [kernel] float32 that sums to 1.

  Raises:
    ValueError: the width is even, or sigma is not positive.
  """
  if kernel < 1 or kernel % 2 == 0 or sigma <= 0:
    raise ValueError(
      f"a blur needs an odd kernel and a positive sigma, not {kernel}, {sigma}"
    )
  offsets = np.arange(kernel) - kernel // 2
  weights = np.exp(-0.5 * (offsets / sigma) ** 2)
  return (weights / weights.sum()).astype(np.float32)
