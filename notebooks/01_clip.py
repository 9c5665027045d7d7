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
# # 1. CLIP: what the embeddings know
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/unclip-jax/unclip_jax/blob/main/notebooks/01_clip.ipynb)
#
# Everything in unCLIP stands on one frozen CLIP: the prior draws its picture
# embeddings, and the decoder draws pictures from them (Ramesh et al. 2022,
# section 2). What CLIP does not tell apart, no later stage can. This notebook
# measures what it does tell apart.
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
# ## Load
#
# `inference.load` takes a run, a part of a model folder, or converted weights:
#
# ```python
# clip = inference.load("runs/emoji/clip")
# clip = inference.load("models/karlo/clip")
# clip = inference.load("models/clip")  # of unclip convert --from clip-hf
# ```
#
# `features.of` makes it a function of batches with pictures of any size. With
# converted weights, which name no data of their own, take the `data` of
# another part.

# %%
from unclip_jax import features, inference
from unclip_jax.data.pipeline import DataPipeline
from unclip_jax.evaluators import base as evaluators

clip = inference.load(folders["clip"])
look = features.of(clip)
data = DataPipeline.from_config(
  clip.config.data, seed=0, assets_dir=clip.assets_dir
)
count = min(300, data.num_examples("train"))
batches = data.eval_batches("train", 50, count)
embeds, inputs = evaluators.collect(
  look.run, batches, ("image_embed", "text_embed"), ("image",), count
)
image_embed, text_embed = embeds["image_embed"], embeds["text_embed"]
pictures = inputs["image"] / 2 + 0.5
infos = [data.example_info(i, "train") for i in range(count)]
captions = [info["captions"][0] for info in infos]
groups = [info["group"] for info in infos]
image_embed.shape, text_embed.shape

# %% [markdown]
# ## Pictures beside captions
#
# Training pulls the cosines on the diagonal up and pushes all others of a
# batch down (Radford et al. 2021, section 2.3). Embeddings are of length 1, so
# that a product is a cosine.

# %%
import matplotlib.pyplot as plt
import numpy as np

some = np.linspace(0, count - 1, 12).astype(int)
cosines = text_embed[some] @ image_embed[some].T
figure, axes = plt.subplots(figsize=(8, 6.2), layout="constrained")
picture = axes.imshow(cosines, cmap="viridis")
axes.set_xticks([])
axes.set_yticks(range(len(some)), [captions[i] for i in some])
for column, i in enumerate(some):
  inset = axes.inset_axes([column / 12, -1 / 11, 1 / 12, 1 / 12])
  inset.imshow(pictures[i])
  inset.axis("off")
figure.colorbar(picture, label="cosine")
plt.show()

# %% [markdown]
# ## Retrieval and zero-shot classification
#
# For each caption, how often is its own picture the nearest one, or among the
# nearest five; and is a picture's class the one whose other captions are
# nearest to it (Radford et al. 2021, section 3.1)? A figure means something
# beside its chance level only, and these are pictures of the training set:
# what they show is how well it was learned. `"validation"` in place of
# `"train"` asks for more, where the data holds something out.

# %%
from unclip_jax.evaluators import retrieval, zero_shot
from unclip_jax.protocols import base as protocols

found = protocols.measure(retrieval.Evaluator(), embeds)
rows = [
  {"what": f"{what}, R@{k}", "found": found[f"{name}_r{k}"],
   "chance": found[f"chance_r{k}"]}
  for what, name in (
    ("caption to picture", "text_to_image"),
    ("picture to caption", "image_to_text"),
  )
  for k in (1, 5)
]  # fmt: skip
found = protocols.measure(zero_shot.Evaluator(), {**embeds, "label": groups})
rows += [
  {"what": f"zero-shot, {name}", "found": found[hit], "chance": found[chance]}
  for name, hit, chance in (
    ("pictures", "accuracy", "chance"),
    (f"mean of {found['num_classes']:.0f} classes", "class_accuracy",
     "class_chance"),
  )
]  # fmt: skip
common.table(rows)

# %% [markdown]
# ## Nearest neighbours
#
# What a picture is near to says what the embedding is about: the meaning, or
# only the colours and outlines; of a few hundred pictures learned by heart,
# hardly anything. Captions of your own find pictures by the same dot product,
# as far as training had their words.

# %%
nearest = np.argsort(-image_embed[some[:4]] @ image_embed.T)[:, :9]
common.show(
  {captions[i]: pictures[near] for i, near in zip(some, nearest)},
  ["itself", *(f"neighbour {k}" for k in range(1, 9))],
)

