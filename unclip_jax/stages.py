"""Models of several stages: loading, saving, and drawing one after another.

What all pipelines share (pipelines.UnCLIPPipeline, families.TextToImage). Each
stage is one jitted function of `(variables, frozen, batch, rngs)` that compiles
once for a given batch size and set of options. Every picture has its own key,
made from the seed and its place in the request, so the same seed gives the same
pictures whatever the batch size.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from unclip_jax import (
  __version__,
  inference,
  model_folder,
  run_folder,
  tensor_files,
  upstream,
)
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.data import preprocess
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

INDEX = "model_index.json"
to_pil = preprocess.to_pil
Callback = Callable[[str, int, int], None]
Arrays = Mapping[str, np.ndarray]
Predict = Callable[[Arrays], Arrays]


class PipelineOutput(NamedTuple):
  """What a call of a pipeline gives."""

  images: Any  # list of PIL pictures, or float32 [N, H, W, 3] in [0, 1]
  # [N, D], the prior's draws in the CLIP's own space; None: there is no prior
  image_embeds: np.ndarray | None
  options: dict[str, dict[str, Any]]  # what each stage was drawn with
  seconds: dict[str, float]  # wall time of each stage


class Outputs(NamedTuple):
  """What stages gave."""

  arrays: dict[str, np.ndarray]  # name -> [N, ...]
  options: dict[str, dict[str, Any]]  # what each stage was run with
  seconds: dict[str, float]  # wall time of each stage


class Stages:
  """Parts of which some draw, one after another.

  Attributes:
    parts: name -> model, in the order in which they draw. `upsampler_SIZE` are
      from small to large, the last.
    first: the stage that draws the first pictures, which upsamplers enlarge.
  """

  first: ClassVar[str]

  def __init__(self, parts: Mapping[str, inference.Loaded]):
    """Args:
    parts: as the attribute.
    """
    self.parts = dict(parts)
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
  ) -> Self:
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
  def from_pretrained(cls, folder: str, **options: Any) -> Self:
    """Loads a model folder that `save_pretrained` or `unclip convert` wrote.

    Args:
      **options: of `from_parts`.

    Raises:
      UserError: there is no model in the folder, or one of another kind.
    """
    index = read_index(folder)
    if index["_class_name"] != cls.__name__:
      raise errors.UserError(
        f"the model in '{folder}' is a {index['_class_name']}, not a "
        f"{cls.__name__}: load it as such"
      )
    names = index["parts"]
    folders = {name: os.path.join(folder, name) for name in names}
    return cls.from_parts(folders, **options)

  def save_pretrained(self, folder: str) -> None:
    """Writes `model_index.json` and a folder for each part (safetensors)."""
    for name, part in self.parts.items():
      config = part.config.copy_and_resolve_references()
      with config.unlocked():
        for upstream_name in {*config.get("frozen", {})} & {*self.parts}:
          config.frozen[upstream_name].path = f"../{upstream_name}"
      save_part(part._replace(config=config), os.path.join(folder, name))
    write_index(folder, self.parts, type(self).__name__)

  @property
  def stages(self) -> list[str]:
    """What draws, in its order: a part that only others read is none."""
    raise NotImplementedError

  def reads(self, name: str) -> tuple[str, ...]:
    """What of the batch a stage is given, where it is there."""
    raise NotImplementedError

  @property
  def upsamplers(self) -> list[str]:
    return [name for name in self.parts if name.startswith("upsampler")]

  @property
  def image_size(self) -> int:
    """Pixels of a side of the final pictures."""
    return list(self.sizes().values())[-1]

  def sizes(self) -> dict[str, int]:
    """Stage -> pixels of a side of the pictures that it draws."""
    size = self.parts[self.first].task.model.image_size
    sizes = {self.first: size}
    for name in self.upsamplers:
      size *= self.parts[name].task.scale
      sizes[name] = size
    return sizes

  @property
  def assets_dir(self) -> str | None:
    """Where the tokenizer's files are."""
    return self.parts[self.first].assets_dir

  def data(self) -> data_pipeline.DataPipeline:
    """What the first stage learned from, with pictures of the final size.

    Raises:
      UserError: the stage that draws them was converted, and names no data.
    """
    part = self.parts[self.first]
    config = data_config(part, self.first).copy_and_resolve_references()
    with config.unlocked():
      config.preprocess.image_size = self.image_size
      if "image_size" in config.source:  # of a source that stores pictures
        stored = max(config.source.image_size, self.image_size)
        config.source.image_size = stored
    return data_pipeline.DataPipeline.from_config(
      config,
      seed=part.config.seed,
      assets_dir=self.assets_dir,
    )

  def jitted(
    self, key: Any, make: Callable[[], Callable[..., Any]]
  ) -> Callable[..., Any]:
    """The jitted function that `make` gave when it was first asked for."""
    if key not in self._jitted:
      self._jitted[key] = make()
    return self._jitted[key]

  def draw(
    self,
    batch: Mapping[str, np.ndarray],
    options: Mapping[str, Mapping[str, Any]],
    **how: Any,
  ) -> PipelineOutput:
    """Pictures of the last stage.

    Args:
      batch, options, **how: of `run`.

    Returns:
      `images` are float32 [N, H, W, 3] in [0, 1].
    """
    arrays, options, seconds = self.run(batch, options, **how)
    image_embeds = arrays.get("image_embed", batch.get("image_embed"))
    images = arrays["image"] / 2 + 0.5
    return PipelineOutput(images, image_embeds, options, seconds)

  def run(
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
  ) -> Outputs:
    """Runs stages one after another on N rows: what every method ends in.

    Args:
      batch: arrays [N, ...], all that the stages read and do not give.
      options: the stages to run, in their order -> options of their `sample`;
        None for the stage's own.
      arrays: stage -> options of its `sample` that are arrays, a row for each
        of N: `x_T`, `init`, `known`, `is_known`.
      indices: [N] int; row i is a function of (seed, indices[i]). None: 0 to
        N - 1.
      seed: see `indices`.
      batch_size: rows at once.
      noise, callback: as in UnCLIPPipeline's `__call__`.

    Returns:
      All that the stages gave, a later one in place of an earlier; pictures in
      [-1, 1].
    """
    arrays = arrays or {}
    N = len(next(iter(batch.values())))
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
    given: list[dict[str, np.ndarray]] = [{} for _ in batches]
    for name in options:
      start = time.monotonic()
      weights = self.weights(name)
      for i, rows in enumerate(batches):
        keys = keys_of(jax.random.key(seed), jnp.asarray(indices[rows]))
        output = self._run(
          name,
          weights,
          inputs[i],
          _fold_all(keys, self.stages.index(name)),
          options[name],
          {
            **{k: v[rows] for k, v in arrays.get(name, {}).items()},
            **self._noise_rows(noise, name, rows),
          },
          callback,
        )
        given[i] |= jax.device_get(output)
        inputs[i] |= given[i]
        if "image" in given[i]:  # which upsamplers enlarge
          inputs[i]["low_res"] = given[i]["image"]
      del weights  # of an offloaded stage, before the next one's are loaded
      seconds[name] = time.monotonic() - start
    whole = {k: np.concatenate([x[k] for x in given])[:N] for k in given[0]}
    return Outputs(whole, options, seconds)

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
    copies = self.options(name).get("num_candidates", 1)
    rows = (rows[:, None] * copies + np.arange(copies)).ravel()
    return {"noise": jnp.asarray(noise[name])[:, rows]}

  def _takes(self, name: str, option: str) -> bool:
    """Whether a stage's `sample` has an option; diffusion passes any on."""
    if name not in self.parts:
      return False
    parameters = inspect.signature(self.parts[name].task.sample).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    return option in parameters or inspect.Parameter.VAR_KEYWORD in kinds

  def check_option(self, name: str, option: str) -> None:
    """Raises UserError unless a stage's `sample` has an option."""
    if self._takes(name, option):
      return
    parameters = inspect.signature(self.parts[name].task.sample).parameters
    known = [
      x
      for x, y in parameters.items()
      if y.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    raise errors.UserError(
      f"the {name} of this model has no option '{option}'"
      f"{config_lib.suggest(option, known)}"
    )

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
    steps = {}
    if self._takes(name, "on_step"):
      # A stable trampoline: another callback does not compile again.
      on_step = (lambda n: self._on_step(n)) if callback is not None else None
      steps = {"on_step": on_step}

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
        **steps,
        **arrays,
        **static,
      )

    key = (name, callback is not None, tuple(sorted(static.items())))
    run = self.jitted(key, lambda: jax.jit(sample))
    if callback is not None:
      self._on_step = _counter(callback, name)
    inputs = {k: batch[k] for k in self.reads(name) if k in batch}
    return run(*weights, inputs, keys, arrays)

  def text_to_image(
    self,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    image_embed: Callable[[Mapping[str, Any]], np.ndarray] | None = None,
  ) -> Predict:
    """What evaluators may ask of all pipelines: pictures of captions alone.

    Args:
      options: stage -> options of its `sample`, in place of those that it was
        saved with; stages that the model lacks are passed over.
      image_embed: tokens and mask -> what takes the place of the prior's draw.
    """
    options = options or {}
    stages = {name: options.get(name, {}) for name in self.stages}
    if image_embed is not None:
      stages.pop("prior", None)

    def predict(batch: Arrays) -> Arrays:
      text = {k: batch[k] for k in ("text_tokens", "text_mask")}
      if image_embed is not None:
        text["image_embed"] = image_embed(text)
      output = self.draw(
        text,
        stages,
        indices=batch["index"],
        seed=seed,
        batch_size=len(batch["index"]),
      )
      return {"image": output.images * 2 - 1}

    return predict


