"""A run's folder: its lock, and the config that it goes on with."""

import pathlib
import subprocess
import sys
import textwrap

import ml_collections
import pytest

from unclip_jax import run_folder
from unclip_jax.utils.errors import UserError


def test_lock_names_the_holder(tmp_path):
  script = textwrap.dedent("""
    import sys, time
    from unclip_jax import run_folder
    with run_folder.lock(sys.argv[1]):
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
      run_folder.lock(tmp_path),
    ):
      pass
  finally:
    other.kill()
    other.wait()
  with run_folder.lock(tmp_path):  # it went with its process
    pass
  with run_folder.lock(tmp_path):
    pass


def test_config(tmp_path, warnings):
  config = ml_collections.ConfigDict(
    {"optim": {"lr": 0.1, "betas": [1, 2]}, "mesh": {"fsdp": 4}}
  )
  run_folder.check_config(tmp_path, config)  # a new run
  run_folder.save_config(tmp_path, config)
  config.mesh.fsdp = 1  # where it runs is no matter
  run_folder.check_config(tmp_path, config)
  assert run_folder.load_config(tmp_path).optim.betas == (1, 2)
  config.optim.lr = 0.2
  with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2.*allow"):
    run_folder.check_config(tmp_path, config)
  assert warnings == []
  run_folder.check_config(tmp_path, config, allow_change=True)
  assert "optim.lr: 0.1 -> 0.2" in warnings[0]


def test_no_or_bad_config(tmp_path):
  with pytest.raises(UserError, match=r"no .*config\.json"):
    run_folder.load_config(tmp_path)
  (tmp_path / "config.json").write_bytes(b"\xff{")
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    run_folder.load_config(tmp_path)
