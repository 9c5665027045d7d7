r"""Draw pictures from prompts, or caption pictures, with a trained model.

  unclip sample --model runs/quickstart/model --prompt "a frog" --out out
  unclip sample --model DIR --prompts prompts.txt --num_images 4 --out out
  unclip sample --model DIR --prompt "a frog" --out out --prior.temperature=0.8
  unclip sample --model runs/baselines/dalle --prompt "a frog" --out out \
    --generator.top_p=0.9 --num_candidates 8

  unclip sample --model runs/baselines/captioner --image a.png --image b.png \
    --out out --captioner.num_beams=4
  unclip sample --model runs/baselines/dalle --prompt "a frog" --image a.png \
    --out out --generator.num_known_rows=4

DIR is a model folder, or a run of configs/baselines that draws, or writes
captions, by itself. --STAGE.NAME=VALUE is an option of the `sample` of a
stage's task: prior, decoder, generator, upsampler, captioner. With --image a
generator completes that picture from its first rows.

Writes OUT/00000.png ... and OUT/samples.jsonl (a line for each picture); of
captions OUT/captions.jsonl alone.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags
from PIL import Image

from unclip_jax import image_to_text, pipelines
from unclip_jax import stages as stages_lib
from unclip_jax.data import preprocess
from unclip_jax.diffusion import samplers
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, programs, progress

MODEL = flags.DEFINE_string("model", None, "Model folder.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
PROMPTS = flags.DEFINE_string("prompts", None, "UTF-8 file, a prompt a line.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures a prompt.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Picture i is drawn from (seed, i).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures at once.", 1)
PRIOR_STEPS = flags.DEFINE_integer("prior_steps", None, "Steps.", 1)
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", None, "Steps.", 1)
UPSAMPLER_STEPS = flags.DEFINE_integer("upsampler_steps", None, "Steps.", 1)
PRIOR_GUIDANCE_SCALE = flags.DEFINE_float(
  "prior_guidance_scale", None, "Of the prior; 1.0 is off."
)
GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale", None, "Of the decoder; 1.0 is off."
)
SAMPLER = flags.DEFINE_enum(
  "sampler", None, list(samplers.SAMPLERS), "Of diffusion; default: its own."
)
TILE_SIZE = flags.DEFINE_integer(
  "tile_size",
  None,
  "Pixels of a side that upsamplers see at once, for small memories.",
  1,
)
STAGES = {
  stage: programs.FieldsFlag(
    stage, f"NAME=VALUE; what --{stage}.NAME=VALUE stands for."
  )
  for stage in ("prior", "decoder", "generator", "upsampler", "captioner")
}
IMAGE = flags.DEFINE_multi_string(
  "image", [], "A picture to caption or to complete; may be repeated."
)
NUM_CANDIDATES = flags.DEFINE_integer(
  "num_candidates",
  1,
  "Drawn for each picture, of which the model's CLIP keeps the best; of a"
  " generator. For a prior: --prior.num_candidates.",
  1,
)
OFFLOAD = flags.DEFINE_bool(
  "offload", False, "Keep only the stage that draws in memory."
)
_DTYPES = ("float32", "bfloat16")
WEIGHTS_DTYPE = flags.DEFINE_enum(
  "weights_dtype", None, _DTYPES, "Of the weights; default: as saved."
)
COMPUTE_DTYPE = flags.DEFINE_enum(
  "compute_dtype", None, _DTYPES, "Of the networks' work; default: their own."
)


def read_prompts(path: str) -> list[str]:
  """The lines of a UTF-8 file; empty lines are empty prompts.

  Raises:
    UserError: no such file, or it is not UTF-8.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f"the prompt file '{path}' is not UTF-8 (byte {e.start}): save it so"
    ) from e
  except OSError as e:
    raise errors.UserError(
      f"the prompt file '{path}' cannot be read: {e.strerror}"
    ) from e


def options_by_stage() -> dict[str, dict[str, Any]]:
  """Of --STAGE.NAME=VALUE, those stages that have some."""
  return {
    stage: {k: config_lib.literal(v) for k, v in flag.value.items()}
    for stage, flag in STAGES.items()
    if flag.value
  }


