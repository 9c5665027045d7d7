"""Tars: which files are a sample, damage, and the index."""

import dataclasses
import io
import json
import logging as std_logging
import os
import tarfile

import pytest
from absl import logging

from tests.data import written
from unclip_jax.data import tar
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError

PNG = written.item(0).image


@pytest.fixture
def messages():
  """What is logged, as text."""
  found = []
  handler = std_logging.Handler()
  handler.emit = lambda record: found.append(record.getMessage())
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  yield found
  logger.removeHandler(handler)


def write(path, files, **options):
  with tarfile.open(path, "w", **options) as file:
    for name, data in files:
      data = data.encode() if isinstance(data, str) else data
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))


def captions(path, **fields):
  source = tar.Source(
    path=str(path), data_dir=str(path) + ".data", holdout=0.0, **fields
  )
  return {r.code_point: r.captions for r in source.records("train")}


def test_files_of_one_name_are_a_sample(tmp_path):
  path = tmp_path / "x.tar"
  files = [
    ("a.txt", "a\n  second \n\n"),
    ("./b/a.json", json.dumps({"text": ["one", "two"], "caption": "zero"})),
    ("a.jpg", PNG),
    ("c.seg.png", PNG),
    ("c.cls", "7"),
    ("./b/a.PNG", PNG),
    ("c.webp", PNG),
    ("c.txt", "a c"),
    ("c.json", json.dumps({"caption": "a c", "text": 3})),
    ("d.txt", "no picture"),
    ("e" * 150 + ".jpeg", PNG),
    ("e" * 150 + ".txt", "long name"),
  ]
  write(path, files)
  expected = {
    "x/a": ("a", "second"),
    "x/b/a": ("zero", "one", "two"),
    "x/c": ("a c",),
    f"x/{'e' * 150}": ("long name",),
  }
  assert captions(path) == expected
  expected["x/b/a"] = ("one", "two")
  assert captions(path, captions=("text",)) == expected
  for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
    files[-2:] = [("e" * 90 + ".png", PNG), ("e" * 90 + ".txt", "long name")]
    write(path, files, format=form)
    assert captions(path).keys() >= {"x/a", f"x/{'e' * 90}"}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("[" * 99999, ()),
    ("{", ()),
    ("3", ()),
    ('[{"caption": "in a list"}]', ("in a list",)),
    ('{"caption": null, "text": {"caption": "x"}}', ()),
    ('{"caption": "half \\ud83d"}', ("half \ud83d",)),
  ],
)
def test_odd_json(tmp_path, text, expected):
  write(tmp_path / "x.tar", [("a.png", PNG), ("a.json", text)])
  source = tar.Source(path=str(tmp_path), data_dir=str(tmp_path), holdout=0.0)
  (records,) = [source.records("train")]
  if expected:
    assert records[0].captions == expected
  else:
    with pytest.raises(BrokenRecord) as error:
      records[0]
    assert error.value.reason == "no caption"


def test_what_is_before_a_cut_is_used(tmp_path, messages):
  items = [written.item(i) for i in range(12)]
  path = tmp_path / "x.tar"
  written.write_tar(path, items)
  size = path.stat().st_size
  whole = captions(path)
  assert len(whole) == 12 and not messages
  counts = []
  for cut in range(size - 10_240, 0, -700):
    os.truncate(path, cut)
    messages.clear()
    try:
      found = captions(path)
    except UserError as e:
      assert "nothing to train on" in str(e)
      found = {}
    for key, texts in found.items():
      assert texts == whole[key][: len(texts)]  # its last file may be cut off
    counts.append(len(found))
    told = [m for m in messages if m.startswith(str(path))]
    assert len(told) == 1 and ("cut off" in told[0] or "to its end" in told[0])
    assert "1 (the end of a tar)" in messages[-1]
  assert counts == sorted(counts, reverse=True) and counts[-1] == 0


def test_other_tars_make_up_for_one_that_is_none(tmp_path, messages):
  written.write_tar(tmp_path / "good.tar", [written.item(0)])
  (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
  (tmp_path / "empty.tar").write_bytes(b"")
  with tarfile.open(tmp_path / "packed.tar", "w:gz"):
    pass
  assert captions(tmp_path).keys() == {"good/0000"}
  assert len(messages) == 4
  messages.clear()
  captions(tmp_path)  # now from the index that was kept
  assert len(messages) == 1 and ": 3 (the end of a tar)" in messages[0]
  (tmp_path / "good.tar").unlink()
  with pytest.raises(UserError, match="unpacked first"):
    captions(tmp_path)


def test_the_index_is_kept_until_a_tar_changes(tmp_path, monkeypatch):
  read = []
  samples = tar._samples
  monkeypatch.setattr(tar, "_samples", lambda p: read.append(p) or samples(p))
  path = tmp_path / "x.tar"
  written.write_tar(path, [written.item(i) for i in range(3)])
  first = captions(path)
  assert captions(path) == first and len(read) == 1
  written.write_tar(path, [written.item(i) for i in range(4)])
  assert len(captions(path)) == 4 and len(read) == 2
  (cache, *_) = (tmp_path / "x.tar.data" / "tar").iterdir()
  for cache in (tmp_path / "x.tar.data" / "tar").iterdir():
    os.truncate(cache, 100)
  assert len(captions(path)) == 4 and len(read) == 3


def test_a_tar_that_is_cut_off_later_is_broken(tmp_path):
  path = tmp_path / "x.tar"
  written.write_tar(path, [written.item(0)])
  source = tar.Source(path=str(path), data_dir=str(tmp_path), holdout=0.0)
  records = source.records("train")
  for change in (lambda: os.truncate(path, 600), path.unlink):
    change()
    with pytest.raises(BrokenRecord) as error:
      records[0]
    assert error.value.reason == "unreadable"


def test_keys_do_not_depend_on_how_the_tars_are_named(tmp_path, monkeypatch):
  (tmp_path / "data").mkdir()
  for i in range(2):
    written.write_tar(tmp_path / f"data/{i}.tar", [written.item(i)])
  monkeypatch.chdir(tmp_path)
  source = tar.Source(path="data", data_dir=str(tmp_path), holdout=0.0)
  for path in ("data", str(tmp_path / "data"), "data/*.tar", "./data/[01].tar"):
    other = dataclasses.replace(source, path=path)
    keys = {r.code_point for r in other.records("train")}
    assert keys == {"0/0000", "1/0001"}
  with pytest.raises(UserError, match="there is no file 'nowhere/"):
    dataclasses.replace(source, path="nowhere/*.tar").records("train")
