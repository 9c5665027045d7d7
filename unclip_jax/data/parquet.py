"""Source `parquet`: tables of pictures and captions.

Pictures are bytes in a column, or fields with "bytes" (as Hugging Face's);
captions are texts, lists of texts, or texts at "a/b" inside of the column a.
Which rows have neither shows when they are read.

Parquet keeps rows in compressed groups, and one row costs its whole group:
training in mixed order is slow where groups are large. `unclip prepare_data`
reads it once, in its order, and writes records that are read one by one.
Captions, order and splits are as data/captioned.py says; keys are "FILE/ROW".
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from unclip_jax.data import captioned
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source(captioned.Source):
  """The fields of `config.data.source`, beside those of all such sources.

  Fields:
    path: a file, a folder of them, or a pattern such as "data/*.parquet".
    image: column of the pictures.
    captions: columns of captions, or places in them ("sentences/raw"); those
      that there are count.
  """

  path: str
  image: str = "image"
  captions: tuple[str, ...] = ("caption", "text")

  def open(self) -> captioned.Rows:
    import pyarrow.parquet

    paths = captioned.find_files(self.path, ".parquet")
    tables = []
    for path in paths:
      try:
        tables.append(pyarrow.parquet.read_metadata(path))
      except (OSError, ValueError) as e:
        raise UserError(
          f"{path} is no parquet file, or is damaged ({e}): get it again, or"
          " take it away"
        ) from e
    columns = tables[0].schema.to_arrow_schema().names
    places = captioned.check_columns(
      self.path, columns, self.image, self.captions
    )
    names = captioned.short_names(self.path, paths)
    return _Rows(self.path, paths, names, tables, self.image, places)


class _Rows:
  """Rows of tables; see captioned.Rows."""

  def __init__(
    self,
    name: str,
    paths: Sequence[str],
    names: Sequence[str],
    tables: Sequence[Any],
    image: str,
    places: Sequence[str],
  ):
    self.name = name
    self.left_out: dict[str, int] = {}
    self._paths = paths
    self._names = names
    self._file_ends = list(itertools.accumulate(t.num_rows for t in tables))
    self.splits = {"train": range(self._file_ends[-1])}
    self._group_ends = [
      list(
        itertools.accumulate(
          table.row_group(i).num_rows for i in range(table.num_row_groups)
        )
      )
      for table in tables
    ]
    self._image = image
    self._places = places
    self._text_columns = sorted({p.partition("/")[0] for p in places})
    self._lock = threading.Lock()

  def key(self, row: int) -> str:
    file, row = _locate(self._file_ends, row)
    return f"{self._names[file]}/{row}"

  def texts(self, row: int) -> Sequence[str]:
    columns = tuple(self._text_columns)
    return captioned.texts_in(self._cells(row, columns), self._places)

  def image(self, row: int) -> bytes:
    cell = self._cells(row, (self._image,))[self._image]
    return captioned.image_of(cell, key=self.key(row))

  def _cells(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    file, place = _locate(self._file_ends, row)
    group, place = _locate(self._group_ends[file], place)
    try:
      with self._lock:  # threads that ask for the same group read it once
        table = _group(self._paths[file], group, columns)
      return {name: table[name][place].as_py() for name in columns}
    except (OSError, ValueError, KeyError) as e:
      raise BrokenRecord(
        captioned.UNREADABLE, f"{self.key(row)} cannot be read: {e}"
      ) from e


# Two groups of pictures and two of texts are kept at most.
@functools.lru_cache(4)
def _group(path: str, group: int, columns: tuple[str, ...]) -> Any:
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
    return file.read_row_group(group, columns=list(columns))


def _locate(ends: Sequence[int], place: int) -> tuple[int, int]:
  """In which part a place lies, and where in it."""
  part = bisect.bisect_right(ends, place)
  return part, place - (ends[part - 1] if part else 0)
