"""The same step on 8 simulated devices and on one gives the same result.

Runs in a process of its own, since the number of devices is fixed when jax
starts. SGD, because Adam turns rounding into whole steps.
"""

import json
import textwrap

import numpy as np
import pytest

PROGRAM = textwrap.dedent(
  """
  import json, sys
  import jax
  import numpy as np
  from tests import random_variables
  from unclip_jax import partitioning, trainer
  from unclip_jax.utils import config as config_lib, trees

  name, mesh, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
  parts = json.loads(sys.argv[4])
  config = config_lib.load(f"configs/emoji/{name}.py:smoke")
  config_lib.apply_overrides(config, {"optim.name": "sgd"})
  with config.unlocked():
    config.mesh = mesh
    config.optim.learning_rate = 0.1
    config.optim.warmup_steps = 0
    config.update(parts)
  assert len(jax.devices()) == int(np.prod(list(mesh.values())))
  run = trainer.setup(config)
  # In a fresh CLIP every picture has the same embedding, up to rounding.
  upstream = random_variables.like_tree(run.frozen)
  tables = run.task.prepare(upstream, run.data.eval_batches("train", 8, 16))
  frozen = jax.device_put(
    {**upstream, **tables}, partitioning.replicated(run.mesh)
  )
  template = trainer.state_shapes(run, frozen)
  shardings = jax.tree.map(lambda x: x.sharding, template)
  batches = run.data.train_batches(0, config.batch_size)
  first = next(batches)
  state = jax.jit(
    lambda rng, batch, frozen: trainer.init_state(
      run.task, run.tx, rng, batch, frozen
    ),
    out_shardings=shardings,
  )(jax.random.key(0), first, frozen)
  step = jax.jit(
    trainer.make_train_step(
      run.task,
      run.tx,
      ema_decay=0.9,
      num_microbatches=config.num_microbatches,
      sam=run.sam,
      mesh=run.mesh,
    ),
    out_shardings=(shardings, partitioning.replicated(run.mesh)),
  )
  losses = []
  batch = first
  for _ in range(2):
    placed = partitioning.to_global(batch, run.mesh)
    state, metrics = step(state, frozen, placed, jax.random.key(1))
    losses.append(float(metrics["loss"]))
    batch = next(batches)
  if mesh["fsdp"] > 1:
    leaves = jax.tree.leaves(state.params)
    assert any(not x.sharding.is_fully_replicated for x in leaves)
  np.savez(
    out,
    losses=losses,
    **{k: np.asarray(v) for k, v in trees.flatten(state.params).items()},
  )
  """
)
MESHES = {
  "one": dict(data=1, fsdp=1, tensor=1),
  "data": dict(data=8, fsdp=1, tensor=1),
  "hybrid": dict(data=2, fsdp=4, tensor=1),
}


CACHED = dict(batch_size=16, num_microbatches=2)
# Two replicas a device.
SAM = dict(batch_size=32, optim=dict(sam_rho=0.1, sam_replica_batch=2))


@pytest.mark.parametrize(
  "name, parts, mesh_names",
  [
    ("clip", {}, ("data", "hybrid")),
    ("clip", CACHED, ("data",)),
    ("clip", SAM, ("data", "hybrid")),
    ("prior", {}, ("data",)),
    ("decoder", {}, ("data", "hybrid")),
    ("upsampler", {}, ("data",)),
  ],
  ids=["clip", "clip-cached", "clip-sam", "prior", "decoder", "upsampler"],
)
def test_eight_devices_equal_one(name, parts, mesh_names, tmp_path, run_python):
  results = {}
  for mesh_name in ("one", *mesh_names):
    mesh = MESHES[mesh_name]
    out = tmp_path / f"{mesh_name}.npz"
    devices = int(np.prod(list(mesh.values())))
    args = (name, json.dumps(mesh), str(out), json.dumps(parts))
    run_python("-c", PROGRAM, *args, devices=devices)
    with np.load(out, allow_pickle=False) as arrays:
      results[mesh_name] = {k: arrays[k] for k in arrays.files}
  one = results.pop("one")
  assert abs(one["losses"][0] - one["losses"][1]) > 0
  for mesh_name, other in results.items():
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_allclose(
        other[key], one[key], rtol=1e-4, atol=2e-6, err_msg=f"{mesh_name} {key}"
      )
