"""The contrastive losses against independent float64 numpy."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.losses import contrastive

B, D = 5, 7


def embeds(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  pair = rng.normal(size=(2, B, D))
  image_embed, text_embed = pair / np.linalg.norm(pair, axis=-1, keepdims=True)
  return image_embed, text_embed


def numpy_softmax(
  image_embed: np.ndarray, text_embed: np.ndarray, scale: float
) -> float:
  total = 0.0
  for i in range(B):
    row = [np.exp(scale * image_embed[i] @ text_embed[j]) for j in range(B)]
    column = [np.exp(scale * image_embed[j] @ text_embed[i]) for j in range(B)]
    total -= np.log(row[i] / sum(row)) + np.log(column[i] / sum(column))
  return total / (2 * B)


def numpy_sigmoid(
  image_embed: np.ndarray, text_embed: np.ndarray, scale: float, bias: float
) -> float:
  total = 0.0
  for i in range(B):
    for j in range(B):
      z = 1.0 if i == j else -1.0
      logit = scale * image_embed[i] @ text_embed[j] + bias
      total += np.log1p(np.exp(-z * logit))
  return total / B


def test_softmax_is_the_papers_number():
  image_embed, text_embed = embeds()
  loss, _ = contrastive.softmax(
    jnp.asarray(image_embed), jnp.asarray(text_embed), jnp.asarray(9.0)
  )
  assert loss.shape == (B,) and loss.dtype == jnp.float32
  expected = numpy_softmax(image_embed, text_embed, 9.0)
  np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)


def test_sigmoid_is_the_papers_number():
  image_embed, text_embed = embeds()
  loss, _ = contrastive.sigmoid(
    jnp.asarray(image_embed),
    jnp.asarray(text_embed),
    jnp.asarray(9.0),
    jnp.asarray(-3.0),
  )
  assert loss.shape == (B,) and loss.dtype == jnp.float32
  expected = numpy_sigmoid(image_embed, text_embed, 9.0, -3.0)
  np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_swapping_the_two_sides_changes_nothing(name):
  image_embed, text_embed = map(jnp.asarray, embeds())
  extra = (jnp.asarray(7.0), jnp.asarray(-2.0))
  extra = extra if name == "sigmoid" else extra[:1]
  loss, metrics = getattr(contrastive, name)(image_embed, text_embed, *extra)
  swapped, back = getattr(contrastive, name)(text_embed, image_embed, *extra)
  np.testing.assert_allclose(loss, swapped, rtol=1e-5)
  np.testing.assert_array_equal(
    metrics["image_to_text_accuracy"], back["text_to_image_accuracy"]
  )


def test_gradients_are_the_slopes_of_the_numpy_losses():
  image_embed, text_embed = embeds(1)
  step = 1e-5
  direction = np.random.default_rng(2).normal(size=(B, D))

  def slope(function):
    """Central difference along `direction`, float64."""
    return (function(step) - function(-step)) / (2 * step)

  numeric = slope(
    lambda t: numpy_softmax(image_embed + t * direction, text_embed, 4.0)
  )
  gradient = jax.grad(
    lambda x: contrastive.softmax(x, jnp.asarray(text_embed), 4.0)[0].mean()
  )(jnp.asarray(image_embed))
  np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-4)

  def loss(text_embed, scale, bias):
    return contrastive.sigmoid(
      jnp.asarray(image_embed), text_embed, scale, bias
    )[0].mean()

  gradients = jax.grad(loss, argnums=(0, 1, 2))(
    jnp.asarray(text_embed), 4.0, -1.0
  )
  args = (image_embed, text_embed, 4.0, -1.0)
  numerics = [
    slope(lambda t: numpy_sigmoid(args[0], args[1] + t * direction, *args[2:])),
    slope(lambda t: numpy_sigmoid(*args[:2], args[2] + t, args[3])),
    slope(lambda t: numpy_sigmoid(*args[:3], args[3] + t)),
  ]
  computed = [(gradients[0] * direction).sum(), gradients[1], gradients[2]]
  np.testing.assert_allclose(computed, numerics, rtol=1e-4)


def test_accuracies_count_known_mistakes_and_share_ties():
  image_embed = jnp.eye(4)
  text_embed = jnp.eye(4)[jnp.array([1, 0, 2, 3])]
  _, metrics = contrastive.softmax(image_embed, text_embed, jnp.asarray(5.0))
  np.testing.assert_array_equal(
    metrics["image_to_text_accuracy"], [0.0, 0.0, 1.0, 1.0]
  )
  # Picture 1 is also caption 0's: column 0 finds it, row 0 finds nothing.
  image_embed = jnp.eye(4)[jnp.array([1, 1, 2, 3])]
  _, metrics = contrastive.softmax(image_embed, jnp.eye(4), jnp.asarray(5.0))
  np.testing.assert_array_equal(
    metrics["image_to_text_accuracy"], [0.0, 1.0, 1.0, 1.0]
  )
  np.testing.assert_array_equal(
    metrics["text_to_image_accuracy"], [0.25, 0.5, 1.0, 1.0]
  )


def test_a_collapsed_model_is_at_chance():
  same = jnp.ones((4, 3)) / np.sqrt(3.0)
  loss, metrics = contrastive.softmax(same, same, jnp.asarray(100.0))
  np.testing.assert_allclose(loss, np.log(4.0), rtol=1e-5)
  np.testing.assert_allclose(metrics["image_to_text_accuracy"], 0.25)
  np.testing.assert_allclose(metrics["text_to_image_accuracy"], 0.25)


def test_bfloat16_embeddings_lose_nothing_more():
  image_embed, text_embed = (jnp.asarray(x, jnp.bfloat16) for x in embeds())
  loss, _ = contrastive.softmax(image_embed, text_embed, jnp.asarray(50.0))
  expected = numpy_softmax(
    np.asarray(image_embed, np.float64), np.asarray(text_embed, np.float64), 50
  )
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)


def test_losses_and_gradients_stay_finite_at_large_logits():
  image_embed, text_embed = map(jnp.asarray, embeds())

  def loss(scale: jax.Array) -> jax.Array:
    softmax, _ = contrastive.softmax(image_embed, text_embed, scale)
    sigmoid, _ = contrastive.sigmoid(image_embed, text_embed, scale, -10.0)
    return (softmax + sigmoid).mean()

  value, gradient = jax.value_and_grad(loss)(1e5)
  assert np.isfinite(value) and np.isfinite(gradient)


AROUND = textwrap.dedent(
  """
  import functools
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
  from unclip_jax.losses import contrastive
  from unclip_jax.utils import axes

  B, D = 16, 5
  rng = np.random.default_rng(0)
  text, noise = rng.normal(size=(2, B, D)).astype(np.float32)
  image = text + 0.1 * noise
  # Ties of examples that are on different devices.
  text[9], image[12] = text[2], image[5]
  weights = rng.normal(size=B).astype(np.float32)
  args = (image, text, np.float32(3), np.float32(-2))

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_grads(mesh, *args):
    def weighted(*args):
      loss, metrics = contrastive.sigmoid(*args)
      return jnp.sum(weights * loss), (loss, metrics)

    with axes.use(mesh, {"batch": ("data", "fsdp")}):
      return jax.value_and_grad(weighted, (0, 1, 2, 3), has_aux=True)(*args)

  def check(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

  plain = value_and_grads(None, *args)
  hits = plain[0][1][1]["image_to_text_accuracy"]
  assert {0.0, 0.5, 1.0} == set(np.asarray(hits).tolist())
  for shape in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)):
    devices = np.asarray(jax.devices()).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    placed = (*jax.device_put(args[:2], rows), *args[2:])
    lowered = value_and_grads.lower(mesh, *placed)
    assert f"tensor<{B}x{B}xf32>" not in lowered.as_text()
    jax.tree.map(check, lowered.compile()(*placed), plain)
  print("equal")
  """
)


def test_captions_that_go_round_eight_devices_change_nothing(run_python):
  assert "equal" in run_python("-c", AROUND, devices=8).stdout
