r"""Runs what a config's `sweep(add)` asks for, and gathers it in one table.

  python launch/sweep.py --out runs/sweeps/prediction \
    --config configs/ablations/decoder_prediction.py:quick -- \
    --config.frozen.clip.path=runs/quickstart/clip

A config module may define, beside `get_config(arg)`,

  def sweep(add):
    for rate in (1e-4, 3e-4):
      add({"optim.learning_rate": rate}, prediction="v")

and `add` is called once a run: keywords are arguments of the config,
`FILE.py:prediction=v`, and the mapping holds single fields,
`--config.optim.learning_rate=0.0001`. What stands behind `--` goes to every
`unclip train`.

The runs are trained here, one after another, each in a folder of OUT that is
named after what is its own. Called again it goes on where it stopped, and skips
what is finished; a run that fails is reported, the others go on, and the exit
code is 1. With --launcher each run is handed over as a job:

  --launcher 'launch/slurm.py --name={name} --nodes=2'

At the end, or with --gather_only, OUT gets sweep.csv, sweep.md (the last value
of each metric) and sweep.png (the curves of one of them).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from absl import flags

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs, platform_flags
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import programs
from unclip_jax.utils.errors import UserError

CONFIG = flags.DEFINE_string(
  "config", None, "Config file with a sweep, FILE.py[:arg].", required=True
)
OUT = flags.DEFINE_string("out", None, "Folder of the runs.", required=True)
ONLY = flags.DEFINE_string(
  "only", "", "A regex: only the runs in whose names it is found."
)
LAUNCHER = flags.DEFINE_string(
  "launcher",
  None,
  "A launcher with its flags; {name} stands for a name of each job.",
)
GATHER_ONLY = flags.DEFINE_bool(
  "gather_only", False, "Train nothing, gather what there is."
)
METRICS = flags.DEFINE_string(
  "metrics", "train/loss$|eval/|best/", "A regex: what the table holds."
)
CURVE = flags.DEFINE_string("curve", "train/loss", "The metric to plot.")
flags.adopt_module_key_flags(jobs)

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
  """One call of `add`.

  Attributes:
    name: its folder, "prediction=v,optim.learning_rate=0.0001".
    job: a name for it that clusters take.
    overrides: what was given to `add`, as text.
    arguments: `unclip train`'s, but for --workdir.
  """

  name: str
  job: str
  overrides: Mapping[str, str]
  arguments: tuple[str, ...]


def expand(path_with_arg: str) -> list[Run]:
  """The runs of a config's sweep, in order.

  Args:
    path_with_arg: "configs/ablations/clip_sam.py:quick".

  Raises:
    UserError: the config has no sweep, or one that adds nothing, the same run
      twice, or something that the config does not know.
  """
  path, argument = config_lib.split_argument(path_with_arg)
  module = config_lib.load_module(path)
  if not hasattr(module, "sweep"):
    raise UserError(f"{path} defines no sweep(add): launch/sweep.py says how")
  stem = pathlib.PurePath(path).stem.lower()
  stem = re.sub(r"[^a-z0-9]+", "-", stem)[:29].strip("-")
  runs: dict[str, Run] = {}

  def add(fields: Mapping[str, Any] | None = None, **arguments: Any) -> None:
    texts = {key: _text(value) for key, value in arguments.items()}
    field_texts = {key: _text(value) for key, value in (fields or {}).items()}
    items = [argument] if argument else []
    items += [f"{key}={text}" for key, text in texts.items()]
    config = f"{path}:{','.join(items)}" if items else path
    config_lib.apply_overrides(config_lib.load(config), field_texts)
    overrides = {**texts, **field_texts}
    name = ",".join(f"{key}={text}" for key, text in overrides.items())
    name = re.sub(r"[^\w.,=+-]+", "_", name) or "base"
    if name in runs:
      raise UserError(f"the sweep of {path} adds {name} twice")
    runs[name] = Run(
      name=name,
      job=f"sweep-{stem}-{len(runs):02d}",
      overrides=overrides,
      arguments=(
        f"--config={config}",
        *(f"--config.{key}={text}" for key, text in field_texts.items()),
      ),
    )

  module.sweep(add)
  if not runs:
    raise UserError(f"the sweep of {path} adds no run")
  return list(runs.values())


def _text(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def command(run: Run, out: str, common: Sequence[str]) -> list[str]:
  """What trains a run, here or by the launcher."""
  arguments = [*run.arguments, *common, f"--workdir={out}/{run.name}"]
  cache_dir = jobs.CACHE_DIR.value or f"{out}/jax_cache"
  if not LAUNCHER.value:
    return jobs.with_env(
      {**platform_flags.cache(cache_dir), **jobs.env_flag()},
      jobs.train_command(arguments),
    )
  launcher = shlex.split(LAUNCHER.value.replace("{name}", run.job))
  return [
    *(sys.executable, *launcher, f"--cache_dir={cache_dir}"),
    *(f"--env={item}" for item in jobs.ENV.value),
    *("--", *arguments),
  ]


def train(runs: Sequence[Run], out: str, common: Sequence[str]) -> list[str]:
  """Trains, or hands over, what is not finished; returns what failed."""
  failed = []
  for i, run in enumerate(runs, start=1):
    if jobs.is_finished(f"{out}/{run.name}"):
      print(f"# {i} of {len(runs)}, {run.name}: finished", flush=True)
      continue
    print(f"# {i} of {len(runs)}, {run.name}", flush=True)
    line = command(run, out, common)
    jobs.show(shlex.join(line))
    if jobs.DRY_RUN.value:
      continue
    if subprocess.run(line, check=False).returncode:
      failed.append(run.name)
  return failed


def read_metrics(folder: pathlib.Path) -> Rows:
  """The rows of a run's metrics.jsonl; [] where there is none."""
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue  # torn: the run is writing it, or was killed
  return rows


