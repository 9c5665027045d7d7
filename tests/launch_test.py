"""Launchers and sweeps: what they would run, and what runs, with made-up tools.

Every launcher is a process of its own, as programs share names of flags. In
place of gcloud, xpk, sbatch and `env` stand small scripts: the commands that a
machine far away would run are really run, in a folder.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a shell would take apart, were it not quoted.
ODD = """it's "a" $HOME;&& #1"""
TRAIN = ["--", "--config=configs/emoji/clip.py", "--workdir=/mnt/b/x"]
CLOUD = ["--name=a", "--zone=z", "--project=p", "--env=LIBTPU_INIT_ARGS=--x=1"]
CACHE = (
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0"
  " JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1"
)
TAR = (
  f"tar -czf {ROOT}/build/a.tar.gz -C {ROOT} --exclude=./.git"
  " --exclude=./.venv --exclude=./runs --exclude=./build --exclude=./dist"
  " --exclude=__pycache__ '--exclude=.*_cache' --exclude=.hypothesis"
  " '--exclude=*.egg-info' ."
)


@pytest.fixture
def launch(run_python):
  """Runs a launcher; returns the process whatever its exit code."""

  def run(name, *args, path=None, **env):
    if path is not None:
      env["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    return run_python(f"launch/{name}.py", *args, env=env, check=False)

  return run


@pytest.fixture
def tool(tmp_path):
  """Writes an executable bash script into a folder for PATH."""

  def write(name, text, folder=tmp_path / "bin"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder

  return write


def error_of(process, code=2):
  """The one line that a mistake gets."""
  assert process.returncode == code, process.stdout + process.stderr
  assert "Traceback" not in process.stderr
  (line,) = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
  return line


def test_tpu_vm_dry_run(launch):
  process = launch(
    "tpu_vm",
    *CLOUD,
    "--type=v5litepod-16",
    "--spot",
    "--actions=create,copy,install,run,tail,delete",
    "--dry_run",
    *TRAIN,
  )
  tpus, where = "gcloud compute tpus", "--zone=z --project=p"
  ssh = f"{tpus} tpu-vm ssh a --worker"
  q = "'\"'\"'"  # a quote within quotes
  assert process.stdout.splitlines() == [
    f"{tpus} queued-resources create a --node-id=a"
    " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
    f" --valid-until-duration=120m --spot {where}",
    f"{tpus} queued-resources describe a '--format=value(state.state)' {where}"
    "  # again and again until ACTIVE, at most 120 minutes",
    f"mkdir -p {ROOT}/build",
    TAR,
    f"{tpus} tpu-vm scp {ROOT}/build/a.tar.gz a:unclip_jax.tar.gz --worker=all"
    f" {where}",
    f'{ssh}=all \'--command=mkdir -p "$HOME"/unclip_jax'
    ' && cd "$HOME"/unclip_jax'
    " && find . -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +"
    f' && tar -xzf "$HOME"/unclip_jax.tar.gz\' {where}',
    f'{ssh}=all \'--command=cd "$HOME"/unclip_jax'
    " && python3 -m pip install --user --quiet uv"
    " && python3 -m uv venv --allow-existing --python 3.11"
    ' "$HOME"/unclip_jax_venv && python3 -m uv pip install --quiet --python'
    ' "$HOME"/unclip_jax_venv/bin/python -c constraints.txt'
    f" -e {q}.[tpu]{q}' {where}",
    f'{ssh}=all \'--command=if kill -0 "$(cat "$HOME"/train.pid)"'
    f" 2> /dev/null; then echo {q}error: a training is running here{q} >&2;"
    ' exit 1; fi; cd "$HOME"/unclip_jax && rm -f "$HOME"/train.exit &&'
    f' {{ nohup bash -c {q}PATH="$HOME"/unclip_jax_venv/bin:$PATH;'
    " env LIBTPU_INIT_ARGS=--x=1"
    f" JAX_COMPILATION_CACHE_DIR=/mnt/b/x/jax_cache {CACHE} unclip train"
    " --config=configs/emoji/clip.py --workdir=/mnt/b/x --distributed;"
    f' echo $? > "$HOME"/train.exit{q} > "$HOME"/train.log 2>&1 < /dev/null &'
    f' echo $! > "$HOME"/train.pid; }}\' {where}',
    f'{ssh}=0 \'--command=tail -n +1 -F --pid="$(cat "$HOME"/train.pid)"'
    f' "$HOME"/train.log; exit "$(cat "$HOME"/train.exit)"\' {where}',
    f"{tpus} queued-resources delete a --force --quiet {where}",
  ]


def test_gke_dry_run(launch):
  args = [*CLOUD, "--cluster=c", "--type=tpu7x-128", "--dry_run"]
  where = "--cluster=c --zone=z --project=p"
  q = "'\"'\"'"
  assert launch("gke", *args, *TRAIN).stdout.splitlines() == [
    f"mkdir -p {ROOT}/build",
    TAR,
    f"rm -rf {ROOT}/build/a",
    f"mkdir {ROOT}/build/a",
    f"tar -xzf {ROOT}/build/a.tar.gz -C {ROOT}/build/a",
    f"xpk workload create {where} --workload=a --tpu-type=tpu7x-128"
    " --num-slices=1 --max-restarts=10 --termination-grace-period-seconds=120"
    f" --base-docker-image=python:3.11 --script-dir={ROOT}/build/a"
    f" '--command=pip install --quiet -c constraints.txt -e {q}.[tpu]{q}"
    f" || exit 1; trap {q}stopped=1; kill -TERM $!{q} TERM;"
    " env LIBTPU_INIT_ARGS=--x=1"
    f" JAX_COMPILATION_CACHE_DIR=/mnt/b/x/jax_cache {CACHE} unclip train"
    " --config=configs/emoji/clip.py --workdir=/mnt/b/x --distributed"
    ' & wait $!; code=$?; if [ -n "${stopped:-}" ]; then wait $!; code=143; fi;'
    " exit $code'",
  ]
  for action, line in {
    "list": f"xpk workload list {where} --filter-by-job=a",
    "delete": f"xpk workload delete {where} --workload=a --force",
  }.items():
    process = launch("gke", *args, f"--action={action}")
    assert process.stdout == line + "\n"


def test_slurm_dry_run(launch, tmp_path):
  folder = tmp_path / "with space"
  process = launch(
    "slurm",
    *("--name=a", "--nodes=2", "--gpus_per_node=4", "--option=partition=gpu"),
    *("--env=XLA_FLAGS=--x=1 --y=2", "--dry_run"),
    *("--", "--config=configs/emoji/clip.py", f"--workdir={folder}/x"),
  )
  python = shlex.quote(sys.executable)
  assert process.stdout.splitlines() == [
    f"mkdir -p '{folder}'",
    f"cat > '{folder}/a.sbatch' << 'END_OF_SCRIPT'",
    "#!/usr/bin/env bash",
    "#SBATCH --job-name=a",
    "#SBATCH --nodes=2",
    "#SBATCH --ntasks-per-node=4",
    "#SBATCH --gpus-per-node=4",
    f"#SBATCH --output='{folder}/a.log'",
    "#SBATCH --open-mode=append",
    "#SBATCH --requeue",
    "#SBATCH --signal=TERM@180",
    "#SBATCH --partition=gpu",
    "set -euo pipefail",
    f"cd {ROOT}",
    "export XLA_FLAGS='--x=1 --y=2'",
    "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
    f"export JAX_COMPILATION_CACHE_DIR='{folder}/x/jax_cache'",
    "export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0",
    "export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1",
    f"srun --kill-on-bad-exit=1 --gpu-bind=none {python} -m unclip_jax train"
    f" --config=configs/emoji/clip.py '--workdir={folder}/x' --distributed",
    "# A training that was told to stop has saved, and ends with 0 as well.",
    f"env PYTHONPATH={ROOT} {python} -c 'import sys; from launch import jobs;"
    f" sys.exit(not jobs.is_finished(sys.argv[1]))' '{folder}/x'"
    ' || scontrol requeue "$SLURM_JOB_ID"',
    "END_OF_SCRIPT",
    f"sbatch '{folder}/a.sbatch'",
  ]
  assert not folder.exists()


def test_gpus_dry_run(launch):
  train = ["--config=configs/emoji/clip.py", "--workdir", "/runs/a"]
  process = launch("gpus", "--dry_run", "--env=A=1", "--", *train)
  environment = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"
    f" JAX_COMPILATION_CACHE_DIR=/runs/a/jax_cache {CACHE} A=1"
  )
  command = (
    f"{shlex.quote(sys.executable)} -m unclip_jax train"
    " --config=configs/emoji/clip.py --workdir /runs/a\n"
  )
  assert process.stdout == (
    "env 'XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true"
    " --xla_gpu_all_gather_combine_threshold_bytes=134217728"
    " --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
    " --xla_gpu_all_reduce_combine_threshold_bytes=134217728'"
    f" {environment} {command}"
  )
  process = launch(
    *("gpus", "--dry_run", "--simulated_devices=8", "--cache_dir=/c"),
    *("--", *train),
  )
  assert process.stdout == (
    "env JAX_PLATFORMS=cpu MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0"
    " MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=67108864 NPROC=64"
    " 'XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    " --xla_force_host_platform_device_count=8'"
    f" JAX_COMPILATION_CACHE_DIR=/c {CACHE} {command}"
  )


def test_gpus_becomes_the_training(launch, tool):
  folder = tool("env", 'printf "%s\\n" "$$" "$@"; exit 7')
  process = launch(
    "gpus", "--", "--config", ODD, "--workdir=x", "--", "a b", path=folder
  )
  assert process.returncode == 7
  assert process.stdout.splitlines()[-5:] == [
    *("--config", ODD, "--workdir=x", "--", "a b")
  ]


def test_flags_are_known_to_jaxlib(run_python):
  """It ends the process at a flag that it does not know."""
  code = "import jax; jax.numpy.zeros(1)"
  program = (
    "from launch import platform_flags as f;"
    " print(*f.GPU_XLA_FLAGS, *f.CPU_XLA_FLAGS)"
  )
  xla_flags = run_python("-c", program).stdout.strip()
  run_python("-c", code, env={"XLA_FLAGS": xla_flags})
  unknown = f"{xla_flags} --xla_gpu_no_such_flag=true"
  assert run_python(
    "-c", code, env={"XLA_FLAGS": unknown}, check=False
  ).returncode


GCLOUD = """
echo "$3 $4" >> "$SLICE/calls"
[ "$4" = "$FAILS" ] && exit 5
for argument; do
  case $argument in
    --command=*) HOME=$SLICE exec bash -c "${argument#--command=}" ;;
  esac
done
[ "$4" = describe ] && cat "$SLICE/state"
exit 0
"""


@pytest.fixture
def tpu_slice(launch, tool, tmp_path):
  """Runs launch/tpu_vm.py on a slice that is a folder."""
  folder = tmp_path / "slice"
  (folder / "unclip_jax").mkdir(parents=True)
  (folder / "state").write_text("ACTIVE\n")
  path = tool("gcloud", GCLOUD)

  def run(actions, *args, **env):
    (folder / "calls").write_text("")
    return launch(
      *("tpu_vm", *CLOUD, "--type=v6e-8", f"--actions={actions}"),
      *("--wait_minutes=1", *args),
      path=path,
      SLICE=str(folder),
      **env,
    )

  run.folder = folder
  run.calls = lambda: (folder / "calls").read_text().splitlines()
  return run


def test_training_on_a_slice_gets_its_arguments_and_environment(
  tpu_slice, tool
):
  tool(
    "unclip",
    'printf "%s\\n" "$A" "$LIBTPU_INIT_ARGS" "$PWD" "$@"; exit 3',
    tpu_slice.folder / "unclip_jax_venv" / "bin",
  )
  process = tpu_slice(
    "create,run,tail,delete", f"--env=A={ODD}", *TRAIN, f"--config.name={ODD}"
  )
  seen = (tpu_slice.folder / "train.log").read_text()
  assert seen.splitlines() == [
    *(ODD, "--x=1", str(tpu_slice.folder / "unclip_jax"), "train"),
    *(*TRAIN[1:], f"--config.name={ODD}", "--distributed"),
  ]
  assert seen in process.stdout
  # The training failed, and the slice is left to be looked at.
  assert "exit code 3" in error_of(process, 1)
  assert tpu_slice.calls() == [
    "queued-resources create",
    "queued-resources describe",
    "tpu-vm ssh",
    "tpu-vm ssh",
  ]


def test_slice_trains_once_at_a_time(tpu_slice):
  (tpu_slice.folder / "train.pid").write_text(str(os.getpid()))
  process = tpu_slice("run", *TRAIN)
  assert process.returncode == 1
  assert "a training is running here" in process.stderr


def test_first_failure_stops(tpu_slice):
  process = tpu_slice("create,tail", FAILS="create")
  assert "exit code 5" in error_of(process, 1)
  assert tpu_slice.calls() == ["queued-resources create"]


def test_lost_slice_is_an_error(tpu_slice):
  (tpu_slice.folder / "state").write_text("SUSPENDED\n")
  process = tpu_slice("create,tail")
  assert "a is SUSPENDED and not ACTIVE" in error_of(process, 1)
  assert tpu_slice.calls() == [
    "queued-resources create",
    "queued-resources describe",
  ]


def test_copied_archive_is_the_source_tree(run_python, tmp_path):
  code = (
    "import json, pathlib, sys; from launch import jobs;"
    " print(json.dumps(jobs.archive_commands(pathlib.Path(sys.argv[1]))))"
  )
  archive = tmp_path / "new" / "a.tar.gz"
  for command in json.loads(run_python("-c", code, archive).stdout):
    subprocess.run(command, check=True)
  listing = subprocess.run(
    ["tar", "-tzf", archive], check=True, capture_output=True, text=True
  ).stdout.splitlines()
  assert {"./setup.py", "./constraints.txt", "./launch/jobs.py"} <= {*listing}
  assert "./unclip_jax/utils/config.py" in listing
  parts = {part for name in listing for part in pathlib.Path(name).parts}
  assert not parts & {".git", "__pycache__", ".pytest_cache", "build"}


@pytest.mark.parametrize("stopped", [False, True])
def test_gke_job_that_was_stopped_is_not_done(launch, tool, tmp_path, stopped):
  folder = tool(
    "unclip",
    f"""trap 'printf "%s\\n" "$@" > {tmp_path}/saved; exit 0' TERM
echo started; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; exit 4""",
  )
  process = launch(
    *("gke", *CLOUD, "--cluster=c", "--type=v5p-8", "--docker_image=i"),
    *("--dry_run", *TRAIN, ODD),
  )
  (line,) = process.stdout.splitlines()
  *_, command = shlex.split(line)
  job = subprocess.Popen(
    ["bash", "-c", command.removeprefix("--command=")],
    env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert job.stdout.readline() == "started\n"
  if stopped:
    job.send_signal(signal.SIGTERM)
  else:
    (tmp_path / "go").touch()
  assert job.wait(20) == (143 if stopped else 4)
  job.stdout.close()
  if stopped:
    saved = (tmp_path / "saved").read_text().splitlines()
    assert saved == ["train", *TRAIN[1:], ODD, "--distributed"]


def finish(folder, num_steps=2):
  """Makes a folder look like a finished run's."""
  (folder / "checkpoints" / f"{num_steps:08d}").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({"num_steps": num_steps}))


@pytest.mark.parametrize(
  ("code", "finished", "requeued"),
  [(0, False, True), (0, True, False), (9, False, False)],
)
def test_slurm_job_queues_again_until_finished(
  launch, tool, tmp_path, code, finished, requeued
):
  workdir = tmp_path / ODD
  tool("sbatch", 'bash -n "$1" && bash "$1"')
  tool("srun", f'printf "%s\\n" "$@" > {tmp_path}/srun; exit {code}')
  folder = tool("scontrol", f'echo "$@" > {tmp_path}/scontrol')
  if finished:
    finish(workdir)
  process = launch(
    *("slurm", "--name=a", "--", "--config=c", f"--workdir={workdir}"),
    path=folder,
    SLURM_JOB_ID="7",
  )
  assert process.returncode == (1 if code else 0), process.stderr
  assert (tmp_path / "srun").read_text().splitlines()[-4:] == [
    *("train", "--config=c", f"--workdir={workdir}", "--distributed")
  ]
  assert (tmp_path / "scontrol").exists() == requeued
  if requeued:
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


TPU_VM = ["tpu_vm", "--name=a", "--zone=z", "--project=p", "--dry_run"]
SLURM = ["slurm", "--name=a", "--dry_run"]
PREDICTION = "--config=configs/ablations/decoder_prediction.py"


@pytest.mark.parametrize(
  ("args", "words"),
  [
    ([*TPU_VM, "--type=v9-8", *TRAIN], ["'v9-8'", "v5litepod-N"]),
    ([*TPU_VM, "--type=v4", *TRAIN], ["'v4'"]),
    ([*TPU_VM, "--type=tpu7x-8", *TRAIN], ["launch/gke.py"]),
    ([*TPU_VM, "--type=v4-8", "--actions=x"], ["--actions", "'x'"]),
    ([*TPU_VM, "--type=v4-8"], ["lack --config", "--"]),
    ([*TPU_VM, "--type=v4-8", "--name=A"], ["--name", "'A'"]),
    (["tpu_vm", "--name=a", "--zone=z", "--type=v4-8"], ["--project=VALUE"]),
    ([*TPU_VM, "--nodry_run", "--type=v4-8", *TRAIN], ["gcloud is not on"]),
    (["gke", *CLOUD, "--cluster=c", *TRAIN], ["accelerator type ''"]),
    (
      ["gke", *CLOUD, "--cluster=c", "--type=v4-8", *TRAIN],
      ["xpk is not on PATH"],
    ),
    (
      ["gpus", "--dry_run", "--", "--config=c", "--workdir=gs://b/x"],
      ["mount"],
    ),
    ([*SLURM, "--option=-p gpu", "--", *TRAIN[1:2], "--workdir=x"], ["-p gpu"]),
    (["slurm", "--name=a", "--", "--config=c", "--workdir=x"], ["sbatch is"]),
    (["gpus", "--dry_run", "--", "--config=c"], ["lack --workdir"]),
    (["gpus", "--dry_run", "--env=A", *TRAIN], ["NAME=VALUE", "'A'"]),
    (["gpus", "--dry_run", "x", *TRAIN], ["unexpected argument 'x'"]),
    (["sweep", "--out=x", "--config=configs/emoji/clip.py"], ["no sweep(add)"]),
    (["sweep", "--out=x", PREDICTION, "--only=zzz"], ["zzz"]),
    (["sweep", "--out=x", PREDICTION, "--only=("], ["no regular expression"]),
    (["sweep", "--out=gs://x", PREDICTION, "--gather_only"], ["mount"]),
    (["sweep", "--out=x", PREDICTION, "--gather_only"], ["metrics yet"]),
  ],
)
def test_mistake_gets_one_line(launch, tmp_path, args, words):
  line = error_of(launch(*args, PATH=str(tmp_path)))
  for word in words:
    assert word in line


def test_every_sweep_of_the_configs_expands(run_python):
  paths = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "configs").rglob("*.py"))
    if "def sweep(" in path.read_text()
  ]
  code = (
    "import sys; from launch import sweep\n"
    "for path in sys.argv[1:]:\n"
    "  for run in sweep.expand(path + ':quick'):\n"
    "    print(path, run.name, run.job, *run.arguments)\n"
  )
  lines = run_python("-c", code, *paths).stdout.splitlines()
  rows = [line.split() for line in lines]
  assert len({tuple(row[:2]) for row in rows}) == len(rows)
  assert len({row[2] for row in rows}) == len(rows)
  per_path = [sum(row[0] == path for row in rows) for path in paths]
  assert len(paths) >= 4 and min(per_path) >= 2
  path = "configs/ablations/clip_sigmoid.py"
  assert rows[[row[0] for row in rows].index(path)] == [
    *(path, "loss_type=softmax,batch_size=32", "sweep-clip-sigmoid-00"),
    f"--config={path}:quick,loss_type=softmax",
    "--config.batch_size=32",
  ]