def options_of(
  pipe: stages_lib.Stages, images: list[Image.Image]
) -> dict[str, Any]:
  """What the flags ask of a pipeline's call; `images` are those of --image.

  Raises:
    UserError: a flag that the model has no stage for.
  """
  given = options_by_stage()
  if given.pop("captioner", None):
    raise errors.UserError("this model draws pictures: it has no captioner")
  upsampler = given.pop("upsampler", {})
  steps = {
    "num_sample_steps": UPSAMPLER_STEPS.value,
    "tile_size": TILE_SIZE.value,
  }
  steps = {k: v for k, v in steps.items() if v is not None}
  if isinstance(pipe, pipelines.UnCLIPPipeline):
    given |= {name: upsampler for name in pipe.upsamplers if upsampler}
    if images:
      raise errors.UserError(
        "this model completes no pictures from --image: see `unclip edit`"
      )
    if NUM_CANDIDATES.value > 1:
      raise errors.UserError(
        "--num_candidates is of a generator; of a prior: --prior.num_candidates"
      )
    return dict(
      prior_steps=PRIOR_STEPS.value,
      decoder_steps=DECODER_STEPS.value,
      upsampler_steps=UPSAMPLER_STEPS.value,
      tile_size=TILE_SIZE.value,
      prior_guidance_scale=PRIOR_GUIDANCE_SCALE.value,
      guidance_scale=GUIDANCE_SCALE.value,
      sampler=SAMPLER.value,
      options=given,
    )
  generator = given.pop("generator", {})
  if given or PRIOR_STEPS.value or PRIOR_GUIDANCE_SCALE.value is not None:
    raise errors.UserError(
      "this model has no prior and no decoder: its options are --generator.NAME"
    )
  own = {
    "num_sample_steps": DECODER_STEPS.value,
    "guidance_scale": GUIDANCE_SCALE.value,
    "sampler": SAMPLER.value,
  }
  own = {k: v for k, v in own.items() if v is not None}
  return dict(
    images=images or None,
    num_candidates=NUM_CANDIDATES.value,
    options={**own, **generator},
    upsampler_options={**steps, **upsampler},
  )


def read_images() -> list[Image.Image]:
  """The pictures of --image.

  Raises:
    UserError: a file is missing, or no picture.
  """
  images = []
  for path in IMAGE.value:
    try:
      with open(path, "rb") as file:
        images.append(preprocess.open_picture(file, name=path).convert("RGB"))
    except OSError as e:
      raise errors.UserError(
        f"the picture '{path}' cannot be read: {e.strerror}"
      ) from e
  return images


def write_lines(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """A line of JSON for each row."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "w", encoding="utf-8") as f:
    for row in rows:
      f.write(json.dumps(row, ensure_ascii=False) + "\n")


def caption(pipe: image_to_text.ImageToTextPipeline) -> None:
  """Captions the pictures of --image, and prints what it writes."""
  if PROMPT.value or PROMPTS.value:
    raise errors.UserError(
      "this model writes captions: give pictures (--image) and no prompts"
    )
  given = {k: v for k, v in options_by_stage().items() if v}
  options = given.pop("captioner", {})
  if given:
    raise errors.UserError(
      "this model has a captioner and no other stage: its options are "
      "--captioner.NAME"
    )
  output = pipe(
    read_images(),
    seed=SEED.value,
    options=options,
    batch_size=BATCH_SIZE.value,
  )
  path = pathlib.Path(OUT.value) / "captions.jsonl"
  log_probs = output.log_probs or [None] * len(output.captions)
  write_lines(
    path,
    [
      {
        "file": file,
        "caption": text,
        "log_prob": log_prob,
        "seed": SEED.value,
        "index": i,
        "options": output.options,
      }
      for i, (file, text, log_prob) in enumerate(
        zip(IMAGE.value, output.captions, log_probs)
      )
    ],
  )
  for file, text in zip(IMAGE.value, output.captions):
    print(f"{file}: {text}")
  print(f"{path} holds {len(output.captions)} captions")


def main() -> None:
  prompts = list(PROMPT.value)
  if PROMPTS.value:
    prompts += read_prompts(PROMPTS.value)
  if not prompts and not IMAGE.value:
    raise errors.UserError(
      "there is no prompt: give --prompt or --prompts; to a captioner --image"
    )
  pipe = pipelines.load(
    MODEL.value,
    offload=OFFLOAD.value,
    weights_dtype=WEIGHTS_DTYPE.value,
    compute_dtype=COMPUTE_DTYPE.value,
  )
  if isinstance(pipe, image_to_text.ImageToTextPipeline):
    caption(pipe)
    return
  images = read_images()
  prompts = prompts or [""] * len(images)  # of a model that knows no captions
  options = options_of(pipe, images)
  stages = pipe.stages
  done: dict[str, float] = dict.fromkeys(stages, 0.0)
  num_images = len(prompts) * NUM_IMAGES.value * NUM_CANDIDATES.value
  num_batches = -(-num_images // BATCH_SIZE.value)
  with progress.Progress("drawing", num_batches * len(stages)) as bar:

    def callback(stage: str, step: int, num_steps: int) -> None:
      # A stage counts as one piece of work in each batch.
      done[stage] = int(done[stage]) + step / num_steps
      bar.update(sum(done.values()), note=f"{stage} {step}/{num_steps}")

    output = pipe(
      prompts,
      num_images_per_prompt=NUM_IMAGES.value,
      batch_size=BATCH_SIZE.value,
      seed=SEED.value,
      callback=callback,
      **options,
    )
  out = pathlib.Path(OUT.value)
  captions = [p for p in prompts for _ in range(NUM_IMAGES.value)]
  rows = [
    {
      "file": f"{i:05d}.png",
      "prompt": prompt,
      "seed": SEED.value,
      "index": i,
      "options": output.options,
      "seconds": {k: round(v, 3) for k, v in output.seconds.items()},
    }
    for i, prompt in enumerate(captions)
  ]
  write_lines(out / "samples.jsonl", rows)
  for image, row in zip(output.images, rows, strict=True):
    image.save(out / row["file"])
  print(f"{len(captions)} pictures and samples.jsonl are in {out}")


if __name__ == "__main__":
  programs.run(main)
