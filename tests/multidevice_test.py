"""The same step on 8 simulated devices and on one gives the same result.

Each task in one process of its own, since the number of devices is fixed when
jax starts: on one device, then over every mesh and by both backends. SGD,
because Adam turns rounding into whole steps.
"""

import json
import textwrap

import numpy as np
import pytest

from unclip_jax.utils import config as config_lib

PROGRAM = textwrap.dedent(
  """
  import json, sys
  import jax
  import numpy as np
  from tests import random_variables
  from unclip_jax import partitioning, trainer
  from unclip_jax.utils import config as config_lib, trees

  name, out = sys.argv[1], sys.argv[4]
  cases, parts = map(json.loads, sys.argv[2:4])
  assert len(jax.devices()) == 8
  results = {}
  for case, changes in cases.items():
    path = name if "/" in name else f"emoji/{name}"
    config = config_lib.load(f"configs/{path}.py:smoke")
    config_lib.apply_overrides(config, {"optim.name": "sgd"})
    with config.unlocked():
      config.optim.learning_rate = 0.1
      config.optim.warmup_steps = 0
      config.update({**parts, **changes})
    sizes = dict(config.mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    run = trainer.setup(config, devices=devices)
    # In a fresh CLIP every picture has the same embedding, up to rounding.
    upstream = random_variables.like_tree(run.frozen)
    tables = run.task.prepare(upstream, run.data.eval_batches("train", 8, 16))
    frozen = {**upstream, **tables}
    frozen = jax.device_put(
      frozen,
      partitioning.frozen_shardings(frozen, config.sharding, run.mesh),
    )
    template = trainer.state_shapes(run, frozen)
    shardings = jax.tree.map(lambda x: x.sharding, template)
    batches = run.data.train_batches(0, config.batch_size)
    batch = next(batches)
    if case == "one":
      init = jax.jit(
        lambda rng, batch, frozen: trainer.init_state(
          run.task, run.tx, rng, batch, frozen
        )
      )
      start = jax.device_get(init(jax.random.key(0), batch, frozen))
    state = jax.device_put(start, shardings)
    whole = [x.is_fully_replicated for x in jax.tree.leaves(state.params)]
    assert all(whole) == (case in ("one", "data", "pmap", "zero1")), case
    whole = [x.is_fully_replicated for x in jax.tree.leaves(state.ema_params)]
    assert all(whole) == (case in ("one", "data", "pmap")), case
    step = run.backend.compile(run.train_step(), shardings)
    losses = []
    for _ in range(2):
      placed = run.backend.place(batch)
      state, metrics = step(state, frozen, placed, jax.random.key(1))
      losses.append(float(metrics["loss"]))
      batch = next(batches)
    results[f"{case}/losses"] = losses
    for part in ("params", "ema_params"):
      for k, v in trees.flatten(getattr(state, part)).items():
        results[f"{case}/{part}.{k}"] = np.asarray(v)
  np.savez(out, **results)
  """
)


def mesh(data, fsdp=1, tensor=1):
  return dict(mesh=dict(data=data, fsdp=fsdp, tensor=tensor))


CASES = {
  "one": mesh(1),
  "data": mesh(8),
  "fsdp": mesh(1, fsdp=8),
  "hybrid": mesh(2, fsdp=4),
  "tensor": mesh(2, fsdp=2, tensor=2),
  "zero1": dict(
    **mesh(2, fsdp=4),
    sharding=[[".*", "replicate"]],
    optimizer_sharding=[[".*", "data+fsdp"], [".*", "fsdp"]],
  ),
  "pmap": dict(**mesh(8), parallel="pmap"),
}


# Most networks take long to compile.
FEW = ("one", "hybrid", "tensor", "pmap")
SLOW = pytest.mark.slow
CACHED = dict(batch_size=16, num_microbatches=2)
# Attention, and half of the program to compile.
ONE_LEVEL = dict(model=dict(channel_mult=[1], attention_resolutions=[16]))
# Two replicas a device.
SAM = dict(batch_size=32, optim=dict(sam_rho=0.1, sam_replica_batch=2))
# A step of norm 0.01 for each player; a derivative of a derivative compiles
# long.
PLAYERS = dict(
  optim=dict(learning_rate=0.01, clip_norm=1.0, groups=[["^discr", {}]]),
  task=dict(gradient_penalty_weight=0.0, r1_weight=0.0),
)


@pytest.mark.parametrize(
  "name, parts, cases",
  [
    ("clip", {}, tuple(CASES)),
    ("clip", CACHED, ("one", "hybrid", "pmap")),
    ("clip", SAM, ("one", "hybrid", "pmap")),
    ("prior", {}, FEW),
    ("prior_ar", {}, ("one", "tensor")),
    ("decoder", ONE_LEVEL, FEW),
    ("upsampler", {}, FEW),
    pytest.param("baselines/gan", PLAYERS, ("one", "hybrid"), marks=SLOW),
    pytest.param("prior", {}, tuple(CASES), marks=SLOW),
    pytest.param("decoder", {}, tuple(CASES), marks=SLOW),
    pytest.param("upsampler", {}, tuple(CASES), marks=SLOW),
  ],
  ids=[
    *("clip", "clip-cached", "clip-sam"),
    *("prior", "prior_ar", "decoder", "upsampler"),
    *("gan", "prior-all", "decoder-all", "upsampler-all"),
  ],
)
def test_eight_devices_equal_one(name, parts, cases, tmp_path, run_python):
  out = tmp_path / "results.npz"
  changes = json.dumps({case: CASES[case] for case in cases})
  args = (name, changes, json.dumps(parts), str(out))
  run_python("-c", PROGRAM, *args, devices=8, timeout=600)
  results = {}
  with np.load(out, allow_pickle=False) as arrays:
    for key in arrays.files:
      case, _, array = key.partition("/")
      results.setdefault(case, {})[array] = arrays[key]
  one = results.pop("one")
  assert set(results) == set(cases) - {"one"}
  assert abs(one["losses"][0] - one["losses"][1]) > 0
  for case, other in results.items():
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_allclose(
        other[key], one[key], rtol=1e-4, atol=2e-6, err_msg=f"{case} {key}"
      )


def test_a_run_goes_on_on_fewer_devices(tmp_path, run_python):
  """Saved on 8, restored on 4 and on 1: the loss curve of one device."""
  evals = config_lib.load("configs/emoji/clip.py:smoke").evals

  def train(workdir, num_steps, data, fsdp):
    run_python(
      *("-m", "unclip_jax.train", "--config=configs/emoji/clip.py:smoke"),
      *(f"--workdir={workdir}", "--allow_config_change"),
      *("--config.optim.name=sgd", "--config.optim.learning_rate=0.1"),
      *("--config.optim.schedule=constant", "--config.optim.warmup_steps=0"),
      *(f"--config.evals.{name}={{}}" for name in evals),
      f"--config.num_steps={num_steps}",
      *(f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"),
      devices=data * fsdp,
    )

  def losses(workdir):
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").open()]
    return [row["train/loss"] for row in rows if "train/loss" in row]

  one, fewer = tmp_path / "one", tmp_path / "fewer"
  train(one, 6, data=1, fsdp=1)
  train(fewer, 2, data=2, fsdp=4)
  train(fewer, 4, data=1, fsdp=4)
  train(fewer, 6, data=1, fsdp=1)
  assert len(losses(one)) == 6
  np.testing.assert_allclose(losses(fewer), losses(one), rtol=1e-5)
