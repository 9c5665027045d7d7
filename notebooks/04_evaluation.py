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
# # 4. Evaluation: figures, and what they are worth
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/04_evaluation.ipynb)
#
# An evaluator measures one predict function; a protocol is an experiment on a
# whole model (`unclip_jax/protocols/`). All of what follows is one command as
# well, `unclip evaluate --model runs/quickstart/model --protocol NAME`, which
# writes JSON, a table and plots. Here the numbers of pictures are small enough
# for a laptop, and the last section shows what that does to them.
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
# ## What is looked at, and with what
#
# The pictures are compared in the features of a network beside the model. Here
# it is the model's own CLIP, which its pictures please by construction, and
# figures say something beside each other only. For figures that others can
# read, load an Inception (`unclip convert --from inception`) and another CLIP
# by `features.load`.
#
# The upsampler is left out, since most of the time goes into it: what is
# measured is the decoder.

# %%
import matplotlib.pyplot as plt
import numpy as np

from unclip_jax import features
from unclip_jax.pipelines import UnCLIPPipeline
from unclip_jax.protocols import base as protocols

names = ("clip", "prior", "decoder")
pipe = UnCLIPPipeline.from_parts({name: folders[name] for name in names})
data = pipe.data()
clip = features.of(pipe.parts["clip"])
subject = protocols.Subject(pipe, data, "train", clip.beside, batch_size=16)
count = 48

# %% [markdown]
# ## A sweep of guidance
#
# Guidance trades likeness as a set (FID, KID, recall) for likeness to the
# caption (CLIP score): GLIDE's curves, and the paper's (section 5.3). The
# paper's FID on MS-COCO, 10.39, is that of a scale of 1.25 (section 5.4). The
# true pictures' score, and that of drawn pictures with the captions of others,
# stand beside the model's.

# %%
from unclip_jax.protocols import guidance_sweep

sweep = guidance_sweep.Protocol((1.0, 2.0, 4.0), num_images=count)
result = sweep.run(subject)
COLUMNS = (
  *("guidance_scale", "fid", "kid", "precision", "recall"),
  *("clip_score", "clip_score_true", "clip_score_shuffled"),
)
common.table([{name: row[name] for name in COLUMNS} for row in result.rows])

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
scales = [row["guidance_scale"] for row in result.rows]
for ax, name in zip(axes, ("fid", "clip_score", "recall")):
  ax.plot(scales, [row[name] for row in result.rows], "o-")
  ax.set(xlabel="guidance scale", ylabel=name.replace("_", " "), xticks=scales)
axes[1].axhline(
  result.rows[0]["clip_score_true"],
  color="grey",
  linestyle=":",
  label="true pictures",
)
axes[1].legend()
axes[2].set_ylim(0, 1.05)
plt.show()

# %% [markdown]
# ## Diversity
#
# People found unCLIP's pictures of one caption more diverse than GLIDE's
# (section 5.2). In features: `within` is the distance of two pictures of one
# caption, `between` that of two captions. A model that has learned a few
# pictures by heart draws one for each caption, and `ratio` is near 0.

# %%
from unclip_jax.protocols import diversity

spread = diversity.Protocol(
  (1.0, 4.0), num_prompts=16, num_images=4, num_grids=4
).run(subject)
common.show(
  {
    f"guidance {scale}": [
      spread.pictures[f"prompt_{i}_guidance_{scale}"] / 2 + 0.5
      for i in range(4)
    ]
    for scale in (1, 4)
  },
  [data.example_info(i, "train")["captions"][0] for i in range(4)],
  side=2,
)
common.table(spread.rows)

# %% [markdown]
# ## Bits per dimension, by timestep
#
# The variational bound of the decoder is a sum over timesteps (Nichol &
# Dhariwal 2021, Fig. 2). Most bits go into the last details, the least noise,
# which nobody sees; what a picture shows is decided at the other end. Samplers
# and guidance do not enter. Stored as it is, a picture takes 8 bits; a decoder
# whose variance is fixed and was never asked for likelihood, as the
# quickstart's, is sure of details that it gets wrong, and needs more. A
# learned variance (`variance="learned_range"`, as the paper has it) mends
# that.

# %%
import jax

from unclip_jax.data.pipeline import DataPipeline
from unclip_jax.diffusion import likelihood
from unclip_jax.evaluators import base as evaluators
from unclip_jax.evaluators import vlb

