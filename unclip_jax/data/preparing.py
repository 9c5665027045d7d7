"""From any source to a prepared folder (data/prepared.py), in many processes.

The records of a split are taken in the order of their files, so many a shard;
each is decoded, and left out where it is

  broken, over 16 megapixels, unreadable or without a caption
  too small     the shorter side has fewer pixels than asked for
  too oblong    the longer side over the shorter
  duplicate     its pixels are those of a record before it, in any split

A shard is first made as a part, beside an account of it, in the hidden folder
.parts. When all are there, the duplicates are known and what is left is put in
place, the index last. Parts appear whole: whoever is killed goes on with the
same call, and the files are bit for bit those of a call that was not. A call on
a finished folder checks the hashes of its files.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from absl import logging
from PIL import Image

from unclip_jax.data import captioned, prepared, preprocess, tokenizers
from unclip_jax.data.prepared import Index, Shard
from unclip_jax.data.source import (
  NO_CAPTION,
  ArrayShape,
  BrokenRecord,
  Record,
  Source,
)
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import files
from unclip_jax.utils import progress as progress_lib
from unclip_jax.utils.errors import UserError

_PARTS = ".parts"
_PLAN = "plan.json"
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is made; the same plan gives the same files.

  Fields:
    source_name: module of the source.
    source: its fields.
    splits: of these the records are taken.
    min_size: pixels that the shorter side must have.
    max_size: pixels to which a longer shorter side is reduced; the picture is
      then encoded anew, as PNG where it was one, else as JPEG of quality 95.
    max_aspect_ratio: of the longer side to the shorter.
    deduplicate: whether duplicates are left out.
    records_per_shard: before any are left out.
  """

  source_name: str
  source: Mapping[str, Any]
  splits: Sequence[str] = ("train", "validation")
  min_size: int | None = None
  max_size: int | None = None
  max_aspect_ratio: float | None = None
  deduplicate: bool = True
  records_per_shard: int = 4096

  def __post_init__(self):
    if self.records_per_shard < 1:
      raise UserError("a shard must hold 1 record or more")
    if self.max_size is not None and self.max_size < 1:
      raise UserError("max_size must be 1 pixel or more")
    if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
      raise UserError("max_aspect_ratio, of longer to shorter, must be >= 1")

  def open(self) -> Source:
    """The source."""
    module = config_lib.import_module(self.source_name)
    return config_lib.construct(module.Source, self.source, where="source")


class _Place(NamedTuple):
  """Which records a part holds: [start, stop) of a split."""

  split: str
  file: str
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class _Part:
  """The account of a part, kept beside it as JSON."""

  shard: Shard
  digests: Sequence[str]  # of the pixels, by record
  left_out: Mapping[str, int]
  arrays: Mapping[str, ArrayShape] | None  # None: it has no record

  def write(self, path: str) -> None:
    files.write_atomically(path, json.dumps(dataclasses.asdict(self)))

  @classmethod
  def read(cls, path: str) -> _Part:
    with open(path, encoding="utf-8") as file:
      fields = json.load(file)
    shapes = fields["arrays"]
    if shapes is not None:
      shapes = {k: ArrayShape(tuple(v[0]), v[1]) for k, v in shapes.items()}
    shard = Shard(**fields["shard"])
    return cls(shard, fields["digests"], fields["left_out"], shapes)


def prepare(plan: Plan, out: str, *, num_processes: int | None = None) -> Index:
  """Makes a prepared folder, or what is missing of it.

  Args:
    out: the folder.
    num_processes: that work; None: as many as there are cores.

  Returns:
    Its index.

  Raises:
    UserError: nothing is left, the folder holds something else, another process
      works on it, or as the source raises.
  """
  source = plan.open()
  sizes = {split: len(_open_split(source, split)) for split in plan.splits}
  made_from = json.loads(json.dumps({**dataclasses.asdict(plan), "of": sizes}))
  if _is_whole(out, made_from):
    logging.info("%s is prepared already, and whole", out)
    # What a kill between the index and the end has left.
    shutil.rmtree(os.path.join(out, _PARTS), ignore_errors=True)
    return prepared.read_index(out)
  with _locked(out) as parts:
    _keep_plan(parts, made_from)
    places = list(_places(plan, sizes))
    _make_parts(plan, parts, places, num_processes)
    shards, left_out, arrays = _put_in_place(plan, parts, places, out)
    before = dict(getattr(source, "left_out", {}))
    left_out = {prepared.BEFORE: before, **left_out} if before else left_out
    index = Index(made_from, shards, left_out, arrays)
    path = source.tokenizer_path()
    for name, asset in tokenizers.load(path).assets().items():
      shutil.copyfile(asset, os.path.join(out, name))
    files.write_atomically(
      os.path.join(out, prepared.INDEX_FILE), index.to_json()
    )
  shutil.rmtree(parts)
  return index


