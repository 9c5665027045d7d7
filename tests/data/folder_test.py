"""Folders of captioned pictures, tidy and hostile."""

import csv
import io
import json
import logging as std_logging
import os
import warnings

import numpy as np
import pytest
from absl import logging
from PIL import Image

from unclip_jax.data import (
  folder,
  pipeline,
  preprocess,
  synthetic,
  tokenizers,
)
from unclip_jax.data.source import BrokenRecord
from unclip_jax.utils.errors import UserError

NAMES = [f"{i:02}" for i in range(30)]


def write(root, name, text=None, *, size=(9, 7), colour=(200, 30, 30), **save):
  """Saves a picture, and its caption beside it."""
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(save.pop("mode", "RGB"), size, colour).save(path, **save)
  if text is not None:
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
  return path


@pytest.fixture
def pictures(tmp_path):
  root = tmp_path / "pictures"
  for i, name in enumerate(NAMES):
    suffix = ("png", "jpg", "jpeg", "webp", "PNG")[i % 5]
    group = "cats/" if i % 2 else ""
    write(root, f"{group}{name}.{suffix}", f"picture {name}", colour=(i, 0, 0))
  return root


def read(root, split="all", **fields):
  return list(folder.Source(str(root), **fields).records(split))


def captions(root, **fields):
  return {r.code_point: r.captions for r in read(root, holdout=0.0, **fields)}


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


def test_records_are_the_files(pictures, messages):
  records = read(pictures)
  assert sorted(r.name for r in records) == [f"picture {n}" for n in NAMES]
  for record in records:
    assert record.image == (pictures / record.code_point).read_bytes()
    assert record.captions == (record.name,) and not record.flippable
    assert record.group == ("cats" if "cats" in record.code_point else "")
  assert all(r.flippable for r in read(pictures, flippable=True))
  assert not messages


def test_splits_part_the_records_and_stay_where_pictures_are_added(pictures):
  parts = {s: read(pictures, s, holdout=30.0) for s in ("train", "validation")}
  names = {k: [r.code_point for r in v] for k, v in parts.items()}
  every = [r.code_point for r in read(pictures)]
  assert set(names["train"]).isdisjoint(names["validation"])
  assert sorted(names["train"] + names["validation"]) == sorted(every)
  assert 3 <= len(names["validation"]) <= 15
  # The first few of all are a fair sample.
  assert every != sorted(every)
  assert set(every[: len(names["validation"])]) & set(names["train"])
  write(pictures, "new/one.png", "one more")
  for split, before in names.items():
    after = [r.code_point for r in read(pictures, split, holdout=30.0)]
    assert [n for n in after if n != "new/one.png"] == before
  assert len(read(pictures, "train", holdout=0.0)) == len(every) + 1
  with pytest.raises(UserError, match="holdout"):
    read(pictures, "validation", holdout=0.0)
  with pytest.raises(UserError, match="there is no split 'test'"):
    read(pictures, "test")


def test_a_text_file_holds_a_phrasing_a_line(tmp_path):
  write(tmp_path, "a.png", "\ufeff a  red\tball \n\n another ball\n")
  assert captions(tmp_path) == {"a.png": ("a red ball", "another ball")}


ROWS = [("a.png", "an a"), ("./b/c.jpg", "a c"), ("a.png", "again"), ("x", "y")]


def test_metadata_as_lines_or_as_a_table(tmp_path):
  write(tmp_path, "a.png", "not this one")
  write(tmp_path, "b/c.jpg")
  lines = [json.dumps({"file_name": n, "text": t, "n": 1}) for n, t in ROWS]
  broken = ["{", "[]", "{}", '{"file_name": 3, "text": 4}', "[" * 99999, ""]
  (tmp_path / "metadata.jsonl").write_text("\n".join([*broken, *lines, "\0"]))
  expected = {"a.png": ("an a", "again"), "b/c.jpg": ("a c",)}
  assert captions(tmp_path) == expected

  with open(tmp_path / "metadata.csv", "w", newline="") as file:
    rows = csv.writer(file)
    too_long = ("a.png", "x" * (csv.field_size_limit() + 1))
    rows.writerows([("file_name", "text"), ("a.png",), too_long, *ROWS])
  with pytest.raises(UserError, match="both"):
    captions(tmp_path)
  (tmp_path / "metadata.jsonl").unlink()
  assert captions(tmp_path) == expected


