"""UnCLIPPipeline: from prompts to pictures through all the trained stages.

Each stage is one jitted function of `(variables, frozen, batch, rngs)` that
compiles once for a given batch size and set of options. Every picture has its
own key, made from the seed and its place in the request, so the same seed
gives the same pictures whatever the batch size.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from unclip_jax import (
  __version__,
  checkpoints,
  inference,
  manipulations,
  tensor_files,
)
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.data import preprocess, tokenizers
from unclip_jax.tasks import base as tasks_base
from unclip_jax.utils import errors, progress

INDEX = "model_index.json"
to_pil = preprocess.to_pil
PipelineOutput = manipulations.PipelineOutput
Callback = Callable[[str, int, int], None]
Arrays = Mapping[str, np.ndarray]
Predict = Callable[[Arrays], Arrays]


class UnCLIPPipeline:
  """Text to picture with CLIP, a prior, a decoder and upsamplers.

  Attributes:
    parts: `clip`, `prior`, `decoder`, then `upsampler_SIZE` from small to
      large, each an `inference.Loaded`. A decoder that was trained on text
      embeddings (tasks.decoder) stands without a prior; another one without a
      prior draws from pictures only (`variations`).
  """

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
    self.parts = dict(parts)
    if self._reads_text and "prior" in parts:
      raise errors.UserError(
        "this decoder was trained on text embeddings: leave out the prior"
      )
    self.tokenizer = tokenizers.load(parts["clip"].assets_dir or "")
    self._jitted: dict[Any, Callable[..., Any]] = {}
    self._on_step: Callable[[int], None] = lambda num_steps: None

  @classmethod
  def from_parts(
    cls,
    folders: Mapping[str, str],
    *,
    weights_dtype: str | None = None,
    compute_dtype: str | None = None,
    offload: bool = False,
  ) -> UnCLIPPipeline:
    """Loads each part from a run folder or from a part of a model folder.

    Args:
      weights_dtype, compute_dtype: "float32" or "bfloat16", of the weights in
        memory and of the work done with them; None: as each part was saved.
      offload: the weights of a stage are in memory only while it draws; for
        parts of a model folder, and machines that cannot hold all of them.

    Raises:
      UserError: a folder is missing, or a prior or decoder was trained with
        another CLIP than the one given.
    """
    parts: dict[str, inference.Loaded] = {}
    for name, folder in folders.items():
      parts[name] = inference.load(
        folder,
        upstream_models=parts,
        weights_dtype=weights_dtype,
        compute_dtype=compute_dtype,
        lazy=offload,
      )
    return cls(parts)

  @classmethod
  def from_pretrained(cls, folder: str, **options: Any) -> UnCLIPPipeline:
    """Loads a model folder that `save_pretrained` or `unclip convert` wrote.

    Args:
      **options: of `from_parts`.

    Raises:
      UserError: there is no model in the folder.
    """
    path = os.path.join(folder, INDEX)
    if not os.path.exists(path):
      raise errors.UserError(
        f"there is no model in '{folder}' ({INDEX} is missing): `make "
        "quickstart` makes one in runs/quickstart/model"
      )
    with open(path, encoding="utf-8") as f:
      names = json.load(f)["parts"]
    folders = {name: os.path.join(folder, name) for name in names}
    return cls.from_parts(folders, **options)

  def save_pretrained(self, folder: str) -> None:
    """Writes `model_index.json` and a folder for each part (safetensors)."""
    for name, part in self.parts.items():
      config = part.config.copy_and_resolve_references()
      with config.unlocked():
        for upstream_name in config.frozen:
          config.frozen[upstream_name].path = f"../{upstream_name}"
      save_part(part._replace(config=config), os.path.join(folder, name))
    write_index(folder, self.parts)

  @property
  def _stages(self) -> list[str]:
    """What draws, in its order: the prior, the decoder, the upsamplers."""
    return [name for name in self.parts if name != "clip"]

  @property
  def _reads_text(self) -> bool:
    """Whether the decoder takes the text embedding where others take z_i."""
    return self.parts["decoder"].task.condition_on == "text_embed"

  @property
  def upsamplers(self) -> list[str]:
    return [name for name in self.parts if name.startswith("upsampler")]

  @property
  def image_size(self) -> int:
    """Pixels of a side of the final pictures."""
    return list(self.sizes().values())[-1]

  def sizes(self) -> dict[str, int]:
    """Stage -> pixels of a side of the pictures that it draws."""
    size = self.parts["decoder"].task.model.image_size
    sizes = {"decoder": size}
    for name in self.upsamplers:
      size *= self.parts[name].task.scale
      sizes[name] = size
    return sizes

  def data(self) -> data_pipeline.DataPipeline:
    """What the decoder was trained on, with pictures of the final size.

    Raises:
      UserError: the decoder was converted, and names no data.
    """
    part = self.parts["decoder"]
    config = _data_config(part, "decoder").copy_and_resolve_references()
    with config.unlocked():
      config.preprocess.image_size = self.image_size
      if "image_size" in config.source:  # of a source that stores pictures
        stored = max(config.source.image_size, self.image_size)
        config.source.image_size = stored
    return data_pipeline.DataPipeline.from_config(
      config,
      seed=part.config.seed,
      assets_dir=self.parts["clip"].assets_dir,
    )

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
        f"{', '.join(self._stages)}"
      )
    if part.task.diffusion.learned_variance:
      raise errors.UserError(
        f"'{name}' learned its variance: there is none to estimate"
      )
    config = part.config.copy_and_resolve_references()
    data = data_pipeline.DataPipeline.from_config(
      _data_config(part, name),
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

  def jitted(
    self, key: Any, make: Callable[[], Callable[..., Any]]
  ) -> Callable[..., Any]:
    """The jitted function that `make` gave when it was first asked for."""
    if key not in self._jitted:
      self._jitted[key] = make()
    return self._jitted[key]

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
    options: dict[str, dict[str, Any]] = {
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
    options = {k: v for k, v in options.items() if k in self.parts}
    for name, stage in options.items():
      if self._takes(name, "sampler"):
        stage["sampler"] = sampler
    output = self.draw(
      self.tokenize(captions),
      options,
      seed=seed,
      batch_size=batch_size,
      noise=noise,
      callback=callback,
    )
    if output_type == "pil":
      output = output._replace(images=[to_pil(x) for x in output.images])
    return output

  def draw(
    self,
    batch: Mapping[str, np.ndarray],
    options: Mapping[str, Mapping[str, Any]],
    *,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    indices: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 16,
    noise: Mapping[str, jax.Array] | None = None,
    callback: Callback | None = None,
  ) -> PipelineOutput:
    """Runs stages one after another on N rows: what every method ends in.

    Args:
      batch: `text_tokens`, `text_mask` [N, L] and, where the prior is not
        among the stages, `image_embed` [N, D]; where the pipeline has no
        prior, its default is the CLIP's `text_embed`.
      options: the stages to run, in their order -> options of their `sample`;
        None for the stage's own.
      arrays: stage -> options of its `sample` that are arrays, a row for each
        of N: `x_T`, `init`, `known`, `is_known`.
      indices: [N] int; picture i is a function of (seed, indices[i]). None:
        0 to N - 1.
      seed, batch_size, noise, callback: as in `__call__`.

    Returns:
      `images` are float32 [N, H, W, 3] in [0, 1].
    """
    arrays = arrays or {}
    if "prior" not in options and "image_embed" not in batch:
      if not self._reads_text:
        raise errors.UserError(
          "this model has no prior, so it draws no prompts: give it pictures "
          "(variations, interpolate, ...), or add the prior to its folder"
        )
      batch = {**batch, "image_embed": self.encode_text(batch)}
    N = len(batch["text_tokens"])
    indices = np.arange(N) if indices is None else indices
    options = {name: self.options(name, options[name]) for name in options}
    batch_size = min(batch_size, N)
    seconds = {}
    # The last batch is filled up with rows that are thrown away, so that
    # nothing compiles a second time.
    batches = [
      np.minimum(np.arange(first, first + batch_size), N - 1)
      for first in range(0, N, batch_size)
    ]
    inputs: list[dict[str, Any]] = [
      {k: v[rows] for k, v in batch.items()} for rows in batches
    ]
    for name in options:
      start = time.monotonic()
      weights = self.weights(name)
      for i, rows in enumerate(batches):
        keys = _keys(jax.random.key(seed), jnp.asarray(indices[rows]))
        output = self._run(
          name,
          weights,
          inputs[i],
          _fold_all(keys, self._stages.index(name)),
          options[name],
          {
            **{k: v[rows] for k, v in arrays.get(name, {}).items()},
            **self._noise_rows(noise, name, rows),
          },
          callback,
        )
        if name == "prior":
          inputs[i]["image_embed"] = np.asarray(output["image_embed"])
        else:
          inputs[i]["low_res"] = np.asarray(output["image"])
      del weights  # of an offloaded stage, before the next one's are loaded
      seconds[name] = time.monotonic() - start
    return PipelineOutput(
      np.concatenate([x["low_res"] for x in inputs])[:N] / 2 + 0.5,
      np.concatenate([x["image_embed"] for x in inputs])[:N],
      options,
      seconds,
    )

  def weights(self, name: str) -> tuple[Any, Any]:
    """Variables and frozen variables of a part, in memory."""
    part = self.parts[name]
    return jax.device_put(tensor_files.loaded((part.variables, part.frozen)))

  def _noise_rows(
    self, noise: Mapping[str, jax.Array] | None, name: str, rows: np.ndarray
  ) -> dict[str, jax.Array]:
    """The injected noise of one stage for some pictures, as its option."""
    if noise is None:
      return {}
    if not self._takes(name, "noise"):
      if name in noise:
        raise errors.UserError(
          f"the stage '{name}' of this model draws codes, not noise: leave it "
          "out of noise"
        )
      return {}
    if name not in noise:
      raise errors.UserError(
        f"noise lacks the stage '{name}': give all stages or none"
      )
    copies = 1
    if name == "prior":
      copies = self.options(name, {})["num_candidates"]
    rows = (rows[:, None] * copies + np.arange(copies)).ravel()
    return {"noise": jnp.asarray(noise[name])[:, rows]}

  def _takes(self, name: str, option: str) -> bool:
    """Whether a stage's `sample` has an option; diffusion passes any on."""
    if name not in self.parts:
      return False
    parameters = inspect.signature(self.parts[name].task.sample).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    return option in parameters or inspect.Parameter.VAR_KEYWORD in kinds

  def options(
    self, name: str, given: Mapping[str, Any] | None = None
  ) -> dict[str, Any]:
    """A stage's own options with those put in that are not None."""
    own = self.parts[name].task.sample_options
    given = {k: v for k, v in (given or {}).items() if v is not None}
    return {**own, **given}

  def _run(
    self,
    name: str,
    weights: tuple[Any, Any],
    batch: Mapping[str, Any],
    keys: jax.Array,
    static: Mapping[str, Any],
    arrays: Mapping[str, Any],
    callback: Callback | None,
  ) -> dict[str, jax.Array]:
    """One stage; its jitted function is kept by the options given."""
    part = self.parts[name]
    # A stable trampoline: another callback does not compile again.
    on_step = (lambda n: self._on_step(n)) if callback is not None else None

    def sample(
      variables: Any,
      frozen: Any,
      batch: Any,
      keys: Any,
      arrays: Any,
    ) -> dict[str, jax.Array]:
      return part.task.sample(
        variables,
        frozen,
        batch,
        keys,
        on_step=on_step,
        **arrays,
        **static,
      )

    key = (name, callback is not None, tuple(sorted(static.items())))
    run = self.jitted(key, lambda: jax.jit(sample))
    if callback is not None:
      self._on_step = _counter(callback, name)
    names = {
      "prior": ("text_tokens", "text_mask"),
      "decoder": ("text_tokens", "text_mask", "image_embed"),
    }.get(name, ("low_res",))
    inputs = {k: batch[k] for k in names}
    return run(*weights, inputs, keys, arrays)

  def predict_fns(
    self, seed: int = 0, options: Mapping[str, Mapping[str, Any]] | None = None
  ) -> dict[str, Predict]:
    """What evaluators may ask of the whole pipeline, by name.

    `embed`: normalised embeddings of `clip_image` and caption. `prior`: the
    prior's draw beside the true embedding. `prior_loss`: its loss of each
    example. `text_to_image`: pictures drawn from the caption alone.

    Args:
      options: stage -> options of its `sample`, in place of those that it was
        saved with; stages that the model lacks are passed over.
    """
    clip = self.parts["clip"]
    embed = jax.jit(clip.task.predict_fns()["embed"])
    variables, _ = self.weights("clip")
    key = jax.random.key(seed)
    options = options or {}
    stages = {name: options.get(name, {}) for name in self._stages}

    def embed_fn(batch: Arrays) -> Arrays:
      inputs = {
        "image": batch["clip_image"],
        "text_tokens": batch["text_tokens"],
        "text_mask": batch["text_mask"],
      }
      return jax.device_get(embed(variables, clip.frozen, inputs, key))

    def text_to_image(batch: Arrays) -> Arrays:
      text = {k: batch[k] for k in ("text_tokens", "text_mask")}
      output = self.draw(
        text,
        stages,
        indices=batch["index"],
        seed=seed,
        batch_size=len(batch["index"]),
      )
      return {"image": output.images * 2 - 1}

    predict_fns = {"embed": embed_fn, "text_to_image": text_to_image}
    if "prior" in self.parts:
      task = dataclasses.replace(
        self.parts["prior"].task,
        sample_options=self.options("prior", stages["prior"]),
      )
      fns = task.predict_fns()
      predict_fns["prior"] = self._prior_predict_fn(fns["sample"], key)
      predict_fns["prior_loss"] = self._prior_predict_fn(fns["loss"], key)
    return predict_fns

  def _prior_predict_fn(
    self, predict_fn: tasks_base.PredictFn, key: jax.Array
  ) -> Predict:
    """One of the prior's, each row by its own key."""
    jitted = jax.jit(predict_fn)
    weights = self.weights("prior")
    names = ("clip_image", "text_tokens", "text_mask", "timesteps")

    def predict(batch: Arrays) -> Arrays:
      inputs = {k: batch[k] for k in names if k in batch}
      keys = _keys(key, jnp.asarray(batch["index"]))
      return jax.device_get(jitted(*weights, inputs, keys))

    return predict


