"""Checkpoints: equality, damage, kills, other meshes, released models."""

import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from absl import logging

from unclip_jax import checkpoints
from unclip_jax.utils import trees
from unclip_jax.utils.errors import UserError


@flax.struct.dataclass
class State:
  """The fields of a training state."""

  step: jax.Array
  params: dict
  model_state: dict
  opt_state: optax.OptState
  ema_params: dict | None


def make_tree(seed=0, ema=True, width=5):
  rng = np.random.default_rng(seed)
  params = {
    "dense": {
      "kernel": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    },
    "scale": jnp.float32(rng.normal()),
  }
  tx = optax.multi_transform(
    {
      "adam": optax.adamw(optax.linear_schedule(1e-3, 0, 9)),
      "off": optax.sgd(0),
    },
    {"dense": "adam", "scale": "off"},
  )
  state = State(
    step=jnp.int32(seed),
    params=params,
    model_state={"batch_stats": {"mean": jnp.arange(3.0) + seed}},
    opt_state=tx.init(params),
    ema_params=jax.tree.map(lambda x: x + 1, params) if ema else None,
  )
  tables = {
    "space": {"mean": jnp.ones(4) * seed, "is_unit": jnp.asarray(True)},
    "ids": np.arange(6, dtype=np.int64) * 2**40,
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
  }
  return {"state": state, "tables": tables}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "checkpoints"


@pytest.fixture
def warnings(monkeypatch):
  seen = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: seen.append(text % args)
  )
  return seen


def save_steps(directory, *steps, **options):
  checkpointer = checkpoints.Checkpointer(directory, **options)
  for step in steps:
    checkpointer.save(step, make_tree(step))
  checkpointer.close()
  return checkpointer


def flip_bit(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def files_of(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


class TestChecksums:
  @pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "bool", "int64", "float16"]
  )
  def test_host_and_device_agree_and_every_bit_counts(self, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 5)).astype(jnp.dtype(dtype))

    def checksum(leaf):
      pending = checkpoints._start_checksums({"x": leaf})
      return checkpoints._finish_checksums(pending)["x"]

    if dtype != "int64":
      assert checksum(jnp.asarray(array)) == checksum(array)
    seen = {checksum(array)}
    bits = 1 if dtype == "bool" else 8
    for byte in range(array.nbytes):
      for bit in range(bits):
        other = array.copy()
        other.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
        seen.add(checksum(other))
    assert len(seen) == 1 + array.nbytes * bits

  def test_changes_that_cancel_in_plain_sums_show(self):
    base = np.arange(1, 101, dtype=np.float32)
    leaves = {name: base.copy() for name in ("base", "swap", "sign", "shift")}
    leaves["swap"][[3, 70]] = base[[70, 3]]
    leaves["sign"][[3, 70]] *= -1
    leaves["shift"] = np.roll(base, 1)
    pending = checkpoints._start_checksums(leaves)
    sums = checkpoints._finish_checksums(pending)
    for half in (slice(0, 8), slice(8, 16)):  # each sum by itself
      assert len({digits[half] for digits in sums.values()}) == len(leaves)


