"""A conditional VAE: the bound on log p(x | caption), and how it is trained.

With the caption's state t (Kingma & Welling 2014, arXiv 1312.6114, eq. 3; Sohn
et al. 2015, eq. 4):

  log p(x | t) >= E_q(z | x, t)[log p(x | z, t)] - KL(q(z | x, t) || p(z | t))

The KL term is what aligns both encoders: what the picture's says of z, the
caption's learns to foretell. In training it is annealed and has free bits
(losses/variational.py); evaluation gives the bound itself.

Such systems are trained in stages. What each of them learns is `objective`:

  "text"   the text encoder alone: each token of the caption from those before
           it (a recurrent language model: Mikolov et al. 2010)
  "image"  picture to z to picture, with no caption: t is 0, the prior N(0, I)
  "elbo"   the bound above, of all networks together or, with the others frozen
           by config.optim.rules, of one
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

from unclip_jax.diffusion import draws, gaussian
from unclip_jax.losses import variational
from unclip_jax.models import cvae
from unclip_jax.tasks import base
from unclip_jax.utils import errors

OBJECTIVES = ("text", "image", "elbo")


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a picture from a caption by way of a latent variable.

  Attributes:
    objective: one of OBJECTIVES, see the module's docstring.
    kl_weight: of the KL term in training, after its warm-up; 1 is the bound.
    kl_warmup_steps: over which that weight rises from 0.
    free_bits: that each latent dimension may carry at no cost, in training.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  objective: str = "elbo"
  kl_weight: float = 1.0
  kl_warmup_steps: int = 0
  free_bits: float = 0.0
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "text_to_image"

  def __post_init__(self) -> None:
    if self.objective not in OBJECTIVES:
      raise errors.UserError(
        f"config.task.objective '{self.objective}' is not one of "
        f"{', '.join(OBJECTIVES)}"
      )

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    return self.model.init(
      rng, batch["image"], batch["text_tokens"], batch["text_mask"]
    )

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
    """Nats per token, or nats per dimension of the picture.

    Metrics of pictures: `kl` in nats per picture, `mse`, and what weighs the
    KL, `kl_weight`; of captions `accuracy`.
    """
    del frozen
    if self.objective == "text":
      return self._caption_loss(variables, batch)
    image = batch["image"]
    text_embed = self._text_embed(variables, batch)
    posterior = self._apply("posterior", variables, image, text_embed)
    prior = self._prior(variables, text_embed)
    z = _draw(posterior, rng)
    mean, log_stddev = self._apply("decode", variables, z, text_embed)

    pixels = tuple(range(1, image.ndim))
    log_likelihood = gaussian.log_density(image, mean, 2.0 * log_stddev)
    kl = gaussian.normal_kl(*posterior, *prior)
    weight, counted = jnp.ones(()), kl.sum(axis=-1)
    if train:
      weight = self.kl_weight * variational.warm_up(step, self.kl_warmup_steps)
      counted = variational.free_bits(kl, self.free_bits)
    loss = weight * counted - log_likelihood.sum(axis=pixels)
    metrics = {
      "kl": kl.sum(axis=-1),
      "mse": jnp.square(image - mean).mean(axis=pixels),
      "kl_weight": weight,
      "stddev": jnp.exp(log_stddev),
    }
    return base.LossOutput(loss / image[0].size, metrics, {})

  def _caption_loss(
    self, variables: base.Variables, batch: base.Batch
  ) -> base.LossOutput:
    tokens, mask = batch["text_tokens"], batch["text_mask"]
    logits = self._apply("next_token_logits", variables, tokens, mask)
    logits, targets = logits[:, :-1], tokens[:, 1:]
    weight = mask[:, 1:].astype(jnp.float32)
    count = jnp.maximum(weight.sum(axis=-1), 1.0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    is_right = jnp.argmax(logits, axis=-1) == targets
    metrics = {"accuracy": (weight * is_right).sum(axis=-1) / count}
    return base.LossOutput((weight * nats).sum(axis=-1) / count, metrics, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    temperature: float = 1.0,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, S, S, 3] in [-1, 1]: the mean of p(x | z, caption).

    Args:
      batch: gives `text_tokens` [B, L] int32 and `text_mask` [B, L] bool.
      rng: one key, or one key per caption.
      temperature: multiplies the standard deviations of p(z | caption); 0
        takes its mean.

    Raises:
      UserError: temperature below 0, or a model of captions alone.
    """
    del frozen
    if temperature < 0:
      raise errors.UserError(
        f"temperature must be 0 or more, not {temperature}"
      )
    if self.objective == "text":
      raise errors.UserError(
        "this run has trained the text encoder alone and draws no pictures: "
        "sample from a run of a later stage"
      )
    text_embed = self._text_embed(variables, batch)
    z = _draw(self._prior(variables, text_embed), rng, temperature)
    image, _ = self._apply("decode", variables, z, text_embed)
    return {"image": jnp.clip(image, -1.0, 1.0)}

  def reconstruct(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """`image` [B, S, S, 3] in [-1, 1], decoded from the posterior's mean."""
    del frozen, rng
    text_embed = self._text_embed(variables, batch)
    posterior = self._apply("posterior", variables, batch["image"], text_embed)
    image, _ = self._apply("decode", variables, posterior.mean, text_embed)
    return {"image": jnp.clip(image, -1.0, 1.0)}

  def _apply(
    self, method: str, variables: base.Variables, *args: jax.Array
  ) -> Any:
    return self.model.apply(variables, *args, method=method)

  def _text_embed(
    self, variables: base.Variables, batch: base.Batch
  ) -> jax.Array:
    """t [B, D]; 0 where pictures are learned without captions."""
    if self.objective == "image":
      return jnp.zeros((len(batch["text_tokens"]), self.model.text_width))
    return self._apply(
      "encode_text", variables, batch["text_tokens"], batch["text_mask"]
    )

  def _prior(
    self, variables: base.Variables, text_embed: jax.Array
  ) -> cvae.Gaussian:
    """p(z | t); N(0, I) where pictures are learned without captions."""
    if self.objective == "image":
      zeros = jnp.zeros((len(text_embed), self.model.latent_dim))
      return cvae.Gaussian(zeros, zeros)
    return self._apply("prior", variables, text_embed)

  def predict_fns(self) -> dict[str, base.PredictFn]:
    fns = {"loss": base.loss_predict_fn(self)}
    if self.objective != "text":
      fns["sample"] = functools.partial(self.sample, **self.sample_options)
      fns["reconstruct"] = self.reconstruct
    return fns


def _draw(
  of: cvae.Gaussian, rng: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """z [B, Z], by one key or one key per row."""
  noise = draws.normal(rng, of.mean.shape)
  return of.mean + temperature * jnp.exp(0.5 * of.log_variance) * noise
