r"""Trains on TPU slices of a GKE cluster, through xpk.

  python launch/gke.py --name my-run --cluster C --type v5litepod-256 \
    --zone us-west4-a --project P -- \
    --config configs/paper/decoder.py --workdir /tmp/BUCKET/my-run

`--action create` sends the job off, `list` says how it does, `delete` ends it.
The cluster is there already (`xpk cluster create`). Where nodes are taken away,
the job is started again, up to --max_restarts times, and goes on where it last
saved.

Without --docker_image, xpk adds the source tree to --base_docker_image, and the
job installs it when it starts; an image that holds the project installed starts
sooner. The options are those of xpk 1 (github.com/AI-Hypercomputer/xpk).
"""

from __future__ import annotations

import pathlib
import shlex
import sys

from absl import flags

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import jobs

NAME = flags.DEFINE_string("name", None, "Of the workload.", required=True)
CLUSTER = flags.DEFINE_string("cluster", None, "Of GKE.", required=True)
TYPE = flags.DEFINE_string(
  "type", None, "Accelerator type, v5litepod-256; create needs it."
)
ZONE = flags.DEFINE_string("zone", None, "us-west4-a.", required=True)
PROJECT = flags.DEFINE_string(
  "project", None, "Of Google Cloud.", required=True
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of this type.", 1)
MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 10, "How often the job may be started again.", 0
)
DOCKER_IMAGE = flags.DEFINE_string(
  "docker_image", None, "An image that holds the project, installed."
)
BASE_DOCKER_IMAGE = flags.DEFINE_string(
  "base_docker_image", "python:3.11", "An image with Python and pip."
)
ACTION = flags.DEFINE_enum(
  "action", "create", ["create", "list", "delete"], "What to do."
)
flags.adopt_module_key_flags(jobs)

# A checkpoint must be written between SIGTERM and the end.
_GRACE_SECONDS = 120
# A training that SIGTERM stopped has saved and ends with 0, which would count
# as done. 143 is what SIGTERM leaves by itself, and has the job started again.
_UNTIL_STOPPED = (
  "trap 'stopped=1; kill -TERM $!' TERM; {} & wait $!; code=$?;"
  ' if [ -n "${{stopped:-}}" ]; then wait $!; code=143; fi; exit $code'
)


def xpk(verb: str, *arguments: str) -> list[str]:
  """`xpk workload VERB ...` on the cluster."""
  return [
    *("xpk", "workload", verb, f"--cluster={CLUSTER.value}"),
    f"--zone={ZONE.value}",
    f"--project={PROJECT.value}",
    *arguments,
  ]


def create_commands(arguments: list[str]) -> list[list[str]]:
  generation = jobs.tpu_generation(TYPE.value or "")
  variables = jobs.environment(generation, arguments)
  train = shlex.join(
    jobs.with_env(variables, ["unclip", "train", *arguments, "--distributed"])
  )
  if DOCKER_IMAGE.value:
    install, before = "", []
    image = [f"--docker-image={DOCKER_IMAGE.value}"]
  else:
    build = jobs.ROOT / "build"
    archive, source = build / f"{NAME.value}.tar.gz", build / NAME.value
    before = [
      *jobs.archive_commands(archive),
      ["rm", "-rf", str(source)],
      ["mkdir", str(source)],
      ["tar", "-xzf", str(archive), "-C", str(source)],
    ]
    image = [
      f"--base-docker-image={BASE_DOCKER_IMAGE.value}",
      f"--script-dir={source}",
    ]
    install = "pip install --quiet -c constraints.txt -e '.[tpu]' || exit 1; "
  create = xpk(
    "create",
    f"--workload={NAME.value}",
    f"--tpu-type={TYPE.value}",
    f"--num-slices={NUM_SLICES.value}",
    f"--max-restarts={MAX_RESTARTS.value}",
    f"--termination-grace-period-seconds={_GRACE_SECONDS}",
    *image,
    f"--command={install}{_UNTIL_STOPPED.format(train)}",
  )
  return [*before, create]


def main(arguments: list[str]) -> None:
  jobs.check_name(NAME.value)
  if ACTION.value == "create":
    commands = create_commands(arguments)
    jobs.require("xpk")  # before anything is packed
    jobs.execute(commands)
  elif ACTION.value == "list":
    jobs.execute([xpk("list", f"--filter-by-job={NAME.value}")])
  else:
    jobs.execute([xpk("delete", f"--workload={NAME.value}", "--force")])


if __name__ == "__main__":
  jobs.run(main)