# %%
import jax

queries = ["a red fruit", "an animal with wings", "something in the sky"]
queries_embed, _ = jax.jit(clip.task.encode_text)(
  clip.variables, **look.encode(queries)
)
nearest = np.argsort(-queries_embed @ image_embed.T)[:, :9]
common.show({q: pictures[near] for q, near in zip(queries, nearest)})

# %% [markdown]
# ## The scale of the logits
#
# The loss is a softmax over cosines times a learned factor,
# `exp(logit_scale)`, which CLIP keeps at or below 100 (Radford et al. 2021,
# section 2.5). Public CLIPs end there: their pictures lie in one narrow cone,
# their captions in another, and the cosines of pairs and of others differ by
# little. One that tells a few hundred pictures apart, as the quickstart's, has
# room to spread them out and needs less.

# %%
scale = float(np.exp(clip.variables["params"]["logit_scale"]))
cosines = text_embed @ image_embed.T
others = ~np.eye(count, dtype=bool)
similarities = {
  "a caption and its picture": np.diag(cosines),
  "a caption and another picture": cosines[others],
  "two pictures": (image_embed @ image_embed.T)[others],
  "two captions": (text_embed @ text_embed.T)[others],
}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.violinplot(
  list(similarities.values()), orientation="horizontal", showmedians=True
)
axes.set_yticks(range(1, 5), list(similarities))
axes.invert_yaxis()
axes.set(xlabel="cosine", title=f"exp(logit_scale) = {scale:.1f}")
plt.show()

# %% [markdown]
# ## Principal components
#
# Few directions carry most of the variance. The paper's autoregressive prior
# keeps 319 of 1,024 (section 2.2) and turns them into codes, and Fig. 7 draws
# pictures from fewer and fewer (notebook 3). Left: how much variance the first
# components hold; right: the pictures on the first two.

# %%
from unclip_jax import manipulations

mean, components = manipulations.fit_pca(image_embed)
parts = (image_embed - mean) @ components.T
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
share = np.cumsum(parts.var(axis=0)) / parts.var(axis=0).sum()
axes[0].plot(range(1, len(share) + 1), share)
axes[0].axhline(0.99, color="grey", linestyle=":")
axes[0].set_title(f"{(share < 0.99).sum() + 1} of {len(share)} hold 99 %")
axes[0].set(xlabel="components", ylabel="share of the variance", ylim=(0, 1.02))
for group in dict.fromkeys(groups):
  rows = np.array(groups) == group
  axes[1].scatter(*parts[rows, :2].T, s=12, alpha=0.7, label=group)
axes[1].set(xlabel="component 1", ylabel="component 2")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What the embedding forgets
#
# Pictures are changed, and their embeddings compared with those of the
# unchanged ones. What leaves the cosine near 1 is forgotten, and the decoder
# is free to draw it either way: that is what varies among a picture's
# variations (section 3.1), and why attributes and objects get mixed up
# (section 7). What brings it down to the level of another picture is what CLIP
# looks at.

# %%
from unclip_jax.metrics import pictures as picture_metrics
from unclip_jax.metrics import similarity

image = inputs["image"]
noise = np.random.default_rng(0).normal(size=image.shape)
changes = {
  "unchanged": image,
  "mirrored": image[:, :, ::-1],
  "upside down": image[:, ::-1],
  "moved by an eighth": np.roll(image, image.shape[1] // 8, axis=2),
  "grey": image.mean(axis=-1, keepdims=True) + 0 * image,
  "other colours": image[..., [1, 2, 0]],
  "a quarter of the pixels": picture_metrics.area_resize(
    image, image.shape[1] // 2, image.shape[2] // 2
  ),
  "noise": np.clip(image + 0.3 * noise, -1, 1).astype(np.float32),
}
common.show(
  {"": [x[some[2]] / 2 + 0.5 for x in changes.values()]}, list(changes)
)

# %%
cosine = {
  name: similarity.cosine(look.run({"image": x})["image_embed"], image_embed)
  for name, x in changes.items()
}
cosine["another picture"] = similarity.shuffled_cosine(image_embed, image_embed)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.boxplot(
  list(cosine.values()), orientation="horizontal", tick_labels=list(cosine)
)
axes.invert_yaxis()
axes.set_xlabel("cosine to the embedding of the unchanged picture")
plt.show()