def test_every_stage_of_the_families_can_be_set_up(run_python):
  """At full size, over what is upstream of it, as their fields make it."""
  code = textwrap.dedent("""
    from launch import families
    from unclip_jax import trainer
    from unclip_jax.utils import config as config_lib

    stages = {s.run: s for all in families.FAMILIES.values() for s in all}

    def config_of(stage):
      path, _, argument = stage.config.partition(":")
      config = config_lib.load(f"configs/{path}.py:{argument}")
      config_lib.apply_overrides(config, stage.fields)
      with config.unlocked():
        for field, run in stage.upstream.items():
          if field == "init_from.path":
            config.init_from.path = ""
          else:
            name = field.split(".")[1]
            config.frozen[name] = dict(untrained=config_of(stages[run]))
      return config

    for run, stage in stages.items():
      trainer.step_shapes(trainer.setup(config_of(stage), abstract=True))
      print(run)
  """)
  runs = run_python("-c", code).stdout.splitlines()
  assert len(runs) >= 16 and {"unclip/decoder", "gan", "mim"} <= {*runs}


def test_steps_of_a_family_fill_its_time(run_python, tmp_path):
  """10 minutes of 2 steps a second, without the start of each stage."""
  code = textwrap.dedent("""
    import json, pathlib, sys
    from launch import families

    out = pathlib.Path(sys.argv[1])
    families.flags.FLAGS(["families", f"--out={out}", "--minutes=10"])
    stage = families.FAMILIES["mim"][1]
    sessions = [
      {"seconds": {"startup": s}, "steps_per_second": {"median": r}}
      for s, r in ((9.0, 1.0), (30.0, 2.0))  # the last one counts
    ]
    families._run = lambda verb, config, workdir, *fields: (
      pathlib.Path(workdir.partition("=")[2]).mkdir(parents=True),
      (out / "steps" / stage.run / "timing.json").write_text(
        json.dumps({"sessions": sessions})
      ),
    )
    assert families.measure(stage, out)
    print(families._num_steps(stage, out))

    # Of what was trained elsewhere there is a report, and no run.
    (out / "reports").mkdir()
    report = out / "reports" / "gan.json"
    report.write_text(json.dumps({"rows": [{"count": 6}]}))
    for name in ("true", "drawn"):
      picture = families.Image.new("RGB", (16, 8))
      picture.save(report.with_suffix(f".{name}.png"))
    for times in ([], [90.0, 30.0]):
      if times:
        (out / "gan").mkdir()
        sessions = [{"wall_seconds": x} for x in times]
        (out / "gan" / "timing.json").write_text(
          json.dumps({"sessions": sessions})
        )
      families.gather(out)
      (row,) = json.loads((out / "families.json").read_text())["rows"]
      print(json.dumps(row))
  """)
  lines = run_python("-c", code, str(tmp_path)).stdout.splitlines()
  assert int(lines[0]) == int(2 * (0.3 * 600 - 30))
  rows = [json.loads(line) for line in lines if line.startswith("{")]
  assert rows == [
    {"family": "gan", "count": 6},
    {"family": "gan", "minutes": 2.0, "count": 6},
  ]


