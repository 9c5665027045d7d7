"""Protocols on a pipeline of random networks: what they ask and write."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests import random_pipelines
from unclip_jax import features
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.evaluators import base as evaluators
from unclip_jax.protocols import (
  aesthetic,
  base,
  coco30k,
  comparison,
  diversity,
  guidance_sweep,
  prior_report,
  scenes,
  typographic,
)
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  pipe = random_pipelines.make(tmp_path_factory.mktemp("assets"))
  clip = features.of(pipe.parts["clip"])
  return base.Subject(pipe, pipe.data(), "train", clip.beside, batch_size=4)


class Drawn:
  """A subject whose pictures are made up: the true ones, and noise on them.

  The noise grows with the guidance scale, so that every protocol has
  something to find.
  """

  def __init__(self, subject):
    self.pipe = self
    self.parts = subject.pipe.parts

  def predict_fns(self, seed, options):
    scale = options.get("decoder", {}).get("guidance_scale", 1.0)

    def draw(batch):
      rng = np.random.default_rng([seed, int(scale * 100)])
      noise = rng.normal(size=batch["image"].shape)
      return {
        "image": np.clip(batch["image"] + 0.3 * (scale - 1) * noise, -1, 1)
      }

    return {"text_to_image": draw}


def test_a_sweep_finds_what_noise_costs(subject):
  made_up = dataclasses.replace(subject, pipe=Drawn(subject))
  result = guidance_sweep.Protocol((1.0, 2.0, 4.0), num_images=8).run(made_up)
  assert [row["guidance_scale"] for row in result.rows] == [1.0, 2.0, 4.0]
  fids = [row["fid"] for row in result.rows]
  assert fids[0] == pytest.approx(0.0, abs=1e-4)
  assert fids[0] < fids[1] < fids[2]
  assert result.rows[0]["count"] == 8
  assert result.figures == {"features_of": "clip"}


def test_more_noise_is_more_diversity(subject):
  made_up = dataclasses.replace(subject, pipe=Drawn(subject))
  protocol = diversity.Protocol(
    (1.0, 2.0, 4.0), num_prompts=4, num_images=3, num_grids=1
  )
  result = protocol.run(made_up)
  within = [row["within"] for row in result.rows]
  assert within[0] == pytest.approx(0.0, abs=1e-6)  # the same picture
  assert 0 < within[1] < within[2]
  assert set(result.pictures) == {
    f"prompt_0_guidance_{scale}" for scale in (1, 2, 4)
  }


def test_scenes_are_read_back(subject):
  config = config_lib.load("configs/shapes/decoder.py:smoke")
  data = data_pipeline.DataPipeline.from_config(config.data, seed=0)
  made_up = dataclasses.replace(subject, pipe=Drawn(subject), data=data)
  splits = ("validation", "unseen_pairs")
  protocol = scenes.Protocol(splits, (1.0, 4.0), 12, 2, 2, num_grid=2)
  result = protocol.run(made_up)
  clean, unseen, noisy, _ = result.rows
  assert clean["split"] == "validation" and unseen["split"] == "unseen_pairs"
  assert clean["object"] == unseen["object"] == 1.0
  assert noisy["object"] < 0.9
  assert clean["within"] < noisy["within"] and "within" not in unseen
  assert set(result.pictures) == {
    f"{split}_guidance_{scale}" for split in splits for scale in (1, 4)
  }
  with pytest.raises(errors.UserError, match="does not do text_embed_to_image"):
    dataclasses.replace(protocol, decoding="text_embed").run(made_up)
  with pytest.raises(errors.UserError, match="none of prior, text_embed, capt"):
    scenes.Protocol(decoding="text")


def test_scenes_drawn_from_captions_alone_ask_for_no_embedding(subject):
  class Asked(Drawn):
    def predict_fns(self, seed, options):
      self.options = options
      fns = super().predict_fns(seed, options)
      # Not by way of the prior, whose draw nobody would look at.
      return {"text_embed_to_image": fns["text_to_image"]}

  asked = Asked(subject)
  config = config_lib.load("configs/shapes/decoder.py:smoke")
  data = data_pipeline.DataPipeline.from_config(config.data, seed=0)
  made_up = dataclasses.replace(subject, pipe=asked, data=data)
  protocol = scenes.Protocol(
    ("validation",), (2.0,), 4, 2, 2, num_grid=2, decoding="caption"
  )
  protocol.run(made_up)
  assert asked.options["decoder"] == {
    "guidance_scale": 2.0,
    "use_image_embed": False,
  }


def test_spread_is_the_mean_over_pairs():
  features = np.random.default_rng(0).normal(size=(3, 4, 5))
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  rows = unit.reshape(12, 5)
  distance = 1 - rows @ rows.T
  own = np.kron(np.eye(3), np.ones((4, 4))).astype(bool)
  pairs = ~np.eye(12, dtype=bool)
  found = diversity.spread(features)
  assert found["within"] == pytest.approx(distance[own & pairs].mean())
  assert found["between"] == pytest.approx(distance[~own].mean())


def test_comparison_of_pictures_that_are_the_true_ones(subject):
  class Exact(Drawn):
    stages = ("decoder",)

  made_up = dataclasses.replace(subject, pipe=Exact(subject))
  protocol = comparison.Protocol(
    num_images=8, num_prompts=4, num_repeats=2, num_shown=3, num_timed=1
  )
  result = protocol.run(made_up)
  (row,) = result.rows
  assert row["r1"] == row["true_r1"] and row["r5"] == row["true_r5"]
  assert row["fid"] == pytest.approx(0.0, abs=1e-4) and row["count"] == 8
  assert row["within"] == pytest.approx(0.0, abs=1e-6)
  assert row["chance_r1"] == 1 / 8 and row["seconds"] > 0
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(part.variables["params"]))
    for name, part in subject.pipe.parts.items()
  }
  assert row["parameters"] == sizes["decoder"] + sizes["clip"]
  np.testing.assert_array_equal(
    result.pictures["drawn"], result.pictures["true"]
  )
  side = subject.pipe.image_size
  assert result.pictures["drawn"].shape == (side + 4, 3 * (side + 2) + 2, 3)


def test_prior_report_of_a_prior(subject):
  result = prior_report.Protocol(8, (1, 2), 3).run(subject)
  assert [row["num_candidates"] for row in result.rows] == [1, 2]
  # Other draws, and the gain is the difference.
  gain = result.figures["gain_in_cosine_over_the_first"]["2"]
  cosines = [row["cosine"] for row in result.rows]
  assert gain == cosines[1] - cosines[0] != 0
  losses = result.figures["loss_by_timestep"]
  assert list(losses) == ["0", "499", "999"]
  assert len(set(losses.values())) == 3


def test_typographic_attack(subject):
  result = typographic.Protocol(3, num_images=1).run(subject)
  rows = {row["pictures"]: row for row in result.rows}
  assert set(rows) == {"clean", "attacked", "decoded"}
  assert all(0 <= row["probability"] <= 1 for row in result.rows)
  assert rows["clean"]["probability"] != rows["attacked"]["probability"]
  assert rows["decoded"]["count"] == 3


def rated(folder, subject, count=60):
  """Pictures of the subject, rated by how light they are."""
  images = next(iter(subject.data.eval_batches("train", count)))["image"]
  with open(folder / "ratings.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["file_name", "rating"])
    for i, image in enumerate(images):
      pixels = np.round(image * 127.5 + 127.5).astype(np.uint8)
      Image.fromarray(pixels).save(folder / f"{i}.png")
      rows.writerow([f"{i}.png", float(image.mean())])
  return str(folder / "ratings.csv")


def test_a_probe_of_ratings(subject, tmp_path):
  made_up = dataclasses.replace(subject, pipe=Drawn(subject))
  ratings = rated(tmp_path, subject)
  result = aesthetic.Protocol(ratings, (1.0, 4.0), 8, image_size=16).run(
    made_up
  )
  true, same, noisy = (row["rating"] for row in result.rows)
  assert true == pytest.approx(same, abs=1e-4)
  assert abs(noisy - true) > 1e-3
  with pytest.raises(errors.UserError, match="file_name and rating"):
    aesthetic.Protocol(str(tmp_path / "none.csv")).run(made_up)


def test_the_probe_finds_a_linear_taste():
  rng = np.random.default_rng(0)
  embeds = rng.normal(size=(400, 16))
  unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
  ratings = 3 + unit @ rng.normal(size=16)
  probe, figures = aesthetic.fit(embeds * rng.uniform(1, 9, (400, 1)), ratings)
  assert figures["spearman"] > 0.99
  assert figures["error"] < 0.1 * figures["error_of_the_mean"]
  np.testing.assert_allclose(probe(embeds), ratings, atol=0.05)
  _, of_noise = aesthetic.fit(embeds, rng.normal(size=400))
  assert abs(of_noise["spearman"]) < 0.5


def coco(folder):
  for i in range(6):
    Image.new("RGB", (20, 16), (40 * i, 90, 10)).save(folder / f"{i}.png")
  rows = [{"file_name": f"{i % 6}.png", "text": f"text {i}"} for i in range(12)]
  lines = "\n".join(json.dumps(row) for row in rows)
  (folder / "metadata.jsonl").write_text(lines)
  return str(folder)


def test_coco30k_pins_its_captions(subject, tmp_path):
  folder = coco(tmp_path)
  made_up = dataclasses.replace(subject, pipe=Drawn(subject))
  result = coco30k.Protocol(folder, 10, guidance_scale=1.0).run(made_up)
  assert result.rows[0]["fid"] == pytest.approx(0.0, abs=1e-4)
  assert result.rows[0]["count"] == 10
  listed = result.texts["captions"].splitlines()
  assert len(set(listed)) == 10 and all("\ttext " in line for line in listed)
  digest = result.figures["sha256"]
  again = coco30k.Protocol(folder, 10, 1.0, digest).run(made_up)
  assert again.texts == result.texts
  with pytest.raises(errors.UserError, match="other captions"):
    coco30k.Protocol(folder, 9, 1.0, digest).run(made_up)
  with pytest.raises(errors.UserError, match="12 captions of the 13"):
    coco30k.Protocol(folder, 13).run(made_up)


def test_what_is_written(tmp_path):
  rows = [
    {"split": "a", "scale": 1.0, "object": 0.5},
    {"split": "a", "scale": 2.0, "object": 0.75, "within": 0.1},
    {"split": "b", "scale": 1.0, "object": 0.25},
  ]
  result = base.Result(
    rows,
    {"more": 1},
    (base.Plot("scale", "object", "split"), base.Plot("scale", "fid")),
    {"grid": np.zeros((4, 4, 3))},
    {"captions": "x\n"},
  )
  out = tmp_path / "sub" / "scenes.json"
  written = base.write(result, out, {"protocol": "scenes"})
  names = ["scenes.json", "scenes.md", "scenes.grid.png", "scenes.captions.txt"]
  names += ["scenes.object_by_scale.png"]  # nobody has a fid
  assert [path.name for path in written] == names
  assert json.loads(out.read_text()) == {
    "protocol": "scenes", "rows": rows, "more": 1,
  }  # fmt: skip
  assert out.with_suffix(".md").read_text().splitlines()[3:] == [
    "| a | 2 | 0.75 | 0.1 |",
    "| b | 1 | 0.25 |  |",
  ]
  assert np.asarray(Image.open(written[2])).tolist() == [[[128] * 3] * 4] * 4


def test_nothing_to_look_at(subject):
  with pytest.raises(errors.UserError, match=evaluators.NOTHING[:20]):
    subject.look(lambda batch: batch, 0)