def test_what_cannot_be_used_is_left_out_and_counted_once(pictures, messages):
  expected = captions(pictures)
  write(pictures, "no caption.png")
  write(pictures, "empty.png", " \n\0\t\n")
  write(pictures, "huge.png", "huge", size=(4001, 4000), mode="L", colour=0)
  (pictures / "text.png").write_text("no picture")
  (pictures / "text.txt").write_text("a caption")
  (pictures / "nothing.jpg").write_bytes(b"")
  (pictures / "nothing.txt").write_text("a caption")
  (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
  (pictures / "gone.txt").write_text("a caption")
  write(pictures, ".hidden.png", "hidden")
  write(pictures, ".cache/a.png", "hidden")
  source = folder.Source(str(pictures))
  for split in ("all", "train", "validation"):
    source.records(split)
  assert {r.code_point: r.captions for r in source.records("all")} == expected
  assert len(messages) == 1
  assert "36 pictures" in messages[0]
  assert "2 have no caption and 4 no readable header (gone.png" in messages[0]


def test_what_is_damaged_later_is_broken(pictures, tmp_path):
  records = folder.Source(str(pictures)).records("all")
  first, second = (pictures / records[i].code_point for i in (0, 1))
  first.unlink()
  os.truncate(second, 2**27 + 1)
  for i in (0, 1):
    with pytest.raises(BrokenRecord) as error:
      records[i]
    assert error.value.reason == "unreadable"
  assert records[2].image


@pytest.mark.parametrize("content", ["empty", "no captions", "no pictures"])
def test_a_folder_of_nothing_is_refused(tmp_path, content):
  if content == "no captions":
    write(tmp_path, "a.png")
  if content == "no pictures":
    (tmp_path / "a.png").write_text("x")
    (tmp_path / "a.txt").write_text("x")
  with pytest.raises(UserError, match=r"nothing to train on: \d pictures"):
    read(tmp_path)
  with pytest.raises(UserError, match="there is no folder"):
    read(tmp_path / "nowhere")


def test_links_are_followed_but_not_in_circles(pictures, tmp_path):
  plain = captions(pictures)
  (pictures / "loop").symlink_to(pictures)
  (pictures / "cats" / "up").symlink_to("..")
  assert captions(pictures) == plain
  write(tmp_path / "elsewhere", "dog.png", "a dog")
  (pictures / "linked").symlink_to(tmp_path / "elsewhere")
  assert captions(pictures) == {**plain, "linked/dog.png": ("a dog",)}


def test_names_of_any_kind(tmp_path):
  composed, apart = "\u00e9.png", "e\u0301.png"
  write(tmp_path, apart)
  weird = os.fsdecode(b"\xff.png")
  write(tmp_path, weird)
  rows = [(composed, "an accent"), (weird, "no text"), ("../x.png", "outside")]
  text = "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows)
  (tmp_path / "metadata.jsonl").write_text(text)
  assert captions(tmp_path) == {apart: ("an accent",), weird: ("no text",)}


def test_odd_pictures_and_captions_make_batches(tmp_path):
  root = tmp_path / "pictures"
  write(root, "dot.png", "a", size=(1, 1))
  write(root, "cmyk.jpg", "x" * 10**6, mode="CMYK", colour=(0, 255, 255, 0))
  write(root, "strip.webp", "a strip", size=(2000, 1))
  write(root, "see-through.png", "中文 🎈", mode="RGBA", colour=(0, 0, 0, 0))
  write(root, "deep.png", "deep", mode="I;16", colour=0)
  data = pipeline.DataPipeline(
    folder.Source(str(root), data_dir=str(tmp_path), holdout=0.0),
    preprocess.Preprocess(image_size=8, context_length=12),
    seed=0,
  )
  batch = next(data.train_batches(0, 10))
  assert batch["image"].shape == (10, 8, 8, 3)
  assert np.abs(batch["image"]).max() <= 1
  by_name = {
    data.example_info(int(i), "train")["code_point"]: image
    for i, image in zip(batch["index"], batch["image"])
  }
  assert (by_name["see-through.png"] == 1).all()
  red, green, blue = by_name["cmyk.jpg"].mean((0, 1))
  assert red > 0.9 and green < -0.9 and blue < -0.9
  batches = [next(data.train_batches(0, 4)) for _ in range(2)]
  np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
  assert data.source.tokenizer_path() == data.tokenizer.path
  again = folder.Source(str(root), data_dir=str(tmp_path), holdout=50.0)
  assert again.tokenizer_path() == data.tokenizer.path


def test_half_a_character_is_no_obstacle(tmp_path):
  write(tmp_path, "a.png")
  row = {"file_name": "a.png", "text": "half \ud83d of it"}
  (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
  source = folder.Source(str(tmp_path), data_dir=str(tmp_path), holdout=0.0)
  tokenizer = tokenizers.load(source.tokenizer_path())
  (record,) = source.records("train")
  text_tokens, _ = tokenizer.encode(record.captions, 32)
  assert tokenizer.decode(text_tokens) == ["half of it"]


def test_the_pipeline_gives_what_it_gives_of_the_same_pictures(tmp_path):
  """Any source may be written to a folder, and read back from there."""
  original = synthetic.Source(data_dir=str(tmp_path), num_examples=8)
  for record in original.records("all"):
    path = tmp_path / "copy" / f"{record.code_point}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(record.image)
    path.with_suffix(".txt").write_text("\n".join(record.captions))
  copied = folder.Source(str(tmp_path / "copy"), holdout=0.0)
  process = preprocess.Preprocess(image_size=16)

  def examples(source):
    data = pipeline.DataPipeline(source, process, 0, original.tokenizer_path())
    (batch,) = data.eval_batches("all", 8)
    names = [data.example_info(i, "all")["name"] for i in range(8)]
    return {
      n: (x, t)
      for n, x, t in zip(names, *map(batch.get, ("image", "text_tokens")))
    }

  expected = examples(original)
  found = examples(copied)
  assert found.keys() == expected.keys()
  for name, arrays in expected.items():
    for a, b in zip(found[name], arrays):
      np.testing.assert_array_equal(a, b)


def test_pictures_are_turned_as_their_exif_says():
  image = Image.new("RGB", (20, 10), "white")
  image.paste("black", (0, 0, 10, 10))
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  file = io.BytesIO()
  image.save(file, "PNG", exif=exif)
  turned = preprocess.decode(file.getvalue(), name="turned")
  assert turned.size == (10, 20)
  pixels = np.asarray(turned)
  assert (pixels[:10] == 0).all() and (pixels[10:] == 255).all()

  file = io.BytesIO()
  image.save(file, "JPEG", exif=b"Exif\0\0junk" * 9)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert preprocess.decode(file.getvalue(), name="junk").size == (20, 10)
