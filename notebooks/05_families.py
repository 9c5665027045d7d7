# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Families: other ways from captions to pictures
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/05_families.ipynb)
#
# The systems that unCLIP is compared with, trained by the same loop on the same
# emoji: DALL-E, its encoder-decoder, a transformer over a VQGAN's codes, GLIDE,
# a GAN, a conditional VAE, a VAE-GAN, and MaskGIT after masked modelling.
# `configs/baselines/README.md` says where each was published and how ours
# differ.
#
# `FAMILIES` is a folder that `python launch/families.py --out FAMILIES` has
# left: each family trained for the same time. Where there is none, one of them
# is trained on the spot for two steps, and every figure is then that of an
# untrained model.

# %%
import os
import pathlib
import sys

FAMILIES = os.environ.get("UNCLIP_NOTEBOOK_FAMILIES", "runs/families")

if "google.colab" in sys.modules:
  # !git clone -q https://github.com/unclip-jax/unclip_jax
  # %cd unclip_jax
  # !pip install -q -e .
  pass

# The repository's root, wherever the notebook was started.
root = pathlib.Path.cwd()
while not (root / "configs").is_dir() and root != root.parent:
  root = root.parent
os.chdir(root)
sys.path.insert(0, str(root))

from notebooks import common

folder = pathlib.Path(common.families_folder(FAMILIES))
families = {path.name: str(path) for path in sorted(folder.glob("models/*"))}
list(families)

# %% [markdown]
# ## The same prompts, one row a family
#
# Any model that draws from captions by itself is a `TextToImagePipeline`;
# unCLIP, which takes several stages, is a `UnCLIPPipeline`. `pipelines.load`
# tells which, and both are called alike.

# %%
from unclip_jax import pipelines

models = {name: pipelines.load(folder) for name, folder in families.items()}
prompts = ["a frog", "a red apple", "a crescent moon", "a smiling face"]
common.show(
  {name: pipe(prompts, seed=1).images for name, pipe in models.items()},
  prompts,
)

# %% [markdown]
# ## The same figures for each
#
# By the protocol `comparison`, with one CLIP that none of them was trained with:
# is a picture found by its caption (`r1`, beside what the true pictures reach
# and beside chance), how like the true pictures are the drawn ones as a set
# (`fid`, in the CLIP's space: no figure that others publish), and how different
# are the pictures of one caption (`within`).

# %%
import json

report = json.loads((folder / "families.json").read_text())
common.table(report["rows"])

# %% [markdown]
# ## Inside DALL-E: who may look at whom
#
# DALL-E's transformer has layers of different sparse attention (Ramesh et al.
# 2021, figure 11). For one token of an 8 x 8 grid (white), what it may attend to
# (yellow) in each kind of layer; to the caption all of them do.

# %%
import matplotlib.pyplot as plt
import numpy as np

from unclip_jax.layers import sparse_masks

side, token = 8, 44
_, axes = plt.subplots(1, 4, figsize=(8, 2.3), layout="constrained")
for ax, kind in zip(axes, ("full", "row", "column", "convolution")):
  seen = sparse_masks.image_mask(kind, side, kernel_size=5)[token].astype(float)
  seen[token] = 2.0
  ax.imshow(seen.reshape(side, side), cmap="inferno")
  ax.set(title=kind, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A walk through a GAN's z
#
# From one draw to another, the caption fixed: what changes is what the caption
# leaves open.

# %%
import jax
import jax.numpy as jnp

if "gan" in models:
  gan = models["gan"].parts["generator"]
  ends = jax.random.normal(jax.random.key(0), (2, gan.task.model.latent_dim))
  steps = jnp.linspace(0.0, 1.0, 8)[:, None]
  z = (1 - steps) * ends[0] + steps * ends[1]
  z *= jnp.linalg.norm(ends[0]) / jnp.linalg.norm(z, axis=1, keepdims=True)
  batch = models["gan"].tokenize(["a frog"] * len(z))
  drawn = gan.task.sample(gan.variables, gan.frozen, batch, None, z=z)
  common.show({"a frog": np.asarray(drawn["image"] / 2 + 0.5)})
