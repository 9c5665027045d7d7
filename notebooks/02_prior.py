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
# # 2. The prior: embeddings of pictures from captions
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/02_prior.ipynb)
#
# The prior draws the CLIP embedding of a picture, z_i, from a caption (Ramesh
# et al. 2022, section 2.2). A caption has many pictures, so this is a
# distribution; the caption's own embedding z_t is no substitute, though it
# lies in the same space (section 5.1). This notebook asks how near the drawn
# embeddings are to the true ones, and what the number of candidates and
# guidance change.
#
# `MODELS` is a folder with trained stages, such as `make quickstart` leaves in
# `runs/quickstart`, or a model folder. Where there is none, all stages are
# trained on the spot for all of these notebooks: with `SIZE = "smoke"` for two
# steps, in a minute, and every figure is then that of an untrained model; with
# `SIZE = "quick"` for a quarter of an hour.

# %%
import os
import pathlib
import sys

MODELS = os.environ.get("UNCLIP_NOTEBOOK_MODELS", "runs/quickstart")
SIZE = os.environ.get("UNCLIP_NOTEBOOK_SIZE", "smoke")

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

folders = common.folders(MODELS, SIZE)

# %% [markdown]
# ## Draw
#
# `pipe.predict_fns()["prior"]` draws for a batch, each row by a key of its
# own: the same caption at another `index` gives another draw. No picture can
# be seen yet, but the training pictures that are nearest to a drawn embedding
# can, as the CLIP sees them. The quickstart's prior has learned them by heart.

# %%
import matplotlib.pyplot as plt
import numpy as np

from unclip_jax import manipulations
from unclip_jax.metrics import similarity
from unclip_jax.pipelines import UnCLIPPipeline

names = ("clip", "prior", "decoder")  # nothing here is drawn in pixels
pipe = UnCLIPPipeline.from_parts({name: folders[name] for name in names})
data = pipe.data()
count = min(150, data.num_examples("train"))
batch = next(iter(data.eval_batches("train", 50)))
draw = pipe.predict_fns()["prior"]
drawn = draw(batch)
{name: x.shape for name, x in drawn.items()}

# %%
train_embeds = pipe.train_image_embeds(count)
pictures = np.concatenate(
  [b["clip_image"] for b in data.eval_batches("train", 50, count)]
)
unit = similarity.normalize(train_embeds)
some = np.arange(0, 48, 6)
nearest = np.argsort(-similarity.normalize(drawn["image_embed"][some]) @ unit.T)
captions = [data.example_info(i, "train")["captions"][0] for i in range(50)]
common.show(
  {
    "the caption's picture": pictures[some] / 2 + 0.5,
    "nearest to the drawn embedding": pictures[nearest[:, 0]] / 2 + 0.5,
    "second": pictures[nearest[:, 1]] / 2 + 0.5,
    "third": pictures[nearest[:, 2]] / 2 + 0.5,
  },
  [captions[i] for i in some],
)

# %% [markdown]
# Fifty draws for each of four captions, on the first two principal components
# of the training embeddings (grey). A star is the true embedding of the
# caption's picture: a prior that knows one picture of a caption draws near it,
# one that knows many spreads out.

# %%
mean, components = manipulations.fit_pca(train_embeds)
figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
parts = (train_embeds - mean) @ components[:2].T
axes.scatter(*parts.T, s=8, color="lightgrey")
for colour, i in enumerate(some[:4]):
  same = {
    name: np.repeat(x[i : i + 1], 50, axis=0) for name, x in batch.items()
  }
  many = draw({**same, "index": np.arange(50)})
  parts = (many["image_embed"] - mean) @ components[:2].T
  axes.scatter(*parts.T, s=14, alpha=0.6, color=f"C{colour}", label=captions[i])
  true = (many["true_image_embed"][0] - mean) @ components[:2].T
  axes.plot(*true, "*", color=f"C{colour}", markersize=16, markeredgecolor="k")
axes.set(xlabel="component 1", ylabel="component 2")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## How near, and does choosing help?
#
# The protocol `prior_report` (`unclip evaluate --protocol prior_report`): the
# cosine of drawn to true embeddings, beside that of the same draws to the
# pictures of other captions, and that of z_t to the true ones, which is what a
# prior has to beat. The paper draws two candidates and keeps the one with the
# larger product with z_t (section 2.2).

# %%
from unclip_jax import features
from unclip_jax.protocols import base as protocols
from unclip_jax.protocols import prior_report

subject = protocols.Subject(
  pipe, data, "train", features.of(pipe.parts["clip"]).beside, batch_size=50
)
report = prior_report.Protocol(count, num_candidates=(1, 2, 4)).run(subject)
common.table(report.rows)

# %% [markdown]
# ## Guidance
#
# In training one caption in ten is dropped, so that the prior can be guided as
# the decoder can (section 2.2). The paper found guiding the prior to hurt
# (section 5.5); Karlo does it with a scale of 4. Beside the cosine, look at
# the length of what is drawn, and at how often the nearest true embedding is
# the caption's own (`r1`).

# %%
from unclip_jax.evaluators import prior_report as evaluator

rows = []
for scale in (1.0, 2.0, 4.0):
  guided = subject.predict("prior", prior=dict(guidance_scale=scale))
  found = evaluator.Evaluator(count).run(guided, subject.batches(count), None)
  rows.append({"guidance_scale": scale, **dict(found)})
common.table(rows)

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, label in (
  ("cosine", "drawn and true"),
  ("cosine_text", "caption and true"),
  ("cosine_shuffled", "drawn and another's"),
):
  scales = [row["guidance_scale"] for row in rows]
  axes.plot(scales, [row[name] for row in rows], "o-", label=label)
axes.set(xlabel="guidance scale", ylabel="cosine", xticks=scales)
axes.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Loss by timestep
#
# A diffusion prior predicts the embedding itself from a noised one, with a
# plain squared error (eq. 2). With little noise that is copying; with nothing
# but noise, at the last timesteps, all that it knows comes from the caption. A
# loss of 1 there, the variance of the standardised embeddings, means that the
# caption says nothing to it.

# %%
losses = report.figures.get("loss_by_timestep", {})
if losses:  # an autoregressive prior has no timesteps
  figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
  axes.plot([int(t) for t in losses], list(losses.values()), "o-")
  axes.axhline(1.0, color="grey", linestyle=":", label="knowing nothing")
  axes.set(xlabel="timestep (0: least noise)", ylabel="loss")
  axes.set_ylim(bottom=0)
  axes.legend(loc="center right")
  plt.show()

# %% [markdown]
# ## The autoregressive prior
#
# The paper has two priors and prefers diffusion for its cost. The other turns
# z_i into codes by PCA and predicts them one by one, after a token for the
# product of z_i and z_t. Here they are two configs, and nothing else changes:
#
# ```
# unclip train --config configs/emoji/prior_ar.py --workdir runs/ar/prior \
#   --config.frozen.clip.path=runs/quickstart/clip
# ```
#
# Its run takes the place of the other (`folders["prior"] = "runs/ar/prior"`),
# and all of the above is about it, but for the loss by timestep.

# %%
from unclip_jax.utils import config as config_lib

for name in ("prior", "prior_ar"):
  config = config_lib.load(f"configs/emoji/{name}.py")
  print(config.task_name, *config.task.sample_options.items(), sep="\n  ")
