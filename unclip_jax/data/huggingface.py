"""Source `huggingface`: what the library `datasets` saved to a folder.

`dataset.save_to_disk(folder)` writes Arrow files, which are mapped into memory:
any row is read in one step, and the library itself is not needed. A folder of
several splits (a DatasetDict) has them here too. Columns are as in
data/parquet.py; captions, order and splits as data/captioned.py says; keys are
"SPLIT/ROW". A picture that is kept outside of the table, by a path alone,
counts as unreadable.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.data import captioned
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source(captioned.Source):
  """The fields of `config.data.source`, beside those of all such sources.

  Fields:
    folder: what `save_to_disk` was told.
    image: column of the pictures.
    captions: columns of captions, or places in them ("sentences/raw"); those
      that there are count.
  """

  folder: str
  image: str = "image"
  captions: tuple[str, ...] = ("caption", "text")

  def open(self) -> captioned.Rows:
    names = {"train": self.folder}
    path = os.path.join(self.folder, "dataset_dict.json")
    if os.path.isfile(path):
      splits = _read_json(path)["splits"]
      names = {split: os.path.join(self.folder, split) for split in splits}
    batches = {split: _read(folder) for split, folder in names.items()}
    first = next(iter(batches.values()))
    places = captioned.check_columns(
      self.folder, first[0].schema.names, self.image, self.captions
    )
    return _Rows(self.folder, batches, self.image, places)


class _Rows:
  """Rows of record batches; see captioned.Rows."""

  def __init__(
    self,
    name: str,
    batches: Mapping[str, Sequence[Any]],
    image: str,
    places: Sequence[str],
  ):
    self.name = name
    self.left_out: dict[str, int] = {}
    self.splits = {}
    stop = 0
    for split, parts in batches.items():
      start, stop = stop, stop + sum(part.num_rows for part in parts)
      self.splits[split] = range(start, stop)
    self._batches = [part for parts in batches.values() for part in parts]
    self._ends = list(itertools.accumulate(b.num_rows for b in self._batches))
    self._image = image
    self._places = places
    self._text_columns = sorted({p.partition("/")[0] for p in places})

  def key(self, row: int) -> str:
    for split, rows in self.splits.items():
      if row in rows:
        return f"{split}/{row - rows.start}"
    raise IndexError(row)

  def texts(self, row: int) -> Sequence[str]:
    cells = {name: self._cell(row, name) for name in self._text_columns}
    return captioned.texts_in(cells, self._places)

  def image(self, row: int) -> bytes:
    return captioned.image_of(self._cell(row, self._image), key=self.key(row))

  def _cell(self, row: int, column: str) -> Any:
    part = bisect.bisect_right(self._ends, row)
    batch = self._batches[part]
    place = row - (self._ends[part] - batch.num_rows)
    try:
      return batch.column(column)[place].as_py()
    except (ValueError, KeyError) as e:
      raise BrokenRecord(
        captioned.UNREADABLE, f"{self.key(row)} cannot be read: {e}"
      ) from e


def _read(folder: str) -> list[Any]:
  """The record batches of a saved dataset, which are not in memory."""
  import pyarrow

  path = os.path.join(folder, "state.json")
  if not os.path.isfile(path):
    raise UserError(
      f"{folder!r} holds no saved dataset, it has no state.json: make one with"
      " the library datasets and its save_to_disk"
    )
  batches = []
  for entry in _read_json(path)["_data_files"]:
    path = os.path.join(folder, entry["filename"])
    try:
      file = pyarrow.memory_map(path)
      batches += pyarrow.ipc.open_stream(file).read_all().to_batches()
    except (OSError, ValueError) as e:
      raise UserError(
        f"{path} is damaged or missing ({e}): save the dataset again"
      ) from e
  if not batches:
    raise UserError(f"the dataset in {folder!r} is empty")
  return batches


def _read_json(path: str) -> Mapping[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except (OSError, ValueError) as e:
    raise UserError(f"{path} is damaged ({e}): save the dataset again") from e
