"""Gradients in parts equal those at once; SAM's are those of its definition.

The references are written out with `jax.grad` and Python loops.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from tests import random_variables
from unclip_jax import gradients, optim, trainer
from unclip_jax.diffusion import draws
from unclip_jax.tasks import base as tasks_base
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

B = 8
RNGS = jax.random.split(jax.random.key(3), B)


@dataclasses.dataclass(frozen=True)
class Regression:
  """A mean over examples, with a draw for each of them."""

  noise: float = 0.3

  batch_coupled = False

  def loss(self, variables, frozen, batch, rng, *, step, train):
    params = variables["params"]
    noise = draws.normal(rng, batch["x"].shape)
    hidden = jnp.tanh((batch["x"] + self.noise * noise) @ params["in"])
    loss = jnp.sum((hidden @ params["out"] - batch["y"]) ** 2, axis=-1)
    count = variables["count"] + 1
    return tasks_base.LossOutput(loss, {"twice": 2 * loss}, {"count": count})


@dataclasses.dataclass(frozen=True)
class Coupled:
  """A coupled loss with draws, in which every row has a weight of its own."""

  keep: float = 0.5

  batch_coupled = True

  def loss(self, variables, frozen, batch, rng, *, step, train):
    outputs = self.encode(variables, frozen, batch, rng, train=train)
    return self.coupled_loss(variables, frozen, outputs)

  def encode(self, variables, frozen, batch, rng, *, train):
    keep = draws.bernoulli(rng, self.keep, batch["x"].shape)
    return jnp.tanh((batch["x"] * keep) @ variables["params"]["in"])

  def coupled_loss(self, variables, frozen, outputs):
    logits = outputs @ outputs.T * jnp.exp(variables["params"]["scale"])
    loss = -jnp.diagonal(jax.nn.log_softmax(logits))
    return tasks_base.LossOutput(loss * jnp.arange(1.0, B + 1), {}, {})


def normal(*shape):
  return jnp.asarray(random_variables.normal(*shape))


BATCH = {"x": normal(B, 3), "y": normal(B, 2)}
STATE = {"count": jnp.zeros(())}
REGRESSION = {"in": normal(3, 4), "out": normal(4, 2)}
COUPLED = {"in": normal(3, 4), "scale": jnp.float32(0.3)}


def sam_of(rho, replica_batch, **fields):
  return optim.Sam(
    optim.Optim(learning_rate=1.0, sam_rho=rho, **fields), replica_batch
  )


def gradients_of(
  task, params, batch=BATCH, *, frozen=None, model_state=None, n=1, sam=None
):
  make = gradients.make_gradients(task, num_microbatches=n, sam=sam)
  model_state = {} if model_state is None else model_state
  return jax.jit(make)(params, model_state, frozen or {}, batch, RNGS, 0)


def assert_close(found, expected):
  """Every parameter, relative to the length of its own gradient."""
  found, expected = trees.flatten(found), trees.flatten(expected)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    error = np.linalg.norm(found[name] - value)
    if name.endswith("key.bias"):
      # Adds the same to all scores of a query: its gradient is 0.
      assert error < 1e-6
    else:
      assert error < 1e-5 * np.linalg.norm(value), (name, error)


def clip(loss_type):
  """(task, params, batch) of a tiny CLIP with random parameters."""
  config = config_lib.load("configs/emoji/clip.py:smoke")
  with config.unlocked():
    config.task.loss_type = loss_type
    if loss_type == "sigmoid":
      config.model.logit_bias_init = -10.0
  run = trainer.setup(config)
  batch = next(run.data.train_batches(0, B))
  shapes = jax.eval_shape(run.task.init, jax.random.key(0), batch, {})
  return run.task, random_variables.like_tree(shapes)["params"], batch


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_cached_gradients_are_those_of_the_whole_batch(loss_type):
  task, params, batch = clip(loss_type)
  whole = gradients_of(task, params, batch)
  cached = gradients_of(task, params, batch, n=2)
  assert "logit_scale" in cached.grads
  assert_close(cached.grads, whole.grads)
  assert cached.metrics.keys() == whole.metrics.keys()
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(cached.metrics[name], value, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("is_coupled", [False, True])
def test_microbatches_draw_as_the_whole_batch_does(is_coupled, n):
  task, params, state = (
    (Coupled(), COUPLED, {})
    if is_coupled
    else (Regression(), REGRESSION, STATE)
  )
  whole = gradients_of(task, params, model_state=state)
  parts = gradients_of(task, params, model_state=state, n=n)
  assert_close(parts.grads, whole.grads)
  np.testing.assert_allclose(
    parts.metrics["loss"], whole.metrics["loss"], rtol=1e-6
  )
  other = RNGS[::-1]
  assert gradients.make_gradients(task)(
    params, state, {}, BATCH, other, 0
  ).metrics["loss"] != pytest.approx(float(whole.metrics["loss"]), rel=1e-3)


def unit(grads):
  return jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_sam_is_its_definition(replicas):
  task, rho, rows = Regression(), 0.7, B // replicas
  losses, perturbed_losses, expected = [], [], []
  for r in range(replicas):
    part, rngs = jax.tree.map(
      lambda x: x[r * rows : (r + 1) * rows],  # noqa: B023
      (BATCH, RNGS),
    )

    def loss(params):
      variables = {"params": params, **STATE}
      output = task.loss(variables, {}, part, rngs, step=0, train=True)  # noqa: B023
      return output.loss.mean()

    value, grads = jax.value_and_grad(loss)(REGRESSION)
    perturbed = jax.tree.map(lambda w, u: w + rho * u, REGRESSION, unit(grads))
    losses.append(value)
    perturbed_losses.append(loss(perturbed))
    expected.append(jax.grad(loss)(perturbed))
  found = gradients_of(
    task, REGRESSION, model_state=STATE, sam=sam_of(rho, rows)
  )
  assert_close(
    found.grads, jax.tree.map(lambda *g: sum(g) / replicas, *expected)
  )
  metrics = {
    "loss": np.mean(losses),
    "twice": 2 * np.mean(losses),
    "perturbed_loss": np.mean(perturbed_losses),
  }
  assert metrics["perturbed_loss"] > 1.1 * metrics["loss"]
  assert found.metrics.keys() == metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5)
  # That of one evaluation, not of two.
  assert float(found.model_state["count"]) == 1


def check_coupled_sam(task, params, batch, replicas):
  """Cached gradients with SAM against the definition."""
  rho, rows = 0.1, B // replicas
  rngs = RNGS.reshape(replicas, rows)
  parts = [
    {k: x[i : i + rows] for k, x in batch.items()} for i in range(0, B, rows)
  ]

  def encode(params, r):
    return task.encode({"params": params}, {}, parts[r], rngs[r], train=True)

  def loss(params, outputs):
    outputs = jax.tree.map(lambda *z: jnp.concatenate(z), *outputs)
    return task.coupled_loss({"params": params}, {}, outputs).loss.mean()

  @jax.jit
  def reference(params):
    outputs = [encode(params, r) for r in range(replicas)]

    def through(w, r):
      """The loss, as a function of what replica r embeds with."""
      return loss(params, [*outputs[:r], encode(w, r), *outputs[r + 1 :]])

    units = [unit(jax.grad(through)(params, r)) for r in range(replicas)]

    def perturbed_loss(params):
      moved = [jax.tree.map(lambda w, u: w + rho * u, params, u) for u in units]
      return loss(params, [encode(w, r) for r, w in enumerate(moved)])

    values = loss(params, outputs), perturbed_loss(params)
    return values, jax.grad(perturbed_loss)(params)

  values, expected = reference(params)
  found = gradients_of(task, params, batch, sam=sam_of(rho, rows))
  assert_close(found.grads, expected)
  np.testing.assert_allclose(
    [found.metrics["loss"], found.metrics["perturbed_loss"]], values, rtol=1e-5
  )
  assert values[1] > values[0]


def test_sam_of_clip_is_its_definition():
  check_coupled_sam(*clip("softmax"), replicas=2)


def test_coupled_sam_keeps_draws_and_order():
  check_coupled_sam(Coupled(), COUPLED, BATCH, replicas=4)


@pytest.mark.parametrize(
  "task, params, state",
  [
    (Regression(noise=0.0), REGRESSION, STATE),
    (Coupled(keep=1.0), COUPLED, {}),
  ],
)
@pytest.mark.parametrize(
  "sam", [sam_of(0.0, 2), sam_of(9.0, 2, sam_start_step=1)]
)
def test_sam_of_rho_0_is_the_plain_gradient(task, params, state, sam):
  plain = gradients_of(task, params, model_state=state)
  found = gradients_of(task, params, model_state=state, sam=sam)
  assert_close(found.grads, plain.grads)


def test_the_perturbation_has_length_rho_and_spares_what_is_frozen():
  sam = sam_of(0.5, 2, rules=(("^in", "freeze"),))
  perturbation = sam.perturbation(REGRESSION, 0)
  assert not np.any(perturbation["in"])
  assert np.linalg.norm(perturbation["out"]) == pytest.approx(0.5)
  cosine = np.vdot(perturbation["out"], REGRESSION["out"]) / (
    0.5 * np.linalg.norm(REGRESSION["out"])
  )
  assert cosine == pytest.approx(1)
  zeros = jax.tree.map(jnp.zeros_like, REGRESSION)
  assert not np.any(sam.perturbation(zeros, 0)["out"])


def make_sam(batch_size=8, num_microbatches=1, **fields):
  fields = ml_collections.ConfigDict({"learning_rate": 1.0, **fields})
  return optim.make_sam(fields, batch_size, num_microbatches)


def test_sam_is_off_unless_it_has_a_rho():
  assert make_sam() is None
  assert make_sam(sam_rho=0.0, sam_replica_batch=3) is None
  assert make_sam(sam_rho=0.1).replica_batch == 8
  assert make_sam(sam_rho=0.1, sam_replica_batch=4).replica_batch == 4


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(sam_rho=-0.1), "sam_rho -0.1 is a length"),
    (dict(sam_rho=float("nan")), "sam_rho nan is a length"),
    (dict(sam_rho=0.1, sam_replica_batch=3), "3 does not divide"),
    (dict(sam_rho=0.1, sam_replica_batch=0), "0 does not divide"),
    (dict(sam_rho=0.1, num_microbatches=2), "num_microbatches must be 1"),
  ],
)
def test_mistakes_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message) as e:
    make_sam(**fields)
  assert "\n" not in str(e.value)