def report(index: Index) -> str:
  """How many records there are, and how many were left out and why."""
  lines = []
  for split in [prepared.BEFORE, *index.splits]:
    left_out = index.left_out.get(split, {})
    if split in index.splits:
      shards = index.splits[split]
      size = sum(shard.num_bytes for shard in shards) / 1e6
      number = prepared.count(shards)
      lines.append(
        f"{split}: {number} records in {len(shards)} files, {size:.1f} MB"
      )
    elif left_out:
      lines.append("before the splits:")
    lines += [f"  left out: {n} ({reason})" for reason, n in left_out.items()]
  return "\n".join(lines)


def _open_split(source: Source, split: str) -> Sequence[Record]:
  try:
    records = source.records(split)
  except UserError as e:
    raise UserError(f"{e} (--splits names those to prepare)") from e
  if isinstance(records, captioned.Records):
    return records.in_file_order()
  return records


def _is_whole(out: str, made_from: Mapping[str, Any]) -> bool:
  """Whether `out` is finished; raises UserError where it is something else."""
  if not os.path.isfile(os.path.join(out, prepared.INDEX_FILE)):
    return False
  index = prepared.read_index(out)
  check_plan(index.made_from, made_from, out)
  for shard in (shard for shards in index.splits.values() for shard in shards):
    path = os.path.join(out, shard.file)
    if not os.path.isfile(path) or prepared.sha256(path) != shard.sha256:
      logging.warning("%s is damaged or missing: all is prepared anew", path)
      return False
  return True


def check_plan(
  found: Mapping[str, Any], wanted: Mapping[str, Any], out: str
) -> None:
  """Raises UserError if what `out` was made of is not what is wanted."""
  differences = config_lib.diff(found, wanted)
  if differences:
    raise UserError(
      f"{out} was prepared otherwise ({'; '.join(differences[:3])}): delete it"
      " or choose another --out"
    )


def _keep_plan(parts: str, made_from: Mapping[str, Any]) -> None:
  path = os.path.join(parts, _PLAN)
  if os.path.isfile(path):
    with open(path, encoding="utf-8") as file:
      check_plan(json.load(file), made_from, os.path.dirname(parts))
  files.write_atomically(path, json.dumps(made_from))


@contextlib.contextmanager
def _locked(out: str) -> Iterator[str]:
  """The folder of parts, this process's alone until the block ends."""
  parts = os.path.join(out, _PARTS)
  try:
    os.makedirs(parts, exist_ok=True)
    file = open(os.path.join(parts, "lock"), "w")  # noqa: SIM115
  except OSError as e:
    raise UserError(f"cannot write to {out} ({e.strerror})") from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      raise UserError(
        f"another process prepares {out}: wait for it, or end it"
      ) from e
    yield parts


def _places(plan: Plan, sizes: Mapping[str, int]) -> Iterator[_Place]:
  for split, size in sizes.items():
    starts = range(0, size, plan.records_per_shard)
    for number, start in enumerate(starts):
      file = prepared.shard_file(split, number, len(starts))
      stop = min(start + plan.records_per_shard, size)
      yield _Place(split, file, start, stop)


def _make_parts(
  plan: Plan,
  parts: str,
  places: Sequence[_Place],
  num_processes: int | None,
) -> None:
  """Makes those that are not there."""
  missing = [p for p in places if not os.path.isfile(_account(parts, p))]
  sizes = {p: p.stop - p.start for p in places}
  total = sum(sizes.values())
  before = total - sum(sizes[p] for p in missing)
  num_processes = num_processes or os.cpu_count() or 1
  if not missing:
    return
  with progress_lib.Progress("preparing", total, start=before) as progress:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", before)
    pool = concurrent.futures.ProcessPoolExecutor(
      min(num_processes, len(missing)), context, _start, (plan, parts, counter)
    )
    try:
      waiting = {pool.submit(_make_part, place) for place in missing}
      while waiting:
        done, waiting = concurrent.futures.wait(
          waiting, 0.5, concurrent.futures.FIRST_EXCEPTION
        )
        for future in done:
          future.result()
        progress.update(counter.value)
    except BrokenProcessPool as e:
      raise UserError(
        "a process died, perhaps for lack of memory: call again, with fewer"
        " --processes"
      ) from e
    finally:
      pool.shutdown(cancel_futures=True)


# What `_start` leaves in a process for `_make_part`.
_worker: dict[str, Any] = {}


