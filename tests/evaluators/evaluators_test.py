"""Every evaluator on small known numbers; padding has no influence."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from unclip_jax.evaluators import (
  base,
  captions,
  clip_score,
  fid,
  mean,
  nearest_match,
  perceptual,
  prior_report,
  psnr_ssim,
  report,
  retrieval,
  sample_grid,
  scenes,
  vlb,
  zero_shot,
)
from unclip_jax.metrics import captions as caption_metrics
from unclip_jax.metrics import (
  frechet,
  inception,
  kernel,
  manifold,
  pictures,
  similarity,
)
from unclip_jax.utils import errors
from unclip_jax.utils import scenes as scenes_lib

N = 10
GROUPS = ["animal"] * 5 + ["food"] * 3 + ["flag"] + ["animal"]


def info(index: int) -> dict[str, Any]:
  return {"name": f"thing {index}", "group": GROUPS[index]}


class Data:
  """Known predictions per index, served in padded batches."""

  def __init__(self, **arrays: np.ndarray):
    self.arrays = arrays
    self.calls = 0

  def batches(
    self, batch_size: int, given: tuple[str, ...] = ()
  ) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, N, batch_size):
      index = np.arange(start, start + batch_size)
      mask = index < N
      index = np.where(mask, index, 0)
      batch = {"index": index.astype(np.int32), "mask": mask}
      for name in given:
        rows = self.arrays[f"given_{name}"][index].copy()
        rows[~mask] = np.nan
        batch[name] = rows
      yield batch

  def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    self.calls += 1
    result = {}
    for name, value in self.arrays.items():
      if name.startswith("given_"):
        continue
      if value.ndim == 0:
        result[name] = value
        continue
      rows = value[batch["index"]].astype(np.float32)
      # What a network makes of padding: anything, NaN at worst.
      rows[~batch["mask"]] = np.nan
      result[name] = rows
    return result


def run(evaluator, data, batch_size=4, given=()) -> dict[str, Any]:
  return dict(
    evaluator.run(data.predict, data.batches(batch_size, given), info)
  )


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_every_evaluator_is_a_frozen_dataclass():
  names = (
    "mean retrieval zero_shot sample_grid prior_report nearest_match"
    " psnr_ssim scenes vlb fid clip_score perceptual captions"
  )
  for name in names.split():
    module = importlib.import_module(f"unclip_jax.evaluators.{name}")
    evaluator = module.Evaluator()
    with pytest.raises(dataclasses.FrozenInstanceError):
      evaluator.any_field = 1


# ---- base


def test_walk_drops_padding_and_stops_in_time():
  data = Data(x=np.arange(N))
  batches = data.batches(4)
  rows = [p["x"] for p, _ in base.walk(data.predict, batches, 6)]
  np.testing.assert_array_equal(np.concatenate(rows), np.arange(6))
  assert data.calls == 2
  assert next(batches)["index"][0] == 8  # nothing was read beyond need
  rows = [p["x"] for p, _ in base.walk(data.predict, data.batches(4))]
  np.testing.assert_array_equal(np.concatenate(rows), np.arange(N))


def test_walk_without_a_mask_takes_every_row():
  walked = base.walk(lambda b: {"x": b["index"]}, [{"index": np.arange(3)}])
  np.testing.assert_array_equal(next(walked)[0]["x"], np.arange(3))


def test_missing_names_and_empty_splits_are_user_errors():
  data = Data(x=np.arange(N))
  with pytest.raises(errors.UserError, match=r"'y' in the prediction.*\['x'\]"):
    base.collect(data.predict, data.batches(4), ("y",))
  with pytest.raises(errors.UserError, match="'image' in the batch"):
    base.collect(data.predict, data.batches(4), ("x",), ("image",))
  empty = [{"index": np.zeros(2, np.int32), "mask": np.zeros(2, bool)}]
  for batches in ([], empty):
    for evaluator in (mean, zero_shot, retrieval):
      with pytest.raises(errors.UserError, match="nothing to evaluate"):
        dict(evaluator.Evaluator().run(data.predict, batches, info))


# ---- mean


def test_mean_is_that_of_the_real_rows():
  data = Data(loss=random(N), scale=np.asarray(7.0))
  for batch_size in (1, 4, 16):
    values = run(mean.Evaluator(), data, batch_size)
    np.testing.assert_allclose(
      values["loss"], data.arrays["loss"].astype(np.float64).mean(), rtol=1e-9
    )
    assert values["scale"] == 7.0


def test_mean_of_the_first_examples():
  data = Data(loss=np.arange(N, dtype=np.float32))
  assert run(mean.Evaluator(max_examples=5), data) == {"loss": 2.0}


def test_mean_refuses_embeddings():
  data = Data(image_embed=random(N, 3))
  with pytest.raises(errors.UserError, match="'image_embed' has shape"):
    run(mean.Evaluator(), data)


# ---- retrieval


def test_retrieval_counts_known_mistakes():
  image_embed = np.eye(N)
  # Captions 0 and 1 are swapped; pictures 2 and 3 have the same caption.
  text_embed = np.eye(N)[[1, 0, 2, 2, 4, 5, 6, 7, 8, 9]]
  data = Data(image_embed=image_embed, text_embed=text_embed)
  values = run(retrieval.Evaluator(), data, batch_size=3)
  # Caption 2 finds picture 2, caption 3 finds it too and misses its own.
  np.testing.assert_allclose(values["text_to_image_r1"], 7 / 10)
  # Picture 2 has two equal captions (a half), picture 3 none: to it all ten
  # are alike (a tenth).
  np.testing.assert_allclose(values["image_to_text_r1"], 6.6 / 10)
  assert values["chance_r1"] == 0.1 and values["chance_r5"] == 0.5
  assert values["count"] == 10.0
  few = run(retrieval.Evaluator(ks=(2,), max_examples=4), data)
  assert few["chance_r2"] == 0.5 and few["count"] == 4.0
  assert "chance_r1" not in few


# ---- zero_shot


def zero_shot_data() -> Data:
  """One direction per group; picture 4 looks like food."""
  direction = {"animal": 0, "food": 1, "flag": 2}
  text_embed = np.eye(3)[[direction[group] for group in GROUPS]]
  image_embed = text_embed.copy()
  image_embed[4] = np.eye(3)[1]
  return Data(image_embed=image_embed, text_embed=text_embed)


def test_zero_shot_accuracies():
  values = run(zero_shot.Evaluator(), zero_shot_data())
  # The only flag has no other caption: nine examples are classified.
  assert values["count"] == 9.0 and values["num_classes"] == 3.0
  np.testing.assert_allclose(values["accuracy"], 8 / 9)
  np.testing.assert_allclose(values["class_accuracy"], (5 / 6 + 1) / 2)
  np.testing.assert_allclose(values["chance"], 6 / 9)
  np.testing.assert_allclose(values["class_chance"], 1 / 3)


def test_zero_shot_never_uses_the_pictures_own_caption():
  # Each caption is its picture and nothing else: no caption of the class helps.
  data = Data(image_embed=np.eye(N), text_embed=np.eye(N))
  data.arrays["image_embed"] = np.eye(N) + 0.01 * random(N, N)
  own = run(zero_shot.Evaluator(), data)
  data.arrays["text_embed"] = np.eye(N)[
    # Rotated inside the classes: the same class means, no own caption.
    [1, 2, 3, 4, 9, 6, 7, 5, 8, 0]
  ]
  other = run(zero_shot.Evaluator(), data)
  assert own["accuracy"] < 0.8 and other["accuracy"] == 1.0


def test_zero_shot_takes_the_label_of_the_data_if_there_is_one():
  data = zero_shot_data()
  data.arrays["given_label"] = np.arange(N) % 2 + 0.0
  batches = data.batches(5, given=("label",))
  values = dict(zero_shot.Evaluator().run(data.predict, batches, None))
  assert values["num_classes"] == 2.0 and values["chance"] == 0.5


def test_zero_shot_says_what_is_missing():
  data = zero_shot_data()
  with pytest.raises(errors.UserError, match="neither 'label'"):
    dict(zero_shot.Evaluator().run(data.predict, data.batches(4), None))
  with pytest.raises(errors.UserError, match=r"'size' is unknown.*'group'"):
    run(zero_shot.Evaluator(class_field="size"), data)
  with pytest.raises(errors.UserError, match="10 classes for 10"):
    run(zero_shot.Evaluator(class_field="name"), data)


class Letters:
  """A tokenizer that turns a text into its letters' codes."""

  def encode(self, captions, length):
    tokens = np.zeros((len(captions), length), np.int32)
    for row, caption in zip(tokens, captions):
      codes = [ord(x) for x in caption[:length]]
      row[: len(codes)] = codes
    return tokens, tokens > 0


