"""The upsamplers: P(x | low_res) (Ramesh et al. 2022, sections 2.1, App. C).

A U-Net without attention and without text sees the noised picture and the
enlarged small one (Saharia et al. 2021, SR3). It is trained on crops of the
target with a corrupted `low_res` (data/degradations.py) and, being fully
convolutional, draws whole pictures. One with a text encoder reads the caption
too, as GLIDE's (Nichol et al. 2021, arXiv 2112.10741, section 4.1), and never
an empty one: upsamplers draw without guidance.

Karlo's draws the last step with other weights, tuned against a discriminator.
They are the collection `last`, which training leaves as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import draws, schedules
from unclip_jax.diffusion import process as process_lib
from unclip_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Task:
  """Enlarges a picture by an integer factor.

  Attributes:
    process: fields of diffusion.process.Process.
    scale: factor between `low_res` and `image`; 4 in the paper.
    separate_last_step: whether the last step of sampling has its own weights.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scale: int = 4
  separate_last_step: bool = False
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  @functools.cached_property
  def diffusion(self) -> process_lib.Process:
    return process_lib.Process(**{"clip_x_start": 1.0, **self.process})

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    timesteps = jnp.zeros(batch["image"].shape[:1], jnp.int32)
    variables = self.model.init(
      rng,
      batch["image"],
      timesteps,
      low_res=batch["low_res"],
      **self._text(batch),
    )
    if self.separate_last_step:
      variables["last"] = jax.tree.map(jnp.copy, variables["params"])
    return variables

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

  def _text(self, batch: base.Batch) -> dict[str, jax.Array]:
    """The captions, if the network reads them."""
    if self.model.text_encoder is None:
      return {}
    return base.text(batch)

  def loss(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    step: jax.Array,
    train: bool,
  ) -> base.LossOutput:
    del frozen, step
    diffusion_rng, dropout_rng = draws.split(rng)

    params, model_state = _split(variables)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      model_output, _ = self.model.apply(
        params,
        x_t,
        timesteps,
        low_res=batch["low_res"],
        **self._text(batch),
        train=train,
        rngs={"dropout": draws.first(dropout_rng)},
      )
      return model_output

    losses = self.diffusion.loss(
      denoise_fn, batch["image"], diffusion_rng, batch.get("timesteps")
    )
    return base.LossOutput(losses.pop("loss"), losses, model_state)

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    num_sample_steps: int = 27,
    sampler: str = "ddim",
    step_placement: str = "uniform",
    tile_size: int | None = None,
    **options: Any,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, scale * h, scale * w, 3] in [-1, 1] from `low_res`.

    And from `text_tokens`, `text_mask` of the batch, where the network reads
    them.

    Args:
      tile_size: pixels of a side of the drawn picture that the network sees at
        once, where memory is short (`_tiled`); None: all.
      **options: of diffusion.process.Process.sample; the paper uses no
        guidance.
    """
    low_res = batch["low_res"]
    B, h, w, C = low_res.shape
    params, others = _split(variables)
    # What is independent of the timestep: the enlargement, and the text if the
    # network reads it.
    condition = self.model.apply(
      params, **self._text(batch), method=self.model.encode_condition
    )
    last_timestep = schedules.step_placement(
      self.diffusion.num_timesteps, num_sample_steps, step_placement
    )[0]

    def denoise(
      x_t: jax.Array, timesteps: jax.Array, low_res: jax.Array
    ) -> jax.Array:
      def run(params: base.PyTree) -> jax.Array:
        return self.model.apply(
          {"params": params},
          x_t,
          timesteps,
          condition,
          low_res=low_res,
          method=self.model.denoise,
        )

      if "last" not in others:
        return run(params["params"])
      return jax.lax.cond(
        timesteps[0] == last_timestep,
        lambda: run(others["last"]),
        lambda: run(params["params"]),
      )

    shape = (B, self.scale * h, self.scale * w, C)
    # Once, and not at every step: what has its size already stays as it is.
    enlarged = jax.image.resize(low_res, shape, self.model.low_res_resize)
    if tile_size is None or tile_size >= max(shape[1:3]):
      denoise_fn = functools.partial(_on_whole, denoise, enlarged)
    else:
      denoise_fn = functools.partial(_tiled, denoise, enlarged, tile_size)
    x_0 = self.diffusion.sample(
      denoise_fn,
      shape,
      rng,
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      step_placement=step_placement,
      x_start_mse=frozen.get("x_start_mse"),
      **options,
    )
    return {"image": jnp.clip(x_0, -1.0, 1.0)}

  def vlb(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Parts of the bound on -log2 p(x | low_res), as likelihood.Vlb.

    Bits per dimension of pictures of 8-bit levels; the trained weights alone,
    not those of a separate last step.
    """
    params, _ = _split(variables)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      model_output, _ = self.model.apply(
        params, x_t, timesteps, low_res=batch["low_res"], **self._text(batch)
      )
      return model_output

    bound = self.diffusion.vlb(
      denoise_fn,
      batch["image"],
      rng,
      discrete=True,
      x_start_mse=frozen.get("x_start_mse"),
    )
    return bound._asdict()

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
      "vlb": self.vlb,
    }