class TestSaveAndRestore:
  def test_equal_in_every_leaf(self, directory):
    save_steps(directory, 1, 2)
    template = jax.tree.map(jnp.zeros_like, make_tree(0)["state"])
    tables = make_tree(0)["tables"]
    step, tree = checkpoints.Checkpointer(directory).restore(
      {"state": template, "tables": tables}
    )
    assert step == 2
    assert_same(tree, make_tree(2))
    assert isinstance(tree["state"].params["scale"], jax.Array)
    assert isinstance(tree["tables"]["ids"], np.ndarray)

  def test_abstract_template(self, directory):
    save_steps(directory, 3)
    state = jax.eval_shape(lambda: make_tree(0)["state"])
    template = {"state": state, "tables": make_tree(0)["tables"]}
    _, tree = checkpoints.Checkpointer(directory).restore(template)
    assert_same(tree, make_tree(3))

  def test_nothing_saved(self, directory, warnings):
    assert checkpoints.Checkpointer(directory).restore(make_tree()) is None
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
      assert_same(flat, expected[step])

  def test_keeps_the_newest_and_every_nth(self, directory):
    checkpointer = save_steps(directory, *range(1, 8), keep=2, keep_every=3)
    assert checkpointer.steps() == [3, 6, 7]
    names = sorted(p.name for p in directory.iterdir())
    assert names == ["00000003", "00000006", "00000007"]

  def test_saving_a_step_twice_keeps_the_first(self, directory):
    checkpointer = save_steps(directory, 1)
    checkpointer.save(1, make_tree(5))
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
    want = trees.flatten(make_tree(1))
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
    checkpointer.save(2, make_tree(2))
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
    message = self._message(directory, make_tree(width=6))
    assert "leaf 'state.params.dense.kernel'" in message
    assert "expected float32[8, 6], found float32[8, 5]" in message

  def test_dtype_is_never_cast(self, directory):
    tree = make_tree()
    params = {**tree["state"].params, "scale": jnp.bfloat16(1)}
    tree["state"] = tree["state"].replace(params=params)
    message = self._message(directory, tree)
    assert "leaf 'state.params.scale'" in message
    assert "expected bfloat16[], found float32[]" in message

  def test_missing(self, directory):
    tree = make_tree()
    tree["tables"]["more"] = np.zeros(3)
    message = self._message(directory, tree)
    assert "'tables.more': expected float64[3], found no such leaf" in message

  def test_left_over(self, directory):
    message = self._message(directory, make_tree(ema=False))
    assert "'state.ema_params.dense.bias': expected no such leaf" in message


class TestDamage:
  def _restore(self, directory, **options):
    checkpointer = checkpoints.Checkpointer(directory, **options)
    return checkpointer.restore(make_tree())

  def _assert_previous_is_used(self, directory, warnings):
    step, tree = self._restore(directory)
    assert step == 1
    assert_same(tree, make_tree(1))
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
      flip_bit(path, bit)
      self._assert_previous_is_used(directory, warnings)
      noticed += 1
      warnings.clear()
      aside.rename(folder)
      flip_bit(path, bit)
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
    flip_bit(path, 4 * path.stat().st_size)
    step, _ = checkpointer.restore(leaves)
    assert step == 1
    assert re.search(r"leaf '(a\.x|b\.y|c\.z)' has changed", warnings[0])

  def test_leaf_that_was_written_wrongly(self, directory, warnings):
    """Files intact, contents not: the checksum was taken on the device."""
    save_steps(directory, 1, 2)
    path = directory / "00000002" / "manifest.json"
    manifest = checkpoints._read_manifest(path.parent)
    manifest["leaves"]["state.params.scale"][2] = 16 * "0"
    path.write_text(checkpoints._seal(manifest))
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
    flip_bit(files_of(directory / "00000002" / "state")[0], 0)
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
  checkpoints._hash_files = kill
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
  assert_same(tree, want)
  assert len(tree["a"].devices()) == 1