def letters_predict(batch):
  """Embeddings are counts of letters; a picture is the letters it shows."""

  def counts(codes):
    return np.stack([np.bincount(x, minlength=128)[1:] for x in codes])

  return {
    "image_embed": counts(batch["image"]) * 3.0,
    "text_embed": counts(batch["text_tokens"]),
  }


def letters_data(names, **given):
  shown, _ = Letters().encode(names, 8)
  own, mask = Letters().encode(["?"] * len(names), 12)
  index = np.arange(len(names))
  arrays = {"image": shown, "text_tokens": own, "text_mask": mask} | given
  batches = [
    {k: v[i : i + 2] for k, v in {**arrays, "index": index}.items()}
    for i in range(0, len(names), 2)
  ]
  info = [{"group": name, "tokenizer": Letters()} for name in names]
  return batches, info.__getitem__


NAMES = ["cab", "dog", "elm", "cab", "fig", "dog"]


def test_zero_shot_with_templates_is_the_mean_of_the_prompts():
  templates = ("zz {} zz", "{}", "{}yyyyyyyy")
  batches, info = letters_data(NAMES)
  evaluator = zero_shot.Evaluator(templates=templates)
  values = dict(evaluator.run(letters_predict, batches, info))
  assert values["accuracy"] == 1.0 and values["count"] == 6.0
  assert values["num_classes"] == 4.0 and values["chance"] == 2 / 6
  found = evaluator._of_templates(
    letters_predict, batches, info, np.array(["cab", "dog"])
  )
  tokens, _ = Letters().encode([x.replace("{}", "dog") for x in templates], 12)
  embeds = letters_predict({"image": tokens, "text_tokens": tokens})
  unit = embeds["text_embed"] / np.linalg.norm(
    embeds["text_embed"], axis=1, keepdims=True
  )
  mean = unit.mean(axis=0)
  np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), rtol=1e-6)


