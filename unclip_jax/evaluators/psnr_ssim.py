"""How near an upsampler's pictures are to the true ones, in decibels and SSIM.

Two questions: does the drawn picture, averaged over areas, give the picture it
was made from (Saharia et al. 2021, arXiv 2104.07636, call it consistency), and
is it nearer to the true one than plain bilinear enlargement is? The second
favours blur, so that a good upsampler may lose it: read it with the pictures,
and with the FID (evaluators/fid.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from unclip_jax.evaluators import base
from unclip_jax.metrics import pictures


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """PSNR, SSIM; `predict` gives `image`, the batches `image` and `low_res`.

  Attributes:
    max_examples: stop after that many; None = the whole split.
  """

  max_examples: int | None = None

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields means over the examples.

    In decibels (peak to peak 2, at most 100 each): `consistency_psnr` (drawn
    averaged to low_res's size, low_res) with `consistency_psnr_true` (the same
    of the true picture, which is what a perfect upsampler gets), `psnr` (drawn,
    true) with `psnr_bilinear` (enlarged low_res, true). In [-1, 1]: `ssim` with
    `ssim_bilinear`. And `count`.
    """
    del info
    predicted, given = base.collect(
      predict,
      batches,
      outputs=("image",),
      inputs=("image", "low_res"),
      max_examples=self.max_examples,
    )
    drawn, true, low_res = predicted["image"], given["image"], given["low_res"]
    small, large = low_res.shape[1:3], true.shape[1:3]
    enlarged = pictures.bilinear_resize(low_res, *large)
    pairs = {
      "consistency_psnr": (pictures.area_resize(drawn, *small), low_res),
      "consistency_psnr_true": (pictures.area_resize(true, *small), low_res),
      "psnr": (drawn, true),
      "psnr_bilinear": (enlarged, true),
    }
    for name, (a, b) in pairs.items():
      yield name, float(pictures.psnr(a, b).mean())
    yield "ssim", float(pictures.ssim(drawn, true).mean())
    yield "ssim_bilinear", float(pictures.ssim(enlarged, true).mean())
    yield "count", float(len(true))
