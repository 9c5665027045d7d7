"""TFDS builder `emoji_styles`: emoji in five styles with English captions.

As `emoji`, whose OpenMoji it holds too, with the styles of emoji_packages.py.
An object has one name in all of them, that of its code points.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from unclip_jax.data import (
  emoji_catalogue,
  emoji_dataset_builder,
  emoji_packages,
)

LICENSE = "several: LICENSES.md"
HOMEPAGE = "https://icon-sets.iconify.design"


@dataclasses.dataclass(frozen=True)
class Entry(emoji_catalogue.Entry):
  """One object in one style, of emoji_packages.STYLES."""

  style: str

  @property
  def captions(self) -> tuple[str, ...]:
    """Phrasings that name object and style, the canonical one first."""
    return emoji_catalogue.style_captions(self.name, self.style)


class Builder(emoji_dataset_builder.Builder):
  """The dataset; TFDS takes its name from the module's."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "OpenMoji 17 and four npm packages."}  # noqa: RUF012

  npm_dir: str | None = None  # as `emoji_packages.read` takes it

  @functools.cached_property
  def icon_sets(self) -> tuple[emoji_packages.IconSet, ...]:
    """The styles beside OpenMoji."""
    return emoji_packages.read(self.npm_dir)

  @functools.cached_property
  def entries(self) -> tuple[Entry, ...]:
    """All pictures with names, those of an object in the order of STYLES.

    With a limit, so many objects without skin tones and flags: those that most
    styles have, of these such as a hash picks.
    """
    spelling = emoji_catalogue.spelling
    openmoji = {spelling(e.code_point): e for e in emoji_catalogue.entries()}
    objects = collections.defaultdict(list)
    for key, entry in openmoji.items():
      objects[key].append(_styled(entry, "openmoji"))
    for icons in self.icon_sets:
      named = 0
      for key in icons.svgs:
        entry = openmoji.get(key) or emoji_catalogue.describe(key)
        if entry is not None:
          objects[key].append(_styled(entry, icons.style))
          named += 1
      without = len(icons.svgs) + len(icons.left_out) - named
      logging.info(
        "%s: %d pictures; left out %d without a name",
        *(icons.style, named, without),
      )
    keys = sorted(objects)
    limit = self.builder_config.limit
    if limit is not None:
      plain = [k for k in keys if _is_plain(objects[k][0])]
      keys = sorted(plain, key=lambda k: (-len(objects[k]), _digest(k)))[:limit]
    return tuple(entry for key in keys for entry in objects[key])

  @property
  def attributions(self) -> dict[str, str]:
    """Style -> artist and licence, one line each."""
    return {
      "openmoji": f"{emoji_dataset_builder.ATTRIBUTION}"
      f" ({emoji_dataset_builder.HOMEPAGE})",
      **{icons.style: icons.attribution for icons in self.icon_sets},
    }

  @property
  def attribution(self) -> str:
    """All of them in one line."""
    return "; ".join(self.attributions.values())

  def licenses(self) -> str:
    """What stands beside the data as LICENSES.md."""
    counts = collections.Counter(entry.style for entry in self.entries)
    lines = [
      f"- {style} ({counts[style]:,} pictures): {text}"
      for style, text in self.attributions.items()
    ]
    size = self.builder_config.image_size
    return (
      "# Licences of the pictures\n\nThey were rasterised on white at"
      f" {size} x {size} pixels and not changed otherwise. Whoever passes them"
      " on passes on this list and keeps to each licence.\n\n"
      + "\n".join(lines)
      + "\n"
    )

  def features(self) -> dict[str, Any]:
    """Those of `emoji`, and style and object."""
    text = tfds.features.Text
    return {**super().features(), "style": text(), "object": text()}

  def row(self, entry: Entry) -> dict[str, Any]:
    """An entry's row but for the picture; its key is "1F438/noto"."""
    return {
      **super().row(entry),
      "code_point": f"{entry.code_point}/{entry.style}",
      "name": entry.captions[0],
      "style": entry.style,
      "object": entry.name,
    }

  def svg(self, entry: Entry) -> str:
    """The picture of an entry."""
    if entry.style == "openmoji":
      return emoji_catalogue.svg(entry.code_point)
    key = emoji_catalogue.spelling(entry.code_point)
    return self._svgs[entry.style][key]

  @functools.cached_property
  def _svgs(self) -> dict[str, Any]:
    return {icons.style: icons.svgs for icons in self.icon_sets}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "Emoji in five styles on white, with English captions made from their"
        " CLDR names and the style's. LICENSES.md names artists and licences."
      ),
      features=tfds.features.FeaturesDict(self.features()),
      homepage=HOMEPAGE,
      license=LICENSE,
      metadata=tfds.core.MetadataDict(
        packages=[package.spec for package in emoji_packages.PACKAGES]
      ),
    )


def make(
  data_dir: str, image_size: int, limit: int | None, npm_dir: str | None
) -> tfds.core.DatasetBuilder:
  """The builder of one size; `limit` is part of the dataset's name."""
  builder = Builder(
    data_dir=data_dir,
    config=emoji_dataset_builder.config(image_size, limit),
    file_format="array_record",
  )
  builder.npm_dir = npm_dir
  return builder


def _styled(entry: emoji_catalogue.Entry, style: str) -> Entry:
  return Entry(**vars(entry), style=style)


def _is_plain(entry: Entry) -> bool:
  return not entry.skin_tone and entry.group != "flags"


def _digest(key: str) -> bytes:
  return hashlib.sha256(key.encode()).digest()
