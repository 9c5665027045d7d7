"""What does guidance buy, and what does it cost?

Pictures for the same captions with each guidance scale of the decoder: how like
the true ones they are as a set (FID and its like), and how well each fits its
caption (CLIP score), as the curves of GLIDE (Nichol et al. 2021, Fig. 6) and of
Ramesh et al. 2022 (section 5.3, where the prior's guidance is fixed and
only the decoder's swept). Without an Inception the sets are compared in the
features of the CLIP; those figures are no FID that others publish.
"""

from __future__ import annotations

import dataclasses

from unclip_jax.evaluators import clip_score, fid
from unclip_jax.protocols import base


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  guidance_scales: of the decoder; each is a row.
  prior_guidance_scale: the same for all; None: the prior's own.
  num_images: captions of the split, one picture each.
  """

  guidance_scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
  prior_guidance_scale: float | None = None
  num_images: int = 1000

  def run(self, subject: base.Subject) -> base.Result:
    """Rows by guidance scale; a plot of the FID by the CLIP score."""
    rows = []
    for scale in self.guidance_scales:
      draw = subject.predict(
        "text_to_image",
        decoder=dict(guidance_scale=scale),
        prior=dict(guidance_scale=self.prior_guidance_scale),
      )
      seen = subject.look(draw, self.num_images)
      rows.append(
        {
          "guidance_scale": scale,
          **base.measure(fid.Evaluator(), seen),
          **base.measure(clip_score.Evaluator(), seen),
        }
      )
    plots = (
      base.Plot("clip_score", "fid"),
      base.Plot("guidance_scale", "recall"),
    )
    return base.Result(rows, subject.networks(), plots)