def _split(
  variables: base.Variables,
) -> tuple[base.Variables, dict[str, base.PyTree]]:
  """What the network is applied to, and the other collections."""
  others = dict(variables)
  return {"params": others.pop("params")}, others


# (x_t, timesteps, low_res) -> the network's output
_Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _on_whole(
  denoise: _Denoise, low_res: jax.Array, x_t: jax.Array, timesteps: jax.Array
) -> jax.Array:
  return denoise(x_t, timesteps, low_res)


def _tiled(
  denoise: _Denoise,
  enlarged: jax.Array,
  tile_size: int,
  x_t: jax.Array,
  timesteps: jax.Array,
) -> jax.Array:
  """The network's output tile by tile, blended where the tiles overlap.

  One tile's activations are alive at a time. Neighbours overlap by a quarter
  or more, and their outputs are mixed at every diffusion step (as in
  MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113, eq. 5), so that no
  seam can grow. Close to the whole picture's output, not equal: the network's
  norms see a tile.

  Args:
    enlarged: `low_res` in x_t's size.
    tile_size: of the network's pictures, no larger than x_t's sides.
  """
  _, H, W, _ = x_t.shape
  height, width = min(tile_size, H), min(tile_size, W)
  corners = [
    (y, x) for y in _tile_starts(H, height) for x in _tile_starts(W, width)
  ]
  window = (_ramp(height)[:, None] * _ramp(width))[:, :, None]
  weight = np.zeros((H, W, 1), np.float32)
  for y, x in corners:
    weight[y : y + height, x : x + width] += window

  def add_tile(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
    y, x = corner

    def cut(picture: jax.Array) -> jax.Array:
      B, _, _, C = picture.shape
      return jax.lax.dynamic_slice(picture, (0, y, x, 0), (B, height, width, C))

    output = denoise(cut(x_t), timesteps, cut(enlarged)) * window
    updated = cut(total) + output
    return jax.lax.dynamic_update_slice(total, updated, (0, y, x, 0)), None

  tile = jax.ShapeDtypeStruct((x_t.shape[0], height, width, 3), x_t.dtype)
  channels = jax.eval_shape(denoise, tile, timesteps, tile).shape[-1]
  total = jnp.zeros((*x_t.shape[:-1], channels), jnp.float32)
  total, _ = jax.lax.scan(add_tile, total, jnp.asarray(corners))
  return total / weight


def _tile_starts(length: int, size: int) -> list[int]:
  """Places of tiles that cover `length`, overlapping by a quarter or more."""
  count = 1 + -(-(length - size) // max(1, size * 3 // 4))
  return np.linspace(0, length - size, count).round().astype(int).tolist()


def _ramp(size: int) -> np.ndarray:
  """[size] float32, rising over the first quarter, falling over the last."""
  distance = np.minimum(np.arange(size), np.arange(size)[::-1])
  return np.minimum(1.0, (distance + 1) / max(1, size // 4)).astype(np.float32)
