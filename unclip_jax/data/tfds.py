"""Source `tfds`: a dataset that TensorFlow Datasets wrote, without TensorFlow.

Any with pictures and captions whose files are ArrayRecord
(`tfds build NAME --file_format=array_record`), such as coco_captions with
`captions = ("captions/text",)`. Splits are its own, "val" under the name of
validation. Files that are cut off are noticed before any work starts.

Its features.json may name a module of Python, which is then imported: open
only folders that you trust. Captions, order and splits are as
data/captioned.py says; keys are "SPLIT/POSITION".
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.data import captioned, prepared
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError

_VALIDATION = ("val", "valid", "dev")


@dataclasses.dataclass(frozen=True)
class Source(captioned.Source):
  """The fields of `config.data.source`, beside those of all such sources.

  Fields:
    folder: that of a version, ".../coco_captions/2014/1.1.0".
    image: feature of the pictures.
    captions: features of captions, or places in them; those that there are
      count.
  """

  folder: str
  image: str = "image"
  captions: tuple[str, ...] = ("caption", "captions/text", "text")

  def open(self) -> captioned.Rows:
    import tensorflow_datasets as tfds

    if not os.path.isfile(os.path.join(self.folder, "dataset_info.json")):
      raise UserError(
        f"{self.folder!r} holds no dataset of TFDS: give the folder of a"
        " version, which has a dataset_info.json"
      )
    try:
      builder = tfds.builder_from_directory(self.folder)
      splits = dict(builder.info.splits)
      is_array_record = builder.info.file_format.value == "array_record"
    except Exception as e:  # whatever the reader raises on damaged files
      raise UserError(f"the dataset in {self.folder} is damaged: {e}") from e
    if not is_array_record:
      raise UserError(
        f"the dataset in {self.folder} is not in ArrayRecord: build it again"
        " with --file_format=array_record"
      )
    places = captioned.check_columns(
      self.folder, list(builder.info.features), self.image, self.captions
    )
    for split in splits.values():
      _check(split.filepaths, split.shard_lengths)
    decoders = {self.image: tfds.decode.SkipDecoding()}
    sources = {
      name: builder.as_data_source(name, decoders=decoders)
      for name, split in splits.items()
      if split.num_examples
    }
    for name in _VALIDATION:
      if name in sources and "validation" not in sources:
        sources["validation"] = sources.pop(name)
    return _Rows(self.folder, sources, self.image, places)


class _Rows:
  """Examples of splits; see captioned.Rows."""

  def __init__(
    self,
    name: str,
    sources: Mapping[str, Sequence[Mapping[str, Any]]],
    image: str,
    places: Sequence[str],
  ):
    self.name = name
    self.left_out: dict[str, int] = {}
    self.splits = {}
    stop = 0
    for split, examples in sources.items():
      start, stop = stop, stop + len(examples)
      self.splits[split] = range(start, stop)
    self._sources = sources
    self._image = image
    self._places = places
    # Captions and picture are asked for one after the other.
    self._example = functools.lru_cache(8)(self._read)

  def key(self, row: int) -> str:
    return "/".join(map(str, self._locate(row)))

  def texts(self, row: int) -> Sequence[str]:
    return captioned.texts_in(self._example(row), self._places)

  def image(self, row: int) -> bytes:
    cell = self._example(row)[self._image]
    return captioned.image_of(cell, key=self.key(row))

  def _read(self, row: int) -> Mapping[str, Any]:
    split, position = self._locate(row)
    try:
      return self._sources[split][position]
    except Exception as e:  # whatever the readers raise on damaged files
      reason = " ".join(str(e).split())[:200]
      raise BrokenRecord(
        captioned.UNREADABLE, f"{self.key(row)} cannot be read: {reason}"
      ) from e

  def _locate(self, row: int) -> tuple[str, int]:
    for split, rows in self.splits.items():
      if row in rows:
        return split, row - rows.start
    raise IndexError(row)


def _check(paths: Sequence[os.PathLike], counts: Sequence[int]) -> None:
  """Raises UserError for a file that is cut off, which opens as empty."""
  for path, count in zip(map(os.fspath, paths), counts):
    found = prepared.num_records(path)
    if found != count:
      raise UserError(
        f"{path} is damaged or missing ({found} of {count} records): build the"
        " dataset again"
      )
