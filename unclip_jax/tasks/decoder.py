"""The decoder: P(x | z_i, caption) (Ramesh et al. 2022, section 2.1).

A U-Net in the manner of GLIDE draws a small picture from a CLIP image
embedding, which is added to the timestep embedding and gives extra context
tokens, and from the caption's text states. The embedding and the caption are
dropped independently, with 10 % and 50 % in the paper, for classifier-free
guidance. The variance is learned (hybrid loss, Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import process as process_lib
from unclip_jax.tasks import base, prior_diffusion
from unclip_jax.utils import embedding_space


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a picture from a CLIP image embedding and a caption.

  Attributes:
    process: fields of diffusion.process.Process.
    embedding_space: kind of standardisation (utils.embedding_space).
    image_embed_drop_prob: share of embeddings replaced by the null embedding.
    text_drop_prob: share of captions replaced by the null caption.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  embedding_space: str = "mean_std"
  image_embed_drop_prob: float = 0.1
  text_drop_prob: float = 0.5
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  @functools.cached_property
  def diffusion(self) -> process_lib.Process:
    return process_lib.Process(
      **{"variance": "learned_range", "clip_x_start": 1.0, **self.process}
    )

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    timesteps = jnp.zeros(batch["image"].shape[:1], jnp.int32)
    condition = self._condition(frozen, batch)
    return self.model.init(rng, batch["image"], timesteps, **condition)

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    return prior_diffusion.fit_embedding_space(
      self.embedding_space, self.upstream["clip"], frozen["clip"], batches
    )

  def _condition(
    self, frozen: base.Frozen, batch: base.Batch
  ) -> dict[str, jax.Array]:
    """The network's conditioning; `image_embed` is taken from the batch if
    it is there, else from the CLIP and `clip_image`."""
    clip = self.upstream["clip"]
    image_embed = batch.get("image_embed")
    if image_embed is None:
      image_embed = clip.encode_image(frozen["clip"], batch["clip_image"])
    _, text_encodings = clip.encode_text(
      frozen["clip"], batch["text_tokens"], batch["text_mask"]
    )
    return {
      "image_embed": embedding_space.encode(
        frozen["embedding_space"], image_embed
      ),
      "text_encodings": text_encodings,
      "text_mask": batch["text_mask"],
    }

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
    del step
    image_rng, text_rng, diffusion_rng, dropout_rng = jax.random.split(rng, 4)
    x_start = batch["image"]
    condition = self._condition(frozen, batch)
    if train:
      rows = x_start.shape[:1]
      condition["image_embed_drop"] = jax.random.bernoulli(
        image_rng, self.image_embed_drop_prob, rows
      )
      condition["text_drop"] = jax.random.bernoulli(
        text_rng, self.text_drop_prob, rows
      )

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      model_output, _ = self.model.apply(
        variables,
        x_t,
        timesteps,
        **condition,
        train=train,
        rngs={"dropout": dropout_rng},
      )
      return model_output

    losses = self.diffusion.loss(denoise_fn, x_start, diffusion_rng)
    return base.LossOutput(losses.pop("loss"), losses, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    guidance_scale: float = 1.0,
    num_sample_steps: int = 250,
    sampler: str = "ddpm",
    eta: float = 0.0,
    noise: jax.Array | None = None,
    on_step: Callable[[], None] | None = None,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, S, S, 3] in [-1, 1].

    The batch gives `text_tokens`, `text_mask`, and either `image_embed`
    [B, D] in the CLIP's own space or `clip_image`. The timestep-independent
    work (keys and values of the context) runs once; options as in
    diffusion.process.Process.sample.
    """
    condition = self._condition(frozen, batch)
    B = condition["image_embed"].shape[0]
    encoded = self._encode(variables, condition, drop=False)
    if guidance_scale != 1.0:
      null = self._encode(
        variables, jax.tree.map(lambda x: x[:1], condition), drop=True
      )
      encoded = jax.tree.map(
        lambda x, y: jnp.concatenate([x, jnp.broadcast_to(y, x.shape)]),
        encoded,
        null,
      )

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      return self.model.apply(
        variables, x_t, timesteps, encoded, method=self.model.denoise
      )

    size = self.model.image_size
    x_0 = self.diffusion.sample(
      denoise_fn,
      (B, size, size, 3),
      rng,
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      guidance_scale=guidance_scale,
      eta=eta,
      noise=noise,
      on_step=on_step,
    )
    return {"image": jnp.clip(x_0, -1.0, 1.0)}

  def _encode(
    self,
    variables: base.Variables,
    condition: dict[str, jax.Array],
    *,
    drop: bool,
  ) -> base.PyTree:
    """`encode_condition` with both conditions kept, or both dropped."""
    drops = jnp.full(condition["image_embed"].shape[:1], drop)
    return self.model.apply(
      variables,
      **condition,
      image_embed_drop=drops,
      text_drop=drops,
      method=self.model.encode_condition,
    )

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def sample(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      return self.sample(variables, frozen, batch, rng, **self.sample_options)

    return {"loss": base.loss_predict_fn(self), "sample": sample}
