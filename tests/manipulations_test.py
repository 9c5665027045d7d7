"""Manipulations and editing, on small networks with random weights."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from tests import random_pipelines
from unclip_jax import manipulations, pipelines
from unclip_jax.utils import errors


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  return random_pipelines.make(tmp_path_factory.mktemp("assets"))


def picture(seed, size=64):
  noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
  image = PIL.Image.fromarray(noise).resize((size, size), PIL.Image.BICUBIC)
  return image


def arrays(output):
  images = output if isinstance(output, list) else output.images
  return np.stack([np.asarray(x, np.float32) for x in images])


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype("f4")


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 2, 3)])
def test_slerp_keeps_the_length_and_meets_both_ends(shape):
  a = normal(2, *shape)[0]
  b = normal(2, *shape)[1]
  a, b = (
    x / np.sqrt((x**2).sum(tuple(range(1, x.ndim)), keepdims=True))
    for x in (a, b)
  )
  np.testing.assert_allclose(manipulations.slerp(a, b, 0.0), a, atol=1e-6)
  np.testing.assert_allclose(manipulations.slerp(a, b, 1.0), b, atol=1e-6)
  middle = np.asarray(manipulations.slerp(a, b, np.array([0.2, 0.5, 0.9])))
  lengths = np.sqrt((middle**2).sum(tuple(range(1, a.ndim))))
  np.testing.assert_allclose(lengths, 1.0, atol=1e-5)
  # The angle grows in proportion to theta.
  flat = [x.reshape(3, -1) for x in (a, b, middle)]
  whole = np.arccos((flat[0] * flat[1]).sum(1))
  part = np.arccos((flat[0] * flat[2]).sum(1))
  np.testing.assert_allclose(part / whole, [0.2, 0.5, 0.9], rtol=1e-3)


def test_slerp_between_parallel_vectors_is_linear():
  a = normal(2, 4)
  middle = manipulations.slerp(a, 3 * a, 0.5)
  np.testing.assert_allclose(middle, 2 * a, rtol=1e-4, atol=1e-5)


def test_eta_0_is_deterministic_and_eta_1_is_not(pipe):
  latents = pipe.encode([picture(0)], decoder_steps=3)
  assert latents.x_T.shape == (1, 16, 16, 3)

  def draw(eta, seed):
    return arrays(
      pipe.decode(
        latents.image_embed,
        x_T=latents.x_T,
        eta=eta,
        seed=seed,
        decoder_steps=3,
      )
    )

  # The upsampler draws its own noise from the seed: compare within one.
  np.testing.assert_array_equal(draw(0.0, 1), draw(0.0, 1))
  assert np.abs(draw(1.0, 1) - draw(0.0, 1)).max() > 5


def test_interpolation_ends_at_the_reconstructions(pipe):
  images = [picture(i) for i in range(3)]
  between = pipe.interpolate(images, num_images=3, decoder_steps=3)
  assert len(between.images) == 5  # a, ab, b, bc, c
  latents = pipe.encode(images, decoder_steps=3)
  np.testing.assert_allclose(
    between.image_embeds[[0, 2, 4]], latents.image_embed, rtol=1e-4, atol=1e-5
  )
  alone = pipe.decode(
    latents.image_embed[[0, 0, 1, 1, 2]],
    x_T=latents.x_T[[0, 0, 1, 1, 2]],
    decoder_steps=3,
  )
  ends = [0, 2, 4]
  np.testing.assert_allclose(
    arrays(between)[ends], arrays(alone)[ends], atol=1.5
  )
  fixed = pipe.interpolate(
    images[:2], num_images=2, fixed_noise=True, decoder_steps=3
  )
  assert np.abs(arrays(fixed)[0] - arrays(alone)[0]).max() > 5


def test_variations_at_eta_0_are_the_reconstruction(pipe):
  a = arrays(pipe.variations(picture(0), num_images=2, eta=0, decoder_steps=3))
  b = arrays(pipe.reconstruct([picture(0)], decoder_steps=3))
  np.testing.assert_allclose(a[:1], b, atol=1.5)


def test_text_diff_starts_at_the_picture_and_turns_to_the_text(pipe):
  options = dict(num_images=3, max_theta=1.0, decoder_steps=2)
  output = pipe.text_diff(picture(0), "a", base_prompt="b", **options)
  z = output.image_embeds
  z_i = pipe.encode([picture(0)], decoder_steps=2).image_embed
  np.testing.assert_allclose(z[:1], z_i, rtol=1e-4, atol=1e-5)
  z_t = pipe.encode_text(pipe.tokenize(["a", "b"]))
  z_t = z_t / np.linalg.norm(z_t, axis=1, keepdims=True)
  z_d = z_t[0] - z_t[1]
  cosine = z[2] @ z_d / np.linalg.norm(z[2]) / np.linalg.norm(z_d)
  assert cosine == pytest.approx(1, abs=1e-4)
  assert np.linalg.norm(z, axis=1) == pytest.approx(
    np.linalg.norm(z_i), rel=1e-3
  )
  alone = pipe.text_diff(picture(0), "a", base_prompt=None, **options)
  assert np.abs(alone.image_embeds[2] - z[2]).max() > 1e-3
  with pytest.raises(errors.UserError, match="same embedding"):
    pipe.text_diff(picture(0), "a", base_prompt="a", **options)


def test_pca_components_are_ordered_and_all_of_them_lose_nothing(pipe):
  embeds = normal(200, 6) * np.array([1, 5, 2, 4, 3, 0.1], "f4") + 1
  mean, components = manipulations.fit_pca(embeds)
  np.testing.assert_allclose(components @ components.T, np.eye(6), atol=1e-5)
  variances = ((embeds - mean) @ components.T).var(axis=0)
  assert np.all(np.diff(variances) < 0)
  assert components[0].argmax() == 1 or components[0].argmin() == 1

  output = pipe.pca_reconstructions(
    picture(0), dims=(2, 8, 16, 99), decoder_steps=2
  )
  z_i = pipe.encode([picture(0)], decoder_steps=2).image_embed[0]
  errors_by_dims = np.abs(output.image_embeds - z_i).sum(axis=1)
  assert len(output.images) == 3  # 99 is more than there are
  assert errors_by_dims[0] > errors_by_dims[1] > errors_by_dims[2]
  np.testing.assert_allclose(output.image_embeds[2], z_i, rtol=1e-3, atol=1e-4)


def test_typographic_attack_shows_the_word_and_what_clip_makes_of_it(pipe):
  attacked = pipe.typographic_attack(
    picture(0), "pig", ["an apple", "a pig"], num_images=2
  )
  assert sum(attacked.probabilities.values()) == pytest.approx(1)
  changed = np.abs(arrays([attacked.image]) - arrays([picture(0)]))
  assert changed.max() > 50 and changed[:, 0].max() == 0
  assert len(attacked.output.images) == 2


def _with_clip(pipe, **changes):
  clip = pipe.parts["clip"]._replace(**changes)
  return pipelines.UnCLIPPipeline({**pipe.parts, "clip": clip})


def test_a_clip_without_its_scale_is_taken_at_the_largest(pipe, monkeypatch):
  monkeypatch.setattr(manipulations, "decode", lambda *args, **kwargs: None)
  task, variables = pipe.parts["clip"].task, pipe.parts["clip"].variables

  def probabilities(scale):
    params = {**variables["params"], "logit_scale": scale}
    if scale is None:
      del params["logit_scale"]
    model = task.model.copy(logit_scale_init=scale)
    other = _with_clip(
      pipe,
      task=dataclasses.replace(task, model=model),
      variables={"params": params},
    )
    labels = ["an apple", "a pig"]
    attacked = other.typographic_attack(picture(0), "pig", labels)
    return list(attacked.probabilities.values())

  largest = probabilities(np.log(100).item())
  assert probabilities(None) == pytest.approx(largest)
  assert probabilities(0.0) != pytest.approx(largest)


def test_without_a_vision_tower_there_are_no_variations(pipe):
  task = pipe.parts["clip"].task
  blind = dataclasses.replace(task, model=task.model.copy(vision_width=None))
  with pytest.raises(errors.UserError, match="--image_encoder"):
    _with_clip(pipe, task=blind).variations(picture(0))


def test_three_decodings_see_what_their_names_say(pipe):
  outputs = pipe.three_decodings(["a red circle", "a ring"], seed=3)
  assert list(outputs) == ["caption", "text_embed", "prior"]
  whole = pipe(["a red circle", "a ring"], seed=3)
  np.testing.assert_array_equal(arrays(outputs["prior"]), arrays(whole))
  # The second's noise is the same: what differs is the conditioning alone.
  for name in ("caption", "text_embed"):
    assert np.abs(arrays(outputs[name]) - arrays(whole)).max() > 5
  z_t = pipe.encode_text(pipe.tokenize(["a ring"]))[0]
  z = outputs["text_embed"].image_embeds[1]
  assert z @ z_t / np.linalg.norm(z) / np.linalg.norm(z_t) == pytest.approx(1)
  # And evaluators may draw so.
  predict = pipe.predict_fns(seed=3)["text_embed_to_image"]
  text = pipe.tokenize(["a red circle", "a ring"])
  drawn = predict({**text, "index": np.arange(2)})["image"] * 127.5 + 127.5
  np.testing.assert_allclose(drawn, arrays(outputs["text_embed"]), atol=1)


def test_a_decoder_of_text_embeddings_needs_no_prior(pipe):
  parts = dict(pipe.parts)
  decoder = parts["decoder"]
  task = dataclasses.replace(decoder.task, condition_on="text_embed")
  parts["decoder"] = decoder._replace(task=task)
  with pytest.raises(errors.UserError, match="leave out the prior"):
    pipelines.UnCLIPPipeline(parts)
  del parts["prior"]
  alone = pipelines.UnCLIPPipeline(parts)
  output = alone(["a ring", "a red circle"], decoder_steps=2)
  z_t = pipe.encode_text(pipe.tokenize(["a ring", "a red circle"]))
  np.testing.assert_array_equal(output.image_embeds, z_t)
  assert list(output.options) == ["decoder", "upsampler_64"]
  assert "prior" not in alone.predict_fns()


def test_without_a_prior_pictures_are_varied_and_prompts_refused(pipe):
  parts = {k: v for k, v in pipe.parts.items() if k != "prior"}
  alone = pipelines.UnCLIPPipeline(parts)
  given = [picture(0)]
  both = [
    arrays(x.variations(*given, num_images=2, decoder_steps=2))
    for x in (pipe, alone)
  ]
  assert both[0].shape == both[1].shape
  with pytest.raises(errors.UserError, match="has no prior"):
    alone("a ring")
  with pytest.raises(errors.UserError, match="lacks its part 'decoder'"):
    pipelines.UnCLIPPipeline({"clip": pipe.parts["clip"]})


def test_inpainting_keeps_what_is_known_bit_for_bit(pipe):
  image = picture(0)
  mask = np.zeros((64, 64))
  mask[10:30, 20:50] = 1
  output = arrays(pipe.inpaint(image, mask, "a ring", num_images=2))
  known = mask == 0
  np.testing.assert_array_equal(output[:, known], arrays([image] * 2)[:, known])
  assert np.abs(output[:, ~known] - arrays([image])[:, ~known]).max() > 5
  with pytest.raises(errors.UserError, match="one size"):
    pipe.inpaint(image, mask[:32], "a ring")
  with pytest.raises(errors.UserError, match="black"):
    pipe.inpaint(image, 0 * mask, "a ring")


def test_outpainting_fills_a_larger_canvas_around_the_picture(pipe):
  image = picture(0)
  canvas = pipe.outpaint(image, "a ring", padding=(16, 0, 40, 8))
  assert canvas.size == (64 + 56, 72)
  pixels = np.asarray(canvas)
  np.testing.assert_array_equal(pixels[:64, 16:80], np.asarray(image))
  for part in (pixels[:, :16], pixels[:, 80:], pixels[64:]):
    assert part.std() > 1  # not the blank canvas


def test_image_to_image_depends_on_the_picture_and_on_strength(pipe):
  def draw(seed, strength):
    return arrays(
      pipe.image_to_image(
        picture(seed), "a ring", strength=strength, num_images=1
      )
    )

  assert np.abs(draw(0, 0.5) - draw(1, 0.5)).max() > 5
  assert np.abs(draw(0, 0.5) - draw(0, 1.0)).max() > 5


def test_bad_numbers_of_pictures_and_prompts_are_named(pipe):
  with pytest.raises(errors.UserError, match="at least two"):
    pipe.interpolate([picture(0)])
  with pytest.raises(errors.UserError, match="2 pictures and 1 prompts"):
    pipe.encode([picture(0), picture(1)], prompts=["a"])


def test_edit_writes_a_sheet(pipe, tmp_path, run_python):
  pipe.save_pretrained(str(tmp_path / "model"))
  picture(0).save(tmp_path / "a.png")
  program = ["-m", "unclip_jax.edit"]
  options = [
    f"--model={tmp_path / 'model'}",
    f"--image={tmp_path / 'a.png'}",
    f"--out={tmp_path / 'new' / 'out.png'}",
  ]
  run_python(*program, "variations", *options, "--num_images=3")
  sheet = PIL.Image.open(tmp_path / "new" / "out.png")
  # One row of the given picture, one of the three that were drawn.
  assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
  failed = run_python(*program, "inpaint", *options, check=False)
  assert failed.returncode == 2 and "--mask" in failed.stderr


def test_the_analytic_variance_is_estimated_and_kept(pipe, tmp_path):
  parts = dict(pipe.parts)
  pipe = pipelines.UnCLIPPipeline(parts)
  pipe.fit_variance("prior", examples_per_timestep=1, batch_size=100)
  table = pipe.parts["prior"].frozen["x_start_mse"]
  assert table.shape == (1000,) and np.all(table > 0)
  assert "x_start_mse" not in parts["prior"].frozen
  pipe.save_pretrained(str(tmp_path))
  loaded = pipelines.UnCLIPPipeline.from_pretrained(str(tmp_path))
  assert loaded.parts["prior"].task.diffusion.variance == "analytic"
  draw = lambda pipe: pipe("a cat", output_type="np", seed=1)  # noqa: E731
  drawn = draw(pipe)
  np.testing.assert_array_equal(draw(loaded).images, drawn.images)
  before = draw(pipelines.UnCLIPPipeline(parts))
  assert np.abs(before.image_embeds - drawn.image_embeds).max() > 1e-3
  with pytest.raises(errors.UserError, match="learned its variance"):
    pipe.fit_variance("decoder")
  with pytest.raises(errors.UserError, match="no diffusion stage"):
    pipe.fit_variance("clip")
