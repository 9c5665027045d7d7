"""Every notebook runs from top to bottom at smoke size, and has its source."""

import json
import os
import pathlib
import subprocess
import sys

import jupytext
import nbformat
import pytest
from PIL import Image

from notebooks import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICKSTART, *OTHERS, FAMILIES = sorted(ROOT.glob("notebooks/*.ipynb"))


def run(path, environment):
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
    env={**os.environ, "UNCLIP_NOTEBOOK_SIZE": "smoke", **environment},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stdout[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """The runs that the quickstart leaves, for all that look at models."""
  folder = tmp_path_factory.mktemp("models")
  run(QUICKSTART, {"UNCLIP_NOTEBOOK_OUT": str(folder)})
  return str(folder)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
  """What launch/families.py leaves: one family, and the CLIP that looks."""
  folder = tmp_path_factory.mktemp("families")
  command = ["launch/families.py", f"--out={folder}", *common.SMOKE_FAMILIES]
  process = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  return folder


@pytest.mark.slow
def test_families_are_compared(families):
  report = json.loads((families / "families.json").read_text())
  (row,) = report["rows"]
  assert row["family"] == "gan" and row["count"] == 6  # all that are held out
  assert row["parameters"] > 0 and row["seconds"] > 0 and row["minutes"] > 0
  assert row["chance_r1"] == 1 / 6
  with Image.open(families / "families.png") as sheet:
    # The true pictures and one row of drawn ones, 8 px doubled.
    assert sheet.height == 2 * 2 * (8 + 4)


def test_quickstart_runs(models):
  assert list(common.folders(models)) == [
    *("clip", "prior", "decoder", "upsampler_64"),
  ]
  assert (
    common.folders(f"{models}/model").keys() == common.folders(models).keys()
  )


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_notebook_runs(path, models):
  run(path, {"UNCLIP_NOTEBOOK_MODELS": models})


@pytest.mark.slow
def test_notebook_of_families_runs(families):
  run(FAMILIES, {"UNCLIP_NOTEBOOK_FAMILIES": str(families)})


@pytest.mark.parametrize(
  "path", [QUICKSTART, *OTHERS, FAMILIES], ids=lambda path: path.stem
)
def test_notebook_is_its_source_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  source = jupytext.read(path.with_suffix(".py"))
  for cell in notebook.cells:
    assert not cell.get("outputs") and not cell.get("execution_count")
  assert [(c.cell_type, c.source) for c in notebook.cells] == [
    (c.cell_type, c.source) for c in source.cells
  ], f"run: jupytext --to ipynb {path.with_suffix('.py').name}"
  assert f"/notebooks/{path.name})" in notebook.cells[0].source  # the badge


def test_without_a_model_one_is_trained_once(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  commands = []

  def train(command, check):
    commands.append(command[1:])
    out = pathlib.Path(command[-1].removeprefix("--out="))
    for name in ("decoder", "clip", "model"):
      (out / name).mkdir(parents=True)
    (out / "report.json").touch()

  monkeypatch.setattr(subprocess, "run", train)
  found = common.folders("none", "smoke")
  out = os.path.join("runs", "notebook_smoke")
  assert found == {name: f"{out}/{name}" for name in ("clip", "decoder")}
  assert commands == [["launch/quickstart.py", "--size=smoke", f"--out={out}"]]
  assert common.folders("none", "smoke") == common.folders(out) == found
  assert len(commands) == 1
