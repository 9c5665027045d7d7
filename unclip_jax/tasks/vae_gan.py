"""VAE-GAN from text: P(x | caption) through a latent p(z | caption).

The bound of a conditional variational autoencoder (Sohn et al. 2015, equation
4) with an adversarial loss (Larsen et al. 2016, arXiv 1512.09300, algorithm 1):

  L_rec(x, decoder(z, y)) + kl_weight KL(q(z | x, y) || p(z | y)) + L_GAN

L_rec and L_GAN, with VQGAN's adaptive weight, are those of
tasks/autoencoding.py. As in Larsen et al. the discriminator meets both
reconstructions and pictures drawn from the prior, which are all that there is
when a picture is drawn from a caption.

Deviations: the KL is divided by the number of pixel values, as the
reconstruction is; reconstructions are compared in pixels and, if there is one,
in a perceptual network's features, not in the discriminator's; the prior and
the text encoder learn from the adversary too. In evaluation the loss is without
the adversarial part.

Captions are read by a text encoder that is trained with the rest, which may
start with BERT's weights

  --config.init_from.path=models/bert \
  --config.init_from.names='^params.text_encoder.(?!pooler)'

or by a frozen one, `config.frozen.text`: any model whose task has `encode_text`
(a converted BERT, a CLIP). The tokenizer must be that model's, too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import draws, gaussian
from unclip_jax.tasks import autoencoding, base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a picture from a caption, in one pass.

  Attributes:
    objective: fields of tasks.autoencoding.Objective.
    kl_weight: of the KL between posterior and prior.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  kl_weight: float = 0.1
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "text_to_image"

  def __post_init__(self) -> None:
    _ = self._objective
    if (self.model.vocab_size is None) != ("text" in self.upstream):
      raise errors.UserError(
        "captions are read either by the model, with a config.model.vocab_size,"
        " or by config.frozen.text: set one of them"
      )

  @functools.cached_property
  def _objective(self) -> autoencoding.Objective:
    return autoencoding.make_objective(self.objective)

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    return self.model.init(rng, batch["image"], **self._text(frozen, batch))

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

  def _text(
    self, frozen: base.Frozen, batch: base.Batch
  ) -> dict[str, jax.Array]:
    """The captions, as the network reads them."""
    text = base.text(batch)
    if "text" not in self.upstream:
      return text
    _, encodings = self.upstream["text"].encode_text(frozen["text"], **text)
    mask = batch["text_mask"][:, : encodings.shape[1]]
    return {"text_encodings": encodings, "text_mask": mask}

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
    noise_rng, draw_rng, dropout_rng = draws.split(rng, 3)
    true = batch["image"]
    B, h = len(true), self.model.grid_size
    shape = (B, h, h, self.model.code_dim)
    features, out = self.model.apply(
      variables,
      true,
      **self._text(frozen, batch),
      noise=draws.normal(noise_rng, shape),
      draw_noise=draws.normal(draw_rng, shape) if train else None,
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
      method=self.model.reconstruct,
    )
    kl = gaussian.normal_kl(*out["posterior"], *out["prior"])
    metrics = {"kl": jnp.sum(kl, axis=(1, 2, 3))}
    cost = self.kl_weight * metrics["kl"] / math.prod(true.shape[1:])
    perceive = self._objective.perceive(self.upstream, frozen)
    params = variables["params"]
    if not train:
      image = self._to_image(params, features)
      found = self._objective.reconstruct(image, true, perceive)
      total = found.pop("total")
      return base.LossOutput(total + cost, metrics | found, {})

    # The text encoder is the generator's.
    text_embed = jax.lax.stop_gradient(out["text_embed"])

    def discriminate(params: base.PyTree, image: jax.Array) -> jax.Array:
      repeated = jnp.concatenate([text_embed] * (len(image) // B))
      return self.model.apply(
        {"params": params}, image, repeated, method=self.model.discriminate
      )

    total, found = self._objective.losses(
      self._to_image,
      features,
      params,
      true,
      discriminate=discriminate,
      perceive=perceive,
      step=step,
    )
    return base.LossOutput(total + cost, metrics | found, {})

  def _to_image(self, params: base.PyTree, features: jax.Array) -> jax.Array:
    return self.model.apply(
      {"params": params}, features, method=self.model.to_image
    )

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    temperature: float = 1.0,
    return_maps: bool = False,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, S, S, 3] in [-1, 1] for the captions of the batch.

    Args:
      rng: one key, or one key per caption, [B].
      temperature: factor on the standard deviation of p(z | caption); 0 draws
        from its mean.
      return_maps: whether the attention maps come too, by their names in
        models/vae_gan.py.

    Raises:
      UserError: a negative temperature.
    """
    if temperature < 0:
      raise errors.UserError(
        f"temperature must be 0 or more, not {temperature}"
      )
    apply = functools.partial(self.model.apply, variables)
    text, maps = apply(
      **self._text(frozen, batch), method=self.model.encode_text
    )
    prior, prior_maps = apply(text, method=self.model.draw_prior)
    noise = draws.normal(rng, prior.mean.shape)
    features, decoder_maps = apply(
      prior.sample(noise, temperature), text, method=self.model.decode
    )
    image = self._to_image(variables["params"], features)
    output = {"image": jnp.clip(image, -1.0, 1.0)}
    if return_maps:
      output |= {**maps, **prior_maps, **decoder_maps}
    return output

  def reconstruct(
    self, variables: base.Variables, frozen: base.Frozen, batch: base.Batch
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Pictures [B, S, S, 3] in [-1, 1] again, by the posterior's mean.

    And the intermediates of models.vae_gan.Model.reconstruct.
    """
    features, out = self.model.apply(
      variables,
      batch["image"],
      **self._text(frozen, batch),
      method=self.model.reconstruct,
    )
    image = self._to_image(variables["params"], features)
    return jnp.clip(image, -1.0, 1.0), out

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def reconstruct(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      del rng
      image, _ = self.reconstruct(variables, frozen, batch)
      return {"image": image}

    return {
      "loss": base.loss_predict_fn(self),
      "reconstruct": reconstruct,
      "sample": functools.partial(self.sample, **self.sample_options),
    }
