"""How different are the pictures of one caption?

Sixteen pictures for each of some captions with each guidance scale, as the 4x4
grids that Ramesh et al. 2022 (section 5.2) showed to people, who found unCLIP's
more diverse than GLIDE's in 70.5 % of 1,000. What people judged there is here
the mean distance of two pictures of one caption in the features of a network,
beside that of pictures of different captions.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unclip_jax.metrics import pictures, similarity
from unclip_jax.protocols import base


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  guidance_scales: of the decoder; each is a row.
  num_prompts: captions of the split.
  num_images: of each caption.
  num_grids: captions whose pictures are shown.
  """

  guidance_scales: tuple[float, ...] = (1.0, 2.0, 4.0)
  num_prompts: int = 50
  num_images: int = 16
  num_grids: int = 4

  def run(self, subject: base.Subject) -> base.Result:
    """Rows by guidance scale, each with a grid for every shown caption.

    `within` is the mean of 1 - cosine over the pairs of pictures of a caption,
    `between` that over pictures of different captions, `ratio` the one by the
    other; `clip_score` says what the pictures still have to do with it.
    """
    rows = []
    grids = {}
    for scale in self.guidance_scales:
      seen = subject.look_repeatedly(
        self.num_images,
        self.num_prompts,
        num_pictures=self.num_grids,
        decoder=dict(guidance_scale=scale),
      )
      fit = similarity.clip_score(seen["image_embed"], seen["text_embed"])
      found = {**spread(seen["features"]), "clip_score": float(fit.mean())}
      rows.append({"guidance_scale": scale, **found})
      for prompt, images in enumerate(seen["image"]):
        name = f"prompt_{prompt}_guidance_{scale:g}"
        grids[name] = pictures.make_grid(images)
    plots = (base.Plot("guidance_scale", "within"),)
    return base.Result(rows, subject.networks(), plots, grids)


def spread(features: np.ndarray) -> dict[str, float]:
  """Mean 1 - cosine of two pictures of a caption, and of two captions.

  Args:
    features: [P, N, D] of N pictures of each of P captions.
  """
  P, N, _ = features.shape
  unit = similarity.normalize(features)
  # The sum over all pairs is the squared length of the sum.
  own = (np.square(unit.sum(axis=1)).sum(axis=-1) - N) / (N * (N - 1))
  whole = np.square(unit.sum(axis=(0, 1))).sum()
  mixed = whole - np.square(unit.sum(axis=1)).sum()
  within = 1.0 - float(own.mean())
  between = 1.0 - float(mixed) / (P * (P - 1) * N * N)
  return {"within": within, "between": between, "ratio": within / between}