def test_zero_shot_names_the_labels_of_the_data():
  label = np.array([0, 1, 2, 0, 3, 1])
  batches, info = letters_data(NAMES, label=label)
  right = zero_shot.Evaluator(
    templates=("{}",), class_names=("cab", "dog", "elm", "fig")
  )
  assert dict(right.run(letters_predict, batches, info))["accuracy"] == 1.0
  wrong = zero_shot.Evaluator(
    templates=("{}",), class_names=("dog", "cab", "elm", "fig")
  )
  assert dict(wrong.run(letters_predict, batches, info))["accuracy"] == 2 / 6
  few = zero_shot.Evaluator(templates=("{}",), class_names=("cab", "dog"))
  with pytest.raises(errors.UserError, match="has 2 names"):
    dict(few.run(letters_predict, batches, info))


def test_zero_shot_templates_say_what_is_missing():
  with pytest.raises(errors.UserError, match="no place"):
    zero_shot.Evaluator(templates=("a photo",))
  batches, _ = letters_data(NAMES)
  info = [{"group": name} for name in NAMES].__getitem__
  with pytest.raises(errors.UserError, match="tokenizer"):
    dict(
      zero_shot.Evaluator(templates=("{}",)).run(letters_predict, batches, info)
    )


# ---- prior_report


