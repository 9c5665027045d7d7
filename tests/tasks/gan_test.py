"""The GAN's task: two players, one gradient; wrong captions; penalties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import gradients, trainer
from unclip_jax.diffusion import draws
from unclip_jax.losses import adversarial
from unclip_jax.models import clip as clip_model
from unclip_jax.models import gan as gan_model
from unclip_jax.tasks import clip as clip_task
from unclip_jax.tasks import gan
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

B, L, Z, SIZE = 4, 5, 6, 8
TEXT = dict(vocab_size=20, context_length=L)
MODEL = gan_model.Model(
  **TEXT, image_size=SIZE, latent_dim=Z, generator_channels=(12, 8),
  discriminator_channels=(8, 12), text_width=8, text_depth=1, text_num_heads=2,
  caption_dim=7,
)  # fmt: skip
MASK = np.arange(L) < np.asarray([3, 2, 5, 2])[:, None]
TOKENS = np.random.default_rng(0).integers(1, 20, (B, L)) * MASK
BATCH = {
  "image": np.tanh(random_variables.normal(B, SIZE, SIZE, 3)),
  "text_tokens": TOKENS.astype(np.int32),
  "text_mask": MASK,
}
RNGS = jax.random.split(jax.random.key(0), B)
AUGMENTATION = dict(
  brightness=0.5, saturation=1.0, contrast=0.5, translation=0.25, cutout=0.5
)


def make(model=None, upstream=None, **fields):
  return gan.Task(MODEL.clone(**(model or {})), upstream or {}, **fields)


@pytest.fixture(name="variables", scope="module")
def _variables():
  model = dict(caption_augmentation=True)
  return random_variables.like_tree(
    jax.eval_shape(make(model).init, jax.random.key(0), BATCH, {})
  )


def loss_of(task, variables, *, train=True, frozen=None):
  """The task's loss as a function that is compiled once."""

  @jax.jit
  def loss(variables, batch, rng, step):
    return task.loss(
      variables, frozen or {}, batch, rng, step=step, train=train
    )

  return lambda batch=BATCH, rng=RNGS, step=0: loss(variables, batch, rng, step)


@pytest.mark.parametrize(
  "loss_type, iterations, wrong",
  [
    ("nonsaturating", 0, True),
    ("hinge", 4, False),
  ],
)
def test_one_gradient_is_that_of_each_player_alone(
  variables, loss_type, iterations, wrong
):
  """Written out for each player, the other one being constant."""
  task = make(
    dict(spectral_norm_iterations=iterations),
    loss_type=loss_type,
    wrong_captions=wrong,
  )
  params = {k: variables["params"][k] for k in ("generator", "discriminator")}
  latent_rng = draws.split(RNGS, 4)[0]
  text = {k: BATCH[k] for k in ("text_tokens", "text_mask")}
  other_text = jax.tree.map(lambda x: x[[1, 2, 3, 0]], text)

  def draw(generator):
    variables = {"params": {"generator": generator}}
    return task.sample(variables, {}, BATCH, latent_rng)["image"]

  def judge(discriminator, image, text):
    variables = {
      "params": {"discriminator": task.model.normalize(discriminator)}
    }
    apply = functools.partial(task.model.apply, variables)
    return apply(
      apply(image, method=MODEL.encode_image),
      apply(**text, method=MODEL.encode_text),
      method=MODEL.score,
    )

  def of_generator(generator, discriminator):
    logits = judge(discriminator, draw(generator), text)
    return adversarial.generator_loss(logits, loss_type).mean()

  def of_discriminator(discriminator, generator):
    logits = [
      judge(discriminator, BATCH["image"], text),
      judge(discriminator, draw(generator), text),
    ]
    if not wrong:
      return adversarial.discriminator_loss(*logits, loss_type).mean()
    logits.append(judge(discriminator, BATCH["image"], other_text))
    return adversarial.matching_aware_loss(*logits, loss_type).mean()

  def of_both(params):
    output = task.loss(
      {"params": params}, {}, BATCH, RNGS, step=jnp.int32(0), train=False
    )
    return output.loss.mean()

  @jax.jit
  def found(params):
    generator, discriminator = params["generator"], params["discriminator"]
    return jax.value_and_grad(of_both)(params), {
      "generator": jax.grad(of_generator)(generator, discriminator),
      "discriminator": jax.grad(of_discriminator)(discriminator, generator),
    }, (
      of_generator(generator, discriminator)
      + of_discriminator(discriminator, generator)
    )  # fmt: skip

  (value, together), separate, expected = found(params)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  _assert_close(together, separate)


def _assert_close(a, b):
  """Up to rounding, beside the player's largest; and neither is 0."""
  for player in ("generator", "discriminator"):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(b[player]))
    assert largest > 1e-2
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(a[player]),
      jax.tree.leaves(b[player]),
      strict=True,
    ):
      np.testing.assert_allclose(
        x, y, rtol=1e-3, atol=1e-5 * largest, err_msg=str(path)
      )


