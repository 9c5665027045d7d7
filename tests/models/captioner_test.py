"""The captioner: what depends on what, and that the cache changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import captioner, clip
from unclip_jax.utils import errors, trees

B, L, V, P, WIDTH = 2, 6, 7, 5, 16
MODEL = captioner.Model(
  vocab_size=V, context_length=L, width=WIDTH, depth=2, num_heads=2
)
TOKENS = np.random.default_rng(0).integers(0, V, (B, L), np.int32)
PICTURE = {
  "image_embed": random_variables.normal(B, 6),
  "image_encodings": random_variables.normal(B, P, 10),
}
TOWER = dict(
  image_size=8, patch_size=4, width=8, depth=1, num_heads=2, embed_dim=6
)


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, TOKENS, **PICTURE)


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables, tokens, picture, model=MODEL):
  return model.apply(variables, tokens, **picture)


def test_prefill_and_decode_steps_equal_the_whole(variables):
  whole, _ = _apply(variables, TOKENS, PICTURE)
  assert whole.shape == (B, L - 2, V) and whole.dtype == jnp.float32

  @jax.jit
  def step(tokens, index, cache):
    return MODEL.apply(
      variables, tokens, index, cache, method=MODEL.decode_step
    )

  logits, cache = jax.jit(
    lambda begin, picture: MODEL.apply(
      variables, begin, **picture, method=MODEL.prefill
    )
  )(TOKENS[:, 0], PICTURE)
  # What is not yet filled is not seen.
  filled = 1 + P + 1
  cache = jax.tree.map(lambda x: x.at[:, :, filled:].set(9.0), cache)
  shapes = jax.tree.map(jnp.shape, cache)
  steps = [logits]
  for i in range(L - 3):
    logits, cache = step(TOKENS[:, 1 + i], jnp.int32(i), cache)
    steps.append(logits)
  assert jax.tree.map(jnp.shape, cache) == shapes
  np.testing.assert_allclose(np.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)
  program = str(step.trace(TOKENS[:, 1], jnp.int32(0), cache).jaxpr)
  assert f"f32[{B},1,{WIDTH}]" in program
  assert f"f32[{B},{L - 2},{WIDTH}]" not in program


def test_causality_by_gradient(variables):
  """Token j moves the logits of token i + 1 where j <= i, and nowhere else."""
  own = np.tile(np.arange(L, dtype=np.int32), (B, 1))  # a row of the table each

  @jax.jit
  @jax.jacobian
  def jacobian(embedding):
    params = {**variables["params"], "token_embed": {"embedding": embedding}}
    logits, _ = _apply({"params": params}, own, PICTURE)
    return (logits * random_variables.normal(V)).sum((0, 2))

  table = variables["params"]["token_embed"]["embedding"]
  depends = np.abs(jacobian(table)).sum(-1)[:, :L] > 0
  expected = np.pad(np.tri(L - 2, dtype=bool), ((0, 0), (0, 2)))
  np.testing.assert_array_equal(depends, expected)


def test_every_token_sees_all_of_its_picture_and_of_no_other(variables):
  @jax.jit
  @functools.partial(jax.jacobian, argnums=0)
  def jacobian(picture):
    logits, _ = _apply(variables, TOKENS, picture)
    return (logits * random_variables.normal(V)).sum(-1)

  moved = jacobian(PICTURE)
  embed = np.abs(moved["image_embed"]).sum(-1) > 0
  states = np.abs(moved["image_encodings"]).sum(-1) > 0
  for a in range(B):
    for b in range(B):
      np.testing.assert_array_equal(embed[a, :, b], [a == b] * (L - 2))
      assert np.all(states[a, :, b] == (a == b))


def test_a_new_captioner_gives_every_token_the_same_probability(variables):
  fresh = jax.jit(
    lambda: MODEL.init(jax.random.key(0), TOKENS, **PICTURE)["params"]["output"]
  )
  new = {"params": {**variables["params"], "output": fresh()}}
  logits, out = _apply(new, TOKENS, PICTURE)
  np.testing.assert_array_equal(logits, 0)
  assert out["encodings"].shape == (B, L - 2, WIDTH)
  assert out["context"].shape == (B, 1 + P, WIDTH)


def test_a_tower_of_its_own_is_that_of_a_clip(variables):
  model = dataclasses.replace(MODEL, vision_tower=TOWER)
  image = random_variables.normal(B, 8, 8, 3)
  own = random_variables.like(model.init, TOKENS, image=image)
  tower = {"params": own["params"]["vision"]}
  see = jax.jit(clip.VisionTower(**TOWER).apply)
  image_embed, out = see(tower, image)
  rest = {k: v for k, v in own["params"].items() if k != "vision"}
  given = {
    "image_embed": image_embed,
    "image_encodings": out["image_encodings"],
  }
  expected, _ = _apply({"params": rest}, TOKENS, given)
  found, _ = jax.jit(lambda x: model.apply(own, TOKENS, image=x))(image)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  # By the same names, so that config.init_from finds them.
  whole = clip.Model(
    image_size=8, patch_size=4, vision_width=8, vision_depth=1,
    vision_num_heads=2, vocab_size=V, context_length=L, text_width=8,
    text_depth=1, text_num_heads=2, embed_dim=6,
  )  # fmt: skip
  shapes = jax.eval_shape(
    lambda: whole.init(jax.random.key(0), image, TOKENS, TOKENS > 0)["params"]
  )
  names = {
    name: x.shape
    for name, x in trees.flatten(shapes).items()
    if name.startswith("vision.")
  }
  ours = trees.flatten({"vision": own["params"]["vision"]})
  assert {name: x.shape for name, x in ours.items()} == names


def test_bfloat16_and_scanned_stacks_are_close(variables):
  exact, _ = _apply(variables, TOKENS, PICTURE)
  model = dataclasses.replace(MODEL, dtype="bfloat16", remat="dots", scan=True)
  rounded, out = _apply(variables, TOKENS, PICTURE, model)
  assert out["encodings"].dtype == jnp.bfloat16
  error = np.linalg.norm(rounded - exact)
  assert 0 < error < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize(
  ("fields", "tokens", "picture", "message"),
  [
    ({}, TOKENS[:, :5], PICTURE, "6 text tokens, not 5"),
    ({}, TOKENS, {}, "image_embed and image_encodings of a CLIP"),
    ({}, TOKENS, {**PICTURE, "image": np.zeros((B, 8, 8, 3))}, "pass what"),
    ({"vision_tower": TOWER}, TOKENS, PICTURE, "vision_tower of its own"),
    ({"context_length": 2}, TOKENS[:, :2], PICTURE, "3 or more, not 2"),
  ],
)
def test_mistakes_are_named(fields, tokens, picture, message):
  model = dataclasses.replace(MODEL, **fields)
  with pytest.raises(errors.UserError, match=message):
    jax.eval_shape(
      functools.partial(model.init, jax.random.key(0)), tokens, **picture
    )
