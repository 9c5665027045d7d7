"""Preparing: what is left out, and the same files however it is done."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import prepared, preparing
from unclip_jax.utils.errors import UserError

SHAPES = dict(image_size=32, num_train=280, num_held_out=20)


def _plan(name="shapes", fields=SHAPES, **options):
  options = {"records_per_shard": 10, **options}
  return preparing.Plan(f"unclip_jax.data.{name}", fields, **options)


def _files(folder):
  return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """What a preparation without interruption gives."""
  out = tmp_path_factory.mktemp("whole")
  preparing.prepare(_plan(), str(out), num_processes=2)
  return _files(out)


@pytest.fixture
def pictures(tmp_path):
  """Writes pictures into a folder, each with its name for a caption."""
  root = tmp_path / "pictures"
  root.mkdir()

  def write(name, colour=(0, 0, 0), size=(40, 40), caption=None, **save):
    path = root / name
    noise = np.random.default_rng(list(colour)).integers(0, 255, (*size, 3))
    Image.fromarray(noise.astype(np.uint8)).save(path, **save)
    text = name if caption is None else caption
    path.with_suffix(".txt").write_text(text)
    return path

  write.root = root
  return write


def _prepared_folder(write, out, **options):
  fields = dict(folder=str(write.root), data_dir=str(out), holdout=0.0)
  plan = _plan("folder", fields, splits=["train"], **options)
  index = preparing.prepare(plan, str(out), num_processes=1)
  records = prepared.Source(str(out)).records("train")
  return index, {r.code_point: r for r in records}


def test_nothing_but_what_belongs_there_is_left(whole):
  shards = [f"train-{i:05d}-of-00028.array_record" for i in range(28)]
  shards += [f"validation-{i:05d}-of-00002.array_record" for i in range(2)]
  assert sorted(whole) == sorted([*shards, "index.json", "tokenizer.model"])


def _is_running(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  except OSError:
    return False
  return state.split()[0] != "Z"


def test_killed_and_called_again_it_makes_the_same_files(tmp_path, whole):
  out = tmp_path / "out"
  fields = [f"--source.{name}={value}" for name, value in SHAPES.items()]
  command = [
    *(sys.executable, "-m", "unclip_jax.prepare_data"),
    *("--source=unclip_jax.data.shapes", *fields),
    *(f"--out={out}", "--records_per_shard=10", "--processes=2"),
  ]
  for count in (3, 9):
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None:
      if len(list(out.glob(".parts/*.json"))) > count:
        tasks = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}")
        children = (tasks / "children").read_text().split()
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    # The processes that it started end with it.
    assert len(children) >= 2
    deadline = time.monotonic() + 30
    while any(_is_running(child) for child in children):
      assert time.monotonic() < deadline
      time.sleep(0.01)
    assert not (out / "index.json").exists()
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "train: 280 records in 28 files" in done.stdout
  assert _files(out) == whole


@pytest.mark.parametrize("stop_at", ["a shard", "the index", "the end"])
def test_stopped_as_shards_are_put_in_place(tmp_path, monkeypatch, stop_at):
  module, name, count = {
    "a shard": (preparing.os, "replace", 3),
    "the index": (preparing.files, "write_atomically", 1),
    "the end": (preparing.shutil, "rmtree", 0),
  }[stop_at]
  real, calls = getattr(module, name), []

  def stop(*args, **kwargs):
    # The first call of the first two is that for the plan.
    if len(calls) == count:
      raise KeyboardInterrupt
    calls.append(args)
    return real(*args, **kwargs)

  plan = _plan(records_per_shard=100)
  expected = tmp_path / "expected"
  preparing.prepare(plan, str(expected), num_processes=2)
  out = tmp_path / "out"
  with monkeypatch.context() as patch:
    patch.setattr(module, name, stop)
    with pytest.raises(KeyboardInterrupt):
      preparing.prepare(plan, str(out), num_processes=2)
  assert (out / "index.json").exists() == (stop_at == "the end")
  preparing.prepare(plan, str(out), num_processes=2)
  assert _files(out) == _files(expected)


def test_processes_do_not_matter(tmp_path, whole):
  preparing.prepare(_plan(), str(tmp_path), num_processes=1)
  assert _files(tmp_path) == whole


@pytest.mark.parametrize("damage", ["cut off", "gone", "changed"])
def test_a_finished_folder_is_checked_and_mended(tmp_path, whole, damage):
  for name, data in whole.items():
    (tmp_path / name).write_bytes(data)
  path = tmp_path / "validation-00000-of-00002.array_record"
  before = (tmp_path / "index.json").stat().st_mtime_ns
  preparing.prepare(_plan(), str(tmp_path))
  assert (tmp_path / "index.json").stat().st_mtime_ns == before
  if damage == "gone":
    path.unlink()
  else:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data[:100] if damage == "cut off" else data)
  preparing.prepare(_plan(), str(tmp_path), num_processes=1)
  assert _files(tmp_path) == whole


def test_another_plan_is_refused(tmp_path, whole):
  for name, data in whole.items():
    (tmp_path / name).write_bytes(data)
  other = _plan(min_size=8)
  with pytest.raises(UserError, match=r"otherwise .*min_size: None -> 8"):
    preparing.prepare(other, str(tmp_path))
  (tmp_path / "index.json").unlink()
  parts = tmp_path / ".parts"
  parts.mkdir()
  (parts / "plan.json").write_text(json.dumps({"source_name": "x"}))
  with pytest.raises(UserError, match="prepared otherwise"):
    preparing.prepare(other, str(tmp_path))


def test_two_do_not_prepare_one_folder(tmp_path):
  with (
    preparing._locked(str(tmp_path)),
    pytest.raises(UserError, match="another process prepares"),
  ):
    preparing.prepare(_plan(), str(tmp_path))


def test_what_is_left_out_is_counted(pictures, tmp_path):
  pictures("whole.png")
  pictures("same.webp", lossless=True)
  pictures("silent.png", (4, 0, 0), caption=" ")
  pictures("small.png", (1, 0, 0), (40, 7))
  pictures("oblong.png", (2, 0, 0), (9, 28))
  cut = pictures("cut.jpg", (3, 0, 0))
  os.truncate(cut, 700)
  index, records = _prepared_folder(
    pictures, tmp_path / "out", min_size=8, max_aspect_ratio=3.0
  )
  assert index.left_out["train"] == {
    "duplicate": 1, "too small": 1, "too oblong": 1, "broken picture": 1,
  }  # fmt: skip
  assert index.left_out["before"] == {"no caption": 1}
  # Of the same pictures the first one stays, in the order of the files.
  assert records.keys() == {"same.webp"}
  text = preparing.report(index)
  assert "train: 1 records in 1 files" in text
  assert all(
    f"left out: 1 ({reason})" in text
    for reason in (
      "no caption",
      "duplicate",
      "too small",
      "too oblong",
      "broken picture",
    )
  )
  index, records = _prepared_folder(
    pictures, tmp_path / "all", deduplicate=False
  )
  assert len(records) == 4 and set(index.left_out["train"]) == {
    "broken picture"
  }


def test_duplicates_are_found_in_other_shards_and_splits(tmp_path):
  """The same scenes in two splits: those of the first one stay."""
  plan = _plan(splits=["train", "all"], records_per_shard=64)
  index = preparing.prepare(plan, str(tmp_path), num_processes=1)
  assert prepared.count(index.splits["train"]) == 280
  assert prepared.count(index.splits["all"]) == 20
  assert index.left_out == {"train": {}, "all": {"duplicate": 280}}
  # Some of its shards are empty, and read all the same.
  assert min(shard.num_records for shard in index.splits["all"]) == 0
  index = dataclasses.replace(index, splits={"train": index.splits["all"]})
  (tmp_path / "index.json").write_text(index.to_json())
  keys = {r.code_point for r in prepared.Source(str(tmp_path)).records("all")}
  assert keys == {f"validation-{i}" for i in range(20)}


def test_large_pictures_are_reduced_and_others_kept(pictures, tmp_path):
  pictures("small.png")
  pictures("large.png", (1, 0, 0), (80, 120))
  pictures("large.jpg", (2, 0, 0), (200, 100))
  _, records = _prepared_folder(pictures, tmp_path / "out", max_size=40)
  kept = (pictures.root / "small.png").read_bytes()
  assert records["small.png"].image == kept
  for name, kind, size in (
    ("large.png", "PNG", (60, 40)),
    ("large.jpg", "JPEG", (40, 80)),
  ):
    picture = Image.open(io.BytesIO(records[name].image))
    assert (picture.format, picture.size) == (kind, size)


def test_nothing_left_is_an_error(pictures, tmp_path):
  pictures("a.png")
  with pytest.raises(UserError, match=r"no record is left: 1 \(too small\)"):
    _prepared_folder(pictures, tmp_path / "out", min_size=99)


def test_a_split_that_is_not_there_is_an_error(pictures, tmp_path):
  pictures("a.png")
  fields = dict(folder=str(pictures.root), holdout=0.0)
  plan = _plan("folder", fields)
  with pytest.raises(UserError, match=r"'validation' .* empty.*--splits"):
    preparing.prepare(plan, str(tmp_path / "out"))


@pytest.mark.parametrize(
  "options",
  [{"records_per_shard": 0}, {"max_size": 0}, {"max_aspect_ratio": 0.5}],
)
def test_wrong_options(options):
  with pytest.raises(UserError, match="must"):
    dataclasses.replace(_plan(), **options)


def test_the_program_refuses_what_it_does_not_take(run_python):
  program = ["-m", "unclip_jax.prepare_data"]
  for arguments, message in (
    (["--source=unclip_jax.data.shapes"], "--out=FOLDER is required"),
    (["--source=unclip_jax.data.shape", "--out=x"], "'unclip_jax.data.shapes'"),
    (
      ["--source=unclip_jax.data.shapes", "--out=x", "--source.image=3"],
      "did you mean 'image_size'",
    ),
    (["--source=unclip_jax.data.shapes", "--image_size=3"], "for the emoji"),
  ):
    done = run_python(*program, *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
