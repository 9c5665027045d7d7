"""Every notebook runs from top to bottom at smoke size."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def test_there_are_notebooks_each_with_its_source():
  assert NOTEBOOKS
  for path in NOTEBOOKS:
    assert path.with_suffix(".py").exists(), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
  env = {
    **os.environ,
    "UNCLIP_NOTEBOOK_SIZE": "smoke",
    "UNCLIP_NOTEBOOK_OUT": str(tmp_path),
  }
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "--nbmake",
      "--nbmake-timeout=600",
      "-p",
      "no:xdist",
      "-c",
      os.devnull,
      "--noconftest",
      str(path),
    ],
    env=env,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stdout[-3000:]
