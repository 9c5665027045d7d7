"""Losses of two players: a generator, and a discriminator or critic.

  nonsaturating  G: softplus(-D(fake)); D: softplus(-D(real)) +
                 softplus(D(fake)). Goodfellow et al. 2014, arXiv 1406.2661,
                 section 3
  hinge          G: -D(fake); D: relu(1 - D(real)) + relu(1 + D(fake)). Lim & Ye
                 2017, arXiv 1705.02894; as in Miyato et al. 2018, arXiv
                 1802.05957, equations 16 and 17
  wasserstein    G: -D(fake); D: D(fake) - D(real). Arjovsky et al. 2017, arXiv
                 1701.07875; needs `gradient_penalty` or another bound on the
                 critic's slope

Arrays in, [B] out: the loss of an example depends on that example alone. All
is float32, to be minimised by the player that it is named after, and knows
nothing of the players: who holds the other one's parameters fixed is the
caller, by `jax.lax.stop_gradient`.

Logits are [B] or [B, ...]; over further axes (the places of a patch
discriminator) the mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.utils import errors

KINDS = ("nonsaturating", "hinge", "wasserstein")

# Pictures [B, ...] -> logits [B, ...]; no row sees another.
Critic = Callable[[jax.Array], jax.Array]


def check_kind(kind: str) -> None:
  """Raises UserError unless `kind` is one of KINDS."""
  if kind not in KINDS:
    raise errors.UserError(
      f"the adversarial loss '{kind}' is not {', '.join(KINDS[:-1])} or"
      f" {KINDS[-1]}"
    )


def generator_loss(fake_logits: jax.Array, kind: str) -> jax.Array:
  """What the generator minimises, [B] float32.

  Args:
    fake_logits: [B, ...] of generated pictures, with a gradient.
    kind: one of KINDS.

  Raises:
    UserError: an unknown kind.
  """
  check_kind(kind)
  fake_logits = fake_logits.astype(jnp.float32)
  if kind == "nonsaturating":
    return _rows(jax.nn.softplus(-fake_logits))
  return _rows(-fake_logits)


def discriminator_loss(
  real_logits: jax.Array, fake_logits: jax.Array, kind: str
) -> jax.Array:
  """What the discriminator minimises, [B] float32.

  Args:
    real_logits: [B, ...] of true pictures.
    fake_logits: [B, ...] of generated ones, which have no gradient.
    kind: one of KINDS.

  Raises:
    UserError: an unknown kind.
  """
  check_kind(kind)
  real_logits = real_logits.astype(jnp.float32)
  fake_logits = fake_logits.astype(jnp.float32)
  if kind == "nonsaturating":
    real, fake = jax.nn.softplus(-real_logits), jax.nn.softplus(fake_logits)
  elif kind == "hinge":
    real, fake = jax.nn.relu(1.0 - real_logits), jax.nn.relu(1.0 + fake_logits)
  else:
    real, fake = -real_logits, fake_logits
  return _rows(real) + _rows(fake)


def matching_aware_loss(
  real_logits: jax.Array,
  fake_logits: jax.Array,
  wrong_logits: jax.Array,
  kind: str,
) -> jax.Array:
  """The discriminator's loss with a third kind of pair, [B] float32.

  GAN-CLS (Reed et al. 2016, arXiv 1605.05396, algorithm 1): a true picture with
  a wrong caption counts as fake, with half of the weight of what is fake, so
  that a discriminator that only looks at pictures does not win.

  Args:
    wrong_logits: [B, ...] of true pictures with captions of other ones.
    real_logits, fake_logits, kind: as in `discriminator_loss`.
  """
  return 0.5 * (
    discriminator_loss(real_logits, fake_logits, kind)
    + discriminator_loss(real_logits, wrong_logits, kind)
  )


def gradient_penalty(
  critic_fn: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array
) -> jax.Array:
  """(||grad||_2 - 1)^2 between true and generated pictures, [B] float32.

  Gulrajani et al. 2017, arXiv 1704.00028, equation 3: the gradient of the
  critic by its input at x = u real + (1 - u) fake, with u uniform in [0, 1).
  The weight (10 in the source) is the caller's.

  Args:
    critic_fn: [B, ...] -> [B, ...]; further axes of the logits are averaged.
    real: [B, ...].
    fake: [B, ...]; no gradient goes through it.
    rng: one key, or one key per example, [B].
  """
  B = len(real)
  if rng.ndim == 0:
    u = jax.random.uniform(rng, (B,))
  else:
    u = jax.vmap(jax.random.uniform)(rng)
  u = u.reshape(B, *(1,) * (real.ndim - 1)).astype(real.dtype)
  between = jax.lax.stop_gradient(u * real + (1.0 - u) * fake)
  square = _square_norm_of_gradient(critic_fn, between)
  # The square root has no derivative at 0, which a critic may have at first.
  norm = jnp.sqrt(jnp.maximum(square, 1e-12))
  return jnp.square(norm - 1.0)


def r1(critic_fn: Critic, real: jax.Array) -> jax.Array:
  """||grad||_2^2 of the critic at true pictures, [B] float32.

  Mescheder et al. 2018, arXiv 1801.04406, equation 9, without its factor
  gamma / 2, which is the caller's.

  Args:
    critic_fn: [B, ...] -> [B, ...]; further axes of the logits are averaged.
    real: [B, ...].
  """
  return _square_norm_of_gradient(critic_fn, jax.lax.stop_gradient(real))


def _square_norm_of_gradient(critic_fn: Critic, x: jax.Array) -> jax.Array:
  """Of each row's logit by that row, [B] float32."""
  # No row sees another: the gradient of the sum holds all rows' own.
  grads = jax.grad(lambda x: jnp.sum(_rows(critic_fn(x))))(x)
  return jnp.sum(
    jnp.square(grads.astype(jnp.float32)), axis=tuple(range(1, x.ndim))
  )


def _rows(x: jax.Array) -> jax.Array:
  """[B, ...] -> [B] float32: the mean over all but the first axis."""
  return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))
