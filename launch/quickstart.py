"""The main job from nothing: train the four stages on emoji, and draw.

  python launch/quickstart.py --out runs/quickstart

Runs the same commands that a user would, one after another, and shows each.
Called again, it resumes where it stopped. At the end OUT holds `samples.png`
(prompts, drawn and true pictures), `report.json` (figures beside their chance
levels) and the model folder `model`.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

from absl import flags

OUT = flags.DEFINE_string("out", "runs/quickstart", "Folder to write to.")
SIZE = flags.DEFINE_enum(
  "size", "quick", ["quick", "smoke"], "Of the configs; smoke only tests."
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = {
  "clip": "clip",
  "prior": "prior",
  "decoder": "decoder",
  "upsampler_64": "upsampler",
}
NUM_SAMPLES = 25  # pictures of samples.png; also the batch that is drawn


def run(command: list[str]) -> None:
  """Shows a command and runs it; exits with its code if it fails."""
  print(f"\n$ {shlex.join(command)}", flush=True)
  arguments = [sys.executable, "-m", f"unclip_jax.{command[1]}", *command[2:]]
  code = subprocess.run(arguments, cwd=ROOT, check=False).returncode
  if code:
    sys.exit(code)


def train_commands(out: pathlib.Path, size: str) -> dict[str, list[str]]:
  """Stage -> its `unclip train`, in order."""
  commands = {}
  for name, config in STAGES.items():
    command = [
      "unclip",
      "train",
      f"--config=configs/emoji/{config}.py:{size}",
      f"--workdir={out / name}",
    ]
    if name in ("prior", "decoder"):
      command.append(f"--config.frozen.clip.path={out / 'clip'}")
    commands[name] = command
  return commands


def check_finished(folder: pathlib.Path) -> None:
  """Exits if a run was asked to stop early (SIGTERM), which is no failure."""
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  last = f"{config['num_steps']:08d}"
  if not (folder / "checkpoints" / last).exists():
    sys.exit(f"{folder} was stopped before its last step: run this again")


def stage_report(folder: pathlib.Path) -> dict[str, float]:
  """Steps, seconds a step and peak memory of a run, from its metrics."""
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").open("r")]
  rows = [row for row in rows if "timing/seconds_per_step" in row]
  seconds = sorted(row["timing/seconds_per_step"] for row in rows)
  return {
    "steps": rows[-1]["step"],
    "seconds_per_step": seconds[len(seconds) // 2],
    "peak_memory_gib": max(row["timing/peak_memory_gib"] for row in rows),
    "loss": rows[-1]["train/loss"],
  }


def draw_and_report(out: pathlib.Path) -> dict[str, Any]:
  """Draws samples.png and true_and_drawn.png; returns the report."""
  # Here and not above: the commands before need neither jax nor its memory.
  import numpy as np

  from unclip_jax import pipelines
  from unclip_jax.data import preprocess
  from unclip_jax.evaluators import report as report_lib

  pipe = pipelines.UnCLIPPipeline.from_pretrained(str(out / "model"))
  data = pipe.data()
  count = data.num_examples("train")
  report: dict[str, Any] = report_lib.report(
    pipe.predict_fns(),
    data,
    split="train",
    num_embeds=500,
    num_images=100,
    draw_batch_size=NUM_SAMPLES,
  )
  grid = report["nearest_match"].pop("grid")
  preprocess.to_pil(grid / 2 + 0.5).save(out / "true_and_drawn.png")
  report["stages"] = {name: stage_report(out / name) for name in STAGES}
  infos = [data.example_info(i, "train") for i in range(count)]
  report["training_code_points"] = [info["code_point"] for info in infos]
  chosen = [i * count // NUM_SAMPLES for i in range(NUM_SAMPLES)]
  prompts = [infos[i]["captions"][0] for i in chosen]
  output = pipe(prompts, output_type="np", batch_size=NUM_SAMPLES)
  true = np.concatenate([b["image"] for b in data.eval_batches("train", 64)])
  samples_picture(prompts, output.images, true[chosen] / 2 + 0.5).save(
    out / "samples.png"
  )
  return report


def samples_picture(prompts: list[str], drawn: Any, true: Any) -> Any:
  """Prompts with the drawn picture (left) beside the true one (right)."""
  import textwrap

  import PIL.Image
  import PIL.ImageDraw
  import PIL.ImageFont

  from unclip_jax.data import preprocess

  side, gap, text_height, columns = 112, 14, 36, 5
  width, height = 2 * side + gap, side + text_height + gap
  rows = -(-len(prompts) // columns)
  top = 34
  sheet = PIL.Image.new(
    "RGB", (columns * (width + gap) + gap, top + rows * height), "white"
  )
  pen = PIL.ImageDraw.Draw(sheet)
  font = PIL.ImageFont.load_default(13)
  pen.text(
    (gap, 10),
    "each prompt: drawn by the model (left), the true picture (right)",
    "black",
    font,
  )
  for i, prompt in enumerate(prompts):
    x = gap + (i % columns) * (width + gap)
    y = top + (i // columns) * height
    for j, image in enumerate((drawn[i], true[i])):
      tile = preprocess.to_pil(image).resize((side, side))
      sheet.paste(tile, (x + j * side, y))
    pen.rectangle((x - 1, y - 1, x + 2 * side, y + side), outline="#cccccc")
    lines = textwrap.wrap(prompt, 34)[:2]
    pen.text((x, y + side + 3), "\n".join(lines), "black", font)
  return sheet


def main() -> None:
  start = time.monotonic()
  out = pathlib.Path(OUT.value)
  report_path = out / "report.json"
  # Compiled programs are kept, so that a second call starts quickly.
  cache = str((out / "jax_cache").resolve())
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
  for name, command in train_commands(out, SIZE.value).items():
    run(command)
    check_finished(out / name)
  if not report_path.exists():
    run(["unclip", "convert", f"--src={out}", f"--out={out / 'model'}"])
    print("\ndrawing from captions and measuring", flush=True)
    report = draw_and_report(out)
    report["minutes"] = (time.monotonic() - start) / 60
    text = json.dumps(report, indent=2, ensure_ascii=False)
    report_path.write_text(text + "\n", encoding="utf-8")
  report = json.loads(report_path.read_text(encoding="utf-8"))
  print_summary(out, report)


def print_summary(out: pathlib.Path, report: dict[str, Any]) -> None:
  """The figures, where everything is, and how to go on."""
  retrieval, prior = report["retrieval"], report["prior"]
  match = report["nearest_match"]
  lines = [
    "",
    f"CLIP, text -> picture R@1   {retrieval['text_to_image_r1']:7.1%}"
    f"   chance {retrieval['chance_r1']:.1%}"
    f" (of {retrieval['count']:.0f} training pictures)",
    f"prior, cosine to the truth  {prior['cosine']:7.3f}"
    f"   shuffled {prior['cosine_shuffled']:.3f}",
    f"caption -> picture, top-1   {match['top1']:7.1%}"
    f"   chance {match['chance_top1']:.1%}"
    f" (of {match['count']:.0f} training pictures)",
    f"caption -> picture, top-5   {match['top5']:7.1%}"
    f"   chance {match['chance_top5']:.1%}",
    "",
    f"pictures  {out / 'samples.png'}",
    f"figures   {out / 'report.json'}",
    f"model     {out / 'model'}",
    "",
    "draw another:",
    f"  .venv/bin/unclip sample --model {out / 'model'} "
    "--prompt 'a frog' --out out",
  ]
  print("\n".join(lines))


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  from unclip_jax.utils import programs

  programs.run(main)
