"""ImageToTextPipeline: captions of pictures, by any model that writes them.

How parts are loaded and run: stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_jax import inference, stages
from unclip_jax.data import tokenizers
from unclip_jax.utils import errors

Picture = Image.Image | np.ndarray


class Captions(NamedTuple):
  """What a call of the pipeline gives."""

  captions: list[str]
  log_probs: list[float] | None  # in nats; None: the model does not say
  options: dict[str, Any]


class ImageToTextPipeline(stages.Stages):
  """Picture to text.

  Attributes:
    parts: the captioner's upstream models by their names; `captioner`, whose
      task gives `text_tokens` for `image`.
  """

  first = "captioner"

  def __init__(self, parts: Mapping[str, inference.Loaded]):
    """Args:
      parts: as the attribute.

    Raises:
      UserError: there is no captioner.
    """
    super().__init__(parts)
    if "captioner" not in self.parts:
      raise errors.UserError(
        "the pipeline lacks its part 'captioner': give its run folder"
      )
    self.tokenizer = tokenizers.load(self.parts["captioner"].assets_dir or "")

  @property
  def stages(self) -> list[str]:
    """The captioner."""
    return ["captioner"]

  def reads(self, name: str) -> tuple[str, ...]:
    """What of the batch it is given."""
    return ("image",)

  @property
  def image_size(self) -> int:
    """Pixels of a side of the pictures that are captioned."""
    task = self.parts["captioner"].task
    return getattr(task, "image_size", None) or task.model.image_size

  def __call__(
    self,
    images: Sequence[Picture],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
  ) -> Captions:
    """Writes a caption for each picture.

    Args:
      images: PIL pictures or arrays [H, W, 3] in [0, 1], of any size: the
        square around the middle is taken.
      seed: caption i is a function of (seed, i).
      options: of the `sample` of the captioner, in place of those that it was
        saved with.
      batch_size: pictures at once.

    Raises:
      UserError: no picture, or an unknown option.
    """
    if not len(images):
      raise errors.UserError("there is no picture: give at least one")
    for option in options or {}:
      self.check_option("captioner", option)
    output = self.run(
      {"image": stages.square_arrays(images, self.image_size)},
      {"captioner": options or {}},
      seed=seed,
      batch_size=batch_size,
    )
    log_probs = output.arrays.get("log_prob")
    return Captions(
      self.tokenizer.decode(output.arrays["text_tokens"]),
      None if log_probs is None else log_probs.tolist(),
      output.options["captioner"],
    )