def square_arrays(
  images: Sequence[Image.Image | np.ndarray], size: int
) -> np.ndarray:
  """The squares around the middle: float32 [N, size, size, 3] in [-1, 1].

  Args:
    images: PIL pictures, or arrays [H, W, 3] in [0, 1], of any size.
  """
  pictures = [
    preprocess.to_pil(x) if isinstance(x, np.ndarray) else x for x in images
  ]
  squares = [preprocess.square(x.convert("RGB"), size) for x in pictures]
  return np.stack([preprocess.to_float(np.asarray(x)) for x in squares])


def read_index(folder: str) -> dict[str, Any]:
  """`model_index.json` of a model folder.

  Raises:
    UserError: there is none.
  """
  path = os.path.join(folder, INDEX)
  if not os.path.exists(path):
    raise errors.UserError(
      f"there is no model in '{folder}' ({INDEX} is missing): `make "
      "quickstart` makes one in runs/quickstart/model"
    )
  with open(path, encoding="utf-8") as f:
    return json.load(f)


def standalone_run(src: str) -> str | None:
  """The run in SRC that is of use by itself; None: there is none.

  Args:
    src: the run folder; or a folder that holds it as `generator` or
      `captioner`.
  """
  for name in ("", "generator", "captioner"):
    if os.path.exists(os.path.join(src, name, "config.json")):
      return os.path.join(src, name) if name else src
  return None


