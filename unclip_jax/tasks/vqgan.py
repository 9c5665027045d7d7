"""VQGAN: an autoencoder whose codes a transformer can draw (Esser et al. 2021).

arXiv 2012.09841, section 3.1, equation 6: reconstruction, perceptual and
adversarial loss (tasks/autoencoding.py) and what the bottleneck costs: with a
codebook beta times the commitment of the encoder to its codes, with a Gaussian
kl_weight times KL(q(z | x) || N(0, I)).

Deviations: the codebook is a moving average (layers/quantize.py) in place of
the source's gradient; the KL is divided by the number of pixel values, as the
reconstruction is, so that kl_weight 1 is the bound of a likelihood of unit
scale. In evaluation the loss is without the adversarial part, which says
nothing by itself.
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
  """Compresses pictures to a grid of codes or numbers, and back.

  Attributes:
    objective: fields of tasks.autoencoding.Objective.
    commitment_weight: beta; 0.25 in the paper.
    kl_weight: of a Gaussian bottleneck.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  commitment_weight: float = 0.25
  kl_weight: float = 0.01

  batch_coupled = False

  def __post_init__(self) -> None:
    _ = self._objective

  @functools.cached_property
  def _objective(self) -> autoencoding.Objective:
    return autoencoding.make_objective(self.objective)

  @property
  def num_codes(self) -> int:
    """V, the number of codes of the codebook.

    Raises:
      UserError: there is no codebook.
    """
    self.model.check_vq()
    return self.model.num_codes

  @property
  def grid_size(self) -> int:
    """h: a picture has h x h codes."""
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
    noise_rng, dropout_rng = draws.split(rng)
    image = batch["image"]
    B, h = len(image), self.model.grid_size
    is_vq = self.model.bottleneck == "vq"
    shape = (h, h, self.model.code_dim)
    bottleneck = {"noise": draws.normal(noise_rng, (B, *shape))}
    if is_vq:
      bottleneck = {"step": step}
      bottleneck["restart_noise"] = draws.draw(
        jax.random.uniform, noise_rng, (B, self.model.num_codes)
      )
    (features, out), learned = self.model.apply(
      variables,
      image,
      **bottleneck,
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
      method=self.model.reconstruct,
      mutable=["codebook"] if train else [],
    )
    model_state = {k: v for k, v in variables.items() if k != "params"}
    model_state |= learned
    if is_vq:
      names = ("commitment", "perplexity", "code_usage")
      metrics = {name: out[name] for name in names}
      cost = self.commitment_weight * out["commitment"]
    else:
      metrics = {"kl": _kl(out["posterior"])}
      cost = self.kl_weight * metrics["kl"] / math.prod(image.shape[1:])

    perceive = self._objective.perceive(self.upstream, frozen)
    if not train:
      image = self._to_image(variables["params"], features)
      found = self._objective.reconstruct(image, batch["image"], perceive)
      total = found.pop("total")
      return base.LossOutput(total + cost, metrics | found, model_state)
    total, found = self._objective.losses(
      self._to_image,
      features,
      variables["params"],
      image,
      discriminate=self._discriminate,
      perceive=perceive,
      step=step,
    )
    return base.LossOutput(total + cost, metrics | found, model_state)

  def _to_image(self, params: base.PyTree, features: jax.Array) -> jax.Array:
    return self.model.apply(
      {"params": params}, features, method=self.model.to_image
    )

  def _discriminate(self, params: base.PyTree, image: jax.Array) -> jax.Array:
    return self.model.apply(
      {"params": params}, image, method=self.model.discriminate
    )

  def reconstruct(
    self, variables: base.Variables, image: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Pictures [B, S, S, 3] in [-1, 1] again, and what is inside.

    With a Gaussian bottleneck of its mean. The intermediates are those of
    models.vqgan.Model.reconstruct.
    """
    features, out = self.model.apply(
      variables, image, method=self.model.reconstruct
    )
    image = self._to_image(variables["params"], features)
    return jnp.clip(image, -1.0, 1.0), out

  def encode_tokens(
    self, variables: base.Variables, image: jax.Array
  ) -> jax.Array:
    """Pictures [B, S, S, 3] in [-1, 1] -> `image_tokens` [B, h h] int32.

    Row by row, from the top left; each in [0, num_codes).

    Raises:
      UserError: there is no codebook, or pictures of another size.
    """
    return self.model.apply(variables, image, method=self.model.encode_tokens)

  def decode_tokens(
    self, variables: base.Variables, image_tokens: jax.Array
  ) -> jax.Array:
    """`image_tokens` [B, h h] int32 -> pictures [B, S, S, 3] in [-1, 1].

    Raises:
      UserError: there is no codebook.
    """
    image = self.model.apply(
      variables, image_tokens, method=self.model.decode_tokens
    )
    return jnp.clip(image, -1.0, 1.0)

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    **options: Any,
  ) -> dict[str, jax.Array]:
    """It draws nothing: what draws its codes is trained on them."""
    raise errors.UserError(
      "this autoencoder draws no pictures by itself: train a transformer over"
      " its codes, or a model of unclip_jax.tasks.vae_gan"
    )

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def reconstruct(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      del frozen, rng
      image, _ = self.reconstruct(variables, batch["image"])
      return {"image": image}

    return {
      "loss": base.loss_predict_fn(self),
      "reconstruct": reconstruct,
    }


def _kl(posterior: Any) -> jax.Array:
  """KL(q || N(0, I)) of [B, ...], [B] in nats (Kingma & Welling, app. B)."""
  kl = gaussian.normal_kl(*posterior, jnp.zeros(()), jnp.zeros(()))
  return jnp.sum(kl, axis=tuple(range(1, kl.ndim)))
