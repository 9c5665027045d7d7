"""The diffusion prior: P(z_i | caption) (Ramesh et al. 2022, section 2.2).

A causal transformer denoises the CLIP image embedding z_i given the encoded
caption and the CLIP text embedding z_t; it predicts the un-noised embedding
with a plain squared error (eq. 2). Sampling draws several candidates and keeps
the one with the larger dot product with z_t; all of them share the key/value
cache of the text prefix, which does not depend on the timestep.

Embeddings are standardised by `EmbeddingSpace`. The paper multiplies them by
17.2, the right factor for its own CLIP; `kind="scaled"` does that.
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
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import embedding_space


@dataclasses.dataclass(frozen=True)
class Task:
  """Predicts a CLIP image embedding from a caption.

  Attributes:
    process: fields of diffusion.process.Process.
    embedding_space: kind of standardisation (utils.embedding_space).
    text_drop_prob: share of captions dropped in training, which makes
      classifier-free guidance possible; 0.1 in the paper.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  embedding_space: str = "mean_std"
  text_drop_prob: float = 0.1
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  @functools.cached_property
  def diffusion(self) -> process_lib.Process:
    return process_lib.Process(
      **{"prediction": "x_start", "schedule": "cosine", **self.process}
    )

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    condition = self._condition(frozen, batch)
    B, D = condition["text_embed"].shape
    return self.model.init(
      rng, jnp.zeros((B, D)), jnp.zeros((B,), jnp.int32), **condition
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    return fit_embedding_space(
      self.embedding_space, self.upstream["clip"], frozen["clip"], batches
    )

  def _condition(
    self, frozen: base.Frozen, batch: base.Batch
  ) -> dict[str, jax.Array]:
    """z_t scaled to the norm of a standard normal vector, and the caption."""
    text_embed, text_encodings = self.upstream["clip"].encode_text(
      frozen["clip"], batch["text_tokens"], batch["text_mask"]
    )
    scale = text_embed.shape[-1] ** 0.5
    return {
      "text_embed": clip_task.normalize(text_embed) * scale,
      **caption(batch, text_encodings, self.model.vocab_size is not None),
    }

  def _true_image_embed(
    self, frozen: base.Frozen, batch: base.Batch
  ) -> jax.Array:
    return self.upstream["clip"].encode_image(
      frozen["clip"], batch["clip_image"]
    )

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
    drop_rng, diffusion_rng, dropout_rng = jax.random.split(rng, 3)
    x_start = embedding_space.encode(
      frozen["embedding_space"], self._true_image_embed(frozen, batch)
    )
    condition = self._condition(frozen, batch)
    if train:
      condition["text_drop"] = jax.random.bernoulli(
        drop_rng, self.text_drop_prob, x_start.shape[:1]
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
    num_candidates: int = 2,
    num_sample_steps: int = 64,
    sampler: str = "ddpm",
    **options: Any,
  ) -> dict[str, jax.Array]:
    """Draws `image_embed` for `text_tokens`, `text_mask` of the batch.

    Args:
      num_candidates: draws per caption, of which the one with the largest
        dot product with z_t is kept; 2 in the paper.
      **options: of diffusion.process.Process.sample, whose B counts the
        candidates.

    Returns:
      `image_embed` [B, D] in the CLIP's own space and `text_embed` [B, D],
      normalised.
    """
    condition = self._condition(frozen, batch)
    B, D = condition["text_embed"].shape
    n = num_candidates
    if rng is not None and rng.ndim:  # a key per caption: one per candidate
      rng = jax.vmap(lambda key: jax.random.split(key, n))(rng).reshape(-1)

    cache = self._prefill(variables, condition, guidance_scale, n)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      return self.model.apply(
        variables, x_t, timesteps, cache, method=self.model.denoise
      )

    x_0 = self.diffusion.sample(
      denoise_fn,
      (B * n, D),
      rng,
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      guidance_scale=guidance_scale,
      **options,
    )
    candidates = embedding_space.decode(frozen["embedding_space"], x_0)
    candidates = candidates.reshape(B, n, D)
    text_embed = clip_task.normalize(condition["text_embed"])
    scores = jnp.einsum(
      "bnd,bd->bn", clip_task.normalize(candidates), text_embed
    )
    best = jnp.argmax(scores, axis=1)
    image_embed = jnp.take_along_axis(candidates, best[:, None, None], axis=1)
    return {"image_embed": image_embed[:, 0], "text_embed": text_embed}

  def _prefill(
    self,
    variables: base.Variables,
    condition: dict[str, jax.Array],
    guidance_scale: float,
    num_candidates: int,
  ) -> base.PyTree:
    """The prefix's cache for [B * n] rows, with guidance [2 * B * n].

    The prefix runs once per caption and once for the dropped caption, which
    is the same for every row.
    """

    def prefill(rows: dict[str, jax.Array], drop: bool) -> base.PyTree:
      text_drop = jnp.full(rows["text_mask"].shape[:1], drop)
      return self.model.apply(
        variables, **rows, text_drop=text_drop, method=self.model.prefill
      )

    cache = jax.tree.map(
      lambda x: jnp.repeat(x, num_candidates, axis=0), prefill(condition, False)
    )
    if guidance_scale == 1.0:
      return cache
    null = prefill(jax.tree.map(lambda x: x[:1], condition), True)
    return jax.tree.map(
      lambda x, y: jnp.concatenate([x, jnp.broadcast_to(y, x.shape)]),
      cache,
      null,
    )

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def sample(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      output = self.sample(variables, frozen, batch, rng, **self.sample_options)
      true_image_embed = self._true_image_embed(frozen, batch)
      return {
        "image_embed": output["image_embed"],
        "true_image_embed": true_image_embed,
        "text_embed": output["text_embed"],
      }

    return {"loss": base.loss_predict_fn(self), "sample": sample}


def caption(
  batch: base.Batch, text_encodings: jax.Array, as_tokens: bool
) -> dict[str, jax.Array]:
  """A network's text: its tokens, or the CLIP's states of them."""
  if as_tokens:
    return {k: batch[k] for k in ("text_tokens", "text_mask")}
  L = text_encodings.shape[1]
  return {
    "text_encodings": text_encodings,
    "text_mask": batch["text_mask"][:, :L],
  }


def fit_embedding_space(
  kind: str,
  clip: Any,
  clip_variables: base.Variables,
  batches: Iterable[base.Batch],
) -> dict[str, base.PyTree]:
  """The table `embedding_space` from the pictures of `batches`."""
  encode = jax.jit(clip.encode_image)
  embeds = [encode(clip_variables, batch["clip_image"]) for batch in batches]
  return {"embedding_space": embedding_space.fit(kind, jnp.concatenate(embeds))}