def summary(run: Run, folder: pathlib.Path, pattern: str) -> dict[str, Any]:
  """A line of the table.

  Args:
    pattern: a regex of the metrics that it holds.

  Returns:
    "run", the overrides, "state", "step", and the last value of each metric.
  """
  last: dict[str, Any] = {}
  for row in read_metrics(folder):
    last.update(row)
  step = last.pop("step", None)
  if jobs.is_finished(folder):
    state = "finished"
  else:
    state = "not started" if step is None else "unfinished"
  return {
    "run": run.name,
    **run.overrides,
    "state": state,
    "step": step,
    **{k: v for k, v in sorted(last.items()) if re.search(pattern, k)},
  }


def gather(runs: Sequence[Run], folder: str) -> None:
  """Writes and prints the table, then plots.

  Raises:
    UserError: no run has metrics, or the folder is a bucket.
  """
  programs.check_folder("out", folder)
  out = pathlib.Path(folder)
  folders = {run.name: out / run.name for run in runs}
  lines = [summary(run, folders[run.name], METRICS.value) for run in runs]
  if all(line["step"] is None for line in lines):
    raise UserError(f"no run in {out} has metrics yet")
  columns = list(dict.fromkeys(key for line in lines for key in line))
  with (out / "sweep.csv").open("w", encoding="utf-8", newline="") as f:
    writer = csv.DictWriter(f, columns)
    writer.writeheader()
    writer.writerows(lines)
  (out / "sweep.md").write_text(markdown(lines), encoding="utf-8")
  print_table(lines)
  curves = {
    name: [
      (row["step"], row[CURVE.value])
      for row in read_metrics(folder)
      if CURVE.value in row
    ]
    for name, folder in folders.items()
  }
  plot({k: v for k, v in curves.items() if v}, CURVE.value, out / "sweep.png")
  for name in ("sweep.csv", "sweep.md", "sweep.png"):
    print(out / name)


def transposed(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """A column a run and a row a metric: names are long, and runs are few."""
  keys = dict.fromkeys(key for line in lines for key in line)
  return [[key, *(_cell(line.get(key)) for line in lines)] for key in keys]


def _cell(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
  """The transposed table in Markdown."""
  head, *body = transposed(lines)
  rule = ["---", *["---:"] * len(lines)]
  return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
  """The transposed table on the terminal; the overrides say which run it is."""
  _, *body = transposed(lines)
  table = rich.table.Table(show_header=False, box=None, pad_edge=False)
  for row in body:
    table.add_row(*row)
  rich.console.Console().print(table)


def plot(
  curves: Mapping[str, Sequence[tuple[int, float]]],
  metric: str,
  path: pathlib.Path,
) -> None:
  """Draws (step, value) curves, one a run.

  Raises:
    UserError: there is nothing to draw.
  """
  import matplotlib.figure  # a second, which starting runs need not wait for

  if not curves:
    raise UserError(f"no run has the metric {metric!r}: choose a --curve")
  # The legend stands above, a line a run: names are long.
  figure = matplotlib.figure.Figure(
    figsize=(8, 4.5 + 0.22 * len(curves)), layout="constrained"
  )
  axes = figure.subplots()
  for i, (name, points) in enumerate(curves.items()):
    steps, values = zip(*points)
    axes.plot(
      steps,
      values,
      label=name,
      color=f"C{i % 10}",
      linestyle=("-", "--", ":")[i // 10 % 3],
      linewidth=1.2,
      marker="." if len(steps) < 20 else "",
    )
  axes.set(xlabel="step", ylabel=metric)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside upper left", frameon=False, fontsize=9)
  figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
  out = OUT.value.rstrip("/")
  for flag in (ONLY, METRICS):
    try:
      re.compile(flag.value)
    except re.error as e:
      raise UserError(f"--{flag.name} is no regular expression: {e}") from e
  runs = [r for r in expand(CONFIG.value) if re.search(ONLY.value, r.name)]
  if not runs:
    raise UserError(f"--only {ONLY.value!r} is found in no run's name")
  failed = []
  if not GATHER_ONLY.value:
    failed = train(runs, out, arguments)
  if jobs.DRY_RUN.value:
    return
  try:
    if GATHER_ONLY.value or not LAUNCHER.value:
      gather(runs, out)
  finally:
    if failed:
      sys.exit("error: these runs failed: " + ", ".join(failed))


if __name__ == "__main__":
  jobs.run(main)
