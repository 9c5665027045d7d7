"""Measure a trained model folder on its own data and write a report.

  unclip evaluate --model runs/quickstart/model --out report.json

Each figure stands beside its chance level. From captions alone it draws
pictures and looks for the true one of each among all true ones.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from unclip_jax import pipelines
from unclip_jax.evaluators import report
from unclip_jax.utils import programs

MODEL = flags.DEFINE_string("model", None, "Model folder.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
SPLIT = flags.DEFINE_string(
  "split", "train", "Which captions and pictures, of the data's splits."
)
NUM_EMBEDS = flags.DEFINE_integer(
  "num_embeds", 500, "Examples for retrieval and for the prior.", 2
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 100, "Captions to draw pictures from.", 2
)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> None:
  pipe = pipelines.UnCLIPPipeline.from_pretrained(MODEL.value)
  results = report.report(
    pipe.predict_fns(SEED.value),
    pipe.data(),
    split=SPLIT.value,
    num_embeds=NUM_EMBEDS.value,
    num_images=NUM_IMAGES.value,
  )
  out = pathlib.Path(OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  grid = results["nearest_match"].pop("grid")
  pipelines.to_pil(grid / 2 + 0.5).save(out.with_suffix(".png"))
  text = json.dumps({"split": SPLIT.value, **results}, indent=2)
  out.write_text(text + "\n", encoding="utf-8")
  print(text)
  print(f"written to {out}; true and drawn pairs in {out.with_suffix('.png')}")


if __name__ == "__main__":
  programs.run(main)
