"""Prepared folders: what is written is read, and damage is noticed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from unclip_jax.data import pipeline, prepared, preparing, synthetic
from unclip_jax.data.preprocess import Preprocess
from unclip_jax.data.source import BrokenRecord, Record
from unclip_jax.utils.errors import UserError

RECORD = Record(
  image=b"\x89PNG\0",
  code_point="a/\udcff.png",
  name="half \ud83d of \u202e it\0",
  group="a",
  captions=("half \ud83d of \u202e it\0", "中文 🎈"),
  flippable=True,
  info={"style": "noto", "box": [1, 2.5, None], "mask": np.eye(2, dtype=bool)},
  arrays={
    "image_embed": np.linspace(-1, 1, 6, dtype=np.float16),
    "codes": np.arange(6, dtype=np.int32).reshape(2, 3),
    "grade": np.float32(0.5),
  },
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """40 records and the folder that was made of them, in shards of 16."""
  folder = tmp_path_factory.mktemp("prepared")
  fields = dict(data_dir=str(folder), num_examples=40)
  plan = preparing.Plan(
    "unclip_jax.data.synthetic", fields, records_per_shard=16
  )
  preparing.prepare(plan, str(folder / "out"), num_processes=1)
  return synthetic.Source(**fields), folder / "out"


@pytest.fixture
def folder(original, tmp_path):
  """A copy to damage."""
  return shutil.copytree(original[1], tmp_path / "copy")


def _pipeline(folder, **fields):
  source = prepared.Source(str(folder))
  return pipeline.DataPipeline(source, Preprocess(image_size=8), 0, **fields)


def test_what_is_encoded_is_decoded():
  found = prepared.decode(prepared.encode(RECORD))
  mask = found.info["mask"]
  np.testing.assert_array_equal(mask, RECORD.info["mask"])
  rest = {**RECORD.info, "mask": None}
  assert dataclasses.replace(
    found, info={**found.info, "mask": None}
  ) == dataclasses.replace(RECORD, info=rest)
  assert found.arrays.keys() == RECORD.arrays.keys()
  for name, array in RECORD.arrays.items():
    np.testing.assert_array_equal(found.arrays[name], array, strict=True)


def test_info_that_does_not_fit_is_left_out():
  record = dataclasses.replace(RECORD, info={"a": object(), "b": 2**70, "c": 1})
  assert prepared.decode(prepared.encode(record)).info == {"c": 1}


@pytest.mark.parametrize("dtype", [object, "U3"])
def test_arrays_that_do_not_fit_are_refused(dtype):
  arrays = {"x": np.zeros(2, dtype)}
  with pytest.raises(UserError, match="array 'x' is of the type"):
    prepared.encode(dataclasses.replace(RECORD, arrays=arrays))


def test_damaged_bytes_are_an_error():
  data = prepared.encode(RECORD)
  for damaged in (b"", data[:-1], data[:40], b"\xc1" + data, b"\x91\x01"):
    with pytest.raises(ValueError):
      prepared.decode(damaged)


def test_the_folder_holds_what_the_source_holds(original):
  source, folder = original
  for split in ("train", "validation", "all"):
    expected = source.records(split)
    found = prepared.Source(str(folder)).records(split)
    assert len(found) == len(expected)
    assert {r.code_point: r for r in found} == {
      r.code_point: r for r in expected
    }
    assert found[-1] == found[len(found) - 1]
  # The tokenizer is the source's, and works.
  data = _pipeline(folder)
  with open(source.tokenizer_path(), "rb") as file:
    expected = file.read()
  assert (folder / "tokenizer.model").read_bytes() == expected
  assert data.batch_spec(4).keys() == next(data.train_batches(0, 4)).keys()


def test_the_order_is_mixed_and_fixed(original):
  records = prepared.Source(str(original[1])).records("train")
  positions = [records._order[i] for i in range(len(records))]
  assert sorted(positions) == list(range(36))
  assert np.mean(np.diff(positions) == 1) < 0.2
  # The first numbers of the published generator, from the seed 0.
  expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
  assert prepared._mixed(3).tolist() == expected


@pytest.mark.parametrize("damage", ["cut off", "cut to nothing", "gone"])
def test_shards_that_are_not_whole_are_noticed_at_once(folder, damage):
  path = folder / "train-00001-of-00003.array_record"
  if damage == "gone":
    path.unlink()
  else:
    os.truncate(path, 0 if "nothing" in damage else path.stat().st_size // 2)
  source = prepared.Source(str(folder))
  with pytest.raises(UserError, match=r"damaged or missing \(0 of 16 records"):
    source.records("train")
  assert len(source.records("validation")) == 4


def test_a_flipped_bit_costs_one_record(folder):
  path = folder / "train-00000-of-00003.array_record"
  data = bytearray(path.read_bytes())
  data[data.index(b"\x89PNG") + 300] ^= 16
  path.write_bytes(data)
  records = prepared.Source(str(folder)).records("train")
  broken = []
  for i in range(len(records)):
    try:
      records[i]
    except BrokenRecord as e:
      assert e.reason == "damaged record" and "\n" not in str(e)
      broken.append(i)
  assert len(broken) == 1
  data = _pipeline(folder)
  assert len(list(data.eval_batches("train", 6))) == 6
  assert data.broken_records("train") == {"damaged record": 1}


def test_a_wrong_index_is_an_error_of_one_line(folder, tmp_path):
  path = folder / "index.json"
  fields = json.loads(path.read_text())
  for text, message in (
    (json.dumps({**fields, "format": 2}), "has the format 2"),
    (
      json.dumps({**fields, "splits": {"train": [{"file": "x"}]}}),
      "is damaged",
    ),
    (path.read_text()[:99], "is damaged"),
    ("[]", "is damaged"),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      prepared.Source(str(folder)).records("train")
  with pytest.raises(UserError, match="no prepared dataset"):
    prepared.Source(str(tmp_path)).records("train")


def test_unknown_and_empty_splits(original):
  source = prepared.Source(str(original[1]))
  with pytest.raises(UserError, match=r"'test'.* train, validation, all"):
    source.records("test")


def test_arrays_of_the_folder_are_in_the_batch(tmp_path):
  records = [
    dataclasses.replace(
      record, arrays={"image_embed": np.full(4, i, np.float16)}
    )
    for i, record in enumerate(synthetic.Source(str(tmp_path)).records("all"))
  ]
  file = prepared.shard_file("train", 0, 1)
  shard = prepared.write_shard(
    str(tmp_path / file), map(prepared.encode, records)
  )
  shapes = {"image_embed": prepared.ArrayShape((4,), np.dtype(np.float16))}
  index = prepared.Index({}, {"train": [shard]}, {"train": {}}, shapes)
  (tmp_path / "index.json").write_text(index.to_json())
  data = _pipeline(
    tmp_path,
    tokenizer_path=synthetic.Source(str(tmp_path)).tokenizer_path(),
  )
  batch = next(data.train_batches(0, 4))
  spec = data.batch_spec(4)
  assert batch.keys() == spec.keys()
  assert spec["image_embed"].shape == (4, 4)
  assert batch["image_embed"].dtype == spec["image_embed"].dtype == np.float32