def test_prior_report_of_known_angles():
  true = np.eye(N) * 2.0
  data = Data(image_embed=true * 3.0, true_image_embed=true, text_embed=true)
  values = run(prior_report.Evaluator(), data)
  assert values["cosine"] == 1.0 and values["cosine_shuffled"] == 0.0
  assert values["r1"] == 1.0 and values["chance_r1"] == 0.1
  np.testing.assert_allclose(values["norm_ratio"], 3.0)
  half = np.eye(N) + np.roll(np.eye(N), 1, axis=0)
  values = run(
    prior_report.Evaluator(),
    Data(image_embed=-true, true_image_embed=true, text_embed=half),
  )
  assert values["cosine"] == -1.0 and values["count"] == N
  np.testing.assert_allclose(values["cosine_text"], np.sqrt(0.5))


def test_prior_report_needs_two():
  data = Data(
    image_embed=random(N, 4),
    true_image_embed=random(N, 4),
    text_embed=random(N, 4),
  )
  with pytest.raises(errors.UserError, match="two or more"):
    run(prior_report.Evaluator(max_examples=1), data)


# ---- nearest_match


@pytest.mark.parametrize("drawn_size", [16, 32])
def test_nearest_match_of_shuffled_pictures(drawn_size):
  true = random(N, 32, 32, 3)
  drawn = pictures.area_resize(true, drawn_size, drawn_size)
  order = [1, 2, 3, 0, 4, 5, 6, 7, 8, 9]
  data = Data(image=drawn[order], given_image=true)
  evaluator = nearest_match.Evaluator(num_grid=4)
  values = run(evaluator, data, batch_size=4, given=("image",))
  assert values["top1"] == 0.6 and values["chance_top1"] == 0.1
  assert values["chance_top5"] == 0.5 and values["count"] == N
  assert 0.6 <= values["top5"] <= 1.0
  side = drawn_size + 2
  assert values["grid"].shape == (2 * side + 2, 2 * (2 * side - 2) + 2, 3)
  np.testing.assert_allclose(
    values["grid"][2:side, 2 : 2 + drawn_size],
    pictures.area_resize(true[:1], drawn_size, drawn_size)[0],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    values["grid"][2:side, 2 + drawn_size : 2 + 2 * drawn_size],
    drawn[1],
    atol=1e-6,
  )
  assert "grid" not in run(nearest_match.Evaluator(), data, given=("image",))


# ---- sample_grid


def test_sample_grid_shows_the_parts_from_left_to_right():
  drawn, true = random(N, 8, 8, 3, seed=1), random(N, 8, 8, 3, seed=2)
  low_res = random(N, 4, 4, 3, seed=3)
  data = Data(image=drawn, given_image=true, given_low_res=low_res)
  evaluator = sample_grid.Evaluator(
    num_examples=3, columns=1, parts=("low_res", "true", "drawn")
  )
  values = run(evaluator, data, batch_size=2, given=("image", "low_res"))
  assert data.calls == 2
  grid = values["grid"]
  assert grid.shape == (3 * 10 + 2, 24 + 4, 3) and grid.dtype == np.float32
  enlarged = low_res.repeat(2, axis=1).repeat(2, axis=2)
  for i in range(3):
    rows = grid[2 + 10 * i : 10 + 10 * i]
    np.testing.assert_allclose(rows[:, 2:10], enlarged[i], atol=1e-6)
    np.testing.assert_allclose(rows[:, 10:18], true[i], atol=1e-6)
    np.testing.assert_allclose(rows[:, 18:26], drawn[i], atol=1e-6)


def test_sample_grid_of_drawn_pictures_needs_no_true_ones():
  data = Data(image=random(N, 4, 4, 3))
  values = run(sample_grid.Evaluator(num_examples=4, parts=("drawn",)), data)
  assert values["grid"].shape == (2 * 6 + 2, 2 * 6 + 2, 3)
  with pytest.raises(errors.UserError, match="must be taken from"):
    run(sample_grid.Evaluator(parts=("true", "low_ress")), data)


# ---- psnr_ssim


