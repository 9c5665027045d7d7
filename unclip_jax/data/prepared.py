"""Source `prepared`: what `unclip prepare_data` made of any other source.

A folder with

  train-00000-of-00016.array_record   and so on, also of the other splits: the
                    records in msgpack, one ArrayRecord chunk each, pictures as
                    they were encoded
  index.json        of each shard its number of records, bytes and SHA-256; what
                    the records were made from, what was left out and why, and
                    the shapes of their arrays
  tokenizer.model   that of the source, or vocab.json and merges.txt

ArrayRecord itself says nothing of a file that is cut off, so sizes and numbers
are compared with the index before any work starts. Any record is read in one
step: the order, a fixed mix of the positions, costs nothing. Splits are those
of the preparation; "all" is train and validation.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from absl import logging

from unclip_jax.data.source import ArrayShape, BrokenRecord, Record
from unclip_jax.utils.errors import UserError

INDEX_FILE = "index.json"
# In Index.left_out, what the source leaves out before there are splits.
BEFORE = "before"
FORMAT = 1
_DAMAGED = "damaged record"  # a reason of BrokenRecord
_ARRAY = 1  # msgpack's number for our extension
# A chunk a record, for random access; pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_MAX_OPEN_FILES = 256


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of a split, as the index tells of it."""

  file: str
  num_records: int
  num_bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Index:
  """What index.json holds.

  Fields:
    made_from: whatever says how to make it again.
    splits: name -> its shards.
    left_out: split, or BEFORE -> reason -> how many.
    arrays: name -> shape and dtype of the records' arrays.
    made_by: name of an upstream model -> fingerprint of the one that the arrays
      come from.
  """

  made_from: Mapping[str, Any]
  splits: Mapping[str, Sequence[Shard]]
  left_out: Mapping[str, Mapping[str, int]]
  arrays: Mapping[str, ArrayShape]
  made_by: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def to_json(self) -> str:
    """The text of index.json."""
    fields = {
      "format": FORMAT,
      "made_from": self.made_from,
      "num_records": {k: count(v) for k, v in self.splits.items()},
      "left_out": self.left_out,
      "arrays": {
        name: {"shape": x.shape, "dtype": np.dtype(x.dtype).str}
        for name, x in self.arrays.items()
      },
      "made_by": self.made_by,
      "splits": {
        name: [dataclasses.asdict(shard) for shard in shards]
        for name, shards in self.splits.items()
      },
    }
    return json.dumps(fields, indent=1) + "\n"


def read_index(folder: str) -> Index:
  """The index of a prepared folder.

  Raises:
    UserError: there is none, or it is damaged or of a later version.
  """
  path = os.path.join(folder, INDEX_FILE)
  if not os.path.isfile(path):
    raise UserError(
      f"{folder!r} is no prepared dataset, it has no {INDEX_FILE}: make one"
      " with unclip prepare_data --out"
    )
  try:
    with open(path, encoding="utf-8") as file:
      fields = json.load(file)
    if fields["format"] != FORMAT:
      raise UserError(
        f"{folder} has the format {fields['format']}, but this version reads"
        f" {FORMAT}: prepare it anew"
      )
    return Index(
      made_from=fields["made_from"],
      splits={
        name: tuple(Shard(**shard) for shard in shards)
        for name, shards in fields["splits"].items()
      },
      left_out=fields["left_out"],
      arrays={
        name: ArrayShape(tuple(x["shape"]), np.dtype(x["dtype"]))
        for name, x in fields["arrays"].items()
      },
      made_by=fields["made_by"],
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{path} is damaged ({e}): prepare the folder anew") from e


@dataclasses.dataclass(frozen=True)
class Source:
  """The fields of `config.data.source`.

  Fields:
    folder: what `unclip prepare_data --out` was told.
  """

  folder: str

  def records(self, split: str) -> Sequence[Record]:
    """The records of a split, which are read when they are asked for.

    Raises:
      UserError: no such split, nothing in it, or shards that are missing or cut
        off.
    """
    splits = self.index.splits
    names = [split]
    if split == "all":
      names = [k for k in ("train", "validation") if k in splits] or [*splits]
    elif split not in splits:
      raise UserError(
        f"there is no split {split!r} in {self.folder}; there are"
        f" {', '.join([*splits, 'all'])}"
      )
    records = _Records(self.folder, [s for name in names for s in splits[name]])
    if not len(records):
      raise UserError(f"the split {split!r} of {self.folder} is empty")
    return records

  def tokenizer_path(self) -> str:
    """The folder itself, which holds the tokenizer."""
    return self.folder

  @property
  def array_shapes(self) -> Mapping[str, ArrayShape]:
    """Name -> shape and dtype of the records' arrays."""
    return self.index.arrays

  @property
  def made_by(self) -> Mapping[str, str]:
    """Upstream model -> fingerprint of the one that the arrays come from."""
    return self.index.made_by

  @functools.cached_property
  def index(self) -> Index:
    """What index.json says."""
    return read_index(self.folder)


class _Records(Sequence[Record]):
  """Records of several shards, in a fixed mixed order."""

  def __init__(self, folder: str, shards: Sequence[Shard]):
    self._paths = [os.path.join(folder, shard.file) for shard in shards]
    for path, shard in zip(self._paths, shards):
      _check(path, shard)
    counts = (shard.num_records for shard in shards)
    self._ends = list(itertools.accumulate(counts))
    self._order = np.argsort(_mixed(count(shards)), kind="stable")
    self._reader = functools.lru_cache(_MAX_OPEN_FILES)(open_shard)

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, index: int) -> Record:
    place = int(self._order[range(len(self))[index]])
    shard = bisect.bisect_right(self._ends, place)
    position = place - (self._ends[shard - 1] if shard else 0)
    path = self._paths[shard]
    try:
      return decode(self._reader(path).read([position])[0])
    except (OSError, RuntimeError, ValueError, IndexError) as e:
      reason = " ".join(str(e).split())[:200]
      raise BrokenRecord(
        _DAMAGED, f"record {position} of {path} is damaged ({reason})"
      ) from e


