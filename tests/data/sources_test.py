"""What holds for every source of captioned pictures, tidy or hostile."""

import dataclasses
import hashlib
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import written
from tests.data.written import Item, encode
from unclip_jax.data import (
  captioned,
  folder,
  huggingface,
  parquet,
  pipeline,
  prepared,
  preparing,
  synthetic,
  tar,
  tfds,
)
from unclip_jax.data.preprocess import Preprocess
from unclip_jax.utils.errors import UserError

every_source = pytest.mark.parametrize(
  "module", written.WRITERS, ids=lambda m: m.__name__.rpartition(".")[2]
)
every_format = pytest.mark.parametrize(
  "module",
  [m for m in written.WRITERS if m is not prepared],
  ids=lambda m: m.__name__.rpartition(".")[2],
)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
  return synthetic.Source(str(tmp_path_factory.mktemp("data"))).tokenizer_path()


@pytest.fixture
def pipe(tokenizer_path):
  def make(source, **fields):
    return pipeline.DataPipeline(
      source, Preprocess(image_size=8), 0, tokenizer_path, **fields
    )

  return make


@every_source
def test_records_are_what_was_written(module, tmp_path):
  items = [written.item(i) for i in range(30)]
  source = written.write(module, tmp_path / "x", items)
  records = source.records("all")
  found = {r.image: r for r in records}
  assert len(found) == len(records) == 30
  for item in items:
    record = found[item.image]
    assert record.captions == item.captions and record.name == item.captions[0]
    assert not record.flippable and not record.arrays
  assert len({r.code_point for r in records}) == 30
  assert records[-1] == records[29]
  with pytest.raises(IndexError):
    records[30]
  with pytest.raises(UserError, match="there is no split 'x'"):
    source.records("x")


@every_format
def test_splits_part_the_records_in_a_mixed_order(module, tmp_path):
  items = [written.item(i) for i in range(40)]
  source = written.write(module, tmp_path / "x", items, holdout=25.0)
  keys = {
    split: [r.code_point for r in source.records(split)]
    for split in ("train", "validation", "all")
  }
  assert 4 <= len(keys["validation"]) <= 18
  assert set(keys["train"]).isdisjoint(keys["validation"])
  assert sorted(keys["train"] + keys["validation"]) == sorted(keys["all"])
  assert keys["all"] != sorted(keys["all"])
  in_order = source.records("all").in_file_order()
  assert in_order._places.tolist() == list(range(40))
  assert sorted(r.code_point for r in in_order) == sorted(keys["all"])


@every_format
def test_the_tokenizer_is_trained_on_the_captions(module, tmp_path):
  items = [written.item(i) for i in range(20)]
  paths = {
    written.write(
      module, tmp_path / str(i), items, holdout=holdout
    ).tokenizer_path()
    for i, holdout in enumerate((0.0, 50.0))
  }
  (path,) = paths
  assert path.startswith(str(tmp_path / "data"))
  other = [written.item(i) for i in range(19)]
  source = written.write(module, tmp_path / "other", other)
  assert source.tokenizer_path() != path


@every_format
def test_a_prepared_folder_holds_the_same(module, tmp_path):
  items = [written.item(i) for i in range(30)]
  fields = written.WRITERS[module](tmp_path / "x", items)
  fields |= dict(data_dir=str(tmp_path), holdout=20.0)
  source = module.Source(**fields)
  plan = preparing.Plan(module.__name__, fields, records_per_shard=8)
  preparing.prepare(plan, str(tmp_path / "out"), num_processes=1)
  copy = prepared.Source(str(tmp_path / "out"))
  for split in ("train", "validation"):
    assert {r.code_point: r for r in copy.records(split)} == {
      r.code_point: r for r in source.records(split)
    }


def _chunks(*chunks):
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data))
    + name
    + data
    + struct.pack(">I", zlib.crc32(name + data))
    for name, data in chunks
  )


def _bomb():
  header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
  data = zlib.compress(bytes(1000))
  return _chunks((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))


def _animation(kind):
  frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
  return encode(frames[0], kind, save_all=True, append_images=frames[1:])


