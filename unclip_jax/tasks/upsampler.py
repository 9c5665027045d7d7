"""The upsamplers: P(x | low_res) (Ramesh et al. 2022, sections 2.1, App. C).

A U-Net without attention and without text sees the noised picture and the
bilinearly enlarged small one (Saharia et al. 2021, SR3). It is trained on
crops of the target with a corrupted `low_res` (data/degradations.py) and,
being fully convolutional, draws whole pictures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import process as process_lib
from unclip_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Task:
  """Enlarges a picture by an integer factor.

  Attributes:
    process: fields of diffusion.process.Process.
    scale: factor between `low_res` and `image`; 4 in the paper.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scale: int = 4
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
    return self.model.init(
      rng, batch["image"], timesteps, low_res=batch["low_res"]
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

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
    diffusion_rng, dropout_rng = jax.random.split(rng)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      model_output, _ = self.model.apply(
        variables,
        x_t,
        timesteps,
        low_res=batch["low_res"],
        train=train,
        rngs={"dropout": dropout_rng},
      )
      return model_output

    losses = self.diffusion.loss(
      denoise_fn, batch["image"], diffusion_rng, batch.get("timesteps")
    )
    return base.LossOutput(losses.pop("loss"), losses, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    num_sample_steps: int = 27,
    sampler: str = "ddim",
    **options: Any,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, scale * h, scale * w, 3] in [-1, 1] from `low_res`.

    Other options as in diffusion.process.Process.sample; the paper uses no
    guidance.
    """
    low_res = batch["low_res"]
    B, h, w, C = low_res.shape
    # Without attention nothing but the picture conditions the network, so the
    # context is empty and only the enlargement is independent of the timestep.
    condition = self.model.apply(variables, method=self.model.encode_condition)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      return self.model.apply(
        variables,
        x_t,
        timesteps,
        condition,
        low_res=low_res,
        method=self.model.denoise,
      )

    x_0 = self.diffusion.sample(
      denoise_fn,
      (B, self.scale * h, self.scale * w, C),
      rng,
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      x_start_mse=frozen.get("x_start_mse"),
      **options,
    )
    return {"image": jnp.clip(x_0, -1.0, 1.0)}

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def sample(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      return self.sample(variables, frozen, batch, rng, **self.sample_options)

    return {"loss": base.loss_predict_fn(self), "sample": sample}
