"""One example: resizing, crops, flips, captions, damaged pictures."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import degradations
from unclip_jax.data.preprocess import (
  Preprocess,
  decode,
  reduced_square,
  square,
  to_float,
)
from unclip_jax.data.source import Record
from unclip_jax.utils.errors import UserError


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def _record(size: int = 64, *, flippable: bool = True) -> Record:
  rng = np.random.default_rng(7)
  # Smooth, so that a resized crop and a cropped resize agree.
  coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
  smooth = Image.fromarray(coarse).resize(
    (size, size), Image.Resampling.BICUBIC
  )
  return Record(
    image=_encode(np.asarray(smooth)),
    code_point="1F438",
    name="frog",
    group="animals",
    captions=("frog", "a frog", "an emoji of a frog"),
    flippable=flippable,
  )


def _train(preprocess: Preprocess, record: Record, seed: int = 0) -> dict:
  return preprocess.train_example(
    preprocess.resize(record), record, np.random.default_rng(seed)
  )


def test_range_is_minus_one_to_one():
  np.testing.assert_array_equal(
    to_float(np.array([0, 255], np.uint8)), np.array([-1, 1], np.float32)
  )


def test_sizes_of_all_pictures():
  preprocess = Preprocess(image_size=64, clip_image_size=24, low_res_size=16)
  record = _record()
  for example in (
    _train(preprocess, record),
    preprocess.eval_example(preprocess.resize(record), record),
  ):
    shapes = {k: v.shape for k, v in example.items() if k != "caption"}
    assert shapes == preprocess.picture_shapes(train=True)
    assert shapes == {
      "image": (64, 64, 3),
      "clip_image": (24, 24, 3),
      "low_res": (16, 16, 3),
    }
    for name in shapes:
      assert example[name].dtype == np.float32
      assert -1 <= example[name].min() < example[name].max() <= 1


def test_resizing_is_antialiased():
  """A fine checkerboard becomes grey, not black or white."""
  board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
  record = Record(
    _encode(np.stack([board] * 3, -1).astype(np.uint8)),
    "x", "x", "x", ("x",), True,
  )  # fmt: skip
  image = Preprocess(image_size=16).resize(record)["image"]
  assert abs(image[4:-4, 4:-4].astype(int) - 127).max() <= 3


@pytest.mark.parametrize("seed", range(6))
def test_low_res_crop_is_aligned_with_the_target_crop(seed):
  preprocess = Preprocess(image_size=64, low_res_size=16, crop_size=32)
  example = _train(preprocess, _record(), seed)
  assert example["image"].shape == (32, 32, 3)
  assert example["low_res"].shape == (8, 8, 3)
  pixels = np.round((example["image"] + 1) * 127.5).astype(np.uint8)
  resized = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)
  expected = to_float(np.asarray(resized))
  # Away from the border, where the filter meets the rest of the picture.
  inner = np.s_[2:-2, 2:-2]
  np.testing.assert_allclose(
    example["low_res"][inner], expected[inner], atol=1.5 / 127.5
  )
  shifted = np.abs(example["low_res"][inner] - expected[2:-2, 3:-1])
  assert shifted.max() > 10 / 127.5  # the test would notice one pixel


def test_crops_reach_every_corner_of_the_low_res_grid():
  record = _record(16)
  preprocess = Preprocess(image_size=16, low_res_size=4, crop_size=8)
  whole = preprocess.eval_example(preprocess.resize(record), record)
  seen = set()
  for seed in range(200):
    image = _train(preprocess, record, seed)["image"]
    seen |= {
      (y, x)
      for y in range(0, 9)
      for x in range(0, 9)
      if np.array_equal(whole["image"][y : y + 8, x : x + 8], image)
    }
  assert seen == {(y, x) for y in (0, 4, 8) for x in (0, 4, 8)}


def test_evaluation_takes_whole_clean_pictures():
  preprocess = Preprocess(
    image_size=64,
    low_res_size=16,
    crop_size=24,
    blur_prob=1.0,
    random_flip=True,
  )
  record = _record()
  example = preprocess.eval_example(preprocess.resize(record), record)
  plain = Preprocess(image_size=64, low_res_size=16, random_caption=False)
  expected = _train(plain, record)
  assert example["caption"] == "frog" == expected["caption"]
  for name in ("image", "low_res"):
    np.testing.assert_array_equal(example[name], expected[name])


def test_blur_touches_low_res_only_and_as_often_as_asked():
  record = _record()
  fields = {"image_size": 64, "low_res_size": 16}
  clean = _train(Preprocess(**fields), record)
  blurred = _train(Preprocess(**fields, blur_prob=1.0), record)
  np.testing.assert_array_equal(blurred["image"], clean["image"])
  np.testing.assert_array_equal(
    blurred["low_res"],
    degradations.gaussian_blur(clean["low_res"], kernel=3, sigma=0.6),
  )
  assert np.abs(blurred["low_res"] - clean["low_res"]).max() > 0.01
  half = Preprocess(**fields, blur_prob=0.5)
  times = sum(
    not np.array_equal(_train(half, record, s)["low_res"], clean["low_res"])
    for s in range(200)
  )
  assert 70 < times < 130


def test_bsr_makes_low_res_anew_from_the_crop():
  record = _record()
  fields = {"image_size": 64, "low_res_size": 16, "crop_size": 32}
  clean = _train(Preprocess(**fields), record)
  degraded = _train(Preprocess(**fields, bsr_prob=1.0), record)
  np.testing.assert_array_equal(degraded["image"], clean["image"])
  assert degraded["low_res"].shape == (8, 8, 3)
  assert np.abs(degraded["low_res"] - clean["low_res"]).max() > 0.02
  again = _train(Preprocess(**fields, bsr_prob=1.0), record)
  np.testing.assert_array_equal(again["low_res"], degraded["low_res"])
  other = _train(Preprocess(**fields, bsr_prob=1.0), record, 1)
  assert np.abs(other["low_res"] - degraded["low_res"]).max() > 0.02


def test_flips_all_pictures_together_and_only_where_allowed():
  fields = {"image_size": 64, "clip_image_size": 32, "low_res_size": 16}
  preprocess = Preprocess(**fields, random_flip=True)
  clean = _train(Preprocess(**fields), _record())
  flipped = 0
  for seed in range(60):
    example = _train(preprocess, _record(), seed)
    mirrored = not np.array_equal(example["image"], clean["image"])
    flipped += mirrored
    for name in ("image", "clip_image", "low_res"):
      expected = clean[name][:, ::-1] if mirrored else clean[name]
      np.testing.assert_array_equal(example[name], expected)
    fixed = _train(preprocess, _record(flippable=False), seed)
    np.testing.assert_array_equal(fixed["image"], clean["image"])
  assert 15 < flipped < 45


def test_captions_are_drawn_from_all_phrasings():
  record = _record()
  preprocess = Preprocess(image_size=16)
  seen = {_train(preprocess, record, seed)["caption"] for seed in range(60)}
  assert seen == set(record.captions)
  fixed = Preprocess(image_size=16, random_caption=False)
  assert {_train(fixed, record, s)["caption"] for s in range(20)} == {"frog"}


def test_an_example_is_a_function_of_its_generator():
  preprocess = Preprocess(
    image_size=64,
    low_res_size=16,
    crop_size=16,
    blur_prob=0.5,
    random_flip=True,
  )
  a, b, c = (_train(preprocess, _record(), seed) for seed in (3, 3, 4))
  assert a["caption"] == b["caption"]
  np.testing.assert_array_equal(a["image"], b["image"])
  np.testing.assert_array_equal(a["low_res"], b["low_res"])
  assert not np.array_equal(a["image"], c["image"])


def test_oblong_and_transparent_pictures():
  pixels = np.zeros((40, 80, 4), np.uint8)
  pixels[:, :20] = 255, 0, 0, 255  # red sides, which are cut off
  record = Record(_encode(pixels), "x", "x", "x", ("x",), True)
  image = Preprocess(image_size=8).resize(record)["image"]
  assert image.shape == (8, 8, 3)
  # Transparent black is white; the filter sees beyond the cut.
  assert (image[:, 2:-2] == 255).all() and image[:, 0].min() < 255


def _random_picture(width: int, height: int) -> Image.Image:
  rng = np.random.default_rng((width, height))
  return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
  "sides",
  [
    (64, 64), (37, 37), (24, 24), (5, 5), (100, 64), (64, 101), (25, 24),
    (24, 27), (383, 24), (7, 100), (1, 16), (3, 2),
  ],
)  # fmt: skip
def test_pictures_are_those_of_transformers(sides):
  transformers = pytest.importorskip("transformers")
  picture = _random_picture(*sides)
  for size in (24, 7):
    processor = transformers.CLIPImageProcessorPil(
      size={"shortest_edge": size},
      crop_size={"height": size, "width": size},
      do_rescale=False,
      do_normalize=False,
    )
    expected = processor(picture)["pixel_values"][0].transpose(1, 2, 0)
    assert expected.dtype == np.uint8
    np.testing.assert_array_equal(square(picture, size), expected)


def test_square_pictures_are_resized_and_nothing_else():
  picture = _random_picture(50, 50)
  expected = picture.resize((24, 24), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(square(picture, 24), expected)
  np.testing.assert_array_equal(reduced_square(picture, 48, 24), expected)
  np.testing.assert_array_equal(square(picture, 50), picture)


@pytest.mark.parametrize("sides", [(88, 64), (64, 119), (640, 400), (70, 30)])
def test_low_res_of_an_oblong_picture_shows_what_the_picture_shows(sides):
  """A ramp along the longer side: its values tell the place."""
  width, height = sides
  ramp = np.broadcast_to(
    np.linspace(0, 255, max(sides))[:: 1 if width > height else -1],
    (min(sides), max(sides)),
  )
  ramp = ramp if width > height else ramp.T
  picture = Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8))
  image = np.asarray(square(picture, 64), float)
  blocks = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
  low_res = np.asarray(reduced_square(picture, 64, 16), float)
  inner = np.s_[2:-2, 2:-2]  # the filter sees beyond the border
  np.testing.assert_allclose(low_res[inner], blocks[inner], atol=1)
  record = Record(_encode(np.asarray(picture)), "x", "x", "x", ("x",), True)
  pictures = Preprocess(image_size=64, low_res_size=16).resize(record)
  np.testing.assert_array_equal(pictures["image"], image)
  np.testing.assert_array_equal(pictures["low_res"], low_res)


def test_of_a_long_strip_the_middle_is_taken():
  strip = np.zeros((1, 10_001, 3), np.uint8)
  strip[:, 5000] = 255
  for pixels in (strip, strip.transpose(1, 0, 2)):
    middle = np.asarray(square(Image.fromarray(pixels), 512))
    assert middle.shape == (512, 512, 3)
    assert (middle[0, 0] == 0).all() and (middle[-1, -1] == 255).all()


def test_damaged_pictures_are_one_line():
  good = _encode(np.zeros((32, 32, 3), np.uint8))
  flipped = bytearray(good)
  flipped[good.index(b"IDAT") + 6] ^= 255
  for bad in (b"", b"<svg/>", good[:60], bytes(flipped)):
    with pytest.raises(UserError, match="'1F438' cannot be decoded") as error:
      decode(bad, name="1F438")
    assert "\n" not in str(error.value)
  gif = _encode(np.zeros((4, 4), np.uint8), "GIF")
  with pytest.raises(UserError, match="cannot be decoded"):
    decode(gif, name="1F438")
  huge = _encode(np.zeros((4001, 4000), bool))
  with pytest.raises(UserError, match="4000 x 4001 pixels"):
    decode(huge, name="1F438")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"low_res_size": 15}, "does not divide"),
    ({"crop_size": 65}, "crop_size"),
    ({"low_res_size": 16, "crop_size": 30}, "multiple"),
    ({"blur_prob": 0.5}, "low_res_size"),
    ({"low_res_size": 16, "blur_prob": 2.0}, "blur_prob"),
    ({"bsr_prob": 0.5}, "low_res_size"),
    ({"blur_kernel": 4}, "odd"),
    ({"blur_sigma": 0.0}, "blur_sigma"),
    ({"context_length": 1}, "context_length"),
    ({"clip_image_size": 0}, "clip_image_size"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    Preprocess(image_size=64, **fields)


@pytest.mark.parametrize("mode", ["I;16", "RGB"])
def test_16_bits_keep_their_upper_half(mode):
  ramp = (np.arange(256, dtype=np.uint16) * 257)[None]
  file = io.BytesIO()
  Image.fromarray(ramp).save(file, "PNG")
  encoded = file.getvalue()
  if mode == "RGB":  # which Pillow reads, but does not write
    header = struct.pack(">IIBBBBB", 256, 1, 16, 2, 0, 0, 0)
    rows = b"\0" + np.repeat(ramp.astype(">u2"), 3).tobytes()
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    encoded = b"\x89PNG\r\n\x1a\n" + b"".join(
      struct.pack(">I", len(data))
      + name
      + data
      + struct.pack(">I", zlib.crc32(name + data))
      for name, data in chunks
    )
  pixels = np.asarray(decode(encoded, name="deep"))
  np.testing.assert_array_equal(pixels[0, :, 0], np.arange(256))


def test_jpegs_are_decoded_smaller_where_that_suffices():
  coarse = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  smooth = Image.fromarray(coarse).resize((256, 384), Image.Resampling.BICUBIC)
  for kind, sizes in (
    ("JPEG", {16: 32, 32: 32, 33: 64, 64: 64, 100: 128, 129: 256, 300: 256}),
    ("PNG", {16: 256}),
  ):
    encoded = _encode(np.asarray(smooth), kind)
    for least, width in sizes.items():
      size = decode(encoded, name="x", least=least).size
      assert size == (width, width * 3 // 2)
  record = dataclasses.replace(
    _record(), image=_encode(np.asarray(smooth), "JPEG")
  )
  plain = Preprocess(image_size=16, clip_image_size=60)
  fast = dataclasses.replace(plain, fast_jpeg=True)
  expected, found = plain.resize(record), fast.resize(record)
  for name, image in expected.items():
    difference = found[name].astype(int) - image
    assert 0 < np.abs(difference).mean() < 2
    assert np.abs(difference).max() < 16
