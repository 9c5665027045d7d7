r"""Trains every family of configs/baselines for equal time, and compares them.

  python launch/families.py --out runs/families --minutes 30
  python launch/families.py --out runs/families --only "unclip|gan"

Each family gets the same wall time for all of its stages together, their starts
among it; how many steps that is, is measured first for all of them, on the
machine as it is then, so that the schedules end with it. `--measure` does no
more than that; what is trained afterwards, two halves (`--only`) side by side
or on a loaded machine, takes the same steps. A stage that two families share
(the dVAE) is trained once, and counts for both. Called again it goes on where
it stopped. A stage that fails is reported, the others go on, and the exit code
is 1.

Then the protocol `comparison` looks at all of them with one CLIP that none of
them has seen (`--judge`, or one of the same config and another seed that is
trained as long), and OUT gets families.md, families.json and families.png: the
same prompts for each of them, the true pictures above.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags, logging
from PIL import Image, ImageDraw, ImageFont

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs
from unclip_jax.protocols import base as protocols
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import files, programs
from unclip_jax.utils.errors import UserError

OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
MINUTES = flags.DEFINE_float("minutes", 30.0, "Wall time of a family.", 0.1)
ONLY = flags.DEFINE_string(
  "only", "", "A regex: only the families in whose names it is found."
)
SPLIT = flags.DEFINE_string(
  "split", "validation", "Of the captions that are drawn."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 150, "Captions drawn.", 20)
MEASURE = flags.DEFINE_bool(
  "measure", False, "Measure the stages' steps, and train nothing."
)
JUDGE = flags.DEFINE_string(
  "judge",
  None,
  "The CLIP that looks, a run folder or a part. Default: one that is trained"
  " as long as a family.",
)
SIZE = flags.DEFINE_enum(
  "size", "full", ["full", "smoke"], "Of the configs; smoke only tests."
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
_MEASURED_STEPS = 24  # of a stage, for its seconds a step
_JUDGE = "judge"  # the CLIP that looks


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training of a family.

  Attributes:
    run: its folder in OUT; what two families call the same is one run.
    config: FILE of configs/, with its argument.
    share: of the family's time.
    upstream: field of the config -> run folder that it is set to.
    fields: other fields, as text.
  """

  run: str
  config: str
  share: float
  upstream: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


# unCLIP's decoder as the network of baselines/glide, which draws 32 px.
_AS_GLIDE = {
  "data.preprocess.image_size": "32",
  "model.image_size": "32",
  "model.channels": "64",
  "model.channel_mult": "(1,2,2)",
  "model.num_res_blocks": "1",
  "model.head_channels": "32",
}
_DVAE = Stage("dvae", "baselines/dvae", 0.35)
_CODES = {"frozen.tokenizer.path": "dvae"}
# Family -> its stages; the last one draws.
FAMILIES: dict[str, tuple[Stage, ...]] = {
  "unclip": (
    # Another seed than what may look at it, and than that of the config.
    Stage("unclip/clip", "emoji/clip", 0.25, fields={"seed": "2"}),
    Stage(
      "unclip/prior", "emoji/prior", 0.3, {"frozen.clip.path": "unclip/clip"}
    ),
    Stage(
      "unclip/decoder",
      "emoji/decoder",
      0.45,
      {"frozen.clip.path": "unclip/clip"},
      _AS_GLIDE,
    ),
  ),
  "glide": (Stage("glide", "baselines/glide", 1.0),),
  "dalle": (_DVAE, Stage("dalle", "baselines/dalle", 0.65, _CODES)),
  "dalle_encoder_decoder": (
    _DVAE,
    Stage(
      "dalle_encoder_decoder", "baselines/dalle_encoder_decoder", 0.65, _CODES
    ),
  ),
  "dalle_vqgan": (
    Stage("vqgan", "baselines/vqgan", 0.45),
    Stage(
      "dalle_vqgan",
      "baselines/dalle_vqgan",
      0.55,
      {"frozen.tokenizer.path": "vqgan"},
    ),
  ),
  "gan": (Stage("gan", "baselines/gan", 1.0),),
  "cvae": (
    Stage("cvae_text", "baselines/cvae:stage=text", 0.1),
    Stage(
      "cvae_image",
      "baselines/cvae:stage=image",
      0.25,
      {"init_from.path": "cvae_text"},
    ),
    Stage(
      "cvae_joint",
      "baselines/cvae:stage=joint",
      0.5,
      {"init_from.path": "cvae_image"},
    ),
    Stage(
      "cvae",
      "baselines/cvae:stage=decoder",
      0.15,
      {"init_from.path": "cvae_joint"},
    ),
  ),
  "vae_gan": (Stage("vae_gan", "baselines/vae_gan", 1.0),),
  "mim": (
    _DVAE,
    Stage("mim_pretrain", "baselines/mim", 0.3),
    Stage(
      "mim",
      "baselines/mim_finetune",
      0.35,
      {**_CODES, "init_from.path": "mim_pretrain"},
    ),
  ),
}


