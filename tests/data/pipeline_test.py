"""The position law and what a batch holds."""

import dataclasses
import itertools
import os
import shutil
import threading

import ml_collections
import numpy as np
import pytest

from unclip_jax.data import pipeline, synthetic
from unclip_jax.data.preprocess import Preprocess
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def data(emoji_source) -> pipeline.DataPipeline:
  return pipeline.DataPipeline(
    source=emoji_source,
    preprocess=Preprocess(
      image_size=32,
      clip_image_size=16,
      low_res_size=8,
      crop_size=16,
      random_flip=True,
      blur_prob=0.5,
      context_length=24,
    ),
    seed=5,
  )


def _take(batches, n: int) -> list[pipeline.Batch]:
  return list(itertools.islice(batches, n))


def _assert_same(a, b) -> None:
  assert len(a) == len(b) > 0
  for left, right in zip(a, b, strict=True):
    assert left.keys() == right.keys()
    for name in left:
      np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_resumed_equals_uninterrupted(data):
  whole = _take(data.train_batches(0, 16), 9)
  for start in (1, 4, 8):
    _assert_same(_take(data.train_batches(start, 16), 9 - start), whole[start:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_concatenated_equal_one_host(data, process_count):
  whole = _take(data.train_batches(2, 16), 4)
  parts = [
    _take(data.train_batches(2, 16, i, process_count), 4)
    for i in range(process_count)
  ]
  joined = [
    {k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]}
    for step in range(4)
  ]
  _assert_same(joined, whole)


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 0), (1, 1), (8, 16)])
def test_threads_do_not_matter(data, num_threads, prefetch):
  other = dataclasses.replace(data, num_threads=num_threads, prefetch=prefetch)
  _assert_same(
    _take(other.train_batches(0, 8), 12), _take(data.train_batches(0, 8), 12)
  )


def _epochs(data: pipeline.DataPipeline, epochs: int) -> np.ndarray:
  size = data.num_examples("train")
  batches = _take(data.train_batches(0, 1), epochs * size)
  index = np.concatenate([b["index"] for b in batches])
  return index.reshape(epochs, size)


def test_epochs_visit_every_example_once_in_orders_of_their_own(data):
  size = data.num_examples("train")
  epochs = _epochs(data, 3)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  in_order = np.arange(size)
  for a, b in itertools.combinations([in_order, *epochs], 2):
    assert (a != b).mean() > 0.5
  other = _epochs(dataclasses.replace(data, seed=6), 1)
  assert (other[0] != epochs[0]).mean() > 0.5


def test_a_batch_size_changes_only_where_batches_end(data):
  small = _take(data.train_batches(0, 4), 6)
  large = _take(data.train_batches(0, 12), 2)
  for name in small[0]:
    np.testing.assert_array_equal(
      np.concatenate([b[name] for b in small]),
      np.concatenate([b[name] for b in large]),
    )


def test_augmentations_differ_between_epochs(data):
  size = data.num_examples("train")
  seen: dict[int, list] = {}
  for batch in _take(data.train_batches(0, 1), 4 * size):
    seen.setdefault(int(batch["index"][0]), []).append(batch["image"])
  differ = [not np.array_equal(v[0], v[1]) for v in seen.values()]
  assert np.mean(differ) > 0.5


def test_a_batch_may_exceed_the_dataset(data):
  size = data.num_examples("train")
  (batch,) = _take(data.train_batches(0, 2 * size + 1), 1)
  counts = np.bincount(batch["index"], minlength=size)
  assert counts.min() == 2 and counts.sum() == 2 * size + 1


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed(data, seed):
  next(dataclasses.replace(data, seed=seed).train_batches(0, 2))


def test_batches_are_as_specified(data):
  train = next(data.train_batches(0, 6))
  evaluation = next(iter(data.eval_batches("validation", 6)))
  for batch, is_train in ((train, True), (evaluation, False)):
    spec = data.batch_spec(6, train=is_train)
    assert batch.keys() == spec.keys()
    for name, array in batch.items():
      assert (array.shape, array.dtype) == (
        spec[name].shape,
        spec[name].dtype,
      ), name
  assert train["image"].shape == (6, 16, 16, 3)
  assert evaluation["image"].shape == (6, 32, 32, 3)
  assert train["mask"].all()


def test_batch_spec_reads_nothing(tmp_path):
  source = synthetic.Source(data_dir=str(tmp_path / "absent"))
  data = pipeline.DataPipeline(source, Preprocess(image_size=32), seed=0)
  assert data.batch_spec(3)["image"].shape == (3, 32, 32, 3)
  assert not os.path.exists(tmp_path / "absent")