decoder = pipe.parts["decoder"]
own = DataPipeline.from_config(
  decoder.config.data, seed=0, assets_dir=decoder.assets_dir
)
predict = jax.jit(decoder.task.predict_fns()["vlb"])
weights, key = pipe.weights("decoder"), jax.random.key(0)
found, _ = evaluators.collect(
  lambda batch: predict(*weights, batch, key),
  own.eval_batches("train", 16, count),
  ("bits_per_dim", "prior_term", "terms"),
)
common.table([protocols.measure(vlb.Evaluator(), found)])

# %%
T, terms = decoder.task.diffusion.num_timesteps, found["terms"].mean(axis=0)
edges = likelihood.strata(T, len(terms))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
axes[0].step(edges[:-1] + 1, terms / np.diff(edges), where="post")
axes[0].set(
  xscale="log", yscale="log", ylabel="bits per dimension and timestep"
)
axes[1].plot(edges[1:], np.cumsum(terms))
axes[1].set(xscale="log", ylabel="bits per dimension up to here", ylim=0)
for ax in axes:
  ax.set_xlabel("timestep, counted from 1")
plt.show()

# %% [markdown]
# ## Scenes that can be read back
#
# Whether "a red cube on top of a blue cube" was drawn (section 7: unCLIP's
# weakness) no feature tells. For scenes of plain shapes `metrics/scene.py`
# reads what is in a picture, without a network. A clean rendering is read
# without error; with the colours of two objects swapped, all colours and all
# shapes are there, but no object is right, and the binding is 0.
#
# A model trained by `configs/shapes/` is measured so by the evaluator and the
# protocol `scenes`, on pairs of shape and colour, and on arrangements, that it
# has never seen.

# %%
import dataclasses

from unclip_jax.data import shapes
from unclip_jax.metrics import scene as scene_metrics
from unclip_jax.utils import scenes

scene, captions = shapes.make(0, "validation", 7)
first, second, *rest = scene.objects
swapped = dataclasses.replace(
  scene,
  objects=(
    dataclasses.replace(first, colour=second.colour),
    dataclasses.replace(second, colour=first.colour),
    *rest,
  ),
)
other, _ = shapes.make(0, "validation", 0)
drawn = {"clean": scene, "swapped": swapped, "another scene": other}
renders = {name: scenes.render(x, 64) for name, x in drawn.items()}
print(captions[0])
common.show({"": list(renders.values())}, list(renders), side=2)

# %%
scores = scene_metrics.score(
  np.stack(list(renders.values())) / 127.5 - 1, [scene] * len(renders)
)
common.table(
  [
    {"picture": name, **{k: float(v[i]) for k, v in scores.items()}}
    for i, name in enumerate(renders)
  ]
)

# %% [markdown]
# ## What few pictures do to an FID
#
# Two sets of true pictures, compared with each other: they come from one
# distribution, and the distance should be 0. The FID of few pictures is far
# above it, and the fewer, the farther, by about a constant over their number
# (Chong & Forsyth 2020). So: never compare FIDs of different numbers of
# pictures, with published ones only those of the same number (30,000 on
# MS-COCO), and with few look at the KID, whose mean is right for any number.
# The sweep above can be below what is seen here, since its drawn and true
# pictures are of the same captions, and thus no two independent samples.

# %%
from unclip_jax.metrics import frechet, kernel, similarity

embeds = pipe.train_image_embeds(min(300, data.num_examples("train")))
embeds = similarity.normalize(embeds)  # as in the sweep
rng = np.random.default_rng(0)
rows = []
for half in (8, 16, 32, 64, 128):
  for _ in range(10 if 2 * half <= len(embeds) else 0):
    a, b = rng.choice(embeds, (2, half), replace=False)
    moments = [frechet.Moments.of(x) for x in (a, b)]
    kid, _ = kernel.kid(a, b, num_subsets=1, subset_size=half)
    rows.append((half, frechet.distance(*moments), kid))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for ax, name, values in zip(axes, ("FID", "KID"), np.transpose(rows)[1:]):
  sizes = np.array([row[0] for row in rows])
  ax.scatter(sizes, values, s=12, alpha=0.5)
  means = [values[sizes == size].mean() for size in np.unique(sizes)]
  ax.plot(np.unique(sizes), means, "o-", label="mean")
  ax.axhline(0, color="grey", linestyle=":", label="what it should be")
  ax.set(xlabel="pictures in each set", ylabel=name, xscale="log")
  ax.set_xticks(np.unique(sizes), [str(size) for size in np.unique(sizes)])
  ax.minorticks_off()
  ax.legend()
plt.show()