FULL = dict(
  gradient_penalty_weight=1.0, r1_weight=0.5, augmentation=AUGMENTATION
)


def test_microbatches_give_the_gradient_of_the_whole_batch(variables):
  """But for whose wrong caption it is, which each part has of its own."""
  task = make(
    dict(caption_augmentation=True),
    wrong_captions=False,
    augmentation=AUGMENTATION,
  )

  @functools.partial(jax.jit, static_argnums=0)
  def of(num_microbatches):
    return gradients.make_gradients(task, num_microbatches=num_microbatches)(
      variables["params"], {}, {}, BATCH, RNGS, jnp.int32(0)
    )

  whole, parts = of(1), of(2)
  _assert_close(parts.grads, whole.grads)
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(
      parts.metrics[name], value, rtol=1e-4, err_msg=name
    )


def test_a_row_takes_the_next_rows_caption_and_nothing_else(variables):
  loss = loss_of(make(**FULL), variables)
  before = loss().loss
  for name, moved in (("image", [0, 0, 1, 0]), ("text_tokens", [0, 1, 1, 0])):
    changed = {**BATCH, name: BATCH[name].copy()}
    changed[name][2] = np.roll(BATCH[name][2], 1, axis=0)
    after = loss(changed).loss
    np.testing.assert_array_equal(np.abs(after - before) > 1e-4, moved)
  rngs = RNGS.at[2].set(jax.random.key(9))
  after = loss(rng=rngs).loss
  np.testing.assert_array_equal(np.abs(after - before) > 1e-4, [0, 0, 1, 0])


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_wrong_caption_is_never_the_own_row(rows):
  own = np.arange(rows)
  wrong = np.asarray(gan.next_row(jnp.asarray(own)))
  assert (wrong != own).all() and set(wrong) == set(own)


def test_the_same_caption_in_the_next_row_is_not_wrong(variables):
  same = {**BATCH, "text_tokens": BATCH["text_tokens"][[0, 0, 1, 2]]}
  with_wrong = loss_of(make(), variables)
  without = loss_of(make(wrong_captions=False), variables)
  differs = np.abs(with_wrong(same).loss - without(same).loss) > 1e-5
  np.testing.assert_array_equal(differs, [False, True, True, True])
  row = jax.tree.map(lambda x: x[:1], BATCH)
  with pytest.raises(errors.UserError, match="there is one example"):
    with_wrong(row, RNGS[:1])
  assert np.isfinite(without(row, RNGS[:1]).loss)


def test_r1_every_fourth_step_is_four_times_as_strong(variables):
  plain = loss_of(make(), variables)().loss
  every = loss_of(make(r1_weight=0.6), variables)()
  r1 = every.metrics["r1"]
  np.testing.assert_allclose(every.loss - plain, 0.3 * r1, rtol=1e-3)
  assert r1.min() > 1e-2
  lazy = loss_of(make(r1_weight=0.6, r1_every=4), variables)
  for step, factor in ((0, 4), (1, 0), (3, 0), (8, 4)):
    np.testing.assert_allclose(
      lazy(step=step).loss - plain, factor * 0.3 * r1, rtol=1e-3, atol=1e-5
    )


def test_evaluation_has_no_augmentation_and_no_penalty(variables):
  full = make(**FULL)
  plain = loss_of(make(), variables, train=False)()
  found = loss_of(full, variables, train=False)()
  np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-5)
  assert found.metrics.keys() == plain.metrics.keys()
  trained = loss_of(full, variables)().metrics
  assert {"r1", "gradient_penalty"} <= trained.keys()
  for name in ("fake_logits", "real_logits"):
    assert np.abs(trained[name] - found.metrics[name]).max() > 1e-3
  assert {x.shape for x in trained.values()} == {(B,)}


def test_the_caption_may_be_drawn_around_its_mean(variables):
  task = make(dict(caption_augmentation=True), caption_kl_weight=2.0)
  output = loss_of(task, variables)()
  assert output.metrics["caption_kl"].min() > 0
  other = dataclasses.replace(task, caption_kl_weight=0.0)
  other = loss_of(other, variables)()
  np.testing.assert_allclose(
    output.loss - other.loss, 2.0 * output.metrics["caption_kl"], rtol=1e-3
  )
  # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - ln v) / 2, and 0 where they match.
  mean, variance = np.asarray([[0.0, 2.0]]), np.asarray([[1.0, 3.0]])
  np.testing.assert_allclose(
    gan._kl(jnp.asarray(mean), jnp.log(variance)),
    [(4 + 3 - 1 - np.log(3)) / 2],
    rtol=1e-5,
  )


def _clip():
  model = clip_model.Model(
    **TEXT, image_size=12, patch_size=4, vision_width=8, vision_depth=1,
    vision_num_heads=2, text_width=8, text_depth=1, text_num_heads=2,
    embed_dim=6,
  )  # fmt: skip
  clip = clip_task.Task(model, {})
  image = np.zeros((B, 12, 12, 3), np.float32)
  shapes = jax.eval_shape(
    clip.init, jax.random.key(0), {**BATCH, "image": image}, {}
  )
  return clip, random_variables.like_tree(shapes)