def test_training_text_belongs_to_the_picture(data):
  for batch in _take(data.train_batches(0, 8), 4):
    texts = data.tokenizer.decode(batch["text_tokens"])
    for index, text in zip(batch["index"], texts, strict=True):
      info = data.example_info(int(index), "train")
      assert text in [caption.lower() for caption in info["captions"]]
      assert info["captions"][0] == info["name"]
      record = data.source.records("train")[index]
      assert info["code_point"] == record.code_point
      assert info["group"] == record.group


def test_evaluation_goes_through_the_split_once_and_pads(data):
  size = data.num_examples("all")
  assert size % 7
  batches = data.eval_batches("all", 7)
  first, again = list(batches), list(batches)
  _assert_same(first, again)
  assert len(first) == len(batches) == -(-size // 7)
  mask = np.concatenate([b["mask"] for b in first])
  index = np.concatenate([b["index"] for b in first])
  np.testing.assert_array_equal(index[mask], np.arange(size))
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < size)
  texts = data.tokenizer.decode(first[0]["text_tokens"])
  names = [data.example_info(i, "all")["name"].lower() for i in range(7)]
  assert texts == names
  # Padding rows hold something that no network stumbles over.
  assert first[-1]["text_mask"].any(1).all()


def test_evaluation_of_the_first_examples_on_two_hosts(data):
  whole = list(data.eval_batches("train", 4, max_examples=5))
  assert sum(b["mask"].sum() for b in whole) == 5
  parts = [list(data.eval_batches("train", 4, 5, i, 2)) for i in range(2)]
  joined = [
    {k: np.concatenate([a[k], b[k]]) for k in a}
    for a, b in zip(*parts, strict=True)
  ]
  _assert_same(joined, whole)


def test_decoded_pictures_are_cached_within_bounds(data, monkeypatch):
  fresh = dataclasses.replace(data)
  monkeypatch.setattr(pipeline, "_CACHE_BYTES", 10 * 3 * (32**2 + 16**2 + 8**2))
  bounded = _take(fresh.train_batches(0, 16), 6)
  assert len(fresh._examples("train")._cache) in (10, 11)  # two threads
  _assert_same(bounded, _take(data.train_batches(0, 16), 6))


@dataclasses.dataclass(frozen=True)
class Listed:
  """A source of given records; of an error in their place it is raised."""

  items: tuple
  array_shapes: dict = dataclasses.field(default_factory=dict)

  def records(self, split):
    items = self.items

    class Records(list):
      def __getitem__(self, index):
        if isinstance(items[index], Exception):
          raise items[index]
        return items[index]

    return Records(items)


def _listed(tmp_path, broken=(), count=40, arrays=None, **fields):
  """A pipeline over `count` pictures; those at `broken` are in turns gone and
  cut off."""
  made = synthetic.Source(data_dir=str(tmp_path), num_examples=count)
  items = list(made.records("all"))
  for i, place in enumerate(broken):
    cut = dataclasses.replace(items[place], image=items[place].image[:60])
    items[place] = (
      BrokenRecord("gone", f"number {place} is gone") if i % 2 else cut
    )
  if arrays:
    items = [
      dataclasses.replace(x, arrays=arrays(i)) for i, x in enumerate(items)
    ]
  shapes = getattr(items[-1], "arrays", {})
  return pipeline.DataPipeline(
    Listed(tuple(items), shapes),
    Preprocess(image_size=8),
    seed=3,
    tokenizer_path=made.tokenizer_path(),
    **fields,
  )


BROKEN = (0, 4, 5, 39)


def test_the_next_whole_record_stands_in_for_a_broken_one(tmp_path):
  whole = _listed(tmp_path)
  data = _listed(tmp_path, BROKEN, max_broken=0.1)
  expected = np.concatenate([b["image"] for b in whole.eval_batches("all", 8)])
  for i, stand_in in zip(BROKEN, (1, 6, 6, 1)):
    expected[i] = expected[stand_in]
    name = data.example_info(i, "all")["name"]
    assert name == whole.example_info(stand_in, "all")["name"]
  for _ in range(2):
    batches = list(data.eval_batches("all", 8))
    found = np.concatenate([b["image"] for b in batches])
    np.testing.assert_array_equal(found, expected)
    index = np.concatenate([b["index"] for b in batches])
    np.testing.assert_array_equal(index, np.arange(40))
  assert data.broken_records("all") == {"broken picture": 2, "gone": 2}


def test_broken_records_are_told_of_once_a_kind_and_at_powers_of_two(
  tmp_path, monkeypatch
):
  told = []
  monkeypatch.setattr(
    pipeline.logging, "warning", lambda text, *args: told.append(text % args)
  )
  data = _listed(tmp_path, range(1, 12), max_broken=0.5)
  for _ in range(2):
    list(data.eval_batches("all", 8))
  assert len(told) == 4  # 1, 2, 4 and 8 of them; the kinds alternate
  assert "so far 4 (broken picture), 4 (gone)" in told[-1]
  assert "number 8 is gone" in told[-1]


