"""Checkpoints: equality, damage, kills, other meshes, other models."""

import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import saved_trees
from unclip_jax import checkpoints, manifests
from unclip_jax.utils import trees
from unclip_jax.utils.errors import UserError


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "checkpoints"


def save_steps(directory, *steps, **options):
  checkpointer = checkpoints.Checkpointer(directory, **options)
  for step in steps:
    checkpointer.save(step, saved_trees.make_tree(step))
  checkpointer.close()
  return checkpointer


def files_of(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


class TestSaveAndRestore:
  def test_equal_in_every_leaf(self, directory):
    save_steps(directory, 1, 2)
    template = jax.tree.map(jnp.zeros_like, saved_trees.make_tree(0)["state"])
    tables = saved_trees.make_tree(0)["tables"]
    step, tree = checkpoints.Checkpointer(directory).restore(
      {"state": template, "tables": tables}
    )
    assert step == 2
    saved_trees.assert_same(tree, saved_trees.make_tree(2))
    assert isinstance(tree["state"].params["scale"], jax.Array)
    assert isinstance(tree["tables"]["ids"], np.ndarray)

  def test_abstract_template(self, directory):
    save_steps(directory, 3)
    state = jax.eval_shape(lambda: saved_trees.make_tree(0)["state"])
    template = {"state": state, "tables": saved_trees.make_tree(0)["tables"]}
    _, tree = checkpoints.Checkpointer(directory).restore(template)
    saved_trees.assert_same(tree, saved_trees.make_tree(3))

  def test_nothing_saved(self, directory, warnings):
    assert (
      checkpoints.Checkpointer(directory).restore(saved_trees.make_tree())
      is None
    )
    assert warnings == []

  def test_donated_and_overwritten_leaves(self, directory):
    """What is saved is what was there when `save` was called."""
    update = jax.jit(
      lambda t: jax.tree.map(lambda x: x * 2 + 1, t), donate_argnums=0
    )
    device = {"w": jnp.arange(2.0**20), "n": jnp.int32(1)}
    host = {"table": np.arange(2**16)}
    checkpointer = checkpoints.Checkpointer(directory, keep=9)
    expected = {}
    for step in range(4):
      expected[step] = jax.tree.map(np.array, {**device, **host})
      checkpointer.save(step, {**device, **host})
      device = update(device)
      host["table"] += 1
    checkpointer.close()
    for step in range(4):
      _, flat = checkpointer.restore_flat(step)
      saved_trees.assert_same(flat, expected[step])

  def test_keeps_the_newest_and_every_nth(self, directory):
    checkpointer = save_steps(directory, *range(1, 8), keep=2, keep_every=3)
    assert checkpointer.steps() == [3, 6, 7]
    names = sorted(p.name for p in directory.iterdir())
    assert names == ["00000003", "00000006", "00000007"]

  def test_saving_a_step_twice_keeps_the_first(self, directory):
    checkpointer = save_steps(directory, 1)
    checkpointer.save(1, saved_trees.make_tree(5))
    _, flat = checkpointer.restore_flat()
    assert flat["state.step"] == 1

  def test_restore_flat_by_name(self, directory):
    checkpointer = save_steps(directory, 1, 2)
    step, flat = checkpointer.restore_flat(
      1, r"^state\.params\.|\.ids$|\.none$"
    )
    assert step == 1
    assert set(flat) == {
      "state.params.dense.kernel",
      "state.params.dense.bias",
      "state.params.scale",
      "tables.ids",
      "tables.none",
    }
    want = trees.flatten(saved_trees.make_tree(1))
    for name, leaf in flat.items():
      assert type(leaf) is np.ndarray and leaf.dtype == want[name].dtype
      np.testing.assert_array_equal(leaf, np.asarray(want[name]))

  def test_restore_flat_of_a_missing_step(self, directory):
    with pytest.raises(UserError, match="no whole checkpoint"):
      checkpoints.Checkpointer(directory).restore_flat()
    with pytest.raises(UserError, match="step 7, there are: 1"):
      save_steps(directory, 1).restore_flat(7)

  def test_unwritable_folder_is_an_error_of_wait(self, directory, monkeypatch):
    def full(*_):
      raise OSError("No space left on device")

    save_steps(directory, 1)
    monkeypatch.setattr(checkpoints.files, "write_atomically", full)
    checkpointer = checkpoints.Checkpointer(directory)
    checkpointer.save(2, saved_trees.make_tree(2))
    with pytest.raises(UserError, match=r"step 2 .* No space left"):
      checkpointer.wait()
    assert checkpointer.steps() == [1]


class TestOtherModel:
  """A wrong config is the user's mistake, and no reason to set a step aside."""

  def _message(self, directory, template):
    save_steps(directory, 1, 2)
    with pytest.raises(UserError, match="does not fit this config") as e:
      checkpoints.Checkpointer(directory).restore(template)
    assert sorted(p.name for p in directory.iterdir()) == [
      "00000001",
      "00000002",
    ]
    return str(e.value)

  def test_shape(self, directory):
    message = self._message(directory, saved_trees.make_tree(width=6))
    assert "leaf 'state.params.dense.kernel'" in message
    assert "expected float32[8, 6], found float32[8, 5]" in message

  def test_dtype_is_never_cast(self, directory):
    tree = saved_trees.make_tree()
    params = {**tree["state"].params, "scale": jnp.bfloat16(1)}
    tree["state"] = tree["state"].replace(params=params)
    message = self._message(directory, tree)
    assert "leaf 'state.params.scale'" in message
    assert "expected bfloat16[], found float32[]" in message

  def test_missing(self, directory):
    tree = saved_trees.make_tree()
    tree["tables"]["more"] = np.zeros(3)
    message = self._message(directory, tree)
    assert "'tables.more': expected float64[3], found no such leaf" in message

  def test_left_over(self, directory):
    message = self._message(directory, saved_trees.make_tree(ema=False))
    assert "'state.ema_params.dense.bias': expected no such leaf" in message


class TestDamage:
  def _restore(self, directory, **options):
    checkpointer = checkpoints.Checkpointer(directory, **options)
    return checkpointer.restore(saved_trees.make_tree())

  def _assert_previous_is_used(self, directory, warnings):
    step, tree = self._restore(directory)
    assert step == 1
    saved_trees.assert_same(tree, saved_trees.make_tree(1))
    assert not (directory / "00000002").exists()
    assert (directory / "00000002.corrupt-1").is_dir()
    (warning,) = warnings
    print(warning)
    assert re.search(r"leaf '|file ", warning), warning

  def test_twenty_flipped_bits(self, directory, warnings):
    """Of any file of the newest step, the manifest included."""
    save_steps(directory, 1, 2)
    rng = np.random.default_rng(0)
    folder, aside = directory / "00000002", directory / "00000002.corrupt-1"
    paths = [p for p in files_of(folder) if p.stat().st_size]
    noticed = 0
    for i in range(20):
      # Every file gets its turn, at a random place.
      path = paths[i % len(paths)]
      bit = int(rng.integers(8 * path.stat().st_size))
      saved_trees.flip_bit(path, bit)
      self._assert_previous_is_used(directory, warnings)
      noticed += 1
      warnings.clear()
      aside.rename(folder)
      saved_trees.flip_bit(path, bit)
    assert noticed == 20
    assert len(paths) > 5
    step, _ = self._restore(directory)  # the flips were all undone
    assert step == 2 and warnings == []

  def test_flipped_bit_of_a_leaf_names_it(self, directory, warnings):
    """Leaves large enough to lie in a file of their own bytes."""
    rng = np.random.default_rng(0)
    leaves = {n: rng.normal(size=(64, 64)) for n in ("a.x", "b.y", "c.z")}
    checkpointer = checkpoints.Checkpointer(directory)
    checkpointer.save(1, leaves)
    checkpointer.save(2, leaves)
    checkpointer.close()
    path = max(files_of(directory / "00000002"), key=lambda p: p.stat().st_size)
    saved_trees.flip_bit(path, 4 * path.stat().st_size)
    step, _ = checkpointer.restore(leaves)
    assert step == 1
    assert re.search(r"leaf '(a\.x|b\.y|c\.z)' has changed", warnings[0])

  def test_leaf_that_was_written_wrongly(self, directory, warnings):
    """Files intact, contents not: the checksum was taken on the device."""
    save_steps(directory, 1, 2)
    path = directory / "00000002" / "manifest.json"
    manifest = manifests.read(path.parent)
    manifest["leaves"]["state.params.scale"][2] = 16 * "0"
    path.write_text(manifests.seal(manifest))
    self._assert_previous_is_used(directory, warnings)
    assert "leaf 'state.params.scale' has changed" in warnings[0]

  @pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "folder"])
  def test_files_cut_or_gone(self, directory, warnings, damage):
    save_steps(directory, 1, 2)
    folder = directory / "00000002"
    path = max(
      (p for p in files_of(folder / "state")), key=lambda p: p.stat().st_size
    )
    if damage == "truncate":
      path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
      path.write_bytes(b"")
    elif damage == "delete":
      path.unlink()
    else:
      for path in files_of(folder / "state"):
        path.unlink()
    self._assert_previous_is_used(directory, warnings)
    said = {"truncate": "bytes, not", "empty": "has 0 bytes"}
    assert said.get(damage, "is missing") in warnings[0]

  @pytest.mark.parametrize("text", ["", "{}", "[1]", "garbage", "\0\xff"])
  def test_garbage_manifest(self, directory, warnings, text):
    save_steps(directory, 1, 2)
    (directory / "00000002" / "manifest.json").write_text(text)
    self._assert_previous_is_used(directory, warnings)
    assert "manifest.json" in warnings[0]

  def test_manifest_that_still_reads(self, directory, warnings):
    """A changed blank is a changed manifest: it may not be the only one."""
    save_steps(directory, 1, 2)
    path = directory / "00000002" / "manifest.json"
    path.write_text(path.read_text().replace("\n ", "\n\t", 1))
    self._assert_previous_is_used(directory, warnings)
    assert "manifest.json has changed" in warnings[0]

  def test_empty_folder_is_no_step(self, directory):
    save_steps(directory, 1)
    (directory / "00000002").mkdir()
    step, _ = self._restore(directory)
    assert step == 1

  def test_a_second_bad_copy_gets_another_name(self, directory, warnings):
    save_steps(directory, 1, 2)
    (directory / "00000002.corrupt-1").mkdir()
    (directory / "00000002" / "manifest.json").write_text("")
    assert self._restore(directory)[0] == 1
    assert (directory / "00000002.corrupt-2" / "manifest.json").exists()

  def test_strict(self, directory):
    save_steps(directory, 1, 2)
    (directory / "00000002" / "manifest.json").write_text("")
    with pytest.raises(UserError, match=r"00000002 is damaged.*manifest"):
      self._restore(directory, strict=True)
    assert checkpoints.Checkpointer(directory).steps() == [1, 2]

  def test_all_damaged(self, directory, warnings):
    save_steps(directory, 1, 2)
    for name in ("00000001", "00000002"):
      (directory / name / "manifest.json").write_text("")
    for _ in range(2):  # also at the next start: never anew without a word
      with pytest.raises(UserError, match=r"00000001\.corr.*00000002\.corr"):
        self._restore(directory)

  def test_restore_flat_moves_nothing(self, directory, warnings):
    checkpointer = save_steps(directory, 1, 2)
    saved_trees.flip_bit(files_of(directory / "00000002" / "state")[0], 0)
    step, _ = checkpointer.restore_flat()
    assert step == 1 and len(warnings) == 1
    assert checkpointer.steps() == [1, 2]
    with pytest.raises(UserError, match="00000002"):
      checkpointer.restore_flat(2)

  def test_failure_to_load_intact_files_is_no_damage(
    self, directory, monkeypatch
  ):
    save_steps(directory, 1, 2)

    def no_memory(*_):
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(checkpoints.ocp, "load", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
      self._restore(directory)
    assert checkpoints.Checkpointer(directory).steps() == [1, 2]


_KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from unclip_jax import checkpoints

def kill(*_):
  os.kill(os.getpid(), signal.SIGKILL)

directory, where = sys.argv[1:]
checkpointer = checkpoints.Checkpointer(directory, keep=1)
checkpointer.save(1, {"w": jnp.zeros(2**18)})
checkpointer.wait()
if where == "hash":
  checkpoints.manifests.hash_files = kill
if where == "manifest":
  checkpoints.files.write_atomically = kill
if where == "delete":
  checkpoints.shutil.rmtree = kill
checkpointer.save(2, {"w": jnp.ones(2**18)})
while where == "orbax" and not list(pathlib.Path(directory).glob("00000002*")):
  pass
if where == "orbax":
  kill()
checkpointer.wait()
"""


@pytest.mark.parametrize(
  "where, newest",
  [("orbax", 1), ("hash", 1), ("manifest", 1), ("delete", 2)],
)
def test_killed_while_saving(directory, warnings, where, newest):
  killed = subprocess.run(
    [sys.executable, "-c", _KILLED, str(directory), where],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  assert len(list(directory.iterdir())) == 2  # there is something to clean
  checkpointer = checkpoints.Checkpointer(directory)
  checkpointer.clean_incomplete()
  assert [p.name for p in directory.iterdir()] == [f"{newest:08d}"]
  step, tree = checkpointer.restore({"w": jnp.zeros(2**18)})
  assert step == newest
  np.testing.assert_array_equal(tree["w"], float(newest - 1))
  assert warnings == []


def test_clean_incomplete_leaves_the_rest(directory):
  checkpointer = save_steps(directory, 1)
  for name in ("00000002", "00000003.orbax-checkpoint-tmp", "notes"):
    (directory / name).mkdir()
  (directory / "00000001.corrupt-1").mkdir()
  checkpointer.clean_incomplete()
  names = sorted(p.name for p in directory.iterdir())
  assert names == ["00000001", "00000001.corrupt-1", "notes"]


_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from unclip_jax import checkpoints

assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
specs = {"a": P("data", "fsdp"), "b": P(None, "fsdp"), "c": P(), "d": P("data")}
dtypes = {"a": "float32", "b": "bfloat16", "c": "int32", "d": "uint8"}
tree = {
  n: jax.device_put(
    np.arange(128).reshape(8, 16).astype(jnp.dtype(dtypes[n])),
    NamedSharding(mesh, specs[n]),
  )
  for n in specs
}
checkpointer = checkpoints.Checkpointer(sys.argv[1])
checkpointer.save(1, tree)
checkpointer.close()
step, back = checkpointer.restore(jax.tree.map(jnp.zeros_like, tree))
for name in tree:
  assert back[name].sharding.is_equivalent_to(tree[name].sharding, 2), name
  np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(tree[name]))
"""


def test_eight_devices_to_one(directory, run_python):
  run_python("-c", _EIGHT_DEVICES, directory, devices=8)
  dtypes = {"a": "float32", "b": "bfloat16", "c": "int32", "d": "uint8"}
  want = {
    name: np.arange(128).reshape(8, 16).astype(jnp.dtype(dtype))
    for name, dtype in dtypes.items()
  }
  checkpointer = checkpoints.Checkpointer(directory, strict=True)
  step, tree = checkpointer.restore(jax.tree.map(jnp.zeros_like, want))
  assert step == 1
  saved_trees.assert_same(tree, want)
  assert len(tree["a"].devices()) == 1