def write_shard(path: str, encoded: Iterable[bytes]) -> Shard:
  """Writes a shard, which appears whole; the same records give the same bytes.

  Args:
    encoded: records, as `encode` gives them.
  """
  from array_record.python import array_record_module

  part = f"{path}.{os.getpid()}.part"
  num_records = 0
  writer = array_record_module.ArrayRecordWriter(part, _WRITER_OPTIONS)
  try:
    for data in encoded:
      writer.write(data)
      num_records += 1
    writer.close()
    with open(part, "rb") as file:
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    with contextlib.suppress(OSError):
      os.remove(part)
  return Shard(
    file=os.path.basename(path),
    num_records=num_records,
    num_bytes=os.path.getsize(path),
    sha256=sha256(path),
  )


def shard_file(split: str, number: int, count: int) -> str:
  """ "train-00003-of-00016.array_record"."""
  return f"{split}-{number:05d}-of-{count:05d}.array_record"


def read_encoded(path: str, positions: Iterable[int]) -> Iterable[bytes]:
  """Records of a shard, still encoded."""
  reader = open_shard(path)
  return (reader.read([position])[0] for position in positions)


def count(shards: Iterable[Shard]) -> int:
  """The number of records in shards."""
  return sum(shard.num_records for shard in shards)


def sha256(path: str) -> str:
  """The hash of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def encode(record: Record) -> bytes:
  """A record in msgpack.

  Of `info`, what is not made of numbers, texts, lists, mappings and arrays is
  left out, which is logged once; tuples come back as lists.

  Raises:
    UserError: an array is not of numbers or truth values.
  """
  for name, array in record.arrays.items():
    if array.dtype.kind not in "biuf" or array.dtype.hasobject:
      raise UserError(
        f"the array {name!r} is of the type {array.dtype}, which records cannot"
        " hold: convert it to float32 or float16"
      )
  info = {k: v for k, v in record.info.items() if _fits(k, v)}
  # Not dataclasses.asdict, which would copy the picture and arrays.
  fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
  return _pack({**fields, "info": info})


def decode(data: bytes) -> Record:
  """The record that `encode` took.

  Raises:
    ValueError: the data are damaged.
  """
  try:
    fields = msgpack.unpackb(
      data, ext_hook=_unpack_array, unicode_errors="surrogatepass"
    )
    return Record(**{**fields, "captions": tuple(fields["captions"])})
  except (TypeError, KeyError, msgpack.UnpackException) as e:
    raise ValueError(f"no record: {e}") from e


def _pack(value: Any) -> bytes:
  return msgpack.packb(
    value, default=_pack_array, unicode_errors="surrogatepass"
  )


def _pack_array(value: Any) -> msgpack.ExtType:
  if not isinstance(value, (np.ndarray, np.generic)):
    raise TypeError(f"{type(value)} cannot be stored")
  array = np.asarray(value)
  fields = array.dtype.str, array.shape, array.tobytes()
  return msgpack.ExtType(_ARRAY, msgpack.packb(fields))


def _unpack_array(code: int, data: bytes) -> np.ndarray:
  if code != _ARRAY:
    raise ValueError(f"extension {code} is none of ours")
  dtype, shape, values = msgpack.unpackb(data)
  return np.frombuffer(values, np.dtype(dtype)).reshape(shape)


def _fits(name: str, value: Any) -> bool:
  try:
    _pack(value)
  except (TypeError, ValueError, OverflowError):
    logging.log_first_n(
      logging.WARNING,
      "info %r is left out of prepared records: it is a %s (this is said once)",
      1,
      name,
      type(value).__name__,
    )
    return False
  return True


def open_shard(path: str) -> Any:
  """A reader of single records; one that is cut off has none."""
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(
    path, _READER_OPTIONS, file_reader_buffer_size=2**15
  )


def num_records(path: str) -> int:
  """The number of records in a file; 0 where it is cut off or missing."""
  if not os.path.isfile(path):
    return 0
  return open_shard(path).num_records()  # closing it would raise


def _check(path: str, shard: Shard) -> None:
  """Raises UserError for a shard that is not as the index says."""
  found = num_records(path)
  size = os.path.getsize(path) if os.path.isfile(path) else 0
  if (size, found) == (shard.num_bytes, shard.num_records):
    return
  raise UserError(
    f"{path} is damaged or missing ({found} of {shard.num_records} records):"
    " call the same unclip prepare_data again, which mends it"
  )


def _mixed(size: int) -> np.ndarray:
  """uint64 [size], as if drawn (splitmix64, Steele et al. 2014), the same with
  any version of numpy."""
  x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  return x ^ (x >> np.uint64(31))
