"""Tables: parquet, what `datasets` saves, and TFDS.

The folders that are written here are as the library datasets 5.2 writes them;
it was tried once on its own (plain, sharded, selected, shuffled, DatasetDict).
"""

import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from tests.data import written
from unclip_jax.data import captioned, huggingface, parquet, tfds
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError

ITEMS = [written.item(i) for i in range(30)]


def _write_parquet(path, **columns):
  pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _records(source, split="train"):
  return {r.code_point: r for r in source.records(split)}


@pytest.mark.parametrize(
  ("value", "path", "expected"),
  [
    ("a", "", ["a"]),
    (b"a", "", ["a"]),
    ("a", "x", []),
    ({"x": ["a", "b"]}, "x", ["a", "b"]),
    ([{"x": "a"}, {"x": "b", "y": "c"}, {}], "x", ["a", "b"]),
    ({"x": [{"y": {"z": "a"}}]}, "x/y/z", ["a"]),
    ({"x/y": "a", "x": {"y": "b"}}, "x/y", ["a"]),
    ({"x": 3, "y": None}, "x", []),
    (None, "x", []),
  ],
)
def test_texts_are_found_at_places(value, path, expected):
  assert captioned.texts_at(value, path) == expected


def test_plain_bytes_and_several_columns(tmp_path):
  _write_parquet(
    tmp_path / "x.parquet",
    picture=[x.image for x in ITEMS],
    caption=[x.captions[0] for x in ITEMS],
    more=[[x.captions[1], "", None] for x in ITEMS],
  )
  source = parquet.Source(
    path=str(tmp_path / "*.parquet"),
    image="picture",
    captions=("caption", "more", "nowhere"),
    holdout=0.0,
  )
  found = _records(source)
  assert found.keys() == {f"x/{i}" for i in range(30)}
  for i, item in enumerate(ITEMS):
    assert found[f"x/{i}"].image == item.image
    assert found[f"x/{i}"].captions == item.captions


def test_missing_cells_are_broken(tmp_path):
  _write_parquet(
    tmp_path / "x.parquet",
    image=[{"bytes": None, "path": "x.png"}, {"bytes": b"x", "path": ""}, None],
    text=["a", None, "c"],
  )
  source = parquet.Source(path=str(tmp_path), holdout=0.0)
  reasons = {}
  for i in range(3):
    with pytest.raises(BrokenRecord) as error:
      source.records("train")[i]
    reasons[error.value.reason] = reasons.get(error.value.reason, 0) + 1
  assert reasons == {"unreadable": 2, "no caption": 1}


def test_columns_that_are_not_there_are_named(tmp_path):
  _write_parquet(tmp_path / "x.parquet", image=[b""], label=["a"])
  with pytest.raises(UserError, match=r"columns image, label: name those"):
    parquet.Source(path=str(tmp_path)).records("train")


@pytest.mark.parametrize("size", [0, 3, 400])
def test_a_damaged_table_is_an_error_of_one_line(tmp_path, size):
  fields = {
    module: written.WRITERS[module](tmp_path / str(i), ITEMS)
    for i, module in enumerate((parquet, huggingface))
  }
  for module, suffix in ((parquet, "*.parquet"), (huggingface, "*.arrow")):
    folder = pathlib.Path(
      fields[module].get("path") or fields[module]["folder"]
    )
    os.truncate(next(iter(sorted(folder.glob(suffix)))), size)
    with pytest.raises(UserError, match="damaged") as error:
      module.Source(**fields[module]).records("train")
    assert "\n" not in str(error.value)


def test_damage_inside_of_a_parquet_file_breaks_records(tmp_path):
  _write_parquet(
    tmp_path / "x.parquet",
    image=[x.image for x in ITEMS],
    text=["a"] * len(ITEMS),
  )
  path = tmp_path / "x.parquet"
  source = parquet.Source(path=str(path), holdout=0.0)
  records = source.records("train")
  data = bytearray(path.read_bytes())
  data[4:400] = bytes(396)
  path.write_bytes(data)
  with pytest.raises(BrokenRecord) as error:
    records[0]
  assert error.value.reason == "unreadable"


def test_splits_of_a_saved_dict(tmp_path):
  for split, items in (("train", ITEMS[:20]), ("test", ITEMS[20:])):
    fields = written.to_huggingface(tmp_path / "x" / split, items)
  names = {"splits": ["train", "test"]}
  (tmp_path / "x" / "dataset_dict.json").write_text(json.dumps(names))
  fields |= dict(folder=str(tmp_path / "x"))
  source = huggingface.Source(**fields, holdout=30.0)
  splits = {s: _records(source, s) for s in ("train", "validation", "all")}
  assert splits["all"].keys() == {f"train/{i}" for i in range(20)}
  assert {**splits["train"], **splits["validation"]} == splits["all"]
  assert _records(source, "test").keys() == {f"test/{i}" for i in range(10)}


def test_a_folder_of_something_else_is_an_error(tmp_path):
  with pytest.raises(UserError, match=r"no state\.json"):
    huggingface.Source(str(tmp_path)).records("train")
  with pytest.raises(UserError, match=r"no dataset of TFDS"):
    tfds.Source(str(tmp_path)).records("train")
  (tmp_path / "state.json").write_text("{")
  with pytest.raises(UserError, match="is damaged"):
    huggingface.Source(str(tmp_path)).records("train")
  (tmp_path / "dataset_info.json").write_text("{")
  with pytest.raises(UserError, match="is damaged"):
    tfds.Source(str(tmp_path)).records("train")


def test_splits_of_tfds_are_its_own(tmp_path):
  fields = written.to_tfds(tmp_path, ITEMS, ("train", "val", "restval"))
  source = tfds.Source(**fields, holdout=50.0)
  splits = {
    s: {r.name for r in source.records(s)}
    for s in ("train", "validation", "restval", "all")
  }
  for i, split in enumerate(("train", "validation", "restval")):
    assert splits[split] == {x.captions[0] for x in ITEMS[i::3]}
  assert splits["all"] == splits["train"] | splits["validation"]


def test_a_shard_of_tfds_that_is_cut_off_is_noticed(tmp_path):
  fields = written.to_tfds(tmp_path, ITEMS)
  (path,) = pathlib.Path(fields["folder"]).glob("*.array_record*")
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match=r"\(0 of 30 records\): build"):
    tfds.Source(**fields).records("train")


def test_tfrecord_is_refused(tmp_path):
  fields = written.to_tfds(tmp_path, ITEMS[:2])
  path = pathlib.Path(fields["folder"]) / "dataset_info.json"
  info = json.loads(path.read_text())
  info["fileFormat"] = "tfrecord"
  path.write_text(json.dumps(info))
  with pytest.raises(UserError, match="not in ArrayRecord"):
    tfds.Source(**fields).records("train")