def test_a_clip_guides_the_generator_alone(variables):
  clip, clip_variables = _clip()
  frozen = {"clip": clip_variables}
  task = make(upstream={"clip": clip}, clip_weight=3.0)
  output = loss_of(task, variables, frozen=frozen)()
  without = loss_of(make(), variables)()
  cosine = output.metrics["clip_cosine"]
  np.testing.assert_allclose(
    output.metrics["generator_loss"],
    without.metrics["generator_loss"] + 3 * (1 - cosine),
    rtol=1e-5,
  )
  # The cosine is the CLIP's own, of the drawn picture and its caption.
  latent_rng = draws.split(RNGS, 4)[0]

  @jax.jit
  def embed(rng):
    drawn = make().sample(variables, {}, BATCH, rng)
    predict = clip.predict_fns()["features"]
    return predict(clip_variables, {}, {**BATCH, **drawn}, None)

  features = embed(latent_rng)
  np.testing.assert_allclose(
    cosine,
    np.sum(features["image_embed"] * features["text_embed"], axis=1),
    atol=1e-4,
  )
  weights = random_variables.normal(B)

  @jax.jit
  @jax.grad
  def gradient(params):
    output = task.loss(
      {"params": params}, frozen, BATCH, RNGS, step=0, train=True
    )
    return jnp.sum(weights * output.metrics["clip_cosine"])

  found = gradient(variables["params"])
  assert max(np.abs(x).max() for x in jax.tree.leaves(found["generator"])) > 0
  for x in jax.tree.leaves(found["discriminator"]):
    np.testing.assert_array_equal(x, 0)


def test_pictures_are_drawn_by_key(variables):
  task = make(dict(caption_augmentation=True))

  @functools.partial(jax.jit, static_argnums=1)
  def draw(rng, truncation=1.0, z=None):
    return task.sample(variables, {}, BATCH, rng, truncation=truncation, z=z)[
      "image"
    ]

  image = draw(RNGS)
  assert image.shape == (B, SIZE, SIZE, 3) and np.abs(image).max() <= 1
  np.testing.assert_array_equal(draw(RNGS), image)
  others = RNGS.at[1].set(jax.random.key(9))
  moved = np.abs(draw(others) - image).max(axis=(1, 2, 3)) > 1e-4
  np.testing.assert_array_equal(moved, [False, True, False, False])
  one = draw(jax.random.key(0))
  assert np.abs(one - draw(jax.random.key(1))).max() > 1e-2
  # Without variety any key draws the same, and so does z = 0.
  still = [draw(k, 0.0) for k in (RNGS, others)]
  np.testing.assert_array_equal(*still)
  zero = draw(None, z=jnp.zeros((B, Z)))
  np.testing.assert_allclose(zero, still[0], atol=1e-5)
  halfway = draw(RNGS, 0.5)
  assert np.abs(halfway - image).max() > 1e-3
  with pytest.raises(errors.UserError, match="truncation is -1"):
    task.sample(variables, {}, BATCH, RNGS, truncation=-1.0)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(loss_type="hing"), "'hing' is not"),
    (dict(loss_type="wasserstein"), "critic has to be bounded"),
    (dict(r1_every=0), "r1_every is 0"),
    (dict(clip_weight=1.0), "needs a CLIP"),
    (dict(augmentation=dict(cutuot=0.5)), "cutout"),
  ],
)
def test_mistakes_are_user_errors(fields, message):
  with pytest.raises(errors.UserError, match=message) as e:
    make(**fields)
  assert "\n" not in str(e.value)


# Loss and gradient norm of the first step of configs/baselines/gan.py:smoke. A
# change here means that the same config now trains something else: if that is
# what you want, say so in CHANGELOG.md and put the new numbers (the test prints
# them).
PINNED = (13.144050, 504.752472)


def test_first_step_is_pinned_and_moves_both_players():
  run = trainer.setup(config_lib.load("configs/baselines/gan.py:smoke"))
  batch = next(run.data.train_batches(0, run.config.batch_size))

  @jax.jit
  def first(batch):
    before = trainer.init_state(run.task, run.tx, jax.random.key(0), batch, {})
    after, metrics = run.train_step()(before, {}, batch, jax.random.key(1))
    moved = jax.tree.map(
      lambda a, b: jnp.abs(a - b).max(), after.params, before.params
    )
    return moved, metrics

  moved, metrics = jax.device_get(first(batch))
  found = float(metrics["loss"]), float(metrics["grad_norm"])
  print(f"PINNED = ({found[0]:.6f}, {found[1]:.6f})")
  np.testing.assert_allclose(found, PINNED, rtol=2e-3)
  # Without moments Adam's first step is the rate: that of the config for one
  # player, that of its group for the other.
  for player, rate in (("generator", 2e-4), ("discriminator", 4e-4)):
    largest = max(float(x) for x in jax.tree.leaves(moved[player]))
    np.testing.assert_allclose(largest, rate / 2, rtol=1e-2)
