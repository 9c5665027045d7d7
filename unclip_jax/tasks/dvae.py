"""The discrete VAE: stage one of DALL-E (Ramesh et al. 2021, arXiv 2102.12092).

Section 2.1 and appendix A. The evidence lower bound over pictures x and grids
of codes z, with a uniform prior over the codes:

  -ln p(x | z) + beta * sum of KL(q(z_hw | x) || uniform)

divided by the number of values of the picture, so that beta weighs nats of the
codes against nats of the pixels. q is categorical; in training z is drawn by
the Gumbel-softmax relaxation (Jang et al. 2016, arXiv 1611.01144; Maddison et
al. 2016, arXiv 1611.00712), whose temperature falls until it is all but
discrete. p is logit-Laplace (losses/reconstruction.py). beta rises and the
temperature falls along half a cosine (appendix A.2).

In evaluation, and for whoever uses the codes, z is the most probable code of
each place, as in the source's stage two, and beta is the final one.

Deviation: `min_log_scale` may bound the likelihood's scale from below. Pictures
with a flat background, as drawings have, are predicted exactly there, and the
density of what is exact grows without end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import draws
from unclip_jax.losses import reconstruction
from unclip_jax.tasks import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Learns a codebook of picture parts; draws nothing itself.

  Attributes:
    kl_weight: beta at the end of its rise; 6.6 in the paper, where a code
      stands for 192 values of a picture.
    kl_steps: training steps in which beta rises from 0; 5,000 in the paper.
    start_temperature, end_temperature: of the relaxation; 1 and 1/16 there.
    temperature_steps: training steps from one to the other; 150,000 there.
    min_log_scale: lowest ln b of the likelihood, approached smoothly; -4 is
      about one 8-bit level. None: none, as in the paper.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  kl_weight: float = 6.6
  kl_steps: int = 5_000
  start_temperature: float = 1.0
  end_temperature: float = 1 / 16
  temperature_steps: int = 150_000
  min_log_scale: float | None = None

  batch_coupled = False

  def __post_init__(self) -> None:
    if min(self.start_temperature, self.end_temperature) <= 0:
      raise errors.UserError(
        "config.task.start_temperature and end_temperature must be above 0: "
        "1/16 is all but discrete"
      )

  @property
  def num_codes(self) -> int:
    """V: image tokens are 0 to num_codes - 1."""
    return self.model.num_codes

  @property
  def grid_size(self) -> int:
    """Image tokens of a side."""
    return self.model.grid_size

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    return self.model.init(rng, batch["image"])

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
    """The negative bound in nats per value of the picture.

    Metrics: `nll` of the picture given the codes, nats per value; `kl`, nats
    per code; `mse` of the mean picture, of [-1, 1]; `perplexity` of the mean
    posterior over all codes of the rows at hand (1: one code is used, V: all
    are alike), which takes no part in the loss; in training `temperature` and
    `kl_weight`.
    """
    del frozen
    image = batch["image"]
    logits = self._encode(variables, image)
    kl = kl_to_uniform(logits)
    if train:
      temperature = cosine(
        step,
        self.temperature_steps,
        self.start_temperature,
        self.end_temperature,
      )
      kl_weight = cosine(step, self.kl_steps, 0.0, self.kl_weight)
      codes = gumbel_softmax(rng, logits, temperature)
      scalars = {"temperature": temperature, "kl_weight": kl_weight}
    else:
      kl_weight = self.kl_weight
      codes = one_hot(jnp.argmax(logits, axis=-1), self.num_codes)
      scalars = {}
    mean, log_scale = self._decode(variables, codes)
    x = reconstruction.to_open_interval(image)
    nll = reconstruction.logit_laplace(x, mean, log_scale)
    values_per_code = x[0].size / self.grid_size**2
    decoded = reconstruction.from_open_interval(jax.nn.sigmoid(mean))
    metrics = {
      "nll": nll,
      "kl": kl,
      "mse": reconstruction.mse(image, decoded),
      "perplexity": perplexity(logits),
      **scalars,
    }
    return base.LossOutput(nll + kl_weight * kl / values_per_code, metrics, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """The pictures of the batch by way of their codes; nothing is drawn.

    Returns:
      `image` [B, S, S, 3] in [-1, 1] and `image_tokens` [B, h * w] int32.
    """
    del frozen, rng
    image_tokens = self.encode_tokens(variables, batch["image"])
    image = self.decode_tokens(variables, image_tokens)
    return {"image": image, "image_tokens": image_tokens}

  def encode_tokens(
    self, variables: base.Variables, image: jax.Array
  ) -> jax.Array:
    """The most probable codes of pictures in raster order.

    Args:
      image: [B, S, S, 3] in [-1, 1].

    Returns:
      image_tokens [B, h * w] int32.
    """
    tokens = jnp.argmax(self._encode(variables, image), axis=-1)
    return einops.rearrange(tokens, "b h w -> b (h w)").astype(jnp.int32)

  def decode_tokens(
    self, variables: base.Variables, image_tokens: jax.Array
  ) -> jax.Array:
    """image_tokens [B, h * w] int32 -> image [B, S, S, 3] in [-1, 1]."""
    tokens = einops.rearrange(
      image_tokens, "b (h w) -> b h w", h=self.grid_size
    )
    mean, _ = self._decode(variables, one_hot(tokens, self.num_codes))
    return reconstruction.from_open_interval(jax.nn.sigmoid(mean))

  def _encode(self, variables: base.Variables, image: jax.Array) -> jax.Array:
    """[B, S, S, 3] in [-1, 1] -> logits [B, h, w, V]."""
    x = reconstruction.to_open_interval(image)
    return self.model.apply(variables, x, method=self.model.encode)

  def _decode(
    self, variables: base.Variables, codes: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """[B, h, w, V] -> mean and log scale, [B, S, S, 3] each."""
    output = self.model.apply(variables, codes, method=self.model.decode)
    mean, log_scale = jnp.split(output, 2, axis=-1)
    if self.min_log_scale is not None:
      # Smooth: at a bound that cuts, no gradient would lead away from it.
      log_scale = self.min_log_scale + jax.nn.softplus(
        log_scale - self.min_log_scale
      )
    return mean, log_scale

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "reconstruct": self.sample,
      "sample": self.sample,
    }


def one_hot(tokens: jax.Array, num_codes: int) -> jax.Array:
  return jax.nn.one_hot(tokens, num_codes, dtype=jnp.float32)


def gumbel_softmax(
  rng: jax.Array, logits: jax.Array, temperature: jax.Array | float
) -> jax.Array:
  """Relaxed one-hot draws (Jang et al. 2016, equation 2).

  Args:
    rng: typed key, or keys [B], one per row.
    logits: [B, ..., V].
    temperature: towards 0 the draws become one-hot, exact and categorical.

  Returns:
    [B, ..., V], positive, of sum 1.
  """
  noise = draws.draw(jax.random.gumbel, rng, logits.shape)
  return jax.nn.softmax((logits + noise) / temperature)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
  """KL(q || uniform) = ln V - H(q), a mean over places.

  Args:
    logits: [B, ..., V] of q.

  Returns:
    [B], 0 to ln V, in nats per code.
  """
  log_q = jax.nn.log_softmax(logits)
  kl = jnp.log(logits.shape[-1]) + jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
  return kl.mean(axis=tuple(range(1, kl.ndim)))


def perplexity(logits: jax.Array) -> jax.Array:
  """[] exp of the entropy of the mean posterior over rows and places."""
  probs = jax.nn.softmax(jax.lax.stop_gradient(logits))
  probs = probs.mean(axis=tuple(range(probs.ndim - 1)))
  return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(probs, probs)))


def cosine(
  step: jax.Array, num_steps: int, start: float, end: float
) -> jax.Array:
  """From `start` to `end` along half a cosine in num_steps, and `end` after."""
  done = jnp.clip(step / num_steps, 0.0, 1.0) if num_steps else 1.0
  return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