def save_part(part: inference.Loaded, folder: str) -> None:
  """Writes one model as a part of a released model (safetensors)."""
  upstream_names = part.config.get("frozen", {})
  checkpoints.save_model(
    folder,
    part.config,
    part.variables,
    {k: v for k, v in part.frozen.items() if k not in upstream_names},
    _assets(part.assets_dir),
  )


def write_index(folder: str, parts: Iterable[str]) -> None:
  """Writes `model_index.json`: the folder's parts, in their order."""
  index = {
    "_class_name": "UnCLIPPipeline",
    "_unclip_jax_version": __version__,
    "parts": list(parts),
  }
  with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
    json.dump(index, f, indent=2)


def _data_config(
  part: inference.Loaded, name: str
) -> ml_collections.ConfigDict:
  """The `config.data` that a part was trained with."""
  if "data" not in part.config:
    raise errors.UserError(
      f"this model's {name} was converted, and does not say what it was trained"
      " on: fine-tune it on data of yours first"
    )
  return part.config.data


def _counted(
  batches: Iterable[Arrays], bar: progress.Progress
) -> Iterator[Arrays]:
  """The batches, with the bar moved on after each."""
  for done, batch in enumerate(batches, 1):
    yield batch
    bar.update(done)


def _counter(callback: Callback, stage: str) -> Callable[[int], None]:
  """A function that calls `callback(stage, 1, n)`, `(stage, 2, n)`, ..."""
  done = 0

  def on_step(num_steps: int) -> None:
    nonlocal done
    done += 1
    callback(stage, done, num_steps)

  return on_step


def _keys(key: jax.Array, indices: jax.Array) -> jax.Array:
  """One key for each index, [N]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def _fold_all(keys: jax.Array, data: int) -> jax.Array:
  """`fold_in` of every key of [N]."""
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _assets(assets_dir: str | None) -> dict[str, str]:
  if assets_dir is None or not os.path.isdir(assets_dir):
    return {}
  return {
    name: os.path.join(assets_dir, name)
    for name in sorted(os.listdir(assets_dir))
    if name not in ("config.json", "model.safetensors")
  }
