"""Do drawn pictures show what their captions say, by the eyes of a CLIP?

The CLIP score of each (metrics/similarity.py), and the CMMD of all of them to
the true pictures (metrics/kernel.py). The CLIP is a network beside the model
(`config.evals.NAME.features`): a decoder that is conditioned on one CLIP
pleases that one by construction, so take another, ViT-L/14 at 336 pixels for
figures to be compared with the CMMD paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from unclip_jax.evaluators import base
from unclip_jax.metrics import kernel, similarity
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`predict` gives `image_embed`, `true_image_embed`, `text_embed` [B, D].

  Attributes:
    max_examples: stop after that many; None = the whole split.
    seed: of the wrong pairing, which is the same at every call.
  """

  max_examples: int | None = None
  seed: int = 0

  def run(
    self,
    predict: base.Predict,
    batches: Iterable[base.Arrays],
    info: base.Info | None,
  ) -> Iterator[tuple[str, base.Value]]:
    """Yields `clip_score` (in [0, 100], mean), `cmmd`, `count`.

    Beside them `clip_score_true`, that of the true pictures, and
    `clip_score_shuffled`, that of drawn pictures with other captions.

    Raises:
      UserError: fewer than two examples.
    """
    del info
    embeds, _ = base.collect(
      predict,
      batches,
      outputs=("image_embed", "true_image_embed", "text_embed"),
      max_examples=self.max_examples,
    )
    drawn, true = embeds["image_embed"], embeds["true_image_embed"]
    text = embeds["text_embed"]
    if len(drawn) < 2:
      raise errors.UserError(
        "clip_score compares with a shuffled pairing and got one example: "
        "evaluate two or more"
      )
    others = text[similarity.derangement(len(text), self.seed)]
    pairs = {
      "clip_score": (drawn, text),
      "clip_score_true": (true, text),
      "clip_score_shuffled": (drawn, others),
    }
    for name, (image, caption) in pairs.items():
      yield name, float(similarity.clip_score(image, caption).mean())
    yield "cmmd", kernel.cmmd(true, drawn)
    yield "count", float(len(drawn))