def test_psnr_and_ssim_of_known_errors():
  true = 0.5 * random(N, 16, 16, 3)
  low_res = pictures.area_resize(true, 4, 4).astype(np.float32)
  # +-0.2 in a checkerboard: 20 dB from the true one, nothing on average.
  board = np.indices((16, 16)).sum(axis=0) % 2 * 0.4 - 0.2
  data = Data(
    image=true + board[None, :, :, None],
    given_image=true,
    given_low_res=low_res,
  )
  values = run(psnr_ssim.Evaluator(), data, given=("image", "low_res"))
  np.testing.assert_allclose(values["psnr"], 20.0, atol=1e-4)
  np.testing.assert_allclose(values["consistency_psnr"], 100.0)
  np.testing.assert_allclose(values["consistency_psnr_true"], 100.0)
  enlarged = pictures.bilinear_resize(low_res, 16, 16)
  expected = 10 * np.log10(4 / ((enlarged - true) ** 2).mean(axis=(1, 2, 3)))
  np.testing.assert_allclose(
    values["psnr_bilinear"], expected.mean(), rtol=1e-5
  )
  drawn = (true + board[None, :, :, None]).astype(np.float32)
  assert values["ssim"] == pytest.approx(pictures.ssim(drawn, true).mean())
  of_enlarged = pictures.ssim(enlarged, true).mean()
  assert values["ssim_bilinear"] == pytest.approx(of_enlarged, rel=1e-5)
  assert values["ssim_bilinear"] < values["ssim"] < 1.0
  assert values["count"] == N


# ---- vlb


def test_vlb_parts_add_up_in_bins():
  terms = np.abs(random(N, 8))
  prior_term = np.abs(random(N, seed=1))
  data = Data(
    bits_per_dim=prior_term + terms.sum(axis=1),
    prior_term=prior_term,
    terms=terms,
  )
  values = run(vlb.Evaluator(num_bins=3), data)
  means = terms.astype(np.float64).mean(axis=0)
  assert values["reconstruction_term"] == pytest.approx(means[0])
  assert values["bin0"] == pytest.approx(means[1:4].sum())
  assert values["bin2"] == pytest.approx(means[6:].sum())
  parts = ("prior_term", "reconstruction_term", "bin0", "bin1", "bin2")
  total = sum(values[name] for name in parts)
  assert values["bits_per_dim"] == pytest.approx(total, rel=1e-6)
  error = data.arrays["bits_per_dim"].std() / N**0.5
  assert values["bits_per_dim_error"] == pytest.approx(error, rel=1e-5)
  assert values["count"] == N


# ---- fid


def features(**changes: np.ndarray) -> Data:
  return Data(
    features=random(N, 3, seed=1),
    true_features=random(N, 3, seed=2) + 0.2,
    logits_unbiased=5 * random(N, 4, seed=3),
    true_logits_unbiased=5 * random(N, 4, seed=4),
    **changes,
  )


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_fid_is_that_of_the_real_rows_in_any_batches(batch_size):
  data = features()
  values = run(fid.Evaluator(k=2), data, batch_size)
  drawn, true = data.arrays["features"], data.arrays["true_features"]
  expected = frechet.distance(
    frechet.Moments.of(true), frechet.Moments.of(drawn)
  )
  assert values["fid"] == pytest.approx(expected)
  assert values["kid"] == pytest.approx(kernel.polynomial_mmd(true, drawn))
  for name, value in manifold.prdc(true, drawn, 2).items():
    assert values[name] == value
  for prefix, name in (
    ("", "logits_unbiased"),
    ("_true", "true_logits_unbiased"),
  ):
    score, _ = inception.score(data.arrays[name], num_splits=1)
    assert score > 1.1
    assert values[f"inception_score{prefix}"] == pytest.approx(score)
  assert values["count"] == N


def test_fid_to_the_statistics_of_a_file(tmp_path):
  data = features()
  true = data.arrays["true_features"].astype(np.float64)
  path = str(tmp_path / "reference.npz")
  np.savez(path, mu=true.mean(axis=0), sigma=np.cov(true, rowvar=False))
  to_split = run(fid.Evaluator(), data)
  values = run(fid.Evaluator(reference=path), data)
  assert values["fid"] == pytest.approx(to_split["fid"])
  np.savez(path, mu=true.mean(axis=0) + 10, sigma=np.cov(true, rowvar=False))
  assert run(fid.Evaluator(reference=path), data)["fid"] > 200
  np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
  with pytest.raises(errors.UserError, match="another network's features"):
    run(fid.Evaluator(reference=path), data)
  np.savez(path, m=np.zeros(2))
  with pytest.raises(
    errors.UserError, match=r"no \.npz file with mu and sigma"
  ):
    run(fid.Evaluator(reference=path), data)
  with pytest.raises(errors.UserError, match="there is no nowhere"):
    run(fid.Evaluator(reference="nowhere"), data)