RED = (255, 0, 0)
# Name -> a picture whose pixels are all known, and these.
ODD = {
  "cmyk": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
  "alpha": (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (255,) * 3),
  "16 bits": (encode(np.full((8, 8), 0x8055, np.uint16)), (128,) * 3),
  "palette": (encode(Image.new("RGB", (8, 8), RED).convert("P")), RED),
  "bits": (encode(Image.new("1", (8, 8), 1)), (255,) * 3),
  "animated webp": (_animation("WEBP"), RED),
  "animated png": (_animation("PNG"), RED),
  "one pixel": (encode(Image.new("RGB", (1, 1), RED)), RED),
  "wrong suffix": (encode(Image.new("RGB", (8, 8), RED)), RED),
  "long caption": (encode(Image.new("RGB", (8, 8), (1, 0, 0))), (1, 0, 0)),
  "odd caption": (encode(Image.new("RGB", (8, 8), (2, 0, 0))), (2, 0, 0)),
}
CAPTIONS = {
  "long caption": "x" * 10**6,
  "odd caption": "a\0b \u202eright to left\u202c \ud83d \x1b[31m",
}
BROKEN = {
  "empty": (b"", "broken picture"),
  "text": (b"no picture", "broken picture"),
  "bomb": (_bomb(), "over 16 megapixels"),
  "gif": (_animation("GIF"), "broken picture"),
  "cut": (written.item(0).image[:99], "broken picture"),
  "no caption": (encode(Image.new("RGB", (8, 8))), "no caption"),
}


@every_source
def test_hostile_records_are_used_or_counted(module, tmp_path, pipe):
  items = [
    Item(name, image, (CAPTIONS.get(name, name),), "jpg")
    for name, (image, _) in ODD.items()
  ]
  items += [
    Item(name, image, () if name == "no caption" else (name,))
    for name, (image, _) in BROKEN.items()
  ]
  fields = {} if module is prepared else {"holdout": 0.0}
  source = written.write(module, tmp_path / "x", items, **fields)
  data = pipe(source, max_broken=1.0)
  count = data.num_examples("train")
  (batch,) = data.eval_batches("train", count)
  expected = {}
  for name, (_, colour) in ODD.items():
    caption = captioned.clean([CAPTIONS.get(name, name)])[0]
    if module in (parquet, huggingface, tfds):
      caption = caption.encode("utf-8", "replace").decode()
    expected[caption] = colour
  names = [data.example_info(i, "train")["name"] for i in range(count)]
  # A prepared folder holds what it is given.
  if module is prepared:
    names = [captioned.clean([name])[0] for name in names]
  assert set(names) == set(expected)
  for name, image in zip(names, batch["image"]):
    pixels = (image + 1) * 127.5
    np.testing.assert_allclose(
      pixels, np.broadcast_to(expected[name], pixels.shape), atol=2
    )
  counts = {}
  for _, reason in BROKEN.values():
    counts[reason] = counts.get(reason, 0) + 1
  if module is folder:  # which looks at headers and captions beforehand
    counts = {"broken picture": 1}
  assert data.broken_records("train") == counts
  assert np.isfinite(next(data.train_batches(0, 32))["image"]).all()


def _digest(batch):
  text = hashlib.sha256()
  for name, array in sorted(batch.items()):
    text.update(name.encode() + array.tobytes())
  return text.hexdigest()


@pytest.mark.parametrize(
  "module", [tar, prepared], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_a_stream_with_holes_resumes_on_any_hosts(module, tmp_path, pipe):
  """Every reader opens the source anew, as a killed run does."""
  items = [written.item(i) for i in range(40)]
  for i in (0, 3, 4, 39):
    image = b"" if i == 3 else items[i].image[:99]
    items[i] = Item(items[i].name, image, items[i].captions)
  fields = {} if module is prepared else {"holdout": 0.0}
  source = written.write(module, tmp_path / "x", items, **fields)

  def stream(start, stop, hosts):
    readers = []
    for host in range(hosts):
      data = pipe(dataclasses.replace(source), max_broken=0.2)
      batches = data.train_batches(start, 16, host, hosts)
      readers.append(list(itertools.islice(batches, stop - start)))
    return [
      _digest({k: np.concatenate([b[k] for b in parts]) for k in parts[0]})
      for parts in zip(*readers)
    ]

  whole = stream(0, 8, 1)
  assert len(set(whole)) == 8  # 3.2 epochs
  for hosts in (1, 2, 4):
    assert stream(0, 3, hosts) + stream(3, 8, hosts) == whole


def vars_of(source):
  import dataclasses

  return {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