def _start(plan: Plan, parts: str, counter: Any) -> None:
  """Begins a process; it ends with the one that started it, however that may
  end."""
  _worker.update(plan=plan, parts=parts, counter=counter, source=plan.open())

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _make_part(place: _Place) -> None:
  plan, parts = _worker["plan"], _worker["parts"]
  splits = _worker.setdefault("splits", {})
  if place.split not in splits:
    splits[place.split] = _open_split(_worker["source"], place.split)
  records = splits[place.split]
  digests: list[str] = []
  left_out: collections.Counter[str] = collections.Counter()
  arrays: dict[str, ArrayShape] | None = None

  def encoded() -> Iterator[bytes]:
    nonlocal arrays
    for index in range(place.start, place.stop):
      with _worker["counter"].get_lock():
        _worker["counter"].value += 1
      try:
        record, digest = _accepted(plan, records[index])
      except BrokenRecord as e:
        left_out[e.reason] += 1
        continue
      shapes = {
        name: ArrayShape(x.shape, x.dtype.str)
        for name, x in record.arrays.items()
      }
      arrays = _same(arrays, shapes)
      digests.append(digest)
      yield prepared.encode(record)

  shard = prepared.write_shard(os.path.join(parts, place.file), encoded())
  _Part(shard, digests, dict(left_out), arrays).write(_account(parts, place))


def _accepted(plan: Plan, record: Record) -> tuple[Record, str]:
  """The record as it is kept, and a hash of its pixels.

  Raises:
    BrokenRecord: it is left out.
  """
  name = record.code_point
  if not captioned.clean(record.captions):
    raise BrokenRecord(NO_CAPTION, f"{name!r} has no caption")
  picture = preprocess.decode(record.image, name=name)
  short, long = sorted(picture.size)
  if short < (plan.min_size or 1):
    raise BrokenRecord("too small", f"{name!r} is too small")
  if plan.max_aspect_ratio and long > plan.max_aspect_ratio * short:
    raise BrokenRecord("too oblong", f"{name!r} is too oblong")
  pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes())
  if plan.max_size and short > plan.max_size:
    image = _reduced(picture, plan.max_size, _is_png(record.image))
    record = dataclasses.replace(record, image=image)
  return record, pixels.hexdigest()[:32]


def _reduced(picture: Image.Image, size: int, as_png: bool) -> bytes:
  sides = [max(1, round(x * size / min(picture.size))) for x in picture.size]
  picture = picture.resize(sides, Image.Resampling.BICUBIC)
  file = io.BytesIO()
  if as_png:
    picture.save(file, "PNG")
  else:
    picture.save(file, "JPEG", quality=_JPEG_QUALITY)
  return file.getvalue()


def _is_png(image: bytes) -> bool:
  return image.startswith(b"\x89PNG")


def _put_in_place(
  plan: Plan, parts: str, places: Sequence[_Place], out: str
) -> tuple[
  dict[str, list[Shard]],
  dict[str, dict[str, int]],
  Mapping[str, ArrayShape],
]:
  """Makes the shards of the parts, without what others held before.

  Returns:
    The last three fields of Index.
  """
  splits: dict[str, list[Shard]] = {split: [] for split in plan.splits}
  left_out: dict[str, collections.Counter[str]] = {
    split: collections.Counter() for split in plan.splits
  }
  arrays: Mapping[str, ArrayShape] | None = None
  seen: set[bytes] = set()
  for place in places:
    part = _Part.read(_account(parts, place))
    arrays = _same(arrays, part.arrays)
    left_out[place.split].update(part.left_out)
    kept = []
    for position, digest in enumerate(map(bytes.fromhex, part.digests)):
      if not (plan.deduplicate and digest in seen):
        kept.append(position)
        seen.add(digest)
    made = os.path.join(parts, place.file)
    new = os.path.join(parts, "new")  # what a kill leaves of it goes with parts
    shard = part.shard
    if len(kept) < shard.num_records:
      left_out[place.split]["duplicate"] += shard.num_records - len(kept)
      shard = prepared.write_shard(new, prepared.read_encoded(made, kept))
      shard = dataclasses.replace(shard, file=place.file)
    else:
      _link(made, new)
    os.replace(new, os.path.join(out, place.file))
    splits[place.split].append(shard)
  if not seen:
    reasons = collections.Counter()
    for counts in left_out.values():
      reasons.update(counts)
    raise UserError(
      "no record is left: "
      + ", ".join(f"{n} ({reason})" for reason, n in reasons.items())
    )
  return splits, {k: dict(v) for k, v in left_out.items()}, arrays or {}


def _same(
  known: Mapping[str, ArrayShape] | None,
  other: Mapping[str, ArrayShape] | None,
) -> Mapping[str, ArrayShape] | None:
  """Shapes of arrays, which all records share."""
  if known is not None and other is not None and known != other:
    raise UserError(
      "the records hold arrays of different names or shapes: compute them anew,"
      " the same for all"
    )
  return other if known is None else known


def _account(parts: str, place: _Place) -> str:
  return os.path.join(parts, f"{place.file}.json")


def _link(source: str, target: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.remove(target)
  try:
    os.link(source, target)
  except OSError:  # a system without hard links
    shutil.copyfile(source, target)
