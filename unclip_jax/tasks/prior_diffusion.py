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

from unclip_jax.diffusion import draws
from unclip_jax.diffusion import process as process_lib
from unclip_jax.tasks import base, priors
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import embedding_space


@dataclasses.dataclass(frozen=True)
class Task:
  """Predicts a CLIP image embedding from a caption.

  Attributes:
    process: fields of diffusion.process.Process.
    embedding_space: kind of standardisation (utils.embedding_space).
    normalize_text_embed: whether z_t is scaled to the norm of a standard normal
      vector; False: it enters as the CLIP gives it (Karlo).
    text_drop_prob: share of captions dropped in training, which makes
      classifier-free guidance possible; 0.1 in the paper.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  embedding_space: str = "mean_std"
  normalize_text_embed: bool = True
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
    self,
    frozen: base.Frozen,
    batch: base.Batch,
    drop: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    return priors.condition(
      self.upstream["clip"],
      frozen["clip"],
      batch,
      normalize=self.normalize_text_embed,
      drop=drop,
      learned_null=self.model.learned_null_text,
      as_tokens=self.model.vocab_size is not None,
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
    drop_rng, diffusion_rng, dropout_rng = draws.split(rng, 3)
    image_embed = clip_task.image_embed(
      self.upstream["clip"], frozen["clip"], batch
    )
    x_start = embedding_space.encode(frozen["embedding_space"], image_embed)
    drop = None
    if train:
      drop = draws.bernoulli(drop_rng, self.text_drop_prob, x_start.shape[:1])
    condition = self._condition(frozen, batch, drop)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      model_output, _ = self.model.apply(
        variables,
        x_t,
        timesteps,
        **condition,
        train=train,
        rngs={"dropout": draws.first(dropout_rng)},
      )
      return model_output

    losses = self.diffusion.loss(
      denoise_fn, x_start, diffusion_rng, batch.get("timesteps")
    )
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
    prefill = functools.partial(
      self.model.apply, variables, method=self.model.prefill
    )
    null = None
    if guidance_scale != 1.0:
      drop = jnp.ones(1, bool)
      null = self._condition(frozen, priors.first_row(batch), drop)
    cache = priors.encode_rows(prefill, condition, null, num_candidates)

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      return self.model.apply(
        variables, x_t, timesteps, cache, method=self.model.denoise
      )

    x_0 = self.diffusion.sample(
      denoise_fn,
      (B * num_candidates, D),
      priors.candidate_rngs(rng, num_candidates),
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      guidance_scale=guidance_scale,
      x_start_mse=frozen.get("x_start_mse"),
      **options,
    )
    candidates = embedding_space.decode(frozen["embedding_space"], x_0)
    return priors.keep_nearest(candidates, condition["text_embed"])

  def vlb(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Parts of the bound on -log2 p(z_i | caption), as likelihood.Vlb.

    Of the density per dimension of the standardised embedding, which has no
    levels: below 0 where it is above 1. Comparable between models of one
    embedding space only.
    """
    image_embed = self.upstream["clip"].encode_image(
      frozen["clip"], batch["clip_image"]
    )
    x_start = embedding_space.encode(frozen["embedding_space"], image_embed)
    cache = self.model.apply(
      variables, **self._condition(frozen, batch), method=self.model.prefill
    )

    def denoise_fn(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
      return self.model.apply(
        variables, x_t, timesteps, cache, method=self.model.denoise
      )

    bound = self.diffusion.vlb(
      denoise_fn,
      x_start,
      rng,
      discrete=False,
      x_start_mse=frozen.get("x_start_mse"),
    )
    return bound._asdict()

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {**priors.predict_fns(self), "vlb": self.vlb}


def fit_embedding_space(
  kind: str,
  clip: Any,
  clip_variables: base.Variables,
  batches: Iterable[base.Batch],
  *,
  of: str = "image_embed",
) -> dict[str, base.PyTree]:
  """The table `embedding_space` from `batches`.

  Args:
    of: "image_embed" of the pictures, or "text_embed" of the captions.
  """

  @jax.jit
  def embed(variables: base.Variables, batch: base.Batch) -> jax.Array:
    if of == "image_embed":
      return clip_task.image_embed(clip, variables, batch)
    text_embed, _ = clip_task.text_states(clip, variables, batch)
    return text_embed

  embeds = [embed(clip_variables, batch) for batch in batches]
  return {"embedding_space": embedding_space.fit(kind, jnp.concatenate(embeds))}
