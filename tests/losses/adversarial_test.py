"""The two players' losses at values computed by hand, and their penalties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.losses import adversarial
from unclip_jax.utils import errors

REAL = np.array([2.0, -0.5, 0.25])
FAKE = np.array([-1.5, 0.5, 3.0])
WRONG = np.array([0.1, -2.0, 1.0])


def softplus(x):
  return np.log1p(np.exp(x))


def numpy_generator(fake, kind):
  return softplus(-fake) if kind == "nonsaturating" else -fake


def numpy_discriminator(real, fake, kind):
  return {
    "nonsaturating": softplus(-real) + softplus(fake),
    "hinge": np.maximum(0, 1 - real) + np.maximum(0, 1 + fake),
    "wasserstein": fake - real,
  }[kind]


@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_losses_are_those_of_the_papers(kind):
  loss = adversarial.generator_loss(jnp.asarray(FAKE), kind)
  assert loss.shape == (3,) and loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, numpy_generator(FAKE, kind), rtol=1e-6)
  loss = adversarial.discriminator_loss(
    jnp.asarray(REAL), jnp.asarray(FAKE), kind
  )
  assert loss.shape == (3,) and loss.dtype == jnp.float32
  np.testing.assert_allclose(
    loss, numpy_discriminator(REAL, FAKE, kind), rtol=1e-6
  )


def test_values_worked_out_by_hand():
  one = lambda x: jnp.asarray([x])  # noqa: E731
  np.testing.assert_allclose(
    adversarial.generator_loss(one(0.0), "nonsaturating"), np.log(2), rtol=1e-6
  )
  # 1 - 2 is below 0; 1 + 0.5 counts.
  assert adversarial.discriminator_loss(one(2.0), one(0.5), "hinge") == 1.5
  assert adversarial.discriminator_loss(one(2.0), one(0.5), "wasserstein") == (
    -1.5
  )


@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_places_are_averaged_after_the_loss(kind):
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(2, 3, 4, 5, 1), scale=2.0)
  np.testing.assert_allclose(
    adversarial.discriminator_loss(jnp.asarray(real), jnp.asarray(fake), kind),
    numpy_discriminator(real, fake, kind).mean((1, 2, 3)),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    adversarial.generator_loss(jnp.asarray(fake), kind),
    numpy_generator(fake, kind).mean((1, 2, 3)),
    rtol=1e-5,
  )


def test_a_wrong_caption_is_half_of_what_is_fake():
  """Reed et al., algorithm 1: log s_r + (log(1 - s_w) + log(1 - s_f)) / 2."""
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  expected = -(
    np.log(sigmoid(REAL))
    + (np.log(1 - sigmoid(WRONG)) + np.log(1 - sigmoid(FAKE))) / 2
  )
  loss = adversarial.matching_aware_loss(
    *(jnp.asarray(x) for x in (REAL, FAKE, WRONG)), "nonsaturating"
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def linear(weight):
  return lambda x: jnp.einsum("bhwc,hwc->b", x, weight)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("per_example", [True, False])
def test_penalties_of_a_linear_critic(scale, per_example):
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(2, 5, 4, 4, 3)).astype("f4")
  weight = scale * rng.normal(size=(4, 4, 3)).astype("f4")
  norm = np.linalg.norm(weight)
  key = jax.random.key(0)
  key = jax.random.split(key, 5) if per_example else key
  critic = linear(weight)
  np.testing.assert_allclose(
    adversarial.gradient_penalty(critic, real, fake, key),
    np.full(5, (norm - 1) ** 2),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    adversarial.r1(critic, real), np.full(5, norm**2), rtol=1e-4
  )


def test_the_gradient_is_taken_between_true_and_generated_pictures():
  """Of |x|^2 / 2 it is x: at u real + (1 - u) fake, u from each row's key."""
  real, fake = np.full((4, 1), 3.0, "f4"), np.full((4, 1), 7.0, "f4")
  keys = jax.random.split(jax.random.key(1), 4)
  found = adversarial.gradient_penalty(
    lambda x: jnp.sum(x**2, -1) / 2, real, fake, keys
  )
  x = np.sqrt(found) + 1
  u = np.stack([jax.random.uniform(key) for key in keys])
  np.testing.assert_allclose(x, u * 3 + (1 - u) * 7, rtol=1e-5)
  # A row's draw is its own.
  alone = adversarial.gradient_penalty(
    lambda x: jnp.sum(x**2, -1) / 2, real[2:3], fake[2:3], keys[2:3]
  )
  np.testing.assert_array_equal(alone, found[2:3])
  np.testing.assert_allclose(
    adversarial.r1(lambda x: jnp.sum(x**2, -1) / 2, real), 9.0, rtol=1e-6
  )


def test_penalties_train_the_critic_alone():
  """By the weight: d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w|, and finite at 0.

  Nothing reaches whoever made the pictures, though the slope depends on them.
  """
  x = np.ones((2, 1, 1, 2), "f4")
  keys = jax.random.split(jax.random.key(0), 2)
  weight = jnp.asarray([[[3.0, 4.0]]])

  def penalty(weight, fake, power=1):
    critic = lambda x: linear(weight)(x) ** power  # noqa: E731
    return adversarial.gradient_penalty(critic, x, fake, keys).mean()

  by_weight = jax.grad(penalty)(weight, 2 * x)
  np.testing.assert_allclose(by_weight, 2 * (5 - 1) * weight / 5, rtol=1e-5)
  assert np.isfinite(jax.grad(penalty)(0 * weight, x)).all()
  assert penalty(weight, 3 * x, 2) > penalty(weight, 2 * x, 2) + 1.0
  by_fake = jax.grad(penalty, argnums=1)(weight, 2 * x, 2)
  np.testing.assert_array_equal(by_fake, 0.0)
  by_weight = jax.grad(lambda w: adversarial.r1(linear(w), x).mean())(weight)
  np.testing.assert_allclose(by_weight, 2 * weight, rtol=1e-5)


def test_an_unknown_kind_is_a_user_error():
  for fn in (
    lambda: adversarial.generator_loss(jnp.zeros(1), "hing"),
    lambda: adversarial.discriminator_loss(jnp.zeros(1), jnp.zeros(1), "hing"),
  ):
    with pytest.raises(errors.UserError, match="'hing' is not nonsaturating"):
      fn()