class TestWorkdir:
  def test_lock_names_the_holder(self, tmp_path):
    script = textwrap.dedent("""
      import sys, time
      from unclip_jax import checkpoints
      with checkpoints.workdir_lock(sys.argv[1]):
        print("locked", flush=True)
        time.sleep(100)
    """)
    other = subprocess.Popen(
      [sys.executable, "-c", script, str(tmp_path)],
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      assert other.stdout.readline() == "locked\n"
      with (
        pytest.raises(UserError, match=f"in use by the run {other.pid}@"),
        checkpoints.workdir_lock(tmp_path),
      ):
        pass
    finally:
      other.kill()
      other.wait()
    with checkpoints.workdir_lock(tmp_path):  # it went with its process
      pass
    with checkpoints.workdir_lock(tmp_path):
      pass

  def test_config(self, tmp_path, warnings):
    config = ml_collections.ConfigDict(
      {"optim": {"lr": 0.1, "betas": [1, 2]}, "mesh": {"fsdp": 4}}
    )
    checkpoints.check_config(tmp_path, config)  # a new run
    checkpoints.save_config(tmp_path, config)
    config.mesh.fsdp = 1  # where it runs is no matter
    checkpoints.check_config(tmp_path, config)
    assert checkpoints.load_config(tmp_path).optim.betas == (1, 2)
    config.optim.lr = 0.2
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2.*allow"):
      checkpoints.check_config(tmp_path, config)
    assert warnings == []
    checkpoints.check_config(tmp_path, config, allow_change=True)
    assert "optim.lr: 0.1 -> 0.2" in warnings[0]

  def test_no_or_bad_config(self, tmp_path):
    with pytest.raises(UserError, match=r"no .*config\.json"):
      checkpoints.load_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
      checkpoints.load_config(tmp_path)


class TestModels:
  @pytest.fixture
  def config(self):
    return ml_collections.ConfigDict({"model": {"width": 8}})

  def _run(self, workdir, config, **options):
    tree = make_tree(4, **options)
    checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
    checkpointer.save(4, tree)
    checkpointer.close()
    checkpoints.save_config(workdir, config)
    return tree

  @pytest.mark.parametrize("ema", [True, False])
  def test_run_and_its_model_folder(self, tmp_path, config, ema):
    tree = self._run(tmp_path / "run", config, ema=ema)
    run = checkpoints.load_model(tmp_path / "run")
    state = tree["state"]
    assert_same(
      run.variables,
      {
        "params": state.ema_params if ema else state.params,
        **state.model_state,
      },
    )
    assert run.config.to_dict() == config.to_dict()
    assert run.assets_dir == str(tmp_path / "run" / "assets")
    assert_same(run.tables, tree["tables"])

    asset = tmp_path / "some.model"
    asset.write_bytes(b"tokens")
    folder = tmp_path / "model"
    checkpoints.save_model(
      folder,
      run.config,
      run.variables,
      run.tables,
      {"tokenizer.model": asset},
    )
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]
    model = checkpoints.load_model(folder)
    assert_same(model.variables, run.variables)
    assert_same(model.tables, run.tables)
    assert model.config.to_dict() == run.config.to_dict()
    assert model.assets_dir == str(folder)
    assert (folder / "tokenizer.model").read_bytes() == b"tokens"
    assert model.fingerprint == run.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint)

  def test_only_needed_leaves_are_read(self, tmp_path, config, monkeypatch):
    self._run(tmp_path, config)
    asked = []
    load = checkpoints.ocp.load

    def spy(path, request):
      skip = checkpoints.ocp.PLACEHOLDER
      asked.extend(n for n, v in request.items() if v is not skip)
      return load(path, request)

    monkeypatch.setattr(checkpoints.ocp, "load", spy)
    checkpoints.load_model(tmp_path)
    groups = {".".join(n.split(".")[:2]) for n in asked if n[0] == "s"}
    assert groups == {"state.ema_params", "state.model_state"}

  def test_shapes_alone_read_no_leaf(self, tmp_path, config, monkeypatch):
    self._run(tmp_path / "run", config)
    run = checkpoints.load_model(tmp_path / "run")
    checkpoints.save_model(
      tmp_path / "model", config, run.variables, run.tables, {}
    )
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      (run.variables, run.tables),
    )
    monkeypatch.setattr(checkpoints.ocp, "load", None)
    monkeypatch.setattr(checkpoints.tensor_files._Reader, "__call__", None)
    for folder in ("run", "model"):
      model = checkpoints.load_model(tmp_path / folder, abstract=True)
      assert (model.variables, model.tables) == shapes
      assert model.fingerprint == ""

  def test_fingerprint_is_that_of_the_params(self):
    params = make_tree()["state"].params
    base = checkpoints.fingerprint({"params": params})
    assert checkpoints.fingerprint({"params": params, "stats": 1}) == base
    for change in (
      {"scale": params["scale"] + 1},
      {"scale": params["scale"].reshape(1)},
      {"scale": jnp.int32(0)},
      {"other": params["scale"]},
    ):
      changed = {"params": {**params, **change}}
      assert checkpoints.fingerprint(changed) != base

  def test_damaged_weights(self, tmp_path, config):
    variables = {"params": make_tree()["state"].params}
    checkpoints.save_model(tmp_path, config, variables, {}, {})
    path = tmp_path / "model.safetensors"
    flip_bit(path, 8 * path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"damaged.*fingerprint"):
      checkpoints.load_model(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="damaged"):
      checkpoints.load_model(tmp_path)

  def test_missing_things_are_said_in_one_line(self, tmp_path, config):
    for folder in (tmp_path / "nowhere", tmp_path):
      with pytest.raises(UserError, match=r"model\.safetensors.*checkpoints/"):
        checkpoints.load_model(folder)
    with pytest.raises(UserError, match=r"no file .*tokenizer"):
      checkpoints.save_model(
        tmp_path / "m", config, {"params": {}}, {}, {"t": "no/tokenizer"}
      )
    self._run(tmp_path, config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
      checkpoints.load_model(tmp_path)
