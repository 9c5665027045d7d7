"""From an encoded picture and its captions to the arrays of one example.

Here, and nowhere else, pictures get their range [-1, 1]. All resizing is
Pillow's bicubic, which is antialiased: the filter grows with the reduction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from unclip_jax.data import degradations
from unclip_jax.data.source import BrokenRecord, Record
from unclip_jax.utils.errors import UserError

# Pillow itself only warns below 179 megapixels, which is a gigabyte decoded.
_MAX_PIXELS = 16_000_000
_MAX_ASPECT = 16
_FORMATS = ("PNG", "JPEG", "WEBP")
# Reasons of BrokenRecord.
BROKEN = "broken picture"
TOO_LARGE = "over 16 megapixels"
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow raises of files that are not whole.
_DAMAGED = (OSError, ValueError, SyntaxError, *_BOMB)


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """How one example is made; the fields of `config.data.preprocess`.

  In training, augmentation, crop and blur are drawn from the example's own
  generator. In evaluation there is none of them: whole pictures, the
  canonical caption.

  Fields:
    image_size: side of `image` in pixels.
    context_length: L, tokens of a caption with begin and end of sequence.
    clip_image_size: side of `clip_image`, the whole picture as the CLIP sees
      it; None: there is none.
    low_res_size: side of `low_res`, an upsampler's conditioning; divides
      image_size. None: there is none.
    crop_size: side of the square that is cut out of `image` at random in
      training, with the same square of `low_res`; a multiple of image_size /
      low_res_size. None: whole pictures.
    random_flip: mirror half of the training pictures, except where a caption
      speaks of left and right or the picture shows text.
    random_caption: draw one of a picture's captions in training, else always
      take the canonical one.
    blur_prob: probability of blurring `low_res` in training. The paper gives
      none; DALLE2-pytorch uses 0.5.
    blur_kernel: width of the blur in pixels (unCLIP: 3).
    blur_sigma: its standard deviation in pixels (unCLIP: 0.6).
    fast_jpeg: decode JPEGs at a half, a quarter or an eighth of their size (by
      the DCT, as libjpeg does) where that is no smaller than any picture that
      is asked for. Pixels then differ by a few levels from those that CLIP's
      own preprocessing gives.
    bsr_prob: probability that `low_res` is made from `image` by the BSR
      degradation (data/degradations.py) instead, in training; 1 for unCLIP's
      second upsampler.
  """

  image_size: int
  context_length: int = 32
  clip_image_size: int | None = None
  low_res_size: int | None = None
  crop_size: int | None = None
  random_flip: bool = False
  random_caption: bool = True
  blur_prob: float = 0.0
  blur_kernel: int = 3
  blur_sigma: float = 0.6
  bsr_prob: float = 0.0
  fast_jpeg: bool = False

  def __post_init__(self):
    where = "config.data.preprocess"
    for name in ("image_size", "clip_image_size", "low_res_size", "crop_size"):
      size = getattr(self, name)
      if size is not None and size < 1:
        raise UserError(f"{where}.{name} must be positive, not {size}")
    if self.context_length < 2:
      raise UserError(f"{where}.context_length must be 2 or more")
    if self.low_res_size is not None and self.image_size % self.low_res_size:
      raise UserError(
        f"{where}.low_res_size {self.low_res_size} does not divide image_size"
        f" {self.image_size}"
      )
    if self.crop_size is not None and (
      self.crop_size > self.image_size or self.crop_size % self._factor
    ):
      raise UserError(
        f"{where}.crop_size {self.crop_size} must be at most image_size"
        f" {self.image_size} and a multiple of image_size / low_res_size"
        f" = {self._factor}"
      )
    for name in ("blur_prob", "bsr_prob"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise UserError(f"{where}.{name} must be in [0, 1]")
      if getattr(self, name) and self.low_res_size is None:
        raise UserError(
          f"{where}.{name} needs low_res_size: it changes low_res"
        )
    if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
      raise UserError(
        f"{where}.blur_kernel must be odd, not {self.blur_kernel}"
      )
    if self.blur_sigma <= 0:
      raise UserError(f"{where}.blur_sigma must be positive")

  @property
  def _factor(self) -> int:
    return self.image_size // (self.low_res_size or self.image_size)

  def picture_shapes(self, *, train: bool) -> dict[str, tuple[int, int, int]]:
    """Name -> [H, W, C] of an example's pictures."""
    sizes = self._sizes()
    if train and self.crop_size is not None:
      sizes["image"] = self.crop_size
      if "low_res" in sizes:
        sizes["low_res"] = self.crop_size // self._factor
    return {name: (size, size, 3) for name, size in sizes.items()}

  def resize(self, record: Record) -> dict[str, np.ndarray]:
    """The part that is the same in every epoch: decoded and resized pictures.

    Of an oblong picture the middle is taken, see `square`; `low_res` shows what
    `image` shows.

    Returns:
      image, clip_image, low_res (those that there are), uint8 [S, S, 3].

    Raises:
      BrokenRecord: the picture cannot be decoded.
    """
    sizes = self._sizes()
    picture = decode(
      record.image,
      name=record.code_point,
      least=max(sizes.values()) if self.fast_jpeg else None,
    )
    low_res_size = sizes.pop("low_res", None)
    pictures = {name: square(picture, size) for name, size in sizes.items()}
    if low_res_size is not None:
      pictures["low_res"] = reduced_square(
        picture, self.image_size, low_res_size
      )
    return {name: np.asarray(x) for name, x in pictures.items()}

  def train_example(
    self,
    pictures: dict[str, np.ndarray],
    record: Record,
    rng: np.random.Generator,
  ) -> dict[str, np.ndarray | str]:
    """One augmented example, a function of its arguments alone.

    Args:
      pictures: as `resize` returns them.
      record: for its captions.
      rng: the example's own generator. Every draw is made whether it is used
        or not, so that switching one augmentation leaves the others as they
        were.

    Returns:
      The pictures float32 in [-1, 1], and "caption".
    """
    flip = rng.random() < 0.5 and self.random_flip and record.flippable
    blur = rng.random() < self.blur_prob
    caption = int(rng.random() * len(record.captions)) * self.random_caption
    corner = rng.random(2)
    degrade = rng.random() < self.bsr_prob
    if flip:
      pictures = {k: v[:, ::-1] for k, v in pictures.items()}
    example = {k: to_float(v) for k, v in pictures.items()}
    if blur and not degrade:
      example["low_res"] = degradations.gaussian_blur(
        example["low_res"], kernel=self.blur_kernel, sigma=self.blur_sigma
      )
    if self.crop_size is not None:
      example |= self._crop(example, corner)
    if degrade:
      example["low_res"] = degradations.bsr(example["image"], self._factor, rng)
    return {**example, "caption": record.captions[caption]}

  def eval_example(
    self, pictures: dict[str, np.ndarray], record: Record
  ) -> dict[str, np.ndarray | str]:
    """One whole, clean example with the canonical caption."""
    example = {k: to_float(v) for k, v in pictures.items()}
    return {**example, "caption": record.captions[0]}

  def _sizes(self) -> dict[str, int]:
    sizes = {
      "image": self.image_size,
      "clip_image": self.clip_image_size,
      "low_res": self.low_res_size,
    }
    return {name: size for name, size in sizes.items() if size is not None}

  def _crop(
    self, example: dict[str, np.ndarray], corner: np.ndarray
  ) -> dict[str, np.ndarray]:
    """The same square of `image` and `low_res`; `corner` is in [0, 1)^2."""
    factor, size = self._factor, self.crop_size
    # On the low-resolution grid, where both pictures have whole pixels.
    steps = (self.image_size - size) // factor + 1
    y, x = (int(c * steps) for c in corner)
    crops = {"image": (y * factor, x * factor, size)}
    if "low_res" in example:
      crops["low_res"] = (y, x, size // factor)
    return {
      name: example[name][top : top + side, left : left + side]
      for name, (top, left, side) in crops.items()
    }


def to_float(picture: np.ndarray) -> np.ndarray:
  """uint8 in [0, 255] to float32 in [-1, 1]."""
  values = picture.astype(np.float32)
  values /= np.float32(127.5)  # in place: fresh memory costs more than this
  values -= np.float32(1.0)
  return values


def to_pil(image: np.ndarray) -> Image.Image:
  """A PIL picture from [H, W, 3] in [0, 1], rounded to bytes."""
  return Image.fromarray(np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8))


