"""Metric writers: what a run leaves on disk, and failures it survives."""

import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto import event_pb2

from unclip_jax.utils import metric_writers


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _events(folder):
  """The events of all TensorBoard files; a record is length, crc, data, crc."""
  events = []
  for path in sorted(folder.rglob("*tfevents*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def _tags(events):
  return {
    (value.tag.split("/text")[0], event.step)
    for event in events
    for value in event.summary.value
  }


def test_all_kinds(tmp_path, warnings):
  writer = metric_writers.create_writer(tmp_path)
  writer.write_hparams({"optim": {"lr": 0.1}, "betas": (1, 2), "none": None})
  writer.write_scalars(3, {"loss": jnp.float32(0.5), "n": np.int64(2), "z": 1})
  writer.write_texts(3, {"caption": "a frog"})
  writer.write_histograms(3, {"w": jnp.arange(5)})
  writer.write_images(3, {"eval/x": jnp.zeros((3, 4, 5, 3))})
  writer.close()
  assert warnings == []
  assert _rows(tmp_path) == [
    {"step": 3, "loss": 0.5, "n": 2, "z": 1},
    {"step": 3, "caption": "a frog"},
  ]
  tags = _tags(_events(tmp_path / "tb"))
  for name in ("loss", "n", "z", "caption", "w"):
    assert (name, 3) in tags
  assert ("eval/x", 3) in tags or ("eval/x/0", 3) in tags
  events = _events(tmp_path / "tb")
  assert any(b"optim.lr" in event.SerializeToString() for event in events)


def test_results_are_numbers_pictures_and_texts(tmp_path, warnings):
  writer = metric_writers.create_writer(tmp_path)
  results = {"x": 0.5, "grid": np.zeros((4, 4, 3)), "examples": "| a | b |"}
  metric_writers.write_results(writer, 7, results)
  writer.close()
  assert warnings == []
  assert _rows(tmp_path) == [
    {"step": 7, "x": 0.5},
    {"step": 7, "examples": "| a | b |"},
  ]
  picture = PIL.Image.open(tmp_path / "samples" / "grid_00000007.png")
  assert picture.size == (4, 4)
  assert ("examples", 7) in _tags(_events(tmp_path / "tb"))


def test_rows_are_on_disk_at_once(tmp_path):
  writer = metric_writers.create_writer(tmp_path)
  writer.write_scalars(1, {"loss": 1.0})
  assert _rows(tmp_path) == [{"step": 1, "loss": 1.0}]
  writer.close()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_pictures_become_a_grid(tmp_path, dtype):
  pictures = np.zeros((3, 2, 4, 3), dtype)
  pictures[0] = 255 if dtype == np.uint8 else 1.0
  pictures[2, ..., 1] = 128 if dtype == np.uint8 else 128 / 255
  writer = metric_writers.create_writer(tmp_path)
  writer.write_images(7, {"eval/a b": pictures})
  writer.close()
  (path,) = (tmp_path / "samples").iterdir()
  assert path.name == "eval_a_b_00000007.png"
  grid = np.asarray(PIL.Image.open(path))
  assert grid.shape == (4, 8, 3)
  assert (grid[:2, :4] == 255).all() and (grid[:2, 4:] == 0).all()
  assert (grid[2:, :4] == [0, 128, 0]).all() and (grid[2:, 4:] == 0).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a cast of NaN
def test_floats_out_of_range_and_grey_pictures(tmp_path):
  picture = np.array([[-1.0, 2.0], [np.nan, 0.5]], np.float32)[..., None]
  writer = metric_writers.PngWriter(tmp_path)
  writer.write_images(0, {"grey": picture})
  grey = np.asarray(PIL.Image.open(tmp_path / "grey_00000000.png"))
  np.testing.assert_array_equal(grey, [[0, 255], [0, 128]])


def test_resume_leaves_no_duplicates(tmp_path, warnings):
  writer = metric_writers.create_writer(tmp_path)
  for step in range(6):
    writer.write_scalars(step, {"loss": step})
  writer.close()
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 2, "lo')  # killed while writing
  writer = metric_writers.create_writer(tmp_path)
  writer.truncate_after(3)
  for step in range(4, 7):
    writer.write_scalars(step, {"loss": -step})
  writer.close()
  assert warnings == []
  assert [(r["step"], r["loss"]) for r in _rows(tmp_path)] == [
    *[(0, 0), (1, 1), (2, 2), (3, 3)],
    *[(4, -4), (5, -5), (6, -6)],
  ]
  # TensorBoard drops what earlier files say from the step of this event on.
  starts = [
    event.step
    for event in _events(tmp_path / "tb")
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  assert starts == [4]


def test_torn_row_is_cut_off_at_opening(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "l')
  writer = metric_writers.create_writer(tmp_path)
  writer.write_scalars(3, {"loss": 1})
  writer.close()
  assert [row["step"] for row in _rows(tmp_path)] == [1, 3]


def test_failing_writer_warns_once(tmp_path, warnings):
  class Broken(metric_writers.MetricWriter):
    def write_scalars(self, step, scalars):
      raise OSError("disk full")

  good = metric_writers.JsonLinesWriter(tmp_path / "metrics.jsonl")
  writer = metric_writers.MultiWriter([Broken(), good])
  for step in range(3):
    writer.write_scalars(step, {"loss": step})
  writer.close()
  assert len(_rows(tmp_path)) == 3
  (warning,) = warnings
  assert "Broken" in warning and "disk full" in warning


def test_unwritable_workdir_stops_no_run(tmp_path, warnings):
  for name in ("metrics.jsonl", "samples"):
    (tmp_path / name).mkdir()
  (tmp_path / "samples").rmdir()
  (tmp_path / "samples").write_text("a file")
  writer = metric_writers.create_writer(tmp_path)
  for step in range(2):
    writer.write_scalars(step, {"loss": 1})
    writer.write_images(step, {"x": np.zeros((1, 2, 2, 3))})
  writer.close()
  assert len(warnings) == 2


def test_clu_takes_over_where_tensorflow_is(tmp_path, monkeypatch, warnings):
  calls = []

  class SummaryWriter:
    def __init__(self, logdir):
      calls.append(("open", logdir))

    def write_scalars(self, step, scalars):
      calls.append((step, dict(scalars)))

    def close(self):
      calls.append("close")

  find_spec = metric_writers.importlib.util.find_spec
  monkeypatch.setattr(
    metric_writers.importlib.util,
    "find_spec",
    lambda name: name == "tensorflow" or find_spec(name),
  )
  fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
  monkeypatch.setitem(sys.modules, "clu.metric_writers", fake)
  monkeypatch.setattr("clu.metric_writers", fake, raising=False)
  writer = metric_writers.create_writer(tmp_path)
  writer.truncate_after(0)
  writer.write_scalars(1, {"loss": 2})
  writer.close()
  assert calls == [("open", str(tmp_path / "tb")), (1, {"loss": 2}), "close"]
  assert warnings == []


def test_broken_tensorflow_falls_back(tmp_path, monkeypatch, warnings):
  monkeypatch.setattr(
    metric_writers.importlib.util, "find_spec", lambda name: True
  )
  monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
  writer = metric_writers.create_writer(tmp_path)
  writer.write_scalars(1, {"loss": 2})
  writer.close()
  assert ("loss", 1) in _tags(_events(tmp_path / "tb"))
  assert len(warnings) == 1 and "tensorboardX" in warnings[0]
