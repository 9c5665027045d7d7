r"""How fast this project is beside others, on the machine at hand.

  python launch/bench.py --out runs/bench
  python launch/bench.py --out runs/bench --only decoder --size large --rounds 5

Whoever is installed takes part; the others are skipped with a line:

  pip install open_clip_torch transformers diffusers dalle2-pytorch \
    torchvision webdataset

A case, what one run of it is, and who is beside us:

  clip       train step of CLIP ViT-B/32: 32 pictures of 224 px, 77 tokens;
             open_clip, transformers
  prior      train step of the diffusion prior, 77 text states, embeddings and
             states given. small: width 512, depth 6, batch 16; large: 1024, 20,
             8 (300 M parameters). Our MLPs are 5 widths wide, which gives the
             parameters of the other's gated ones; dalle2-pytorch
  decoder    train step of a decoder U-Net at 64 px, batch 4, image embedding
             and 77 text states given. small: 16 M parameters; large: 100 M.
             diffusers (the same layers; its conditions come projected),
             dalle2-pytorch (as many parameters, its own layers)
  upsampler  train step of an upsampler on 64 px crops, batch 4; diffusers (the
             same layers)
  sampling   25 steps of our prior, batch 4: with the text's keys and values
             computed once, and by running the whole sequence at every step
  data       16 batches of 32 from a folder of 512 JPEGs of 512 px, in threads
             or processes started anew, each picture for the first time: 64 and
             224 px, in [-1, 1], from one decoding; a torch DataLoader with
             Pillow, with torchvision's transforms
  tar        32 batches of the same from 1,024 JPEGs in four tars, also with
             `fast_jpeg`; webdataset with torchvision's transforms
  start      from the start of the process to the end of the first step of
             configs/emoji/prior.py:smoke, by the run's own account: with an
             empty cache of compiled programs, and with that run's cache

A train step is the forward and the backward pass in training mode and an AdamW
update of float32 parameters, without clipping. Ours is the trainer's own: it
also guards against non-finite gradients, updates the moving average of the
parameters and measures the gradient's norm. A peer's is what its documentation
asks for in a loop of one's own, fused AdamW, attention by SDPA where it has it,
U-Nets in channels_last; with --compile, torch.compile too. bfloat16 is compute
only: autocast in torch. Inputs lie in memory; drawing timesteps and noise is in
the step.

All run in one process on the same --threads, in turn: each round times every
contender, the order turned about in every other round. First runs, which
compile, are not counted but shown. Ratios are medians over the rounds of the
other's seconds by ours, or by the first line's: above 1, that one is faster.
Figures of a CPU are noisy, and the load average says how much else ran; the CPU
seconds of all threads, and the shortest run, say what does not depend on it as
much. torch's threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE): where
they spin, as is the default, any other program makes torch several times
slower. Matrix products are most of every step, and whose are faster depends on
the processor: ratios of one are not another's.

Results are printed, and kept in OUT/bench.json and OUT/bench.md, where what
another call measured stays.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import bench_cases
from unclip_jax.utils import programs

ONLY = flags.DEFINE_multi_enum(
  "only", [], list(bench_cases.CASES), "Which case; repeatable. Default: all."
)
SIZE = flags.DEFINE_enum(
  "size", "small", ["small", "large"], "Of the networks."
)
TINY = flags.DEFINE_bool("tiny", False, "Sizes that only try the program out.")
DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "To compute in."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each is timed.", 1)
RUNS = flags.DEFINE_integer("runs", 2, "Runs that are timed together.", 1)
WARMUP = flags.DEFINE_integer(
  "warmup", 3, "Runs before, that do not count; torch takes some to settle.", 0
)
THREADS = flags.DEFINE_integer(
  "threads", None, "Cores to use; default: all that there are.", 1
)
PEERS = flags.DEFINE_bool("peers", True, "Whether others take part.")
COMPILE = flags.DEFINE_bool("compile", False, "torch.compile the peers.")
OUT = flags.DEFINE_string("out", None, "Folder for bench.json and bench.md.")

_PACKAGES = (
  *("jax", "jaxlib", "flax", "torch", "torchvision", "open_clip_torch"),
  *("transformers", "diffusers", "dalle2-pytorch", "webdataset"),
)


@dataclasses.dataclass(frozen=True)
class Times:
  """What was measured of one contender."""

  examples: int  # a run
  num_params: int | None
  first_seconds: float  # of the first run, which compiles
  seconds: list[float]  # of a run, by round
  cpu_seconds: list[float]  # the same, of all threads and child processes


def cpu_time() -> float:
  """CPU seconds of this process and of the children that have ended."""
  usages = map(
    resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(x.ru_utime + x.ru_stime for x in usages)


def race(
  contenders: Mapping[str, bench_cases.Contender],
  rounds: int,
  runs: int,
  warmup: int,
  clock: Callable[[], float] = time.monotonic,
  cpu_clock: Callable[[], float] = cpu_time,
) -> dict[str, Times]:
  """Times contenders in turn.

  Args:
    contenders: name -> who runs.
    rounds: how often each is timed.
    runs: that are timed together.
    warmup: runs before all that, after the first.
    clock, cpu_clock: seconds.
  """

  def timed(run: Callable[[], float | None], count: int) -> tuple[float, float]:
    start, cpu_start = clock(), cpu_clock()
    given = [run() for _ in range(count)]
    whole = clock() - start if None in given else sum(given)
    return whole / count, (cpu_clock() - cpu_start) / count

  times = {
    name: Times(x.examples, x.num_params, timed(x.run, 1)[0], [], [])
    for name, x in contenders.items()
  }
  for contender in contenders.values():
    for _ in range(warmup):
      contender.run()
  for i in range(rounds):
    for name in list(contenders)[:: -1 if i % 2 else 1]:
      seconds, cpu_seconds = timed(contenders[name].run, runs)
      times[name].seconds.append(seconds)
      times[name].cpu_seconds.append(cpu_seconds)
  return times


def summary(times: Mapping[str, Times]) -> dict[str, dict[str, Any]]:
  """Name -> figures; ratios are those of its seconds by the first one's."""
  ours = next(iter(times.values()))

  def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(y / x for x, y in zip(a, b))

  figures = {}
  for name, x in times.items():
    median, shortest = statistics.median(x.seconds), min(x.seconds)
    figures[name] = {
      "num_params": x.num_params,
      "examples_per_second": x.examples / median,
      "seconds_median": median,
      "seconds_min": shortest,
      "spread": (max(x.seconds) - shortest) / median,
      "cpu_seconds_median": statistics.median(x.cpu_seconds),
      "seconds_first": x.first_seconds,
      "ratio": ratio(ours.seconds, x.seconds),
      "ratio_of_min": shortest / min(ours.seconds),
      "ratio_of_cpu": ratio(ours.cpu_seconds, x.cpu_seconds),
    }
  return figures