def decode(
  encoded: bytes, *, name: str, least: int | None = None
) -> Image.Image:
  """Decodes a picture of at most 16 megapixels, transparency on white.

  It is turned as its EXIF data says.

  Args:
    encoded: PNG, JPEG or WEBP.
    name: what messages call it.
    least: pixels that suffice for the shorter side; JPEGs are then decoded at
      the smallest size that libjpeg offers from there on.

  Returns:
    An RGB picture.

  Raises:
    BrokenRecord: it is damaged, too large, or of another format.
  """
  picture = open_picture(io.BytesIO(encoded), name=name)
  try:
    if least is not None:
      picture.draft(None, (least, least))  # does nothing to other formats
    picture.load()
  except _DAMAGED as e:
    raise _broken(name, e) from e
  # Whatever junk in EXIF data raises: the picture then stays as it lies.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(picture, in_place=True)
  if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
    high = np.asarray(picture) >> 8
    picture = Image.fromarray(high.astype(np.uint8))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  # Each copy of a large picture costs as much as a tenth of its decoding.
  return picture if picture.mode == "RGB" else picture.convert("RGB")


def open_picture(file: IO[bytes], *, name: str) -> Image.Image:
  """Opens a picture; reads its header, but no pixels.

  Args:
    file: PNG, JPEG or WEBP.
    name: what messages call it.

  Raises:
    BrokenRecord: it is damaged, of more than 16 megapixels, or of another
      format.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      picture = Image.open(file, formats=_FORMATS)
  except _DAMAGED as e:
    raise _broken(name, e) from e
  if picture.width * picture.height > _MAX_PIXELS:
    raise BrokenRecord(
      TOO_LARGE,
      f"the picture {name!r} has {picture.width} x {picture.height} pixels,"
      f" more than {_MAX_PIXELS}: scale it down first",
    )
  return picture


def _broken(name: str, error: Exception) -> BrokenRecord:
  reason = TOO_LARGE if isinstance(error, _BOMB) else BROKEN
  return BrokenRecord(
    reason, f"the picture {name!r} cannot be decoded: {error}"
  )


def square(picture: Image.Image, size: int) -> Image.Image:
  """The middle of a picture, as CLIP sees it: [size, size].

  The shorter side is resized to `size`, the longer in proportion (rounded
  down), and as much is cut off at both its ends (one pixel less at the first,
  if that is odd). Pixel for pixel transformers' CLIPImageProcessorPil (its
  other backend, torchvision's, rounds the resized pixels otherwise), but of a
  strip longer than 16 times its width, of which the middle is taken first.
  """
  picture = _no_strip(picture)
  width, height = _enlarged(picture.size, size)
  if picture.size != (width, height):
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
  if (width, height) == (size, size):
    return picture
  left, top = (width - size) // 2, (height - size) // 2
  return picture.crop((left, top, left + size, top + size))


def reduced_square(
  picture: Image.Image, size: int, small_size: int
) -> Image.Image:
  """The same part as `square(picture, size)`, in [small_size, small_size].

  `square(picture, small_size)` is another part, by up to a pixel, since sides
  and cuts are whole pixels.
  """
  picture = _no_strip(picture)
  width, height = _enlarged(picture.size, size)
  left, top = (width - size) // 2, (height - size) // 2
  # In pixels of `picture`; of a square one exactly the whole.
  xs = [x * picture.width / width for x in (left, left + size)]
  ys = [y * picture.height / height for y in (top, top + size)]
  return picture.resize(
    (small_size, small_size),
    Image.Resampling.BICUBIC,
    box=(xs[0], ys[0], xs[1], ys[1]),
  )


def _enlarged(sides: tuple[int, int], size: int) -> tuple[int, int]:
  """Both sides, so scaled that the shorter is `size`."""
  short = min(sides)
  return tuple(int(size * side / short) for side in sides)


def _no_strip(picture: Image.Image) -> Image.Image:
  """A strip without its ends: its enlarged whole would fill the memory."""
  width, height = picture.size
  width = min(width, _MAX_ASPECT * height)
  height = min(height, _MAX_ASPECT * width)
  if (width, height) == picture.size:
    return picture
  left, top = (picture.width - width) // 2, (picture.height - height) // 2
  return picture.crop((left, top, left + width, top + height))
