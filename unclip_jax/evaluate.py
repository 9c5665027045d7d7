r"""Measure a trained model and write a report.

  unclip evaluate --model runs/quickstart/model --out report.json
  unclip evaluate --model models/mine --out report.json --split validation \
    --num_images 5000 --inception models/inception --clip models/clip
  unclip evaluate --run runs/emoji/decoder --out report.json \
    --config configs/evals.py:of=decoder,inception=models/inception

A whole model (--model) draws pictures from captions alone and looks for the
true one of each among all true ones; each figure stands beside its chance
level. With an Inception (`unclip convert --from inception`) there are the FID
and its like, with a CLIP the CLIP score and the CMMD.

  unclip evaluate --model models/mine --out sweep.json \
    --protocol guidance_sweep --protocol.guidance_scales="(1.0, 2.0, 4.0)" \
    --protocol.num_images=5000 --inception models/inception

An experiment on a whole model is a protocol (unclip_jax/protocols, a module
each): prior_report, guidance_sweep, coco30k, diversity, scenes, typographic,
aesthetic, comparison. It writes a table and plots too.

Of one stage (--run: a run folder, or one part of a model) the evaluators of its
config are run, or those of --config in their place; --config.NAME=VALUE changes
fields, such as task.sample_options.num_sample_steps.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from unclip_jax import evaluation, features, pipelines, run_folder
from unclip_jax.data import preprocess
from unclip_jax.evaluators import report
from unclip_jax.protocols import base
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, programs

MODEL = flags.DEFINE_string("model", None, "Model folder.")
RUN = flags.DEFINE_string("run", None, "Run folder, or one part of a model.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.", required=True)
SPLIT = flags.DEFINE_string(
  "split", "train", "Of --model: a split of its data, which gives captions."
)
PROTOCOL = flags.DEFINE_string(
  "protocol", None, "Of --model: a module of unclip_jax/protocols."
)
FIELDS = programs.FieldsFlag(
  "protocol", "NAME=VALUE; what --protocol.NAME=VALUE stands for."
)
NUM_EMBEDS = flags.DEFINE_integer(
  "num_embeds", 500, "Of --model: examples for retrieval and the prior.", 2
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 100, "Of --model: captions to draw pictures from.", 2
)
INCEPTION = flags.DEFINE_string(
  "inception", None, "Of --model: folder of an Inception, for the FID."
)
CLIP = flags.DEFINE_string(
  "clip", None, "Of --model: folder of a CLIP, for the CLIP score and the CMMD."
)
SEED = flags.DEFINE_integer("seed", 0, "Of --model: of the draws.")
CONFIG = programs.config_flag(required=False)


def main() -> None:
  if bool(MODEL.value) == bool(RUN.value):
    raise errors.UserError("give --model or --run, one of them")
  out = pathlib.Path(OUT.value)
  if PROTOCOL.value:
    written = [str(path) for path in of_protocol(out)]
    print(out.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written: {', '.join(written)}")
    return
  results = of_model() if MODEL.value else of_run()
  out.parent.mkdir(parents=True, exist_ok=True)
  written = [str(out)]
  for name, values in results.items():
    if not isinstance(values, dict):
      continue
    for key in [k for k, value in values.items() if np.ndim(value)]:
      path = out.with_suffix(f".{name}.{key}.png")
      preprocess.to_pil(values.pop(key) / 2 + 0.5).save(path)
      written.append(str(path))
  text = json.dumps(results, indent=2)
  out.write_text(text + "\n", encoding="utf-8")
  print(text)
  print(f"written: {', '.join(written)}")


def of_model() -> dict[str, Any]:
  """What is known of a pipeline's pictures."""
  if CONFIG.path is not None:
    raise errors.UserError("--config goes with --run")
  networks = {"fid": INCEPTION.value, "clip_score": CLIP.value}
  pipe = pipelines.load(MODEL.value)
  results = report.report(
    pipe.predict_fns(SEED.value),
    pipe.data(),
    split=SPLIT.value,
    num_embeds=NUM_EMBEDS.value,
    num_images=NUM_IMAGES.value,
    beside={
      name: features.load(path).beside
      for name, path in networks.items()
      if path
    },
  )
  return {"split": SPLIT.value, **results}


def of_protocol(out: pathlib.Path) -> list[pathlib.Path]:
  """Carries a protocol out on a pipeline and writes what it found."""
  if not MODEL.value:
    raise errors.UserError("--protocol goes with --model")
  module = config_lib.import_module(f"unclip_jax.protocols.{PROTOCOL.value}")
  fields = config_lib.fields_from_text(
    module.Protocol, FIELDS.value, where="--protocol"
  )
  protocol = config_lib.construct(module.Protocol, fields, where="--protocol")
  pipe = pipelines.load(MODEL.value)
  if CLIP.value:
    clip = features.load(CLIP.value)
  elif "clip" not in pipe.parts:
    raise errors.UserError(
      "this model has no CLIP to look at its pictures with: give one by --clip"
    )
  else:  # its own, which its pictures please by construction
    weights, _ = pipe.weights("clip")
    clip = features.of(pipe.parts["clip"]._replace(variables=weights))
  subject = base.Subject(
    pipe,
    pipe.data(),
    SPLIT.value,
    clip.beside,
    features.load(INCEPTION.value).beside if INCEPTION.value else None,
    SEED.value,
  )
  head = {
    "protocol": PROTOCOL.value,
    "options": dataclasses.asdict(protocol),
    "model": MODEL.value,
    "split": SPLIT.value,
    "seed": SEED.value,
    "clip": CLIP.value or "its own",
    "inception": INCEPTION.value,
  }
  return base.write(protocol.run(subject), out, head)


def of_run() -> dict[str, Any]:
  """What the evaluators of a config say of one stage."""
  config = run_folder.load_config(RUN.value)
  if CONFIG.path is not None:
    with config.unlocked():
      config.evals = config_lib.load(CONFIG.path).evals
  return evaluation.evaluate(RUN.value, CONFIG.over(config))


if __name__ == "__main__":
  programs.run(main)
