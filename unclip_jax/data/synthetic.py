"""Source `synthetic`: coloured shapes with captions, drawn in numpy.

For trials and tests: every combination of shape, colour and size, 96 pictures
in all, in milliseconds and without a file except the tokenizer.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unclip_jax.data import source, tokenizers
from unclip_jax.data.source import Record
from unclip_jax.utils.errors import UserError

# Hues in turns.
_COLOURS = {
  "red": 0.0, "orange": 0.08, "yellow": 0.16, "green": 0.33,
  "cyan": 0.5, "blue": 0.62, "purple": 0.76, "pink": 0.9,
}  # fmt: skip
_SIZES = {"small": 0.4, "large": 0.8}  # diameter over the picture's side
_VOCAB_SIZE = 384


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Where a shape of diameter 2 around the origin is; y points down."""
  if shape == "circle":
    return y**2 + x**2 <= 1
  if shape == "square":
    return np.maximum(abs(y), abs(x)) <= 0.9
  if shape == "diamond":
    return abs(y) + abs(x) <= 1
  if shape == "triangle":
    return (abs(y) <= 0.9) & (abs(x) <= (y + 0.9) / 1.8)
  if shape == "ring":
    return (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.3)
  return (np.minimum(abs(y), abs(x)) <= 0.3) & (np.maximum(abs(y), abs(x)) <= 1)


_SHAPES = ("circle", "square", "diamond", "triangle", "ring", "cross")


@dataclasses.dataclass(frozen=True)
class Source:
  """The fields of `config.data.source`.

  Fields:
    data_dir: where the tokenizer is kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    image_size: side in pixels.
    num_examples: how many of the 96 combinations, evenly spread.
    holdout: percentage held out for validation; 0 trains on everything.
  """

  data_dir: str | None = None
  image_size: int = 32
  num_examples: int = 64
  holdout: float = 10.0

  def __post_init__(self):
    most = len(_SHAPES) * len(_COLOURS) * len(_SIZES)
    if not 2 <= self.num_examples <= most:
      raise UserError(f"config.data.source.num_examples must be in [2, {most}]")
    if not 0 <= self.holdout < 100:
      raise UserError("config.data.source.holdout is a percentage in [0, 100)")

  def records(self, split: str) -> Sequence[Record]:
    """The records of "train", "validation" or "all".

    Raises:
      UserError: no such split, or nothing in it.
    """
    if split not in source.SPLITS:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(source.SPLITS)}"
      )
    held_out = round(self.num_examples * self.holdout / 100)
    if split == "all":
      return self._records
    if split == "train":
      return self._shuffled[held_out:]
    if not held_out:
      raise UserError(
        "the split 'validation' of the synthetic dataset is empty: raise"
        " config.data.source.holdout"
      )
    return self._shuffled[:held_out]

  def tokenizer_path(self) -> str:
    """A tokenizer trained on all captions, made at need."""
    captions = [c for record in self._records for c in record.captions]
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12]
    path = os.path.join(
      self.data_dir or source.default_data_dir(),
      "synthetic",
      digest,
      tokenizers.SENTENCEPIECE_FILE,
    )
    if not os.path.isfile(path):
      tokenizers.train(captions, _VOCAB_SIZE, path)
    return path

  @functools.cached_property
  def _records(self) -> tuple[Record, ...]:
    kinds = list(itertools.product(_SHAPES, _COLOURS, _SIZES))
    chosen = np.linspace(0, len(kinds) - 1, self.num_examples).astype(int)
    return tuple(self._record(*kinds[i]) for i in chosen)

  @functools.cached_property
  def _shuffled(self) -> tuple[Record, ...]:
    # A fixed order that does not go by shape, so that both sides have all.
    return tuple(
      sorted(
        self._records,
        key=lambda r: hashlib.sha256(r.code_point.encode()).digest(),
      )
    )

  def _record(self, shape: str, colour: str, size: str) -> Record:
    name = f"{size} {colour} {shape}"
    return Record(
      image=self._draw(shape, colour, size),
      code_point=f"{shape}-{colour}-{size}",
      name=name,
      group=shape,
      captions=(name, f"a {name}", f"a drawing of a {name}"),
      flippable=True,
    )

  def _draw(self, shape: str, colour: str, size: str) -> bytes:
    # Three samples a pixel and axis, averaged.
    side = 3 * self.image_size
    axis = ((np.arange(side) + 0.5) / side * 2 - 1) / _SIZES[size]
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = _inside(shape, y, x)[..., None]
    rgb = np.array(colorsys.hsv_to_rgb(_COLOURS[colour], 0.9, 0.9))
    picture = np.where(inside, rgb, 1.0)
    picture = picture.reshape(self.image_size, 3, self.image_size, 3, 3)
    picture = np.round(picture.mean((1, 3)) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