def main() -> None:
  out = pathlib.Path(OUT.value)
  chosen = {k: v for k, v in FAMILIES.items() if re.search(ONLY.value, k)}
  if not chosen:
    raise UserError(
      f"--only '{ONLY.value}' is found in none of {', '.join(FAMILIES)}"
    )
  if JUDGE.value is None:
    judge = Stage(_JUDGE, "emoji/clip", 1.0, fields={"seed": "1"})
    chosen = {_JUDGE: (judge,), **chosen}
  failed = {
    name
    for name, stages in chosen.items()
    if not all(measure(stage, out) for stage in stages)
  }
  if not MEASURE.value:
    failed |= {
      name
      for name, stages in chosen.items()
      if name not in failed and not show(name, stages, out)
    }
    gather(out)
  if failed:
    sys.exit(f"error: these failed: {', '.join(sorted(failed))}")


def show(name: str, stages: tuple[Stage, ...], out: pathlib.Path) -> bool:
  """Trains a family, and looks at it; False if something of it failed."""
  trained = all(train(stage, out) for stage in stages)
  return trained and (name == _JUDGE or compare(name, stages, out))


def train(stage: Stage, out: pathlib.Path) -> bool:
  """Trains a stage for its share of the time; False if it failed."""
  folder = out / stage.run
  if jobs.is_finished(folder):
    return True
  num_steps = _num_steps(stage, out)
  fields = {
    "num_steps": str(num_steps),
    "checkpoint.every_steps": str(max(num_steps // 5, 1)),
  }
  return _train(stage, out, folder, fields)


def measure(stage: Stage, out: pathlib.Path) -> bool:
  """Writes how long a stage starts and its steps take; False if it failed.

  What is upstream of it is what was left by measuring that.
  """
  path = _measured(stage, out)
  if SIZE.value == "smoke" or path.exists():
    return True
  folder = out / "steps" / stage.run
  fields = {"num_steps": str(_MEASURED_STEPS), "optim.warmup_steps": "0"}
  if not _train(stage, out / "steps", folder, fields):
    return False
  session = _sessions(folder)[-1]
  found = {
    "startup_seconds": session["seconds"]["startup"],
    "steps_per_second": session["steps_per_second"]["median"],
  }
  files.write_atomically(path, json.dumps(found))
  return True


def _measured(stage: Stage, out: pathlib.Path) -> pathlib.Path:
  return out / "steps" / f"{stage.run.replace('/', '_')}.json"


def _num_steps(stage: Stage, out: pathlib.Path) -> int:
  """How many steps a stage's share of the time is, the start taken off."""
  if SIZE.value == "smoke":
    return 2
  found = json.loads(_measured(stage, out).read_text(encoding="utf-8"))
  seconds = stage.share * MINUTES.value * 60 - found["startup_seconds"]
  return max(int(found["steps_per_second"] * seconds), 1)


def _sessions(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What a training took, from each start to its end."""
  timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
  return timing["sessions"]


def _train(
  stage: Stage,
  out: pathlib.Path,
  folder: pathlib.Path,
  fields: Mapping[str, str],
) -> bool:
  """Trains a stage, with the runs in OUT upstream of it."""
  path, _, argument = stage.config.partition(":")
  arguments = [argument] if argument else []
  if SIZE.value == "smoke":
    arguments.append("smoke")
  config = f"configs/{path}.py" + (
    f":{','.join(arguments)}" if arguments else ""
  )
  fields = {
    **fields,
    "checkpoint.best.metric": "",
    "checkpoint.best.patience": "0",
  }
  if SIZE.value == "full":
    fields |= stage.fields
  fields |= {k: str(out / run) for k, run in stage.upstream.items()}
  # What is to be compared is measured at the end.
  for name in config_lib.load(str(ROOT / config)).evals:
    fields[f"evals.{name}"] = "{}"
  return _run(
    "train",
    f"--config={config}",
    f"--workdir={folder}",
    *(f"--config.{k}={v}" for k, v in fields.items()),
  )


def compare(name: str, stages: tuple[Stage, ...], out: pathlib.Path) -> bool:
  """Makes a model of a family's runs and looks at it; False if that failed."""
  run = out / stages[-1].run
  model = out / "models" / name
  report = out / "reports" / f"{name}.json"
  if not (model / "model_index.json").exists():
    src = run.parent if (run.parent / "clip").is_dir() else run
    if not _run("convert", "--from=runs", f"--src={src}", f"--out={model}"):
      return False
  if report.exists():
    return True
  return _run(
    "evaluate",
    f"--model={model}",
    "--protocol=comparison",
    f"--protocol.num_images={NUM_IMAGES.value}",
    f"--protocol.num_prompts={min(NUM_IMAGES.value, 50)}",
    f"--clip={JUDGE.value or out / _JUDGE}",
    f"--split={SPLIT.value}",
    f"--out={report}",
  )


def _run(verb: str, *arguments: str) -> bool:
  """Shows an `unclip` command and runs it; False if it failed."""
  print(f"\n$ {shlex.join(['unclip', verb, *arguments])}", flush=True)
  command = [sys.executable, "-m", f"unclip_jax.{verb}", *arguments]
  code = subprocess.run(command, cwd=ROOT, check=False).returncode
  if code:
    logging.error("%s failed with exit code %d", verb, code)
  return code == 0


def gather(out: pathlib.Path) -> None:
  """Writes families.json, families.md and families.png of what there is."""
  rows, strips = [], {}
  for name, stages in FAMILIES.items():
    path = out / "reports" / f"{name}.json"
    if not path.exists():
      continue
    report = json.loads(path.read_text(encoding="utf-8"))
    rows.append({"family": name, **_minutes(stages, out), **report["rows"][0]})
    strips.setdefault("true", path.with_suffix(".true.png"))
    strips[name] = path.with_suffix(".drawn.png")
  if not rows:
    return
  head = {"minutes": MINUTES.value, "split": SPLIT.value}
  text = json.dumps({**head, "rows": rows}, indent=2)
  files.write_atomically(out / "families.json", text + "\n")
  table = protocols.table(rows)
  files.write_atomically(out / "families.md", table + "\n")
  sheet(strips).save(out / "families.png")
  print(f"\n{table}\n\nwritten: {out}/families.json, .md, .png")


def _minutes(stages: tuple[Stage, ...], out: pathlib.Path) -> dict[str, float]:
  """`minutes` that the trainings took; {} where a run is there no more."""
  runs = [out / stage.run for stage in stages]
  if not all((run / "timing.json").exists() for run in runs):
    return {}
  seconds = [x["wall_seconds"] for run in runs for x in _sessions(run)]
  return {"minutes": sum(seconds) / 60}


def sheet(strips: Mapping[str, pathlib.Path], scale: int = 2) -> Image.Image:
  """Rows of pictures under each other, with their names at the left.

  Args:
    strips: name -> file with a row of pictures; all of one size in the end.
    scale: pixels for one of the first.
  """
  images = {k: Image.open(path).convert("RGB") for k, path in strips.items()}
  width, height = (scale * x for x in next(iter(images.values())).size)
  font = ImageFont.load_default(max(12, height // 6))
  margin = 12 + max(round(font.getlength(name)) for name in images)
  whole = Image.new("RGB", (margin + width, height * len(images)), "white")
  draw = ImageDraw.Draw(whole)
  for i, (name, image) in enumerate(images.items()):
    middle = i * height + height // 2
    draw.text((6, middle), name, fill="black", font=font, anchor="lm")
    resized = image.resize((width, height), Image.Resampling.NEAREST)
    whole.paste(resized, (margin, i * height))
  return whole


if __name__ == "__main__":
  programs.run(main)