def test_fid_needs_neighbours():
  with pytest.raises(errors.UserError, match="5th and got 5 examples"):
    run(fid.Evaluator(max_examples=5), features())


# ---- clip_score, perceptual


def test_clip_score_has_its_levels():
  text = np.eye(N)
  data = Data(image_embed=3 * text, true_image_embed=text + 1, text_embed=text)
  values = run(clip_score.Evaluator(), data)
  assert values["clip_score"] == 100.0 and values["clip_score_shuffled"] == 0.0
  expected = similarity.clip_score(text + 1, text).mean()
  assert values["clip_score_true"] == pytest.approx(expected)
  assert values["cmmd"] == pytest.approx(kernel.cmmd(text + 1, text), rel=1e-5)
  assert values["count"] == N
  with pytest.raises(errors.UserError, match="two or more"):
    run(clip_score.Evaluator(max_examples=1), data)


def test_perceptual_is_the_squared_distance_of_pairs():
  true = np.eye(N)
  data = Data(features=true + 0.5 * np.eye(N), true_features=true)
  values = run(perceptual.Evaluator(), data)
  assert values["distance"] == 0.25
  assert values["distance_shuffled"] == 1.5**2 + 1
  with pytest.raises(errors.UserError, match="two or more"):
    run(perceptual.Evaluator(max_examples=1), data)


# ---- captions


class Words:
  """A tokenizer of a few words; 0 is padding."""

  def decode(self, text_tokens):
    words = ["", "a", "red", "frog", "thing", "|"]
    return [" ".join(words[i] for i in row if i) for row in text_tokens]


def caption_info(index: int) -> dict[str, Any]:
  references = ("A Frog!", "a red frog") if index < 5 else (f"thing {index}",)
  return {"captions": references, "tokenizer": Words()}


def test_captions_are_compared_with_all_references():
  tokens = np.asarray([[1, 2, 3, 0]] * 5 + [[4, 5, 0, 0]] * 5)
  data = Data(text_tokens=tokens)
  predict = lambda b: {"text_tokens": tokens[b["index"]]}  # noqa: E731
  found = dict(
    captions.Evaluator(num_shown=6).run(predict, data.batches(4), caption_info)
  )
  texts = [["a", "red", "frog"]] * 5 + [["thing"]] * 5
  references = [[["a", "frog"], ["a", "red", "frog"]]] * 5
  references += [[["thing", str(i)]] for i in range(5, 10)]
  expected = caption_metrics.scores(texts, references)
  assert found["count"] == N and found["bleu_1"] < 1
  for name, value in expected.items():
    assert found[name] == pytest.approx(value)
  lines = found["examples"].splitlines()
  assert lines[0] == "| caption | reference |" and len(lines) == 2 + 6
  assert lines[2] == "| a red frog | A Frog! |"
  assert lines[7] == "| thing \\| | thing 5 |"
  none = captions.Evaluator(num_shown=0, max_examples=3)
  found = dict(none.run(predict, data.batches(4), caption_info))
  assert found["count"] == 3 and "examples" not in found


@pytest.mark.parametrize("given", [None, info, lambda i: {"captions": ("a",)}])
def test_captions_need_references_and_a_tokenizer(given):
  data = Data(text_tokens=np.ones((N, 3)))
  with pytest.raises(errors.UserError, match="'tokenizer'"):
    list(captions.Evaluator().run(data.predict, data.batches(4), given))


# ---- report


