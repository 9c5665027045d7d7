"""Source `emoji_styles`: the objects of `emoji` in up to five styles each.

  styles      openmoji, noto, twemoji, fluent, fxemoji: 15,827 pictures; 7,611
              of them plain, of 1,831 objects, 1,593 in four styles or five
  names       one for an object in all styles, as in `emoji`
  captions    six phrasings that name object and style: "a noto style frog",
              "a frog in noto style"; emoji_catalogue.style_captions

  train, validation   objects are held out as in `emoji`, in all styles: 6,520
                      and 750 plain pictures
  unseen_styles       341 pairs of an object and a style that training has
                      apart: the object in exactly two other styles, the style
                      with other objects. Most of the 138 objects are there in
                      several styles, which only the style tells apart

The pictures keep the margins of their artists: OpenMoji's are wide, Twemoji has
none.

`Record.info` holds `style` and `object`; `code_point` is "1F438/noto".

OpenMoji comes from its PyPI package, the others from npm packages, which npm
fetches on first use or `npm_dir` holds. Artists and licences are in LICENSES.md
beside the data: data_dir/emoji_styles.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from typing import Any, ClassVar

from unclip_jax.data import (
  emoji,
  emoji_catalogue,
  emoji_packages,
  source,
  tfds_folder,
)
from unclip_jax.data.source import Record
from unclip_jax.utils import files
from unclip_jax.utils.errors import UserError

LICENSES_FILE = "LICENSES.md"
_SEEN_STYLES = 2  # that training has of an object with unseen ones


@dataclasses.dataclass(frozen=True)
class Source(emoji.Source):
  """Which pictures; the fields of `config.data.source`.

  Fields, beside those of `emoji`, whose `limit` counts objects here:
    styles: only these of emoji_packages.STYLES; None: all of them.
    holdout_styles: percentage of training's objects with three styles or more
      that are trained in two of them; 0 leaves "unseen_styles" empty.
    npm_dir: a folder with the npm packages' archives; None: npm fetches them.
  """

  styles: tuple[str, ...] | None = None
  holdout_styles: float = 10.0
  npm_dir: str | None = None

  splits: ClassVar[tuple[str, ...]] = (*source.SPLITS, "unseen_styles")

  def __post_init__(self):
    super().__post_init__()
    where = "config.data.source"
    unknown = set(self.styles or ()) - set(emoji_packages.STYLES)
    if unknown:
      raise UserError(
        f"{where}.styles has no {', '.join(map(repr, sorted(unknown)))}; there"
        f" are {', '.join(emoji_packages.STYLES)}"
      )
    if not 0 <= self.holdout_styles <= 100:
      raise UserError(f"{where}.holdout_styles is a percentage in [0, 100]")

  def _builder(self, data_dir: str) -> Any:
    from unclip_jax.data import emoji_styles_dataset_builder as builder_lib

    with tfds_folder.quiet():
      return builder_lib.make(
        data_dir, self.image_size, self.limit, self.npm_dir
      )

  def _build(self, builder: Any) -> None:
    super()._build(builder)
    path = os.path.join(builder.data_path, LICENSES_FILE)
    files.write_atomically(path, builder.licenses())

  def _keeps(self, row: dict[str, Any]) -> bool:
    if self.styles is not None and row["style"].decode() not in self.styles:
      return False
    return super()._keeps(row)

  def _record(self, row: dict[str, Any]) -> Record:
    info = {"style": row["style"].decode(), "object": row["object"].decode()}
    return dataclasses.replace(super()._record(row), info=info)

  def _order(self, record: Record) -> tuple[bytes, str]:
    # An object's styles together: the first few examples of a split are then
    # told apart by style too.
    return emoji.digest(_object(record)), record.code_point

  def _split_of(self, record: Record) -> str:
    thing = _object(record)
    if emoji_catalogue.holdout_fraction(thing) < self.holdout / 100:
      return "validation"
    pair = thing, record.info["style"]
    return "unseen_styles" if pair in self._unseen else "train"

  @functools.cached_property
  def _unseen(self) -> frozenset[tuple[str, str]]:
    """Pairs of an object and a style that training does not have."""
    styles = collections.defaultdict(set)
    for record in self._selected:
      styles[_object(record)].add(record.info["style"])
    fraction = emoji_catalogue.fraction
    return frozenset(
      (thing, style)
      for thing, drawn in styles.items()
      # Not the hash that holds out objects.
      if fraction(f"styles {thing}") < self.holdout_styles / 100
      for style in sorted(
        drawn, key=lambda style: fraction(f"{thing} {style}")
      )[_SEEN_STYLES:]
    )


def _object(record: Record) -> str:
  """What is drawn, whatever its style and skin tone."""
  return emoji_catalogue.base(record.code_point.partition("/")[0])
