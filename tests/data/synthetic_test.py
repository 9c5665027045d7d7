"""The procedural source."""

import io

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import pipeline, synthetic
from unclip_jax.data.preprocess import Preprocess
from unclip_jax.utils.errors import UserError


def _picture(record) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"))


def test_pictures_and_captions_agree():
  records = synthetic.Source(num_examples=96).records("all")
  by_name = {r.name: _picture(r).astype(int) for r in records}
  assert len(by_name) == 96
  assert len({r.image for r in records}) == 96
  for name, picture in by_name.items():
    assert picture.shape == (32, 32, 3)
    assert (picture[0, 0] == 255).all(), name
  red, green, blue = (
    by_name[f"large {colour} square"][16, 16]
    for colour in ("red", "green", "blue")
  )
  assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
  small, large = (
    (by_name[f"{size} red circle"].min(-1) < 128).sum()
    for size in ("small", "large")
  )
  # Areas of discs of diameters 0.4 and 0.8.
  assert small == pytest.approx(np.pi * (0.2 * 32) ** 2, rel=0.1)
  assert large == pytest.approx(np.pi * (0.4 * 32) ** 2, rel=0.05)
  assert (by_name["large red ring"][16, 16] == 255).all()
  triangle = by_name["large red triangle"].min(-1) < 128
  assert triangle[8].sum() < triangle[22].sum()  # its tip is on top


def test_splits():
  source = synthetic.Source()
  train, validation = source.records("train"), source.records("validation")
  assert (len(train), len(validation)) == (58, 6)
  assert {r.name for r in train} | {r.name for r in validation} == {
    r.name for r in source.records("all")
  }
  everything = synthetic.Source(holdout=0.0)
  assert len(everything.records("train")) == 64
  with pytest.raises(UserError, match="holdout"):
    everything.records("validation")
  with pytest.raises(UserError, match="num_examples"):
    synthetic.Source(num_examples=97)


def test_batches_hold_captions_as_tokens(tmp_path):
  data = pipeline.DataPipeline(
    source=synthetic.Source(data_dir=str(tmp_path)),
    preprocess=Preprocess(image_size=16, context_length=16),
    seed=0,
  )
  path = data.tokenizer.path
  batch = next(data.train_batches(0, 8))
  texts = data.tokenizer.decode(batch["text_tokens"])
  for index, text in zip(batch["index"], texts, strict=True):
    info = data.example_info(int(index), "train")
    assert text in info["captions"]
    assert info["tokenizer"].decode(batch["text_tokens"]) == texts
  again = synthetic.Source(data_dir=str(tmp_path)).tokenizer_path()
  assert again == path
