"""TextToImagePipeline: pictures of captions by any model that draws them.

The systems that unCLIP is compared with (configs/baselines) are one part that
draws, its upstream models, and upsamplers where there are some. Candidates of a
prompt are ranked by a CLIP (Ramesh et al. 2021, arXiv 2102.12092, section 2.6).
How stages are loaded and run: stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax import inference, manipulations, stages
from unclip_jax.data import preprocess, tokenizers
from unclip_jax.stages import Arrays, Callback, PipelineOutput, Predict
from unclip_jax.utils import errors

Picture = Image.Image | np.ndarray


class TextToImagePipeline(stages.Stages):
  """Text to picture with a generator, and upsamplers.

  Attributes:
    parts: the generator's upstream models by their names; `generator`, whose
      task gives `image` for `text_tokens` and `text_mask`; then
      `upsampler_SIZE` from small to large. Among the first there may be a
      `clip`, which ranks candidates.
  """

  first = "generator"

  def __init__(self, parts: Mapping[str, inference.Loaded]):
    """Args:
      parts: as the attribute.

    Raises:
      UserError: there is no generator.
    """
    super().__init__(parts)
    if "generator" not in self.parts:
      raise errors.UserError(
        "the pipeline lacks its part 'generator', which draws: give its run "
        "folder"
      )
    self.tokenizer = tokenizers.load(self.parts["generator"].assets_dir or "")

  @property
  def stages(self) -> list[str]:
    """What draws, in its order: the generator, the upsamplers."""
    return ["generator", *self.upsamplers]

  def reads(self, name: str) -> tuple[str, ...]:
    """What of the batch a stage is given."""
    if name == "generator":
      return ("text_tokens", "text_mask", "image")
    return ("low_res", "text_tokens", "text_mask")

  def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """`text_tokens` [B, L] int32 and `text_mask` [B, L] bool."""
    length = stages.data_config(
      self.parts["generator"], "generator"
    ).preprocess.context_length
    text_tokens, text_mask = self.tokenizer.encode(list(captions), length)
    return {"text_tokens": text_tokens, "text_mask": text_mask}

  def __call__(
    self,
    prompts: str | Sequence[str],
    *,
    images: Sequence[Picture] | None = None,
    num_images_per_prompt: int = 1,
    num_candidates: int = 1,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    upsampler_options: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    output_type: str = "pil",
    batch_size: int = 16,
  ) -> PipelineOutput:
    """Draws pictures for prompts.

    Args:
      prompts: one or more captions; the empty one is legal.
      images: one for each prompt, of any size (the square around the middle
        is taken), that a generator completes with the option num_known_rows:
        of its grid, from the top (Ramesh et al. 2021, figure 6).
      num_candidates: so many are drawn for each picture, and the CLIP keeps
        the one that fits the caption best.
      seed: picture i of the request is a function of (seed, i).
      options, upsampler_options: of the `sample` of the generator and of the
        upsamplers, in place of those that they were saved with.
      callback: `callback(stage, step, num_steps)` after every step of the
        stages that have steps.
      output_type: "pil", or "np" for float32 NHWC in [0, 1].
      batch_size: pictures drawn at once.

    Returns:
      The pictures, prompt by prompt.

    Raises:
      UserError: no prompt, an unknown option, not a picture for each prompt,
        or candidates without a CLIP.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    captions = [p for p in prompts for _ in range(num_images_per_prompt)]
    if not captions:
      raise errors.UserError("there is no prompt: give at least one")
    if output_type not in ("pil", "np"):
      raise errors.UserError(f"output_type '{output_type}' is not pil or np")
    if num_candidates > 1 and "clip" not in self.parts:
      raise errors.UserError(
        "candidates are ranked by a CLIP, and this model has none: add a part "
        "'clip' to its folder, or leave num_candidates at 1"
      )
    given = {"generator": dict(options or {})}
    given |= {name: dict(upsampler_options or {}) for name in self.upsamplers}
    for name, stage in given.items():
      for option in stage:
        self.check_option(name, option)
    batch: Arrays = self.tokenize(captions)
    if images is not None:
      batch = {**batch, **self._known(images, prompts, num_images_per_prompt)}
    rows = np.repeat(np.arange(len(captions)), num_candidates)
    output = self.draw(
      {k: v[rows] for k, v in batch.items()},
      given,
      seed=seed,
      batch_size=batch_size,
      callback=callback,
    )
    if num_candidates > 1:
      drawn = output.images.reshape(
        len(captions), num_candidates, *output.images.shape[1:]
      )
      best = self.similarities(drawn, captions).argmax(axis=1)
      drawn = drawn[np.arange(len(captions)), best]
      output = output._replace(images=drawn)
    if output_type == "pil":
      drawn = [preprocess.to_pil(x) for x in output.images]
      output = output._replace(images=drawn)
    return output

  # Of a generator that draws by diffusion (Nichol et al. 2021, section 4.3).
  image_to_image = manipulations.image_to_image
  inpaint = manipulations.inpaint
  outpaint = manipulations.outpaint

  def _known(
    self, images: Sequence[Picture], prompts: Sequence[str], copies: int
  ) -> Arrays:
    """The pictures to complete, as the generator reads them."""
    if len(images) != len(prompts):
      raise errors.UserError(
        f"there are {len(images)} pictures and {len(prompts)} prompts: give one"
        " each"
      )
    size = self.sizes()["generator"]
    return {"image": stages.square_arrays(images, size).repeat(copies, axis=0)}

  def similarities(
    self, images: np.ndarray, captions: Sequence[str]
  ) -> np.ndarray:
    """Cosines [N, M] of the CLIP, of M pictures with each of N captions.

    Args:
      images: [N, M, H, W, 3] in [0, 1].
    """
    clip = self.parts["clip"]
    look = self.jitted(
      "clip", lambda: jax.jit(clip.task.predict_fns()["features"])
    )
    weights = self.weights("clip")
    length = clip.task.model.context_length
    own = tokenizers.load(clip.assets_dir or "")
    cosines = []
    for pictures, caption in zip(images, captions, strict=True):
      text_tokens, text_mask = own.encode([caption] * len(pictures), length)
      found = look(
        *weights,
        {
          "image": jnp.asarray(pictures * 2 - 1),
          "text_tokens": text_tokens,
          "text_mask": text_mask,
        },
        jax.random.key(0),
      )
      cosines.append(jnp.sum(found["image_embed"] * found["text_embed"], -1))
    return np.stack(jax.device_get(cosines))

  def predict_fns(
    self, seed: int = 0, options: Mapping[str, Mapping[str, Any]] | None = None
  ) -> dict[str, Predict]:
    """What evaluators may ask of the whole pipeline, by name.

    `text_to_image`: pictures drawn from the caption alone.

    Args:
      options: stage -> options of its `sample`, in place of those that it was
        saved with; stages that the model lacks are passed over.
    """
    return {"text_to_image": self.text_to_image(seed, options)}
