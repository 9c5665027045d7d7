"""Does a model put together what it was asked for, and what it never saw?

For every split and guidance scale the scores of metrics/scene.py, which reads
drawn scenes of shapes back, and the spread of the pictures of one caption. Run
it on unCLIP and on a decoder of captions alone, trained alike, to see what the
CLIP embedding gives and what it loses (Ramesh et al. 2022, sections 5.3 and 7:
guidance costs unCLIP less diversity; binding is its weakness).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from unclip_jax.evaluators import scenes
from unclip_jax.protocols import base, diversity
from unclip_jax.utils import errors

# What the decoder is given -> predict function, its options. The names are
# those of manipulations.three_decodings (section 5.1).
_DECODINGS: dict[str, tuple[str, dict[str, Any]]] = {
  "prior": ("text_to_image", {}),
  "text_embed": ("text_embed_to_image", {}),
  "caption": ("text_embed_to_image", {"use_image_embed": False}),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Fields:
  splits: of unclip_jax.data.shapes.
  guidance_scales: of the decoder.
  num_images: captions of a split, one picture each.
  num_prompts, num_repeats: captions of the first split of which more
    pictures are drawn, for the spread.
  num_grid: examples shown.
  decoding: what the decoder is given beside the caption: what the "prior"
    draws; the "text_embed" as if it were an image embedding; nothing
    ("caption"), as a decoder of captions alone must have it.

  Raises:
    UserError: there is no such decoding, or the model cannot do it.
  """

  splits: tuple[str, ...] = ("validation", "unseen_pairs", "unseen_bindings")
  guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0)
  num_images: int = 500
  num_prompts: int = 50
  num_repeats: int = 8
  num_grid: int = 16
  decoding: str = "prior"

  def __post_init__(self):
    if self.decoding not in _DECODINGS:
      raise errors.UserError(
        f"decoding '{self.decoding}' is none of {', '.join(_DECODINGS)}"
      )

  def run(self, subject: base.Subject) -> base.Result:
    """A row for every split and scale: all scores with their chance levels,
    `within` (protocols/diversity.py) in those of the first split."""
    rows = []
    grids = {}
    evaluator = scenes.Evaluator(self.num_images, num_grid=self.num_grid)
    name, fixed = _DECODINGS[self.decoding]
    for scale in self.guidance_scales:
      options = {**fixed, "guidance_scale": scale}
      for split in self.splits:
        found = dict(
          evaluator.run(
            subject.predict(name, decoder=options),
            subject.batches(self.num_images, split),
            subject.info(split),
          )
        )
        grids[f"{split}_guidance_{scale:g}"] = found.pop("grid")
        row = {"split": split, "guidance_scale": scale, **found}
        if split == self.splits[0]:
          again = subject.look_repeatedly(
            self.num_repeats,
            self.num_prompts,
            draw=name,
            split=split,
            decoder=options,
          )
          row["within"] = diversity.spread(again["features"])["within"]
        rows.append(row)
    plots = (
      base.Plot("guidance_scale", "object", "split"),
      base.Plot("guidance_scale", "binding", "split"),
      base.Plot("guidance_scale", "within"),
    )
    return base.Result(rows, {}, plots, grids)
