"""VAE-GAN: the parts of its loss, draws from captions, where it looks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import gradients
from unclip_jax.models import bert, vae_gan
from unclip_jax.tasks import bert as bert_task
from unclip_jax.tasks import vae_gan as vae_gan_task
from unclip_jax.utils import errors, trees

B, S, L, V = 4, 16, 5, 20
MODEL = vae_gan.Model(
  image_size=S, context_length=L, text_width=8, vocab_size=V, text_depth=1,
  text_num_heads=2, code_dim=2, prior_width=8, prior_depth=1, channels=8,
  channel_mult=(1, 2), num_res_blocks=1, num_heads=2, discriminator_channels=4,
  discriminator_layers=1,
)  # fmt: skip
TASK = vae_gan_task.Task(MODEL, {}, objective=dict(adaptive=False))
BATCH = {
  "image": np.tanh(random_variables.normal(B, S, S, 3)),
  "text_tokens": np.random.default_rng(0).integers(1, V, (B, L), np.int32),
  "text_mask": np.arange(L) < np.asarray([[3], [5], [1], [4]]),
}
TEXT = {k: BATCH[k] for k in ("text_tokens", "text_mask")}
RNGS = jax.random.split(jax.random.key(3), B)


@pytest.fixture(scope="module")
def variables():
  return random_variables.like(MODEL.init, BATCH["image"], **TEXT)


@functools.cache
def gradient_fn(n):
  make = gradients.make_gradients(TASK, num_microbatches=n)
  run = jax.jit(lambda params, step: make(params, {}, {}, BATCH, RNGS, step))
  return lambda *args: jax.device_get(run(*args))


@pytest.fixture(scope="module")
def whole(variables):
  return gradient_fn(1)(variables["params"], 0)


def test_microbatches_equal_the_whole(variables, whole):
  parts = gradient_fn(2)(variables["params"], 0)
  expected = trees.flatten(whole.grads)
  for name, x in trees.flatten(parts.grads).items():
    error = np.linalg.norm(x - expected[name])
    bound = 1e-4 * np.linalg.norm(expected[name])
    assert error <= bound or name.endswith("key.bias"), name


def test_every_part_learns(whole):
  flat = trees.flatten(whole.grads)
  assert not {name for name, x in flat.items() if not np.any(x)}
  assert {x.split(".")[0] for x in flat} == {
    "text_encoder", "encoder", "prior", "decoder", "conv_out", "discriminator",
  }  # fmt: skip


def test_one_step_is_pinned(whole):
  """Another number means that the same config trains something else: if that
  is what you want, say so in CHANGELOG.md and put what is printed here."""
  norm = np.sqrt(sum(np.vdot(x, x) for x in jax.tree.leaves(whole.grads)))
  pinned = float(whole.metrics["loss"]), float(norm)
  print(pinned)
  np.testing.assert_allclose(pinned, (3.019568, 4.887512), rtol=2e-3)


@pytest.fixture(scope="module")
def inspected(variables):
  """The evaluation loss, and the network with the same draw written out."""

  @jax.jit
  def run(params):
    output = TASK.loss(
      {"params": params}, {}, BATCH, RNGS, step=jnp.int32(0), train=False
    )
    _, out = MODEL.apply({"params": params}, BATCH["image"], **TEXT)
    return output, out

  return run(variables["params"])


def test_the_loss_is_the_bound(inspected):
  output, out = inspected
  (m_q, v_q), (m_p, v_p) = out["posterior"], out["prior"]
  kl = 0.5 * (v_p - v_q + (np.exp(v_q) + (m_q - m_p) ** 2) / np.exp(v_p) - 1)
  kl = kl.sum((1, 2, 3))
  np.testing.assert_allclose(output.metrics["kl"], kl, rtol=1e-4)
  assert kl.min() > 0.1
  np.testing.assert_allclose(
    output.loss,
    output.metrics["reconstruction"] + 0.1 * kl / (S * S * 3),
    rtol=1e-5,
  )


def test_attention_maps_sum_to_one_and_leave_out_padding(inspected):
  _, out = inspected
  places = (S // 2) ** 2
  padded = ~BATCH["text_mask"]
  shapes = {
    "text_attention": (L, L),
    "encoder_self_attention": (places, places),
    "encoder_cross_attention": (places, L),
    "prior_self_attention": (places, places),
    "prior_cross_attention": (places, L),
    "decoder_self_attention": (places, places),
    "decoder_cross_attention": (places, L),
  }
  for name, shape in shapes.items():
    maps = out[name] if isinstance(out[name], tuple) else (out[name],)
    for found in maps:
      assert found.shape == (B, 2, *shape), name
      np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)
      assert np.std(found) > 1e-4
      if shape[1] == L:
        where = np.broadcast_to(padded[:, None, None], found.shape)
        assert np.all(np.asarray(found)[where] == 0), name


@pytest.fixture(scope="module")
def draw(variables):
  @functools.partial(jax.jit, static_argnames="temperature")
  def run(text, rng, temperature=1.0):
    return TASK.sample(
      variables, {}, text, rng, temperature=temperature, return_maps=True
    )

  return run


def test_pictures_are_drawn_from_captions(draw):
  output = draw(TEXT, RNGS)
  image = output["image"]
  assert image.shape == (B, S, S, 3) and np.abs(image).max() <= 1
  assert output["decoder_cross_attention"].shape == (B, 2, (S // 2) ** 2, L)
  np.testing.assert_array_equal(draw(TEXT, RNGS)["image"], image)
  # A row depends on its own key and caption alone.
  others = jax.random.split(jax.random.key(9), B).at[0].set(RNGS[0])
  text = {k: np.concatenate([x[:1], x[1:][::-1]]) for k, x in TEXT.items()}
  changed = draw(text, others)["image"]
  np.testing.assert_allclose(changed[0], image[0], atol=1e-5)
  assert np.abs(changed[1:] - image[1:]).max((1, 2, 3)).min() > 1e-3
  text = dict(TEXT, text_tokens=TEXT["text_tokens"][::-1])
  assert np.abs(draw(text, RNGS)["image"] - image).max() > 1e-3


def test_the_mean_of_the_prior_needs_no_draw_and_padding_no_token(draw):
  image = draw(TEXT, RNGS, temperature=0.0)["image"]
  noise = jax.random.split(jax.random.key(9), B)
  padded = np.where(TEXT["text_mask"], TEXT["text_tokens"], 7)
  again = draw(dict(TEXT, text_tokens=padded), noise, temperature=0.0)
  np.testing.assert_allclose(again["image"], image, atol=1e-5)
  with pytest.raises(errors.UserError, match="temperature"):
    TASK.sample({}, {}, TEXT, RNGS, temperature=-1.0)


def test_the_discriminator_heeds_the_caption(variables):
  """A row's logits depend on its own picture and caption alone."""
  judge = jax.jit(
    lambda image, text: MODEL.apply(
      variables, image, text, method=MODEL.discriminate
    )
  )
  image, text = BATCH["image"], random_variables.normal(B, 8)
  logits = judge(image, text)
  assert logits.shape == (B, 6, 6)
  changed = judge(image, np.concatenate([text[:1], text[:0:-1]]))
  np.testing.assert_allclose(changed[0], logits[0], atol=1e-6)
  assert np.abs(changed[1] - logits[1]).max() > 1e-3


