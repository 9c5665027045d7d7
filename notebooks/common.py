"""What the notebooks share: models to look at, pictures side by side, tables."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from IPython import display

from unclip_jax.protocols import base as protocols

# In the pipeline's order; a model need not have all of them.
PARTS = (
  *("clip", "prior", "decoder"),
  *("upsampler_64", "upsampler_256", "upsampler_1024"),
)

# One family, untrained, of which no figure says anything.
SMOKE_FAMILIES = ("--size=smoke", "--only=^gan$", "--num_images=20")


def folders(models: str, size: str = "smoke") -> dict[str, str]:
  """The parts of a model: name -> folder, in the pipeline's order.

  Args:
    models: a folder with runs, such as `make quickstart` leaves, or a model
      folder. Where it holds neither, launch/quickstart.py trains all stages in
      runs/notebook_SIZE, once for all notebooks.
    size: "smoke", two steps a stage, or "quick", as `make quickstart`.
  """
  if not os.path.isdir(os.path.join(models, "decoder")):
    out = os.path.join("runs", f"notebook_{size}")
    print(f"no model in {models}: taking that in {out}")
    if not os.path.isfile(os.path.join(out, "report.json")):  # its last file
      command = ["launch/quickstart.py", f"--size={size}", f"--out={out}"]
      subprocess.run([sys.executable, *command], check=True)
    models = out
  found = {name: os.path.join(models, name) for name in PARTS}
  return {name: path for name, path in found.items() if os.path.isdir(path)}


def families_folder(folder: str) -> str:
  """A folder that launch/families.py has left; else one that it makes.

  Args:
    folder: where there is none, one family is trained for two steps in
      runs/notebook_families, once.
  """
  if not os.path.isfile(os.path.join(folder, "families.json")):
    out = os.path.join("runs", "notebook_families")
    print(f"no families in {folder}: taking those in {out}")
    folder = out
  if not os.path.isfile(os.path.join(folder, "families.json")):
    command = ["launch/families.py", f"--out={folder}", *SMOKE_FAMILIES]
    subprocess.run([sys.executable, *command], check=True)
  return folder


def show(
  rows: Mapping[str, Sequence[Any]],
  titles: Sequence[str] = (),
  side: float = 1.3,
) -> None:
  """Draws pictures in labelled rows.

  Args:
    rows: label -> PIL pictures or arrays [H, W, 3] in [0, 1].
    titles: of the columns.
    side: of a picture, in inches.
  """
  columns = max(len(pictures) for pictures in rows.values())
  titles = [textwrap.fill(title, 16) for title in titles]
  lines = max([title.count("\n") + 1 for title in titles], default=0)
  _, axes = plt.subplots(
    len(rows),
    columns,
    figsize=(side * columns + 0.5, side * len(rows) + 0.16 * lines),
    squeeze=False,
    layout="constrained",
  )
  for ax in axes.ravel():
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
  for row, (label, pictures) in zip(axes, rows.items()):
    row[0].set_ylabel(textwrap.fill(label, 14), fontsize=9)
    for ax, picture in zip(row, pictures):
      ax.imshow(picture)
  for ax, title in zip(axes[0], titles):
    ax.set_title(title, fontsize=8)
  plt.show()


def table(rows: Sequence[protocols.Row]) -> display.Markdown:
  """Rows of numbers and words, as a notebook shows them."""
  return display.Markdown(protocols.table(rows))