CONFIG = """
import ml_collections
from unclip_jax.utils import config as config_lib

def get_config(arg=None):
  arg = config_lib.parse_arg(arg, a=1, b=False, quick=False)
  return ml_collections.ConfigDict(dict(num_steps=2, optim=dict(lr=0.1)))

def sweep(add):
"""


@pytest.fixture
def sweep(launch, tmp_path):
  """Runs launch/sweep.py on a config with the given lines of `sweep`."""
  path = tmp_path / "My Config.py"

  def run(lines, *args, **env):
    body = "".join(f"  {line}\n" for line in lines)
    path.write_text(CONFIG + body, encoding="utf-8")
    return launch(
      "sweep", f"--config={path}:quick", f"--out={tmp_path}/out", *args, **env
    )

  run.path, run.out = path, tmp_path / "out"
  return run


@pytest.mark.parametrize(
  ("lines", "words"),
  [
    (["pass"], ["adds no run"]),
    (["add(a=1)", "add(a=1)"], ["a=1 twice"]),
    (["add(aa=1)"], ["'aa'", "'a'"]),
    (['add({"optim.rl": 1})'], ["optim.rl", "optim.lr"]),
    (['add({"optim.lr": "x"})'], ["config.optim.lr must be a float"]),
  ],
)
def test_wrong_sweep_trains_nothing(sweep, lines, words):
  line = error_of(sweep(lines))
  for word in words:
    assert word in line
  assert not sweep.out.exists()


