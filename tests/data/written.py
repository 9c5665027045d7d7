"""The same captioned pictures, written in every format that a source reads."""

import dataclasses
import io
import json
import tarfile

import numpy as np
from PIL import Image

from unclip_jax.data import (
  folder,
  huggingface,
  parquet,
  prepared,
  tar,
  tfds,
)
from unclip_jax.data.source import Record


@dataclasses.dataclass(frozen=True)
class Item:
  """What is written of a sample; `suffix` is that of a file of its own."""

  name: str
  image: bytes
  captions: tuple[str, ...]
  suffix: str = "png"


def encode(pixels, kind="PNG", **save):
  """A picture as bytes; `pixels` is an array or a PIL picture."""
  if isinstance(pixels, np.ndarray):
    pixels = Image.fromarray(pixels)
  file = io.BytesIO()
  pixels.save(file, kind, **save)
  return file.getvalue()


def item(i, side=8):
  """One of many that all differ."""
  rng = np.random.default_rng(i)
  pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
  return Item(f"{i:04}", encode(pixels), (f"picture {i}", f"number {i}"))


def to_folder(root, items):
  root.mkdir()
  with open(root / "metadata.jsonl", "w", encoding="utf-8") as file:
    for x in items:
      name = f"{x.name}.{x.suffix}"
      (root / name).write_bytes(x.image)
      for caption in x.captions:
        file.write(json.dumps({"file_name": name, "text": caption}) + "\n")
  return dict(folder=str(root))


def write_tar(path, items):
  """The first caption in .txt, where it can be so, and all in .json."""
  with tarfile.open(path, "w") as file:
    for x in items:
      first = "".join(x.captions[:1]).encode("utf-8", "ignore")
      if first.decode() != "".join(x.captions[:1]):
        first = b""
      fields = json.dumps({"caption": x.captions, "other": 1}).encode()
      for suffix, data in (
        (x.suffix, x.image),
        ("txt", first),
        ("json", fields),
      ):
        info = tarfile.TarInfo(f"{x.name}.{suffix}")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))


def to_tars(root, items):
  root.mkdir()
  for i in range(2):
    write_tar(root / f"{i:05}.tar", items[i::2])
  return dict(path=str(root))


def _table(items):
  import pyarrow

  texts = [
    [c.encode("utf-8", "replace").decode() for c in x.captions] for x in items
  ]
  images = [{"bytes": x.image, "path": f"{x.name}.{x.suffix}"} for x in items]
  raw = [[{"raw": text, "id": 1} for text in each] for each in texts]
  return pyarrow.table({"image": images, "n": texts, "sentences": raw})


def to_parquet(root, items):
  import pyarrow.parquet

  root.mkdir()
  for i in range(2):
    table = _table(items[i::2])
    path = root / f"part-{i}.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=7)
  return dict(path=str(root), captions=("caption", "sentences/raw"))


def to_huggingface(root, items):
  import pyarrow

  root.mkdir(parents=True)
  names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
  for i, name in enumerate(names):
    table = _table(items[i::2])
    with pyarrow.ipc.new_stream(str(root / name), table.schema) as file:
      file.write_table(table, 5)
  fields = {"_data_files": [{"filename": name} for name in names]}
  (root / "state.json").write_text(json.dumps(fields))
  return dict(folder=str(root), captions=("sentences/raw",))


def to_tfds(root, items, splits=("train",)):
  """With the features of coco_captions; one split after the other."""
  import tensorflow_datasets as tfds_lib

  tfds_lib.disable_progress_bar()
  features = tfds_lib.features

  class CocoCaptions(
    tfds_lib.core.GeneratorBasedBuilder, skip_registration=True
  ):
    VERSION = tfds_lib.core.Version("1.1.0")
    pkg_dir_path = None

    def _info(self):
      return tfds_lib.core.DatasetInfo(
        builder=self,
        features=features.FeaturesDict(
          {
            "image": features.Image(),
            "image/filename": features.Text(),
            "image/id": np.int64,
            "captions": features.Sequence({"text": np.str_, "id": np.int64}),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {
        split: self._generate_examples(items[i :: len(splits)])
        for i, split in enumerate(splits)
      }

    def _generate_examples(self, items):
      for i, x in enumerate(items):
        texts = [c.encode("utf-8", "replace").decode() for c in x.captions]
        yield (
          i,
          {
            "image": io.BytesIO(x.image),
            "image/filename": x.name,
            "image/id": i,
            "captions": [{"text": text, "id": 1} for text in texts],
          },
        )

  builder = CocoCaptions(data_dir=str(root), file_format="array_record")
  builder.download_and_prepare()
  return dict(folder=str(builder.data_path))


def to_prepared(root, items):
  root.mkdir()
  records = [
    Record(x.image, x.name, "".join(x.captions[:1]), "", x.captions, False)
    for x in items
  ]
  shards = [
    prepared.write_shard(
      str(root / prepared.shard_file("train", i, 2)),
      map(prepared.encode, records[i::2]),
    )
    for i in range(2)
  ]
  index = prepared.Index({}, {"train": shards}, {"train": {}}, {})
  (root / "index.json").write_text(index.to_json())
  return dict(folder=str(root))


WRITERS = {
  folder: to_folder,
  tar: to_tars,
  parquet: to_parquet,
  huggingface: to_huggingface,
  tfds: to_tfds,
  prepared: to_prepared,
}


def write(module, root, items, **fields):
  """The source `module` over `items`, written to `root`."""
  fields |= WRITERS[module](root, items)
  if module is prepared:
    return prepared.Source(fields["folder"])
  return module.Source(data_dir=str(root.parent / "data"), **fields)
