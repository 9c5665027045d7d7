"""Rules and tactics: what lies where, and what is refused."""

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from unclip_jax import partitioning, trainer
from unclip_jax.utils import axes, errors, trees
from unclip_jax.utils import config as config_lib

MESH = AbstractMesh((2, 4, 2), partitioning.AXES)


def spec(shape, tactic, mesh=MESH):
  return partitioning.param_specs({"a.w": shape}, [(".*", tactic)], mesh)["a.w"]


@pytest.mark.parametrize(
  "shape, tactic, expected",
  [
    ((8, 16), "replicate", P()),
    ((8, 16), "fsdp", P(None, "fsdp")),
    ((8, 6), "fsdp", P("fsdp", None)),
    ((6, 6), "fsdp", P()),
    ((8, 12), "data+fsdp", P(("data", "fsdp"), None)),
    ((4, 12), "data+fsdp", P()),
    ((8, 16), ("fsdp", "tensor"), P("fsdp", "tensor")),
    ((8, 15), ("fsdp", "tensor"), P("fsdp", None)),
    ((8, 16), (("tensor", "fsdp"),), P(("tensor", "fsdp"))),
    ((12, 16), (("tensor", "fsdp"),), P(None)),
    (
      (3, 3, 8, 16),
      (None, None, "fsdp", "tensor"),
      P(*(None,) * 2, "fsdp", "tensor"),
    ),
  ],
)
def test_tactics(shape, tactic, expected):
  assert spec(shape, tactic) == expected


def test_axes_of_one_device_split_nothing():
  mesh = AbstractMesh((8, 1, 1), partitioning.AXES)
  assert spec((8, 16), "fsdp", mesh) == P()
  assert spec((8, 16), ("fsdp", "tensor"), mesh) == P(None, None)


@pytest.mark.parametrize(
  "rules, message",
  [
    ([("^b", "fsdp")], r"no rule for parameter 'a\.w'"),
    ([(".*", "fdsp")], "'fdsp' of '.*' is neither"),
    ([(".*", ("fsdp", "model"))], "made of the mesh axes data, fsdp, tensor"),
    ([(".*",)], "is not a pair"),
  ],
)
def test_wrong_rules_are_user_errors(rules, message):
  with pytest.raises(errors.UserError, match=message) as e:
    partitioning.param_specs({"a.w": (8, 8)}, rules, MESH)
  assert "\n" not in str(e.value)


def test_moments_may_lie_apart_from_their_parameters():
  run = trainer.setup(config_lib.load("configs/emoji/clip.py:smoke"))
  state = trainer.step_shapes(run)[0]
  shardings = partitioning.state_shardings(
    state, [(".*", "replicate")], MESH, [(".*", "data+fsdp"), (".*", "fsdp")]
  )
  assert not any(any(s.spec) for s in jax.tree.leaves(shardings.params))
  kernel = "text.block_0.mlp.dense_1.kernel"
  for part in (shardings.ema_params, shardings.opt_state):
    found = [
      s.spec for k, s in trees.flatten(part).items() if k.endswith(kernel)
    ]
    assert found and all(any(spec) for spec in found)


def test_backends_are_checked():
  mesh = partitioning.make_mesh(dict(data=1))
  assert partitioning.make_backend("jit", mesh).axis_name is None
  assert partitioning.make_backend("pmap", mesh).axis_name
  with pytest.raises(errors.UserError, match="'pjit' is unknown"):
    partitioning.make_backend("pjit", mesh)
  with pytest.raises(errors.UserError, match="replicates parameters"):
    partitioning.make_backend("pmap", MESH)


def test_logical_axes_lie_where_they_divide():
  rules = axes.AxisRules(MESH, dict(batch=("data", "fsdp"), heads="tensor"))
  assert rules.mesh_axes("batch", 16) == ("data", "fsdp")
  assert rules.mesh_axes("batch", 12) == ()
  assert rules.mesh_axes("heads", 6) == ("tensor",)
  assert rules.mesh_axes("width", 6) == rules.mesh_axes(None, 6) == ()
  x = jax.numpy.ones((4, 2))
  assert axes.constrain(x, "batch", "width") is x  # on no mesh