def test_report_draws_once_for_all_that_look_at_pictures():
  drawn, text = random(N, 16, 16, 3), random(N, 4, seed=1)
  draws = []

  class Source:
    def eval_batches(self, split, batch_size, count):
      assert split == "train"
      data = Data(given_image=random(N, 16, 16, 3, seed=2))
      return data.batches(batch_size, ("image",))

    def example_info(self, index, split):
      return {"captions": (f"{split} {index}",)}

  def text_to_image(batch):
    draws.append(batch["index"])
    return {"image": drawn[batch["index"]]}

  def beside(predict, info):
    def together(batch):
      image = predict(batch)["image"]
      assert info(3) == {"captions": ("train 3",)}
      features = image.mean(axis=(1, 2))
      return {
        **{"features": features, "true_features": features},
        **{"image_embed": features, "true_image_embed": features},
        "text_embed": features,
      }

    return together

  results = report.report(
    {
      "embed": lambda b: dict.fromkeys(
        ("image_embed", "text_embed"), text[b["index"]]
      ),
      "text_to_image": text_to_image,
    },
    Source(),
    split="train",
    num_embeds=N,
    num_images=N,
    draw_batch_size=4,
    beside={"fid": beside, "clip_score": beside},
  )
  expected = {"retrieval", "nearest_match", "fid", "clip_score"}
  assert set(results) == expected and len(draws) == 3
  assert results["fid"]["fid"] == pytest.approx(0.0, abs=1e-9)
  assert results["clip_score"]["clip_score"] == pytest.approx(100.0)


# ---- scenes


def a_scene(colours, shapes) -> scenes_lib.Scene:
  """Two objects, the first left of the second."""
  objects = tuple(
    scenes_lib.Object(shape, colour, "medium", x, 0.5, 0.14)
    for colour, shape, x in zip(colours, shapes, (0.25, 0.75))
  )
  relation = scenes_lib.Relation(0, "left of", 1)
  return scenes_lib.Scene(objects, "white", (relation,))


def test_scenes_of_known_mistakes():
  wanted = [a_scene(("red", "blue"), ("circle", "square"))] * N
  swapped = a_scene(("blue", "red"), ("circle", "square"))
  drawn = [*wanted[:6], *[swapped] * 4]
  images = np.stack([scenes_lib.render(s, 32) for s in drawn]) / 127.5 - 1
  data = Data(image=images)
  evaluator = scenes.Evaluator(num_grid=2)
  values = dict(
    evaluator.run(data.predict, data.batches(4), lambda i: {"scene": wanted[i]})
  )
  assert values["binding"] == values["scene"] == values["relation"] == 0.6
  assert values["colour"] == values["shape"] == values["number"] == 1.0
  assert values["count"] == N
  # All scenes are the same, so that another's is as good.
  assert values["chance_object"] == values["object"] == 0.6
  grid = values["grid"]
  assert grid.shape == (32 + 4, 2 * (3 * 32 + 2) + 2, 3)
  # Wanted, drawn, read.
  for left in (2, 34, 66):
    np.testing.assert_allclose(
      grid[2:34, left : left + 32], images[0], atol=0.2
    )


def test_scenes_have_a_chance_level_and_leave_out_what_is_not_asked():
  shapes = ("circle", "square")
  wanted = [a_scene(("red", "blue"), shapes), a_scene(("pink", "cyan"), shapes)]
  one = scenes_lib.Scene(wanted[0].objects[:1], "white")
  for scene, expected in ((wanted, 0.0), ([one, one], 1.0)):
    images = np.stack([scenes_lib.render(s, 32) for s in scene]) / 127.5 - 1
    values = dict(
      scenes.Evaluator().run(
        lambda batch, images=images: {"image": images},
        [{"index": np.arange(2)}],
        lambda i, scene=scene: {"scene": scene[i]},
      )
    )
    assert values["object"] == 1.0 and values["chance_object"] == expected
    assert ("binding" in values) == ("relation" in values) == (scene is wanted)


def test_scenes_says_what_is_missing():
  data = Data(image=random(N, 32, 32, 3))
  with pytest.raises(errors.UserError, match="knows its scenes"):
    run(scenes.Evaluator(), data)
  with pytest.raises(errors.UserError, match="knows its scenes"):
    dict(scenes.Evaluator().run(data.predict, data.batches(4), None))
