"""UnCLIPPipeline: from prompts to pictures through all the trained stages.

How stages are loaded and run: stages.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import inference, manipulations, stages, upstream
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.data import preprocess, tokenizers
from unclip_jax.image_to_text import ImageToTextPipeline
from unclip_jax.stages import Arrays, Callback, PipelineOutput, Predict
from unclip_jax.tasks import base as tasks_base
from unclip_jax.text_to_image import TextToImagePipeline
from unclip_jax.utils import errors, progress


class UnCLIPPipeline(stages.Stages):
  """Text to picture with CLIP, a prior, a decoder and upsamplers.

  Attributes:
    parts: `clip`, `prior`, `decoder`, then `upsampler_SIZE` from small to
      large, each an `inference.Loaded`. A decoder that was trained on text
      embeddings (tasks.decoder) stands without a prior; another one without a
      prior draws from pictures only (`variations`).
  """

  first = "decoder"

  def __init__(self, parts: Mapping[str, inference.Loaded]):
    """Args:
      parts: as the attribute.

    Raises:
      UserError: a part is missing, or there is a prior that nothing reads.
    """
    for name in ("clip", "decoder"):
      if name not in parts:
        raise errors.UserError(
          f"the pipeline lacks its part '{name}': train it, and put its run "
          "folder beside those of the others"
        )
    super().__init__(parts)
    if self._reads_text and "prior" in parts:
      raise errors.UserError(
        "this decoder was trained on text embeddings: leave out the prior"
      )
    self.tokenizer = tokenizers.load(parts["clip"].assets_dir or "")

  @property
  def stages(self) -> list[str]:
    """What draws, in its order: the prior, the decoder, the upsamplers."""
    return [name for name in self.parts if name != "clip"]

  def reads(self, name: str) -> tuple[str, ...]:
    """What of the batch a stage is given."""
    return {
      "prior": ("text_tokens", "text_mask"),
      "decoder": ("text_tokens", "text_mask", "image_embed"),
    }.get(name, ("low_res",))

  @property
  def assets_dir(self) -> str | None:
    """Where the tokenizer's files are."""
    return self.parts["clip"].assets_dir

  @property
  def _reads_text(self) -> bool:
    """Whether the decoder takes the text embedding where others take z_i."""
    return self.parts["decoder"].task.condition_on == "text_embed"

  def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """`text_tokens` [B, L] int32 and `text_mask` [B, L] bool.

    L is what the prior takes, or the CLIP where there is no prior, or the
    decoder's own text encoder, if that takes more.
    """
    reader = "prior" if "prior" in self.parts else "clip"
    encoder = self.parts["decoder"].task.model.text_encoder or {}
    length = max(
      self.parts[reader].task.model.context_length,
      encoder.get("context_length", 0),
    )
    text_tokens, text_mask = self.tokenizer.encode(list(captions), length)
    return {"text_tokens": text_tokens, "text_mask": text_mask}

  def encode_image(self, images: np.ndarray) -> np.ndarray:
    """`image_embed` [N, D] of pictures [N, S, S, 3] in the CLIP's size."""
    clip = self.parts["clip"]
    encode = self.jitted(
      "encode_image", lambda: jax.jit(clip.task.encode_image)
    )
    variables, _ = self.weights("clip")
    return np.asarray(encode(variables, images))

  def encode_text(self, text: Mapping[str, np.ndarray]) -> np.ndarray:
    """`text_embed` [N, D] of what `tokenize` returned."""
    clip = self.parts["clip"]
    encode = self.jitted("encode_text", lambda: jax.jit(clip.task.encode_text))
    variables, _ = self.weights("clip")
    text_embed, _ = encode(variables, text["text_tokens"], text["text_mask"])
    return np.asarray(text_embed)

  def train_image_embeds(self, num_examples: int) -> np.ndarray:
    """`image_embed` [N, D] of the first training pictures."""
    batches = self.data().eval_batches("train", 64, num_examples)
    return np.concatenate(
      [
        self.encode_image(batch["clip_image"])[batch["mask"]]
        for batch in batches
      ]
    )

  def fit_variance(
    self,
    name: str,
    *,
    examples_per_timestep: int = 64,
    batch_size: int = 64,
    seed: int = 0,
  ) -> None:
    """Gives a stage the analytic variance, estimated from its training data.

    From then on `ddpm` draws with it (diffusion.gaussian.AnalyticVariance:
    Analytic-DPM, the sampler of the paper's prior), and `save_pretrained`
    keeps it.

    Raises:
      UserError: the stage has no diffusion process, learns its variance, or
        was converted and names no data.
    """
    part = self.parts.get(name)
    if not hasattr(getattr(part, "task", None), "diffusion"):
      raise errors.UserError(
        f"'{name}' is no diffusion stage of this model: use one of "
        f"{', '.join(self.stages)}"
      )
    if part.task.diffusion.learned_variance:
      raise errors.UserError(
        f"'{name}' learned its variance: there is none to estimate"
      )
    config = part.config.copy_and_resolve_references()
    data = data_pipeline.DataPipeline.from_config(
      stages.data_config(part, name),
      seed=config.seed,
      assets_dir=self.parts["clip"].assets_dir,
    )
    num_timesteps = part.task.diffusion.num_timesteps
    num_batches = -(-num_timesteps * examples_per_timestep // batch_size)
    batches = data.train_batches(0, batch_size)
    with progress.Progress(f"variance of {name}", num_batches) as bar:
      table = tasks_base.fit_x_start_mse(
        part.task,
        *self.weights(name),
        _counted(itertools.islice(batches, num_batches), bar),
        jax.random.key(seed),
      )
    batches.close()
    with config.unlocked():
      config.task.process.variance = "analytic"
    process = {**part.task.process, "variance": "analytic"}
    self.parts[name] = part._replace(
      task=dataclasses.replace(part.task, process=process),
      frozen={**part.frozen, "x_start_mse": table},
      config=config,
    )
    self._jitted.clear()

  # The paper's manipulations, and the editing that users expect.
  encode = manipulations.encode
  decode = manipulations.decode
  reconstruct = manipulations.reconstruct
  variations = manipulations.variations
  interpolate = manipulations.interpolate
  text_diff = manipulations.text_diff
  pca_reconstructions = manipulations.pca_reconstructions
  typographic_attack = manipulations.typographic_attack
  classify = manipulations.classify
  three_decodings = manipulations.three_decodings
  image_to_image = manipulations.image_to_image
  inpaint = manipulations.inpaint
  outpaint = manipulations.outpaint

  def __call__(
    self,
    prompts: str | Sequence[str],
    *,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    prior_steps: int | None = None,
    decoder_steps: int | None = None,
    upsampler_steps: int | None = None,
    prior_guidance_scale: float | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    tile_size: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    noise: Mapping[str, jax.Array] | None = None,
    callback: Callback | None = None,
    output_type: str = "pil",
    batch_size: int = 16,
  ) -> PipelineOutput:
    """Draws pictures for prompts.

    What is None is taken from the options that each stage was saved with.

    Args:
      prompts: one or more captions; the empty one is legal.
      seed: picture i of the request is a function of (seed, i).
      prior_steps, decoder_steps, upsampler_steps: denoising steps.
      prior_guidance_scale, guidance_scale: of the prior and of the decoder;
        1.0 is off.
      sampler: a name in diffusion.samplers.SAMPLERS, for all diffusion stages.
      tile_size: pixels of a side that the upsamplers see at once, where memory
        is short (tasks/upsampler.py); None: all.
      options: stage -> further options of its `sample`, such as
        {"prior": {"temperature": 0.8}} of an autoregressive one.
      noise: in place of every draw: diffusion stage -> `[num_sample_steps + 1,
        N, ...]`, entry 0 is x_T, entry i the noise of step i. The prior's N
        counts its candidates.
      callback: `callback(stage, step, num_steps)` after every step, of an
        autoregressive prior after every code.
      output_type: "pil", or "np" for float32 NHWC in [0, 1].
      batch_size: pictures drawn at once.

    Returns:
      The pictures, prompt by prompt.

    Raises:
      UserError: no prompt, or an option that the model's prior does not have.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    captions = [p for p in prompts for _ in range(num_images_per_prompt)]
    if not captions:
      raise errors.UserError("there is no prompt: give at least one")
    if output_type not in ("pil", "np"):
      raise errors.UserError(f"output_type '{output_type}' is not pil or np")
    if prior_steps is not None and not self._takes("prior", "num_sample_steps"):
      raise errors.UserError(
        "this model has no diffusion prior, which alone has a number of steps: "
        "leave prior_steps out"
      )
    given: dict[str, dict[str, Any]] = {
      "prior": dict(
        num_sample_steps=prior_steps, guidance_scale=prior_guidance_scale
      ),
      "decoder": dict(
        num_sample_steps=decoder_steps, guidance_scale=guidance_scale
      ),
      **{
        name: dict(num_sample_steps=upsampler_steps, tile_size=tile_size)
        for name in self.upsamplers
      },
    }
    given = {k: v for k, v in given.items() if k in self.parts}
    for name, stage in given.items():
      if self._takes(name, "sampler"):
        stage["sampler"] = sampler
    for name, further in (options or {}).items():
      if name not in given:
        raise errors.UserError(
          f"this model has no stage '{name}': it has {', '.join(given)}"
        )
      for option in further:
        self.check_option(name, option)
      given[name] |= further
    output = self.draw(
      self.tokenize(captions),
      given,
      seed=seed,
      batch_size=batch_size,
      noise=noise,
      callback=callback,
    )
    if output_type == "pil":
      output = output._replace(
        images=[preprocess.to_pil(x) for x in output.images]
      )
    return output

  def draw(
    self,
    batch: Mapping[str, np.ndarray],
    options: Mapping[str, Mapping[str, Any]],
    **how: Any,
  ) -> PipelineOutput:
    """As `stages.Stages.draw`.

    Without a prior among the stages the batch gives `image_embed` [N, D]; where
    the pipeline has no prior, its default is the CLIP's `text_embed`.

    Raises:
      UserError: there is neither.
    """
    if "prior" not in options and "image_embed" not in batch:
      own = self.options("decoder", options["decoder"])
      # A decoder that drops the embedding does not care which it is.
      if not self._reads_text and own.get("use_image_embed", True):
        raise errors.UserError(
          "this model has no prior, so it draws no prompts: give it pictures "
          "(variations, interpolate, ...), or add the prior to its folder"
        )
      batch = {**batch, "image_embed": self.encode_text(batch)}
    return super().draw(batch, options, **how)

  def predict_fns(
    self, seed: int = 0, options: Mapping[str, Mapping[str, Any]] | None = None
  ) -> dict[str, Predict]:
    """What evaluators may ask of the whole pipeline, by name.

    `embed`: normalised embeddings of `clip_image` and caption. `prior`: the
    prior's draw beside the true embedding. `prior_loss`: its loss of each
    example. `text_to_image`: pictures drawn from the caption alone.
    `text_embed_to_image`: the same without the prior, the text embedding taken
    for an image embedding (manipulations.three_decodings).

    Args:
      options: stage -> options of its `sample`, in place of those that it was
        saved with; stages that the model lacks are passed over.
    """
    clip = self.parts["clip"]
    embed = self.jitted(
      "embed", lambda: jax.jit(clip.task.predict_fns()["embed"])
    )
    variables, _ = self.weights("clip")
    key = jax.random.key(seed)
    options = options or {}

    def embed_fn(batch: Arrays) -> Arrays:
      inputs = {
        "image": batch["clip_image"],
        "text_tokens": batch["text_tokens"],
        "text_mask": batch["text_mask"],
      }
      return jax.device_get(embed(variables, clip.frozen, inputs, key))

    predict_fns = {
      "embed": embed_fn,
      "text_to_image": self.text_to_image(seed, options),
      "text_embed_to_image": self.text_to_image(
        seed, options, functools.partial(manipulations.as_image_embed, self)
      ),
    }
    if "prior" in self.parts:
      own = self.options("prior", options.get("prior"))
      task = dataclasses.replace(self.parts["prior"].task, sample_options=own)
      for name, fn in (("prior", "sample"), ("prior_loss", "loss")):
        jitted = self.jitted(
          (name, tuple(sorted(own.items()))),
          lambda fn=fn: jax.jit(task.predict_fns()[fn]),
        )
        predict_fns[name] = self._prior_predict_fn(jitted, key)
    return predict_fns

  def _prior_predict_fn(
    self, predict_fn: tasks_base.PredictFn, key: jax.Array
  ) -> Predict:
    """One of the prior's, jitted, each row by its own key."""
    weights = self.weights("prior")
    names = ("clip_image", "text_tokens", "text_mask", "timesteps")

    def predict(batch: Arrays) -> Arrays:
      inputs = {k: batch[k] for k in names if k in batch}
      keys = stages.keys_of(key, jnp.asarray(batch["index"]))
      return jax.device_get(predict_fn(*weights, inputs, keys))

    return predict


def load(folder: str, **options: Any) -> stages.Stages:
  """The model of a folder, of whatever kind: what `unclip sample` runs.

  Args:
    folder: a model folder; or what `load_runs` takes.
    **options: of `stages.Stages.from_parts`.

  Raises:
    UserError: there is no model in the folder, or one of an unknown kind.
  """
  is_model = os.path.exists(os.path.join(folder, stages.INDEX))
  if not is_model and stages.standalone_run(folder):
    return load_runs(folder, **options)
  name = stages.read_index(folder)["_class_name"]
  kinds = {
    kind.__name__: kind
    for kind in (UnCLIPPipeline, TextToImagePipeline, ImageToTextPipeline)
  }
  if name not in kinds:
    raise errors.UserError(
      f"the model in '{folder}' is a '{name}', which this version does not know"
    )
  return kinds[name].from_pretrained(folder, **options)


def load_runs(src: str, **options: Any) -> stages.Stages:
  """The model of a run that draws, or writes captions, by itself.

  Args:
    src: of `stages.run_folders`.
    **options: of `stages.Stages.from_parts`.

  Raises:
    UserError: it does neither: its task has no `direction`.
  """
  run = stages.standalone_run(src) or src
  task = upstream.load_model(run, abstract=True).task
  direction = getattr(task, "direction", None)
  if direction is None:
    raise errors.UserError(
      f"the run in '{run}' draws nothing by itself: make a model of it and "
      "its other stages (unclip convert --from runs)"
    )
  kind: type[stages.Stages] = TextToImagePipeline
  if direction == "image_to_text":
    kind = ImageToTextPipeline
  return kind.from_parts(stages.run_folders(src, kind.first), **options)


def _counted(
  batches: Iterable[Arrays], bar: progress.Progress
) -> Iterator[Arrays]:
  """The batches, with the bar moved on after each."""
  for done, batch in enumerate(batches, 1):
    yield batch
    bar.update(done)
