"""The discrete VAE's objective: the relaxation, the schedules, the codes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import random_variables
from unclip_jax import trainer
from unclip_jax.losses import reconstruction
from unclip_jax.models import dvae as dvae_model
from unclip_jax.tasks import dvae
from unclip_jax.utils import errors

V, B = 6, 4
MODEL = dvae_model.Model(
  image_size=8, num_codes=V, channels=8, channel_mult=(1, 2),
  num_res_blocks=1, codebook_width=4,
)  # fmt: skip
TASK = dvae.Task(MODEL, {}, kl_weight=2.0, kl_steps=10, temperature_steps=10)
BATCH = {"image": np.tanh(random_variables.normal(B, 8, 8, 3))}
KEYS = jax.random.split(jax.random.key(0), B)


@pytest.fixture(name="variables", scope="module")
def _variables():
  variables = random_variables.like(MODEL.init, BATCH["image"])
  # Different places shall have different codes.
  variables["params"]["encoder_out"]["kernel"] *= 30
  return variables


@functools.partial(jax.jit, static_argnames=("train", "task"))
def _loss(variables, batch, rng, step, train=True, task=TASK):
  return task.loss(variables, {}, batch, rng, step=step, train=train)


@pytest.fixture(name="evaluated", scope="module")
def _evaluated(variables):
  return _loss(variables, BATCH, KEYS, 0, train=False)


def test_towards_temperature_0_draws_are_one_hot():
  logits = random_variables.normal(50, 3, V)
  rng = jax.random.split(jax.random.key(1), 50)
  cold = np.asarray(dvae.gumbel_softmax(rng, logits, 1e-5))
  hot = np.asarray(dvae.gumbel_softmax(rng, logits, 1.0))
  one_hot = np.eye(V)[hot.argmax(-1)]
  np.testing.assert_allclose(cold, one_hot, atol=1e-6)
  np.testing.assert_allclose(hot.sum(-1), 1, rtol=1e-5)
  assert hot.max() < 0.999 and len(set(cold.argmax(-1).ravel())) == V


def test_draws_follow_the_posterior():
  """The argmax of a relaxed draw is a draw of the posterior (Gumbel-max)."""
  logits = 2 * random_variables.normal(V)
  many = np.broadcast_to(logits, (20_000, V))
  draws = dvae.gumbel_softmax(jax.random.key(0), many, 0.5)
  frequency = np.bincount(draws.argmax(-1), minlength=V) / len(many)
  probs = np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose(frequency, probs, atol=0.015)


def test_kl_is_0_of_uniform_and_ln_V_of_certain_posteriors():
  uniform, certain = np.full((2, 3, 3, V), 4.0), 100 * np.eye(V)[None]
  np.testing.assert_allclose(dvae.kl_to_uniform(uniform), [0, 0], atol=1e-6)
  np.testing.assert_allclose(dvae.kl_to_uniform(certain), [math.log(V)], 1e-6)
  logits = random_variables.normal(2, 3, V)
  q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = (q * np.log(q * V)).sum(-1).mean(1)
  np.testing.assert_allclose(dvae.kl_to_uniform(logits), expected, rtol=1e-4)


def test_perplexity_counts_codes():
  logits = 100 * np.eye(V)[np.asarray([[0, 1, 2], [0, 1, 2]])]
  assert float(dvae.perplexity(logits)) == pytest.approx(3, rel=1e-4)
  assert float(dvae.perplexity(0 * logits)) == pytest.approx(V, rel=1e-4)


def test_schedules_are_half_cosines():
  at = lambda step: float(dvae.cosine(step, 10, 1.0, 0.0625))  # noqa: E731
  assert [at(0), at(10), at(99)] == pytest.approx([1, 0.0625, 0.0625])
  assert at(5) == pytest.approx((1 + 0.0625) / 2)
  assert 1 - at(1) < 0.03 < at(4) - at(5)  # slow, then fast
  assert float(dvae.cosine(jnp.int32(0), 0, 0.0, 3.0)) == 3


def test_the_step_moves_temperature_and_kl_weight(variables):
  first, last = (_loss(variables, BATCH, KEYS, step) for step in (0, 10))
  assert first.metrics["temperature"] == 1 and first.metrics["kl_weight"] == 0
  assert last.metrics["temperature"] == 1 / 16
  np.testing.assert_allclose(first.loss, first.metrics["nll"], rtol=1e-6)
  # 192 values of a picture, 16 codes: 12 values a code.
  expected = last.metrics["nll"] + 2.0 * last.metrics["kl"] / 12
  np.testing.assert_allclose(last.loss, expected, rtol=1e-5)
  np.testing.assert_allclose(first.metrics["kl"], last.metrics["kl"], 1e-5)


def test_evaluation_knows_no_step_and_no_draw(variables, evaluated):
  other = _loss(variables, BATCH, KEYS[::-1], 7, train=False)
  np.testing.assert_array_equal(other.loss, evaluated.loss)
  assert set(evaluated.metrics) == {"nll", "kl", "mse", "perplexity"}
  assert evaluated.loss.shape == evaluated.metrics["mse"].shape == (B,)


def test_codes_are_the_most_probable_and_decode_as_one_hot(
  variables, evaluated
):
  tokens = jax.jit(TASK.encode_tokens)(variables, BATCH["image"])
  assert tokens.shape == (B, TASK.grid_size**2) and tokens.dtype == jnp.int32
  assert len(np.unique(tokens)) > 2
  x = reconstruction.to_open_interval(BATCH["image"])
  logits = MODEL.apply(variables, x, method=MODEL.encode)
  flat = np.asarray(logits).reshape(B, -1, V)
  np.testing.assert_array_equal(tokens, flat.argmax(-1))
  # A draw at temperature 0 without noise is the codes' picture.
  codes = jax.nn.softmax(logits / 1e-6)
  mean = MODEL.apply(variables, codes, method=MODEL.decode)[..., :3]
  expected = np.clip((jax.nn.sigmoid(mean) - 0.1) / 0.8 * 2 - 1, -1, 1)
  output = TASK.predict_fns()["reconstruct"](variables, {}, BATCH, KEYS)
  np.testing.assert_array_equal(output["image_tokens"], tokens)
  np.testing.assert_allclose(output["image"], expected, atol=1e-4)
  mse = ((output["image"] - BATCH["image"]) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(evaluated.metrics["mse"], mse, rtol=1e-4)
  # The other tokens make another picture.
  other = TASK.decode_tokens(variables, (tokens + 1) % V)
  assert np.abs(other - output["image"]).max() > 1e-3


def test_the_relaxation_lets_gradients_through_and_codes_do_not(variables):
  @functools.partial(jax.jit, static_argnames="train")
  def gradient(variables, train):
    def nll(variables):
      out = TASK.loss(
        variables, {}, BATCH, KEYS, step=jnp.int32(5), train=train
      )
      return out.metrics["nll"].mean()

    return jax.grad(nll)(variables)["params"]

  relaxed, hard = (gradient(variables, train) for train in (True, False))
  for name in ("encoder_in", "encoder_out"):
    assert np.any(relaxed[name]["kernel"])
    assert not np.any(hard[name]["kernel"])
  assert np.any(hard["codebook"]["kernel"])


def test_the_lowest_scale_is_approached_and_never_passed(variables):
  bounded = dvae.Task(MODEL, {}, min_log_scale=-4.0)
  raw = random_variables.normal(1, 4, 4, V)
  mean, log_scale = bounded._decode(variables, raw)
  same_mean, free = TASK._decode(variables, raw)
  np.testing.assert_array_equal(mean, same_mean)
  np.testing.assert_allclose(log_scale, -4 + np.log1p(np.exp(free + 4)), 1e-5)
  assert np.all(log_scale > -4)


def test_a_temperature_of_0_is_an_error():
  with pytest.raises(errors.UserError, match="must be above 0"):
    dvae.Task(MODEL, {}, end_temperature=0.0)


def test_microbatches_draw_and_lose_the_same(variables):
  whole = _loss(variables, BATCH, KEYS, 5).loss
  halves = [
    _loss(variables, {"image": BATCH["image"][i:j]}, KEYS[i:j], 5).loss
    for i, j in ((0, 2), (2, 4))
  ]
  np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5)


# Loss, gradient norm and norm of the parameters after one step of SGD. A change
# means that the same task now trains something else: if that is what you want,
# say so in CHANGELOG.md and put the new numbers (the test prints them).
PINNED = (0.188139, 0.897188, 74.059586)


def test_a_step_is_pinned(variables):
  tx = optax.sgd(0.1)
  state = trainer.TrainState(
    jnp.asarray(5), variables["params"], {}, tx.init(variables["params"]),
    variables["params"],
  )  # fmt: skip
  step = jax.jit(trainer.make_train_step(TASK, tx, ema_decay=0.9))
  after, metrics = step(state, {}, BATCH, jax.random.key(0))
  found = [
    float(x)
    for x in (
      metrics["loss"], metrics["grad_norm"], optax.tree.norm(after.params)
    )
  ]  # fmt: skip
  print(found)
  np.testing.assert_allclose(found, PINNED, rtol=2e-3)