def test_a_frozen_text_encoder_reads_the_captions(variables):
  text = bert.Model(V, L, width=12, depth=1, num_heads=2)
  model = MODEL.clone(vocab_size=None, text_width=12)
  upstream = {"text": bert_task.Task(text, {})}
  task = vae_gan_task.Task(model, upstream)
  frozen = {"text": random_variables.like(text.init, **TEXT)}
  shapes = jax.eval_shape(task.init, jax.random.key(0), BATCH, frozen)
  assert "text_encoder" not in shapes["params"]
  own = random_variables.like_tree(shapes)
  draw = jax.jit(lambda own, frozen: task.sample(own, frozen, TEXT, RNGS))
  image = draw(own, frozen)["image"]
  other = jax.tree.map(lambda x: x[::-1], frozen)
  assert np.abs(draw(own, other)["image"] - image).max() > 1e-3
  for wrong in (
    lambda: vae_gan_task.Task(MODEL, upstream),
    lambda: dataclasses.replace(task, upstream={}),
  ):
    with pytest.raises(errors.UserError, match=r"config\.frozen\.text"):
      wrong()
  # The names of a BERT's parameters are those of the encoder trained here.
  names = trees.flatten(frozen["text"]["params"]["text_encoder"]).keys()
  ours = trees.flatten(variables["params"]["text_encoder"]).keys()
  assert {x for x in names if "pooler" not in x} == set(ours)
