"""What VQGAN and VAE-GAN minimise besides what their bottleneck costs.

Reconstruction, perceptual and adversarial loss (Esser et al. 2021, arXiv
2012.09841, section 3.1, equations 5 to 7). Two players, one gradient: the sum

  L_rec(G) + w lambda L_G(G, sg(D)) + w' L_D(sg(G), D)

has, by the parameters of either player, the gradient of that player's own
losses; updates are simultaneous, each player by an optimizer of its own
(`config.optim.groups`). lambda is the adaptive weight (equation 7),

  lambda = ||dL_rec/dW|| / (||dL_G/dW|| + delta)

with W the kernel of the decoder's last layer: there the two losses pull with
the same strength. It is of the mean losses of all rows that one program sees:
under `jax.jit` of the global batch, of a microbatch or of a device under
`jax.pmap` its own, as in the source's training. Before `start_step` both
adversarial terms are 0.

The perceptual distance is the squared one between the features of the two
pictures in a frozen network (`config.frozen.perceptual`): anything whose task
has the predict function `features`, a CLIP among them. The source's is LPIPS
(Zhang et al. 2018), which has this form too (evaluators/perceptual.py); its
weights do not come with the package and are the user's to bring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.losses import adversarial
from unclip_jax.tasks import base
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

DELTA = 1e-6  # section 3.1
MAX_WEIGHT = 1e4  # as in the released code
DISCRIMINATOR = "discriminator"  # the one player's parameters

# Pictures [R, H, W, 3], R a multiple of B, and the parameters -> logits [R, ..]
Discriminate = Callable[[base.PyTree, jax.Array], jax.Array]
Perceive = Callable[[jax.Array], jax.Array]  # pictures -> features [B, ...]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The fields of `config.task.objective`.

  Attributes:
    reconstruction: "l1" or "l2", the mean over pixel values.
    perceptual_weight: of the perceptual distance; 0: there is none.
    adversarial: kind of the players' losses, see losses/adversarial.py.
    adversarial_weight: w, of the generator's; 0.8 in the released code.
    adaptive: whether lambda is the adaptive weight, or 1.
    start_step: when the discriminator sets in.
  """

  reconstruction: str = "l1"
  perceptual_weight: float = 0.0
  adversarial: str = "hinge"
  adversarial_weight: float = 0.8
  adaptive: bool = True
  start_step: int = 0

  def __post_init__(self) -> None:
    adversarial.check_kind(self.adversarial)
    if self.reconstruction not in ("l1", "l2"):
      raise errors.UserError(
        f"config.task.objective.reconstruction '{self.reconstruction}' is not"
        " 'l1' or 'l2'"
      )

  def reconstruct(
    self, image: jax.Array, true: jax.Array, perceive: Perceive | None
  ) -> dict[str, jax.Array]:
    """Of pictures [B, H, W, 3]: "reconstruction", "perceptual", all [B].

    "total" is their weighted sum, L_rec.
    """
    difference = image - true
    error = (
      jnp.abs(difference)
      if self.reconstruction == "l1"
      else jnp.square(difference)
    )
    found = {"reconstruction": jnp.mean(error, axis=(1, 2, 3))}
    total = found["reconstruction"]
    if perceive is not None:
      distance = jnp.square(perceive(image) - perceive(true))
      found["perceptual"] = distance.reshape(len(distance), -1).sum(-1)
      total = total + self.perceptual_weight * found["perceptual"]
    return {**found, "total": total}

  def losses(
    self,
    to_image: Callable[[base.PyTree, jax.Array], jax.Array],
    features: jax.Array,
    params: base.PyTree,
    true: jax.Array,
    *,
    discriminate: Discriminate,
    perceive: Perceive | None,
    step: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of both players' losses.

    Args:
      to_image: (parameters, features) -> pictures [R, H, W, 3] by the last
        layer, `conv_out`; the first B rows are reconstructions, what follows in
        blocks of B (drawn pictures) only meets the discriminator.
      features: [R, H, W, C], what the last layer takes.
      params: of the model.
      true: [B, H, W, 3] in [-1, 1].
      discriminate, perceive: see the types; the latter None: there is none.
      step: [] int32.

    Returns:
      The loss [B], and metrics: those of `reconstruct`, and "generator",
      "discriminator", "real_logits" and "fake_logits" [B], "adaptive_weight"
      [] (0 before the start).
    """
    B = len(true)
    image = to_image(params, features)
    rows = self.reconstruct(image[:B], true, perceive)
    metrics = {k: v for k, v in rows.items() if k != "total"}

    # The generator's side: the discriminator judges, and learns nothing.
    judge = jax.lax.stop_gradient(params)

    def generator_loss(image: jax.Array) -> jax.Array:
      logits = discriminate(judge, image)
      return _by_example(
        adversarial.generator_loss(logits, self.adversarial), B
      )

    deceit = generator_loss(image)
    started = jnp.asarray(step >= self.start_step, jnp.float32)
    weight = started
    if self.adaptive:
      weight = started * adaptive_weight(
        lambda image: self.reconstruct(image[:B], true, perceive)["total"],
        generator_loss,
        to_image,
        features,
        params,
      )

    # The discriminator's side: what it judges is given.
    fake = discriminate(params, jax.lax.stop_gradient(image))
    real = discriminate(params, true)
    repeated = jnp.concatenate([real] * (len(fake) // B))
    judgement = _by_example(
      adversarial.discriminator_loss(repeated, fake, self.adversarial), B
    )
    metrics |= {
      "generator": deceit,
      "discriminator": judgement,
      "real_logits": real.reshape(B, -1).mean(-1),
      "fake_logits": _by_example(fake.reshape(len(fake), -1).mean(-1), B),
      "adaptive_weight": weight,
    }
    deceit = self.adversarial_weight * weight * deceit
    return rows["total"] + deceit + started * judgement, metrics

  def perceive(
    self, upstream: Mapping[str, Any], frozen: base.Frozen
  ) -> Perceive | None:
    """The features of `config.frozen.perceptual`, if they have a weight.

    Raises:
      UserError: there is no such network, or it has no features.
    """
    if not self.perceptual_weight:
      return None
    task = upstream.get("perceptual")
    if task is None or "features" not in task.predict_fns():
      raise errors.UserError(
        "a perceptual loss needs the features of a frozen network: name a"
        " converted or trained one by config.frozen.perceptual.path, or set"
        " config.task.objective.perceptual_weight=0"
      )
    predict = task.predict_fns()["features"]
    variables = frozen["perceptual"]

    def features(image: jax.Array) -> jax.Array:
      found = predict(
        variables, variables.get("frozen", {}), {"image": image}, None
      )
      # Of a CLIP: its normalised embedding.
      name = "features" if "features" in found else "image_embed"
      return found[name].astype(jnp.float32)

    return features


def make_objective(fields: Mapping[str, Any]) -> Objective:
  """The objective of `config.task.objective`.

  Raises:
    UserError: an unknown field or value.
  """
  return config_lib.construct(Objective, fields, where="config.task.objective")


def adaptive_weight(
  rec_loss: Callable[[jax.Array], jax.Array],
  gan_loss: Callable[[jax.Array], jax.Array],
  to_image: Callable[[base.PyTree, jax.Array], jax.Array],
  features: jax.Array,
  params: base.PyTree,
) -> jax.Array:
  """lambda (Esser et al. 2021, equation 7), [] in [0, 1e4], without gradient.

  Args:
    rec_loss, gan_loss: pictures -> losses [B].
    to_image, features, params: as in `Objective.losses`.
  """
  params, features = jax.lax.stop_gradient((params, features))
  last = params["conv_out"]

  def norm(loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    def at(kernel: jax.Array) -> jax.Array:
      own = {**params, "conv_out": {**last, "kernel": kernel}}
      return jnp.mean(loss(to_image(own, features)))

    return jnp.linalg.norm(jax.grad(at)(last["kernel"]).reshape(-1))

  weight = norm(rec_loss) / (norm(gan_loss) + DELTA)
  return jax.lax.stop_gradient(jnp.clip(weight, 0.0, MAX_WEIGHT))


def _by_example(rows: jax.Array, batch_size: int) -> jax.Array:
  """[R] in blocks of B -> their mean [B]."""
  return rows.reshape(-1, batch_size).mean(0)
