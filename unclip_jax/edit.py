"""Change pictures with a trained model folder: variations, inpainting, ...

  unclip edit variations --model DIR --image a.png --out out.png
  unclip edit interpolate --model DIR --image a.png --image b.png ...
  unclip edit text_diff --model DIR --image a.png --prompt "a cat" ...
  unclip edit inpaint --model DIR --image a.png --mask m.png --prompt ...

Writes one picture: what was given, then what was drawn, row by row. The verbs
are methods of the model's pipeline (unclip_jax/manipulations.py says what each
is); a model without a CLIP, as GLIDE, has image_to_image, inpaint and outpaint.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
from absl import flags
from PIL import Image

from unclip_jax import pipelines
from unclip_jax.data import preprocess
from unclip_jax.metrics import pictures
from unclip_jax.utils import errors, programs

MODEL = flags.DEFINE_string("model", None, "Model folder.", required=True)
OUT = flags.DEFINE_string("out", None, "PNG to write.", required=True)
IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be repeated.")
MASK = flags.DEFINE_string("mask", None, "Picture: not black is drawn anew.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
BASE_PROMPT = flags.DEFINE_string(
  "base_prompt", "a photo", "text_diff: what the prompt is compared with."
)
LABEL = flags.DEFINE_multi_string("label", [], "typographic_attack: a caption.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 8, "Pictures to draw.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of everything that is drawn.")
STEPS = flags.DEFINE_integer("decoder_steps", None, "Of the decoder.", 1)
REFINEMENTS = flags.DEFINE_integer(
  "num_refinements", 0, "reconstruct: of each step of the inversion.", 0
)
ETA = flags.DEFINE_float("eta", 1.0, "variations: share of fresh noise.")
FROM_NOISE = flags.DEFINE_bool(
  "from_noise", False, "variations: not from the picture's own x_T."
)
FIXED_NOISE = flags.DEFINE_bool(
  "fixed_noise", False, "interpolate: one random x_T."
)
MAX_THETA = flags.DEFINE_float("max_theta", 0.5, "text_diff: how far.")
STRENGTH = flags.DEFINE_float("strength", 0.6, "image_to_image: in (0, 1].")
RESAMPLES = flags.DEFINE_integer(
  "num_resamples", 1, "inpaint: above 1 by RePaint, so often.", 1
)
PADDING = flags.DEFINE_integer("padding", 32, "outpaint: pixels a side.", 1)

Images = list[Image.Image]


def _images(count: int | None = 1) -> Images:
  if not IMAGE.value or (count is not None and len(IMAGE.value) != count):
    wanted = "at least one" if count is None else f"exactly {count}"
    raise errors.UserError(f"give {wanted} --image, not {len(IMAGE.value)}")
  return [_open(path) for path in IMAGE.value]


def _open(path: str) -> Image.Image:
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as e:
    raise errors.UserError(
      f"the picture '{path}' cannot be read: {e.strerror}"
    ) from e
  return preprocess.decode(data, name=path)


def _prompt() -> str:
  if len(PROMPT.value) != 1:
    raise errors.UserError(f"give one --prompt, not {len(PROMPT.value)}")
  return PROMPT.value[0]


def _reconstruct(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.reconstruct(
    _images(None),
    decoder_steps=STEPS.value,
    num_refinements=REFINEMENTS.value,
  ).images


def _variations(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.variations(
    *_images(),
    num_images=NUM_IMAGES.value,
    eta=ETA.value,
    from_noise=FROM_NOISE.value,
    decoder_steps=STEPS.value,
    seed=SEED.value,
  ).images


def _interpolate(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.interpolate(
    _images(None),
    num_images=NUM_IMAGES.value,
    fixed_noise=FIXED_NOISE.value,
    decoder_steps=STEPS.value,
    seed=SEED.value,
  ).images


def _text_diff(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.text_diff(
    *_images(),
    _prompt(),
    base_prompt=BASE_PROMPT.value or None,
    max_theta=MAX_THETA.value,
    num_images=NUM_IMAGES.value,
    decoder_steps=STEPS.value,
    seed=SEED.value,
  ).images


def _pca_reconstructions(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.pca_reconstructions(
    *_images(), decoder_steps=STEPS.value, seed=SEED.value
  ).images


def _typographic_attack(pipe: pipelines.UnCLIPPipeline) -> Images:
  attacked = pipe.typographic_attack(
    *_images(),
    _prompt(),
    LABEL.value or [_prompt()],
    num_images=NUM_IMAGES.value,
    seed=SEED.value,
  )
  for label, probability in attacked.probabilities.items():
    print(f"{probability:7.2%}  {label}")
  return [attacked.image, *attacked.output.images]


def _three_decodings(pipe: pipelines.UnCLIPPipeline) -> Images:
  if not PROMPT.value:
    raise errors.UserError("give at least one --prompt")
  outputs = pipe.three_decodings(PROMPT.value, seed=SEED.value)
  print("each row: " + ", ".join(outputs))
  rows = zip(*(output.images for output in outputs.values()))
  return [image for row in rows for image in row]


def _image_to_image(pipe: pipelines.UnCLIPPipeline) -> Images:
  return pipe.image_to_image(
    *_images(),
    _prompt(),
    strength=STRENGTH.value,
    num_images=NUM_IMAGES.value,
    seed=SEED.value,
  ).images


def _inpaint(pipe: pipelines.UnCLIPPipeline) -> Images:
  if MASK.value is None:
    raise errors.UserError("inpaint needs --mask")
  return pipe.inpaint(
    *_images(),
    _open(MASK.value),
    _prompt(),
    num_images=NUM_IMAGES.value,
    num_resamples=RESAMPLES.value,
    seed=SEED.value,
  ).images


def _outpaint(pipe: pipelines.UnCLIPPipeline) -> Images:
  padding = (PADDING.value,) * 4
  return [
    pipe.outpaint(*_images(), _prompt(), padding=padding, seed=SEED.value)
  ]


VERBS: dict[str, Callable[[pipelines.UnCLIPPipeline], Images]] = {
  "reconstruct": _reconstruct,
  "variations": _variations,
  "interpolate": _interpolate,
  "text_diff": _text_diff,
  "pca_reconstructions": _pca_reconstructions,
  "typographic_attack": _typographic_attack,
  "three_decodings": _three_decodings,
  "image_to_image": _image_to_image,
  "inpaint": _inpaint,
  "outpaint": _outpaint,
}
VERB = flags.DEFINE_enum(
  "verb", None, list(VERBS), "What to do.", required=True
)


def main() -> None:
  pipe = pipelines.load(MODEL.value)
  if not hasattr(pipe, VERB.value):
    able = [name for name in VERBS if hasattr(pipe, name)]
    raise errors.UserError(
      f"the model in '{MODEL.value}' cannot {VERB.value}; it can "
      f"{', '.join(able) or 'do none of these'}"
    )
  drawn = VERBS[VERB.value](pipe)
  given = [_open(path) for path in IMAGE.value]
  out = pathlib.Path(OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  columns = 3 if VERB.value == "three_decodings" else 8
  sheet(given, drawn, pipe.image_size, columns).save(out)
  print(f"{len(drawn)} pictures are in {out}")


def sheet(
  given: Images, drawn: Images, size: int, columns: int = 8
) -> Image.Image:
  """Rows of the given pictures, then rows of the drawn ones."""
  if any(x.size != (size, size) for x in drawn):  # a canvas of its own size
    return drawn[0]
  columns = min(columns, max(len(given), len(drawn)))
  blank = Image.new("RGB", (size, size), "white")
  tiles = []
  for row in (given, drawn):
    row = [preprocess.square(x, size) for x in row]
    tiles += row + [blank] * (-len(row) % columns)
  array = np.stack([np.asarray(x, np.float32) for x in tiles]) / 127.5 - 1
  grid = pictures.make_grid(array, columns)
  return preprocess.to_pil(grid / 2 + 0.5)


if __name__ == "__main__":
  programs.run(main, argument="verb")