def test_sweep_dry_run(sweep):
  lines = ["add()", 'add({"optim.lr": 1e-3}, a=2, b=True)']
  process = sweep(lines, "--dry_run", "--", "--strict")
  train = (
    f"env JAX_COMPILATION_CACHE_DIR={sweep.out}/jax_cache {CACHE}"
    f" {shlex.quote(sys.executable)} -m unclip_jax train"
  )
  name = "a=2,b=true,optim.lr=0.001"
  assert process.stdout.splitlines() == [
    "# 1 of 2, base",
    f"{train} '--config={sweep.path}:quick' --strict"
    f" --workdir={sweep.out}/base",
    f"# 2 of 2, {name}",
    f"{train} '--config={sweep.path}:quick,a=2,b=true' --config.optim.lr=0.001"
    f" --strict --workdir={sweep.out}/{name}",
  ]


def test_sweep_hands_jobs_to_a_launcher(sweep):
  launcher = "--launcher=launch/gpus.py --dry_run --env 'N={name} x'"
  process = sweep(["add(a=2)"], launcher, "--env=A=1")
  assert process.returncode == 0, process.stderr
  handed, done = process.stdout.splitlines()[1:]
  assert handed.startswith(f"$ {shlex.quote(sys.executable)} launch/gpus.py")
  variables = shlex.split(done)
  assert variables[variables.index("A=1") - 1] == "N=sweep-my-config-00 x"
  assert f"JAX_COMPILATION_CACHE_DIR={sweep.out}/jax_cache" in variables
  assert variables[-2:] == [
    f"--config={sweep.path}:quick,a=2",
    f"--workdir={sweep.out}/a=2",
  ]


