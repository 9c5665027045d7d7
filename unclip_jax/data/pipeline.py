"""From a source to batches, in an order that is a function of the step.

The position law: the example at place i of step s is f(seed, p), where
p = s * global_batch + i counts examples since the start of training. Epoch
p // N is a permutation of the N records of its own, and every augmentation is
drawn from a generator seeded by (seed, p). A host yields its block of each
global batch. So a run resumes at any step, on any number of hosts and
threads, from `step` alone; the concatenated batches of the hosts are the
batch of one host.

A record that cannot be used is a hole in the source, not in the order: the next
whole one of the split stands at its place, always the same. They are counted,
and too many of them stop the run.

Grain's MapDataset supplies the permutations (an index shuffle without a
table), the generators and the prefetching threads.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from unclip_jax.data import tokenizers
from unclip_jax.data.preprocess import Preprocess
from unclip_jax.data.source import (
  CAPTION_ARRAYS,
  NO_CAPTION,
  ArrayShape,
  BrokenRecord,
  Record,
  Source,
)
from unclip_jax.utils import config as config_lib
from unclip_jax.utils.errors import UserError

if TYPE_CHECKING:
  import jax

Batch = dict[str, np.ndarray]

# Decoded pictures are kept in memory up to this size: without, small datasets
# would have the same PNGs decoded in every epoch.
_CACHE_BYTES = 256 * 2**20
_ENDLESS = 2**40  # steps


@dataclasses.dataclass(frozen=True)
class DataPipeline:
  """Batches of one source.

  A batch holds image, clip_image and low_res (those that `preprocess` asks
  for) float32 [B, H, W, 3] in [-1, 1]; text_tokens int32 [B, L]; text_mask
  bool [B, L]; index int32 [B], the position in the split; mask bool [B],
  False at padding rows; and the stored `arrays` of the records under their
  names, float16 as float32, of CAPTION_ARRAYS the row of the example's caption.

  Fields:
    source: the pictures.
    preprocess: how an example is made of one.
    seed: of the order and the augmentations.
    tokenizer_path: what `tokenizers.load` takes; None: the source's own.
    num_threads: threads that prepare batches; the result does not depend on
      it.
    prefetch: batches that may be ready ahead.
    max_broken: share of a split's records that may be found broken; more than
      these (one in any case) stop the run.
    stored_arrays: whether batches hold the records' arrays. With a stored
      image_embed there is no clip_image.
  """

  source: Source
  preprocess: Preprocess
  seed: int
  tokenizer_path: str | None = None
  num_threads: int = 2
  prefetch: int = 4
  max_broken: float = 0.05
  stored_arrays: bool = True

  @classmethod
  def from_config(
    cls, config_data: Any, *, seed: int, assets_dir: str | None = None
  ) -> DataPipeline:
    """Builds the pipeline that `config.data` describes.

    Args:
      config_data: has source_name (a module with a `Source`), source and
        preprocess (their fields), and optionally tokenizer (a path, as
        `tokenizers.load` takes it), max_broken and stored_arrays.
      seed: of the order and the augmentations.
      assets_dir: a folder with the tokenizer that must be used, such as that
        of a frozen CLIP; it wins over config.data.tokenizer.

    Raises:
      UserError: an unknown field, module, or no tokenizer in `assets_dir`.
    """
    module = config_lib.import_module(config_data["source_name"])
    source = config_lib.construct(
      module.Source, config_data.get("source"), where="config.data.source"
    )
    preprocess = config_lib.construct(
      Preprocess, config_data["preprocess"], where="config.data.preprocess"
    )
    stored = getattr(source, "image_size", preprocess.image_size)
    if stored < preprocess.image_size:
      logging.warning(
        "pictures stored at %d px are enlarged to %d px: raise"
        " config.data.source.image_size",
        stored,
        preprocess.image_size,
      )
    path = assets_dir or config_data.get("tokenizer")
    options = {
      name: config_data[name]
      for name in ("max_broken", "stored_arrays")
      if name in config_data
    }
    pipeline = cls(source, preprocess, seed, path, **options)
    if "image_embed" in pipeline.array_shapes:
      preprocess = dataclasses.replace(preprocess, clip_image_size=None)
      pipeline = dataclasses.replace(pipeline, preprocess=preprocess)
    return pipeline

  @property
  def array_shapes(self) -> dict[str, ArrayShape]:
    """Name -> shape and dtype of the stored arrays of an example."""
    if not self.stored_arrays:
      return {}
    return {
      name: ArrayShape(
        x.shape[1:] if name in CAPTION_ARRAYS else x.shape, _widened(x.dtype)
      )
      for name, x in getattr(self.source, "array_shapes", {}).items()
    }

  @property
  def made_by(self) -> Mapping[str, str]:
    """Upstream model -> fingerprint of the one that stored arrays come from."""
    return getattr(self.source, "made_by", {}) if self.stored_arrays else {}

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer in use."""
    return tokenizers.load(self.tokenizer_path or self.source.tokenizer_path())

  def num_examples(self, split: str) -> int:
    """The number of records in a split."""
    return len(self._examples(split).records)

  def train_batches(
    self,
    start_step: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """This host's block of every global batch from `start_step` on, endless.

    Batches are prepared in threads ahead of their use.

    Args:
      start_step: the first step, 0 at the start of training.
      global_batch: examples a step over all hosts; may exceed the dataset.
      process_index: which host this is.
      process_count: how many there are; divides global_batch.

    Raises:
      UserError: global_batch does not divide, or too many records are broken.
    """
    import grain

    block = _block(global_batch, process_index, process_count)
    examples = self._examples("train")
    dataset = (
      grain.MapDataset.range(len(examples.records))
      .seed(self.seed % 2**32)
      .shuffle()
      .repeat()
      .random_map(examples.train)
    )

    def batch(step: int) -> Batch:
      start = step * global_batch
      return self._collate([dataset[start + i] for i in block])

    steps = grain.MapDataset.range(start_step, _ENDLESS)
    options = grain.ReadOptions(
      num_threads=self.num_threads, prefetch_buffer_size=self.prefetch
    )
    return iter(steps.map(batch).to_iter_dataset(options))

  def eval_batches(
    self,
    split: str,
    batch_size: int,
    max_examples: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterable[Batch]:
    """A split once, in its order; may be iterated over repeatedly.

    No augmentation, the canonical caption. The last batch is filled up with
    repetitions whose `mask` is False; all hosts yield equally many batches.

    Args:
      split: "train", "validation", "all", or one that the source has beside.
      batch_size: examples a batch over all hosts.
      max_examples: only the first ones; None: all.
      process_index: which host this is.
      process_count: how many there are; divides batch_size.

    Raises:
      UserError: batch_size does not divide, or the split is unknown or empty.
    """
    return _EvalBatches(
      pipeline=self,
      examples=self._examples(split),
      batch_size=batch_size,
      block=_block(batch_size, process_index, process_count),
      max_examples=max_examples,
    )

  def batch_spec(
    self, batch_size: int, *, train: bool = True
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, without reading data."""
    import jax

    text = (batch_size, self.preprocess.context_length)
    shapes = {
      name: ((batch_size, *shape), np.float32)
      for name, shape in self.preprocess.picture_shapes(train=train).items()
    } | {
      "text_tokens": (text, np.int32),
      "text_mask": (text, np.bool_),
      "index": ((batch_size,), np.int32),
      "mask": ((batch_size,), np.bool_),
    }
    shapes |= {
      name: ((batch_size, *x.shape), x.dtype)
      for name, x in self.array_shapes.items()
    }
    return {k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()}

  def assets(self) -> dict[str, str]:
    """Name -> path of the files that must be stored with a model."""
    return self.tokenizer.assets()

  def example_info(self, index: int, split: str) -> dict[str, Any]:
    """What is known of a position: code_point, name, group, captions and the
    record's own `info`; and `decode`, which is the same for all."""
    record = self._examples(split).whole(index)[0]
    return {
      "code_point": record.code_point,
      "name": record.name,
      "group": record.group,
      "captions": record.captions,
      "decode": self.decode,
      **record.info,
    }

  def decode(self, text_tokens: np.ndarray) -> list[str]:
    """The texts of token ids [B, L], as `Tokenizer.decode`."""
    return self.tokenizer.decode(text_tokens)

  def broken_records(self, split: str) -> dict[str, int]:
    """Reason -> number of the broken records that this process came across."""
    return dict(self._examples(split).reasons)

  @functools.cached_property
  def _open_splits(self) -> dict[str, _Examples]:
    return {}

  def _examples(self, split: str) -> _Examples:
    if split not in self._open_splits:
      records = self.source.records(split)
      self._open_splits[split] = _Examples(
        records, self.preprocess, split, self.max_broken, self.stored_arrays
      )
    return self._open_splits[split]

  def _collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
    captions = [example.pop("caption") for example in examples]
    text_tokens, text_mask = self.tokenizer.encode(
      captions, self.preprocess.context_length
    )
    shapes = [{k: np.shape(v) for k, v in x.items()} for x in examples]
    if any(x != shapes[0] for x in shapes):
      raise UserError(
        "the records hold arrays of different names or shapes: compute them"
        " anew, the same for all"
      )
    batch = {
      name: np.stack([example[name] for example in examples])
      for name in examples[0]
    }
    return {**batch, "text_tokens": text_tokens, "text_mask": text_mask}


class _Examples:
  """The examples of one split; keeps decoded pictures up to a bound."""

  def __init__(
    self,
    records: Sequence[Record],
    preprocess: Preprocess,
    split: str,
    max_broken: float,
    stored_arrays: bool,
  ):
    self.records = records
    self._stored_arrays = stored_arrays
    self.reasons: collections.Counter[str] = collections.Counter()
    self._broken: set[int] = set()
    self._too_many = ""  # the message that stops the run
    self._lock = threading.Lock()
    self._split = split
    self._max_broken = max(1, int(max_broken * len(records)))
    self._preprocess = preprocess
    self._cache: dict[int, dict[str, np.ndarray]] = {}
    shapes = preprocess.picture_shapes(train=False).values()
    size = sum(int(np.prod(shape)) for shape in shapes)
    self._cache_entries = _CACHE_BYTES // size

  def train(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """One augmented example."""
    record, pictures = self.whole(index)
    example = self._preprocess.train_example(pictures, record, rng)
    return self._completed(example, record, index, True)

  def evaluate(self, index: int, real: bool) -> dict[str, Any]:
    """One clean example; `real` is its `mask`."""
    record, pictures = self.whole(index)
    example = self._preprocess.eval_example(pictures, record)
    return self._completed(example, record, index, real)

  def whole(self, index: int) -> tuple[Record, dict[str, np.ndarray]]:
    """The record at a position, or the next that can be used; its pictures."""
    if self._too_many:  # found by whatever thread
      raise UserError(self._too_many)
    N = len(self.records)
    for turn in range(N):
      place = (index + turn) % N
      if place in self._broken:
        continue
      try:
        record = self.records[place]
        if not record.captions:
          name = record.code_point
          raise BrokenRecord(NO_CAPTION, f"{name!r} has no caption")
        return record, self._pictures(place, record)
      except BrokenRecord as e:
        self._count(place, e)
    raise UserError(f"no record of the split {self._split!r} can be used")

  def _completed(
    self, example: dict[str, Any], record: Record, index: int, real: bool
  ) -> dict[str, Any]:
    """An example with its arrays, position and mask."""
    example |= {"index": np.int32(index), "mask": np.bool_(real)}
    if not self._stored_arrays:
      return example
    clash = {*example, "text_tokens", "text_mask"} & set(record.arrays)
    if clash:
      raise UserError(
        f"the records hold arrays named {', '.join(sorted(clash))}, as the"
        " pipeline's own: rename them"
      )
    for name, array in record.arrays.items():
      if name in CAPTION_ARRAYS:
        array = array[record.captions.index(example["caption"])]
      example[name] = array.astype(_widened(array.dtype))
    return example

  def _count(self, place: int, error: BrokenRecord) -> None:
    with self._lock:
      if place in self._broken:  # another thread was faster
        return
      self._broken.add(place)
      self.reasons[error.reason] += 1
      count = len(self._broken)
      # Said of the first of its kind, and 1, 2, 4, 8, ... times.
      if self.reasons[error.reason] == 1 or count & (count - 1) == 0:
        logging.warning(
          "others stand in for the broken records of %r, so far %s; the last:"
          " %s",
          self._split,
          ", ".join(f"{n} ({reason})" for reason, n in self.reasons.items()),
          error,
        )
      if count > self._max_broken:
        self._too_many = (
          f"{count} of the {len(self.records)} records of {self._split!r} are"
          " broken: mend the data, leave them out (unclip prepare_data), or"
          f" raise config.data.max_broken; the last: {error}"
        )
        raise UserError(self._too_many)

  def _pictures(self, index: int, record: Record) -> dict[str, np.ndarray]:
    # Two threads may decode the same picture at once: to the same pixels.
    pictures = self._cache.get(index)
    if pictures is None:
      pictures = self._preprocess.resize(record)
      if len(self._cache) < self._cache_entries:
        self._cache[index] = pictures
    return pictures


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
  """What `DataPipeline.eval_batches` returns."""

  pipeline: DataPipeline
  examples: _Examples
  batch_size: int
  block: range
  max_examples: int | None

  def __len__(self) -> int:
    return -(-self._size // self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    last = self._size - 1
    for start in range(0, self._size, self.batch_size):
      positions = [start + i for i in self.block]
      yield self.pipeline._collate(
        [self.examples.evaluate(min(p, last), p <= last) for p in positions]
      )

  @property
  def _size(self) -> int:
    size = len(self.examples.records)
    return size if self.max_examples is None else min(size, self.max_examples)


def _widened(dtype: np.dtype) -> np.dtype:
  return np.dtype(np.float32) if dtype == np.float16 else dtype


def _block(size: int, process_index: int, process_count: int) -> range:
  """The places of a global batch that a host makes."""
  if size < 1 or size % process_count:
    raise UserError(
      f"the batch size {size} is not a multiple of the {process_count} host(s):"
      " change it"
    )
  block = size // process_count
  return range(process_index * block, (process_index + 1) * block)
