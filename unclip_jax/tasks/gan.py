"""Text-conditional GAN: two players, one gradient (Reed et al. 2016).

The loss of an example is L_G(G, sg(D)) + L_D(sg(fake), D), where sg holds a
player's parameters or pictures fixed. No parameter is both players', so the
gradient of the sum is each player's own, exactly, and one update moves both:
updates are simultaneous, where the papers' take turns. A rate of its own for
each player is `config.optim.groups`.

  L_G  the adversarial loss of G(z, c); with conditioning augmentation the KL
       divergence from N(0, I) (Zhang et al. 2017, arXiv 1612.03242, equation
       2); with a CLIP, 1 - the cosine of its embeddings of picture and caption
  L_D  the adversarial loss of true and generated pictures, and of true ones
       with wrong captions (arXiv 1605.05396, algorithm 1); R1 or the gradient
       penalty. Kernels may be spectrally normalised

Losses and penalties: losses/adversarial.py. What the discriminator is shown is
augmented (losses/diff_augment.py), and penalties are taken at what it is shown.

The wrong caption of an example is that of the next row, the first one's for the
last; where both are the same there is none. So the loss of a row takes the next
row's caption from the data, and nothing else from any other. On a mesh the rows
are the global batch's; a microbatch, or a device under `jax.pmap`, pairs the
rows that it has, and so other ones than the whole batch would.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import draws, gaussian
from unclip_jax.losses import adversarial, diff_augment
from unclip_jax.tasks import base
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a picture from a caption in one step.

  Attributes:
    loss_type: one of losses.adversarial.KINDS.
    gradient_penalty_weight: 10 in Gulrajani et al. 2017; 0 = off.
    r1_weight: gamma of Mescheder et al. 2018, of which half is multiplied with
      the squared norm; 0 = off.
    r1_every: R1 is computed in every so many-th step, so many times as strong
      (Karras et al. 2020, arXiv 1912.04958, section 3.1). On CPU that costs
      more than it saves: there convolutions are slow inside of a condition.
    wrong_captions: true pictures with wrong captions count as fake.
    caption_kl_weight: read with config.model.caption_augmentation.
    clip_weight: of 1 - cosine, by the upstream `clip`; 0 = off.
    augmentation: fields of losses.diff_augment.DiffAugment.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  loss_type: str = "nonsaturating"
  gradient_penalty_weight: float = 0.0
  r1_weight: float = 0.0
  r1_every: int = 1
  wrong_captions: bool = True
  caption_kl_weight: float = 1.0
  clip_weight: float = 0.0
  augmentation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "text_to_image"

  def __post_init__(self) -> None:
    adversarial.check_kind(self.loss_type)
    self._augment  # noqa: B018 - its fields are checked
    bounded = (
      self.gradient_penalty_weight,
      self.r1_weight,
      self.model.spectral_norm_iterations,
    )
    if self.loss_type == "wasserstein" and not any(bounded):
      raise errors.UserError(
        "a wasserstein critic has to be bounded: set"
        " config.task.gradient_penalty_weight, for example to 10"
      )
    if self.r1_every < 1:
      raise errors.UserError(
        f"config.task.r1_every is {self.r1_every}: choose 1 (every step) or"
        " more"
      )
    if self.clip_weight and "clip" not in self.upstream:
      raise errors.UserError(
        "config.task.clip_weight needs a CLIP: set config.frozen.clip ="
        " dict(path=...), or clip_weight to 0"
      )

  @functools.cached_property
  def _augment(self) -> diff_augment.DiffAugment:
    return config_lib.construct(
      diff_augment.DiffAugment,
      self.augmentation,
      where="config.task.augmentation",
    )

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    return self.model.init(rng, batch["image"], **base.text(batch))

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
    """L_G + L_D; in evaluation without augmentation and penalties.

    The sum is of use as a gradient: as a number it tells little of how good
    the pictures are.

    Raises:
      UserError: wrong captions are asked for, and there is one row.
    """
    latent_rng, augment_rng, real_rng, penalty_rng = draws.split(rng, 4)
    generator = variables["params"]["generator"]
    discriminator = self.model.normalize(variables["params"]["discriminator"])
    augment = self._augment if train else lambda image, rng: image

    image, out = self._generate(generator, batch, latent_rng)
    fake = augment(image, augment_rng)
    generator_loss, metrics = self._generator_loss(
      jax.lax.stop_gradient(discriminator), frozen, batch, image, fake, out
    )
    real = augment(batch["image"], real_rng)
    discriminator_loss, more = self._discriminator_loss(
      discriminator, batch, real, jax.lax.stop_gradient(fake)
    )
    metrics |= more
    if train:
      penalty, more = self._penalty(
        discriminator,
        batch,
        real,
        jax.lax.stop_gradient(fake),
        penalty_rng,
        step,
      )
      discriminator_loss += penalty
      metrics |= more
    metrics["generator_loss"] = generator_loss
    metrics["discriminator_loss"] = discriminator_loss
    return base.LossOutput(generator_loss + discriminator_loss, metrics, {})

  def _generate(
    self,
    generator: base.PyTree,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    truncation: float = 1.0,
    z: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pictures [B, S, S, 3] of the batch's captions, as Model.generate."""
    B, model = len(batch["text_tokens"]), self.model
    caption_noise = None
    if rng is not None:
      z_rng, caption_rng = draws.split(rng)
      caption_noise = truncation * draws.normal(
        caption_rng, (B, model.caption_dim)
      )
      if z is None:
        z = truncation * draws.normal(z_rng, (B, model.latent_dim))
    return model.apply(
      {"params": {"generator": generator}},
      z,
      **base.text(batch),
      caption_noise=caption_noise,
      method=model.generate,
    )

  def _features(
    self, discriminator: base.PyTree, image: jax.Array
  ) -> jax.Array:
    return self.model.apply(
      {"params": {"discriminator": discriminator}},
      image,
      method=self.model.encode_image,
    )

  def _caption(
    self, discriminator: base.PyTree, batch: base.Batch
  ) -> jax.Array:
    return self.model.apply(
      {"params": {"discriminator": discriminator}},
      **base.text(batch),
      method=self.model.encode_text,
    )

  def _score(
    self, discriminator: base.PyTree, features: jax.Array, caption: jax.Array
  ) -> jax.Array:
    return self.model.apply(
      {"params": {"discriminator": discriminator}},
      features,
      caption,
      method=self.model.score,
    )

  def _generator_loss(
    self,
    discriminator: base.PyTree,
    frozen: base.Frozen,
    batch: base.Batch,
    image: jax.Array,
    fake: jax.Array,
    out: dict[str, jax.Array],
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_G [B] of pictures, augmented in `fake`, and its parts."""
    logits = self._score(
      discriminator,
      self._features(discriminator, fake),
      self._caption(discriminator, batch),
    )
    loss = adversarial.generator_loss(logits, self.loss_type)
    metrics = {}
    if "caption_log_variance" in out:
      kl = _kl(out["caption_mean"], out["caption_log_variance"])
      metrics["caption_kl"] = kl
      loss += self.caption_kl_weight * kl
    if self.clip_weight:
      cosine = self._clip_cosine(frozen, batch, image)
      metrics["clip_cosine"] = cosine
      loss += self.clip_weight * (1.0 - cosine)
    return loss, metrics

  def _clip_cosine(
    self, frozen: base.Frozen, batch: base.Batch, image: jax.Array
  ) -> jax.Array:
    """[B], of the CLIP's embeddings of the pictures and of their captions."""
    clip, variables = self.upstream["clip"], frozen["clip"]
    size = (len(image), clip.image_size, clip.image_size, 3)
    if image.shape != size:
      image = jnp.clip(jax.image.resize(image, size, "bicubic"), -1.0, 1.0)
    text_embed, _ = clip_task.text_states(clip, variables, batch)
    image_embed = clip_task.normalize(clip.encode_image(variables, image))
    return jnp.sum(image_embed * clip_task.normalize(text_embed), axis=-1)

  def _discriminator_loss(
    self,
    discriminator: base.PyTree,
    batch: base.Batch,
    real: jax.Array,
    fake: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_D [B] without its penalties, and its parts."""
    score = functools.partial(self._score, discriminator)
    caption = self._caption(discriminator, batch)
    features = self._features(discriminator, real)
    real_logits = score(features, caption)
    fake_logits = score(self._features(discriminator, fake), caption)
    loss = adversarial.discriminator_loss(
      real_logits, fake_logits, self.loss_type
    )
    metrics = {"real_logits": real_logits, "fake_logits": fake_logits}
    if self.wrong_captions:
      # Of the next row's tokens, which are encoded already.
      wrong_logits = score(features, next_row(caption))
      metrics["wrong_logits"] = wrong_logits
      tokens = batch["text_tokens"]
      is_wrong = jnp.any(tokens != next_row(tokens), axis=1)
      loss = jnp.where(
        is_wrong,
        adversarial.matching_aware_loss(
          real_logits, fake_logits, wrong_logits, self.loss_type
        ),
        loss,
      )
    return loss, metrics

  def _penalty(
    self,
    discriminator: base.PyTree,
    batch: base.Batch,
    real: jax.Array,
    fake: jax.Array,
    rng: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is added to L_D [B], and its parts."""
    penalty, metrics = jnp.zeros(len(real)), {}
    if not (self.gradient_penalty_weight or self.r1_weight):
      return penalty, metrics
    caption = self._caption(discriminator, batch)

    def critic(image: jax.Array) -> jax.Array:
      features = self._features(discriminator, image)
      return self._score(discriminator, features, caption)

    if self.gradient_penalty_weight:
      metrics["gradient_penalty"] = adversarial.gradient_penalty(
        critic, real, fake, rng
      )
      penalty += self.gradient_penalty_weight * metrics["gradient_penalty"]
    if self.r1_weight and self.r1_every == 1:
      metrics["r1"] = adversarial.r1(critic, real)
      penalty += 0.5 * self.r1_weight * metrics["r1"]
    elif self.r1_weight:
      # No metric: most of what is logged would be 0.
      penalty += jax.lax.cond(
        step % self.r1_every == 0,
        lambda: (
          0.5 * self.r1_weight * self.r1_every * adversarial.r1(critic, real)
        ),
        lambda: jnp.zeros(len(real)),
      )
    return penalty, metrics

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    truncation: float = 1.0,
    z: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, S, S, 3] in [-1, 1] for the batch's captions.

    The batch gives `text_tokens` and `text_mask` [B, L].

    Args:
      rng: one key, or one key per caption, [B]; None with `z`, where the
        caption is not drawn around its mean either.
      truncation: factor on all that is drawn; less than 1 gives pictures that
        are more alike and nearer to the middle of what was learned.
      z: [B, latent_dim] in place of the draw.

    Raises:
      UserError: a negative truncation.
    """
    del frozen
    if truncation < 0.0:
      raise errors.UserError(
        f"truncation is {truncation}: choose 0 (no variety) or more"
      )
    image, _ = self._generate(
      variables["params"]["generator"], batch, rng, truncation=truncation, z=z
    )
    return {"image": image}

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
    }


def next_row(x: jax.Array) -> jax.Array:
  """[B, ...] -> row i + 1 in the place of row i, the first in the last's.

  Raises:
    UserError: there is one row.
  """
  if len(x) < 2:
    raise errors.UserError(
      "a wrong caption is the next example's, and there is one example: use a"
      " batch, microbatches and devices of 2 or more, or set"
      " config.task.wrong_captions=false"
    )
  return jnp.roll(x, -1, axis=0)


def _kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """KL(N(mean, variance) || N(0, I)) of [B, D], in nats: [B]."""
  zero = jnp.zeros(())
  return gaussian.normal_kl(mean, log_variance, zero, zero).sum(axis=-1)