# In place of `env`: trains a=1, and fails at a=2 until it may.
TRAINER = """
for argument; do
  case $argument in --workdir=*) folder=${argument#--workdir=} ;; esac
done
mkdir -p "$folder/checkpoints"
echo trained >> "$folder/calls"
echo '{"step": 1, "train/loss": 0.5, "train/x": 1}' > "$folder/metrics.jsonl"
case $folder in *a=2*) [ -e "$FIXED" ] || exit 3 ;; esac
mkdir "$folder/checkpoints/00000002"
echo '{"num_steps": 2}' > "$folder/config.json"
echo '{"step": 2, "train/loss": 0.25}' >> "$folder/metrics.jsonl"
echo '{"step": 2, "eval/v/top1": 1.0}' >> "$folder/metrics.jsonl"
"""


def test_sweep_trains_goes_on_and_gathers(sweep, tool, tmp_path):
  fixed = tmp_path / "fixed"
  options = dict(path=tool("env", TRAINER), FIXED=str(fixed))
  lines = ["add(a=2)", "add(a=1)"]
  process = sweep(lines, **options)
  assert error_of(process, 1).endswith("failed: a=2")
  table = list(csv.DictReader((sweep.out / "sweep.csv").open()))
  columns = ["run", "a", "state", "step", "train/loss", "eval/v/top1"]
  assert [[row[k] for k in columns] for row in table] == [
    ["a=2", "2", "unfinished", "1", "0.5", ""],
    ["a=1", "1", "finished", "2", "0.25", "1.0"],
  ]
  assert "train/x" not in table[0]
  assert (sweep.out / "sweep.md").read_text().splitlines()[:3] == [
    "| run | a=2 | a=1 |",
    "| --- | ---: | ---: |",
    "| a | 2 | 1 |",
  ]
  picture = (sweep.out / "sweep.png").read_bytes()
  assert picture.startswith(b"\x89PNG")

  fixed.touch()
  process = sweep(lines, "--curve=eval/v/top1", **options)
  assert process.returncode == 0, process.stderr
  calls = {x: (sweep.out / x / "calls").read_text() for x in ("a=1", "a=2")}
  assert calls == {"a=1": "trained\n", "a=2": "trained\ntrained\n"}
  assert "# 2 of 2, a=1: finished" in process.stdout
  assert (sweep.out / "sweep.png").read_bytes() != picture


def test_gather_takes_what_there_is(sweep):
  folder = sweep.out / "a=1"
  finish(folder)
  (folder / "metrics.jsonl").write_text(
    '{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 1e-7}\n{"st'
  )
  process = sweep(["add(a=1)", "add(a=3)"], "--gather_only")
  assert process.returncode == 0, process.stderr
  rows = [x.split() for x in process.stdout.splitlines()]
  assert rows[:4] == [
    ["a", "1", "3"],
    ["state", "finished", "not", "started"],
    ["step", "2"],
    ["train/loss", "1e-07"],
  ]
  assert not (sweep.out / "a=3").exists()
  line = error_of(sweep(["add(a=1)"], "--gather_only", "--curve=x"))
  assert "'x'" in line and "--curve" in line
