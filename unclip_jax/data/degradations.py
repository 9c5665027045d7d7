"""Corruption of an upsampler's conditioning.

Training an upsampler on clean low-resolution pictures makes it trust every
pixel of them, which a generated picture does not deserve. The first upsampler
of unCLIP sees its conditioning blurred by a Gaussian (Ramesh et al. 2022,
section 2.3, after SR3, arXiv 2104.07636), the second one the "more diverse BSR
degradation" of Zhang et al. 2021 (arXiv 2103.14006) in the form that latent
diffusion uses (Rombach et al. 2022, arXiv 2112.10752).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_FILTERS = (
  Image.Resampling.BILINEAR,
  Image.Resampling.BICUBIC,
  Image.Resampling.BOX,
)


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


def bsr(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
  """Shrinks a picture as bad cameras and the web do (Zhang et al., section 3).

  In random order: two blurs by random Gaussian kernels, isotropic or not; a
  resize to a random size (in a quarter of the cases a third blur) and, after
  it, the one to the final size; Gaussian noise; JPEG compression nine times in
  ten. At the end JPEG once more.
  Ranges are those of latent diffusion's released pipeline; its camera pipeline
  (ISP) is left out, which needs raw pictures.

  Args:
    image: [H, W, 3] float32 in [-1, 1], H and W multiples of `factor`.
    factor: how many times smaller the result is; 4 for unCLIP's upsamplers.
    rng: the result is a function of it and of the picture.

  Returns:
    [H / factor, W / factor, 3] float32 in [-1, 1].

  Raises:
    ValueError: the picture's size is no multiple of the factor.
  """
  H, W, _ = image.shape
  if H % factor or W % factor:
    raise ValueError(f"{H} x {W} pixels are no multiple of {factor}")
  size = (H // factor, W // factor)
  x = (image.astype(np.float32) + 1) / 2
  steps = ["blur", "blur", "resize", "shrink", "noise", "jpeg"]
  order = [steps[i] for i in rng.permutation(len(steps))]
  first, last = sorted((order.index("resize"), order.index("shrink")))
  order[first], order[last] = "resize", "shrink"
  for step in order:
    if step == "blur":
      x = _convolve(x, random_kernel(factor, rng))
    elif step == "resize" and rng.random() < 0.75:
      scale = 1 / rng.uniform(1, 2 * factor)
      x = _resize(x, [max(1, round(scale * side)) for side in x.shape[:2]], rng)
    elif step == "resize":
      sigma = rng.uniform(0.1, 0.6 * factor)
      x = _convolve(x, np.outer(*[gaussian_kernel(25, sigma)] * 2))
    elif step == "shrink":
      x = _resize(x, size, rng)
    elif step == "noise":
      x = _add_noise(x, rng)
    elif rng.random() < 0.9:
      x = _jpeg(x, rng)
  return _jpeg(x, rng) * 2 - 1


def random_kernel(factor: int, rng: np.random.Generator) -> np.ndarray:
  """A Gaussian [k, k] that sums to 1, k odd from 7 to 25; half isotropic."""
  size = 2 * int(rng.integers(2, 12)) + 3
  if rng.random() < 0.5:
    sigma = max((2.0 + 0.2 * factor) * rng.random(), 0.1)
    return np.outer(*[gaussian_kernel(size, sigma)] * 2)
  angle = rng.random() * np.pi
  variances = np.maximum((4.0 + factor) * rng.random(2), 0.01)
  axes = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  precision = axes @ np.diag(1 / variances) @ axes.T
  offsets = np.arange(size) - size // 2
  points = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1)
  exponent = np.einsum("yxi,ij,yxj->yx", points, precision, points)
  weights = np.exp(-0.5 * exponent)
  return (weights / weights.sum()).astype(np.float32)


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
  """Each channel with a symmetric kernel [k, k]; the border is mirrored."""
  radius = min(len(kernel) // 2, *(side - 1 for side in x.shape[:2]))
  middle = len(kernel) // 2
  cut = slice(middle - radius, middle + radius + 1)
  kernel = kernel[cut, cut] / kernel[cut, cut].sum()
  padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), "reflect")
  shape = [padded.shape[i] + len(kernel) - 1 for i in (0, 1)]
  spectrum = np.fft.rfft2(padded, shape, axes=(0, 1))
  spectrum *= np.fft.rfft2(kernel, shape)[..., None]
  full = np.fft.irfft2(spectrum, shape, axes=(0, 1))
  start = 2 * radius
  rows = full[start : start + x.shape[0], start : start + x.shape[1]]
  return rows.astype(np.float32)


def _resize(
  x: np.ndarray, size: tuple[int, int] | list[int], rng: np.random.Generator
) -> np.ndarray:
  """To `size` (height, width) by a random filter of Pillow's."""
  resample = _FILTERS[rng.integers(len(_FILTERS))]
  channels = [
    np.asarray(
      Image.fromarray(np.ascontiguousarray(x[..., c])).resize(
        (size[1], size[0]), resample
      )
    )
    for c in range(x.shape[-1])
  ]
  return np.clip(np.stack(channels, axis=-1), 0, 1)


def _add_noise(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Gaussian noise of 2 to 25 levels: coloured, grey, or correlated."""
  level = rng.integers(2, 26) / 255
  kind = rng.random()
  if kind < 0.4:
    noise = rng.normal(size=x.shape)
  elif kind < 0.8:
    noise = rng.normal(size=(*x.shape[:2], 1))
  else:
    mixing = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.random(3)
    noise = rng.normal(size=x.shape) @ mixing.T
  return np.clip(x + level * noise, 0, 1).astype(np.float32)


def _jpeg(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Compressed and read again, at a quality of 30 to 95."""
  buffer = io.BytesIO()
  picture = Image.fromarray(np.uint8(np.clip(x, 0, 1) * 255 + 0.5))
  picture.save(buffer, "JPEG", quality=int(rng.integers(30, 96)))
  return np.asarray(Image.open(buffer), np.float32) / 255
