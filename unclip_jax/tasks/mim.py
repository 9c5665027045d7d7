"""Masked image modelling: random patches are hidden and predicted.

What is predicted is the model's `num_codes`:

  None   pixels, each patch normalised by its own mean and standard deviation,
         with the squared error: MAE (He et al. 2022, arXiv 2111.06377),
         section 3 and table 1d
  V      codes of a frozen tokenizer, with cross-entropy: BEiT (Bao et al. 2022,
         arXiv 2106.08254), equation 2

The loss is a mean over masked patches only. Masks are drawn uniformly, as in
MAE, with one number of masked patches for all pictures; BEiT draws blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from unclip_jax.diffusion import draws
from unclip_jax.models import mim
from unclip_jax.tasks import base, image_tokens
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Learns from pictures alone, by filling in what it does not see.

  Attributes:
    mask_ratio: share of patches that are masked; 0.75 in MAE, 0.4 in BEiT.
    normalize_target: whether patches of pixels are normalised.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  mask_ratio: float = 0.75
  normalize_target: bool = True
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "image_to_image"

  def __post_init__(self) -> None:
    if not 0 < self.num_masked < self.model.num_patches:
      raise errors.UserError(
        f"config.task.mask_ratio {self.mask_ratio} masks {self.num_masked} of "
        f"{self.model.num_patches} patches: some must be masked, and some seen"
      )
    if self.model.num_codes is not None:
      image_tokens.check_tokenizer(self)

  @property
  def num_masked(self) -> int:
    """Patches that are masked of every picture."""
    return round(self.mask_ratio * self.model.num_patches)

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    B = len(batch["image"])
    is_masked = jnp.zeros((B, self.model.num_patches), bool)
    return self.model.init(rng, batch["image"], is_masked)

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
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
    """Squared error of masked pixels, or nats per masked code."""
    del step
    mask_rng, dropout_rng = draws.split(rng)
    image = batch["image"]
    is_masked = self._masks(mask_rng, len(image))
    prediction, _ = self.model.apply(
      variables,
      image,
      is_masked,
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
    )
    if self.model.num_codes is None:
      target = pixel_target(
        image, self.model.patch_size, normalize=self.normalize_target
      )
      errors_ = jnp.square(prediction - target).mean(axis=-1)
      return base.LossOutput(masked_mean(errors_, is_masked), {}, {})
    tokens = image_tokens.encode(self, frozen, batch)
    return token_loss(prediction, tokens, is_masked)

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Fills in pictures, of which it masks patches itself.

    Patches of normalised pixels get the true mean and standard deviation, as
    in MAE's own figures; codes are the most probable ones.

    Args:
      batch: `image` [B, S, S, 3] in [-1, 1].
      rng: one key, or one key per picture.

    Returns:
      `image` [B, S, S, 3] in [-1, 1], filled in; `shown`, with masked patches
      grey; `is_masked` [B, P].
    """
    image, p = batch["image"], self.model.patch_size
    is_masked = self._masks(rng, len(image))
    output, _ = self.model.apply(variables, image, is_masked)
    patches = mim.to_patches(image, p)
    if self.model.num_codes is not None:
      tokens = image_tokens.encode(self, frozen, batch)
      tokens = jnp.where(is_masked, jnp.argmax(output, axis=-1), tokens)
      drawn = mim.to_patches(image_tokens.decode(self, frozen, tokens), p)
    elif self.normalize_target:
      mean, stddev = _moments(patches)
      drawn = mean + stddev * output
    else:
      drawn = output
    hidden = is_masked[..., None]
    drawn = mim.to_image(jnp.where(hidden, drawn, patches), p)
    return {
      "image": jnp.clip(drawn, -1.0, 1.0),
      "shown": mim.to_image(jnp.where(hidden, 0.0, patches), p),
      "is_masked": is_masked,
    }

  def _masks(self, rng: jax.Array, rows: int) -> jax.Array:
    return draw_masks(rng, (rows, self.model.num_patches), self.num_masked)

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
    }


def draw_masks(
  rng: jax.Array, shape: tuple[int, int], num_masked: jax.Array | int
) -> jax.Array:
  """Bool [B, P], True at exactly `num_masked` places of each row.

  Args:
    rng: one key, or one key per row.
    num_masked: of all rows, or [B, 1].
  """
  return ranks(draws.draw(jax.random.uniform, rng, shape)) < num_masked


def ranks(x: jax.Array) -> jax.Array:
  """[..., P] -> the place of each value in ascending order, from 0."""
  return jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)


def masked_mean(x: jax.Array, is_masked: jax.Array) -> jax.Array:
  """The mean of [B, P] over the masked places: [B]."""
  weight = is_masked.astype(jnp.float32)
  return (x * weight).sum(axis=-1) / jnp.maximum(weight.sum(axis=-1), 1.0)


def token_loss(
  logits: jax.Array,
  tokens: jax.Array,
  is_masked: jax.Array,
  label_smoothing: float = 0.0,
) -> base.LossOutput:
  """Cross-entropy of the masked codes, in nats per code, and `accuracy`.

  Args:
    logits: [B, P, V].
    tokens: [B, P] int32.
    label_smoothing: share of the target's mass spread over all codes.
  """
  logp = jax.nn.log_softmax(logits)
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  nats = (1 - label_smoothing) * nats - label_smoothing * logp.mean(axis=-1)
  is_right = (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)
  metrics = {"accuracy": masked_mean(is_right, is_masked)}
  return base.LossOutput(masked_mean(nats, is_masked), metrics, {})


def pixel_target(
  image: jax.Array, patch_size: int, *, normalize: bool
) -> jax.Array:
  """[B, P, patch_size^2 * 3], normalised patch by patch (MAE, section 3)."""
  patches = mim.to_patches(image.astype(jnp.float32), patch_size)
  if not normalize:
    return patches
  mean, stddev = _moments(patches)
  return (patches - mean) / stddev


def _moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
  mean = patches.mean(axis=-1, keepdims=True)
  # The source's constant: it keeps a flat patch finite.
  return mean, jnp.sqrt(patches.var(axis=-1, keepdims=True) + 1e-6)