def table(results: Mapping[str, Any]) -> str:
  """All results in Markdown."""
  lines = []
  for case, result in results.items():
    low, high = result["load_average"]
    lines += [
      f"### {case}",
      "",
      f"{result['rounds']} rounds of {result['runs']} runs, "
      f"{result['threads']} threads of {result['cpu']}, load average "
      f"{low:.1f} to {high:.1f}; "
      + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
      "",
      "| | M parameters | examples/s | s/run: median | min | spread | CPU |"
      " first | ratio | of min | of CPU |",
      "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, (name, x) in enumerate(result["contenders"].items()):
      cells = [
        name,
        "" if x["num_params"] is None else f"{x['num_params'] / 1e6:.1f}",
        f"{x['examples_per_second']:.4g}",
        f"{x['seconds_median']:.4g}",
        f"{x['seconds_min']:.4g}",
        f"{x['spread']:.0%}",
        f"{x['cpu_seconds_median']:.4g}",
        f"{x['seconds_first']:.3g}",
        *(
          f"{x[ratio]:.2f}" if i else ""
          for ratio in ("ratio", "ratio_of_min", "ratio_of_cpu")
        ),
      ]
      lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
  return "\n".join(lines)


def versions() -> dict[str, str]:
  """Package -> version, of those that may take part and are installed."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def cpu_name() -> str:
  """The processor's, as Linux tells it."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    text = ""
  found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
  return found[1] if found else platform.machine()


def use_threads(count: int | None) -> int:
  """Keeps the process to some cores, before any thread pool is made."""
  cores = sorted(os.sched_getaffinity(0))
  if count is not None:
    cores = cores[:count]
    os.sched_setaffinity(0, cores)
  # XLA takes NPROC for the number of cores where it is set.
  os.environ.pop("NPROC", None)
  os.environ["OMP_NUM_THREADS"] = str(len(cores))
  # Before torch is loaded. Threads that spin as they wait take the cores from
  # those that they wait for, wherever another program runs.
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  return len(cores)


def main() -> None:
  threads = use_threads(THREADS.value)
  options = bench_cases.Options(
    size="tiny" if TINY.value else SIZE.value,
    dtype=DTYPE.value,
    threads=threads,
    peers=PEERS.value,
    compile=COMPILE.value,
  )
  out = pathlib.Path(OUT.value) if OUT.value else None
  results = {}
  if out and (out / "bench.json").exists():
    results = json.loads((out / "bench.json").read_text(encoding="utf-8"))
  for case in ONLY.value or bench_cases.CASES:
    key = f"{case}, {options.size}, {options.dtype}"
    key += ", torch.compile" * options.compile
    before = os.getloadavg()[0]
    with bench_cases.contenders(case, options) as who:
      times = race(who, ROUNDS.value, RUNS.value, WARMUP.value)
    loads = sorted([before, os.getloadavg()[0]])
    results[key] = {
      "rounds": ROUNDS.value,
      "runs": RUNS.value,
      "threads": threads,
      "cpu": cpu_name(),
      "load_average": loads,
      "versions": versions(),
      "contenders": summary(times),
    }
    print(table({key: results[key]}), flush=True)
    if out:
      out.mkdir(parents=True, exist_ok=True)
      text = json.dumps(results, indent=2) + "\n"
      (out / "bench.json").write_text(text, encoding="utf-8")
      (out / "bench.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
  programs.run(main)