def run_folders(src: str, first: str) -> dict[str, str]:
  """Part -> run folder; what another part reads stands before it.

  Args:
    src: of `standalone_run`; beside a run in it there may be `upsampler_SIZE`
      and a `clip`.
    first: what the run that others do not read is called.

  Raises:
    UserError: there is no such run, or two upstream models have one name.
  """
  own = standalone_run(src)
  if own is None:
    raise errors.UserError(
      f"'{src}' is neither a run folder nor holds one as '{first}'"
    )
  folders = _upstream_folders(own)
  if own == src:
    return {**folders, first: own}
  clip = os.path.join(src, "clip")
  if os.path.isdir(clip):
    folders.setdefault("clip", clip)
  return {**folders, first: own, **upsampler_folders(src)}


def _upstream_folders(path: str) -> dict[str, str]:
  """Name -> folder of the upstream models of a run, and of theirs."""
  config = upstream.at_home(run_folder.load_config(path), path)
  folders: dict[str, str] = {}
  for name, spec in config.get("frozen", {}).items():
    if not spec.get("path"):
      continue
    for own, folder in {
      **_upstream_folders(spec.path),
      name: spec.path,
    }.items():
      if os.path.realpath(folders.setdefault(own, folder)) != (
        os.path.realpath(folder)
      ):
        raise errors.UserError(
          f"two upstream models of the run in {path} are called '{own}': "
          f"{folders[own]} and {folder}; train with one of them"
        )
  return folders


def upsampler_folders(src: str) -> dict[str, str]:
  """`upsampler_SIZE` -> its run folder in SRC, from small to large."""
  names = [
    name
    for name in os.listdir(src)
    if name.startswith("upsampler_")
    and os.path.exists(os.path.join(src, name, "config.json"))
  ]
  names.sort(key=lambda name: int(name.rpartition("_")[2]))
  return {name: os.path.join(src, name) for name in names}


def save_part(part: inference.Loaded, folder: str) -> None:
  """Writes one model as a part of a released model (safetensors)."""
  upstream_names = part.config.get("frozen", {})
  model_folder.save_model(
    folder,
    part.config,
    part.variables,
    {k: v for k, v in part.frozen.items() if k not in upstream_names},
    _assets(part.assets_dir),
  )


def write_index(
  folder: str, parts: Iterable[str], class_name: str = "UnCLIPPipeline"
) -> None:
  """Writes `model_index.json`: the folder's parts, in their order."""
  index = {
    "_class_name": class_name,
    "_unclip_jax_version": __version__,
    "parts": list(parts),
  }
  with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
    json.dump(index, f, indent=2)


def data_config(part: inference.Loaded, name: str) -> ml_collections.ConfigDict:
  """The `config.data` that a part was trained with."""
  if "data" not in part.config:
    raise errors.UserError(
      f"this model's {name} was converted, and does not say what it was trained"
      " on: fine-tune it on data of yours first"
    )
  return part.config.data


def _counter(callback: Callback, stage: str) -> Callable[[int], None]:
  """A function that calls `callback(stage, 1, n)`, `(stage, 2, n)`, ..."""
  done = 0

  def on_step(num_steps: int) -> None:
    nonlocal done
    done += 1
    callback(stage, done, num_steps)

  return on_step


def keys_of(key: jax.Array, indices: jax.Array) -> jax.Array:
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