def test_too_many_broken_records_stop_the_run(tmp_path):
  data = _listed(tmp_path, BROKEN)  # 5 % of 40 are 2
  with pytest.raises(UserError, match=r"3 of the 40 .* raise config"):
    list(data.eval_batches("all", 8))
  with pytest.raises(UserError, match="of the 40"):  # in whatever thread
    next(data.train_batches(0, 400))
  with pytest.raises(UserError, match="of the 40"):  # and stays so
    next(data.train_batches(7, 1))
  # One may be broken in any case, unless nothing is left.
  assert len(
    list(_listed(tmp_path, (0,), max_broken=0.0).eval_batches("all", 8))
  )
  with pytest.raises(UserError, match="no record"):
    list(_listed(tmp_path, (0, 1), 2, max_broken=1.0).eval_batches("all", 2))


def test_arrays_of_records_are_in_the_batch(tmp_path):
  def arrays(i):
    return {
      "image_embed": np.full(3, i + 0.5, np.float16),
      "grade": np.int32(i),
    }

  data = _listed(tmp_path, arrays=arrays)
  batch = next(data.train_batches(0, 8))
  spec = data.batch_spec(8)
  assert batch.keys() == spec.keys()
  for name, array in batch.items():
    assert (array.shape, array.dtype) == (spec[name].shape, spec[name].dtype)
  assert batch["image_embed"].dtype == np.float32
  np.testing.assert_array_equal(batch["grade"], batch["index"])
  np.testing.assert_array_equal(
    batch["image_embed"][:, 1], batch["index"] + 0.5
  )


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (lambda i: {"x": np.zeros(i)}, "names or shapes"),
    (lambda i: {"x": np.zeros(1)} if i == 0 else {}, "names or shapes"),
    (lambda i: {"x": np.zeros(1)} if i else {}, "names or shapes"),
    (lambda i: {"text_mask": np.zeros(1)}, "arrays named text_mask"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
  data = _listed(tmp_path, arrays=arrays)
  with pytest.raises(UserError, match=message):
    next(iter(data.eval_batches("all", 4)))


def test_wrong_batch_sizes_and_splits(data):
  with pytest.raises(UserError, match="not a multiple of the 3 host"):
    data.train_batches(0, 16, 0, 3)
  with pytest.raises(UserError, match="batch size 0"):
    data.eval_batches("train", 0)
  with pytest.raises(UserError, match="there is no split 'test'"):
    data.eval_batches("test", 4)


def _config(**preprocess) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "source_name": "unclip_jax.data.synthetic",
      "source": {"image_size": 16, "num_examples": 8},
      "preprocess": {"image_size": 16} | preprocess,
      "tokenizer": None,
    }
  )


def test_from_config_and_assets(tmp_path):
  config = _config()
  config.source.data_dir = str(tmp_path)
  data = pipeline.DataPipeline.from_config(config, seed=0)
  own = data.assets()["tokenizer.model"]
  assert own == data.tokenizer.path and own.startswith(str(tmp_path))
  # The tokenizer of a frozen model wins.
  folder = tmp_path / "assets"
  folder.mkdir()
  shutil.copy(own, folder)
  data = pipeline.DataPipeline.from_config(
    config, seed=0, assets_dir=str(folder)
  )
  assert data.assets() == {"tokenizer.model": str(folder / "tokenizer.model")}
  next(data.train_batches(0, 2))


def test_enlarged_pictures_are_warned_of(monkeypatch):
  warnings = []
  monkeypatch.setattr(
    pipeline.logging,
    "warning",
    lambda text, *args: warnings.append(text % args),
  )
  pipeline.DataPipeline.from_config(_config(), seed=0)
  assert warnings == []
  pipeline.DataPipeline.from_config(_config(image_size=32), seed=0)
  assert len(warnings) == 1 and "16 px are enlarged to 32" in warnings[0]


def test_closing_ends_the_threads(data):
  before = set(threading.enumerate())
  batches = data.train_batches(0, 4)
  next(batches)
  started = set(threading.enumerate()) - before
  assert started
  batches.close()
  for thread in started:
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_from_config_names_the_nearest_field():
  with pytest.raises(UserError, match=r"config\.data\.preprocess.*image_size"):
    pipeline.DataPipeline.from_config(_config(imge_size=8), seed=0)
  config = _config()
  config.source.hold_out = 0.0
  with pytest.raises(UserError, match=r"config\.data\.source.*holdout"):
    pipeline.DataPipeline.from_config(config, seed=0)
