"""Imports point one way, and the package installs no more than it says.

The rule is a table, `ALLOWED`: a new module or folder directly under
unclip_jax/ needs a row there. The checks read source text, and are themselves
tried on made-up sources that break each rule.
"""

from __future__ import annotations

import ast
import graphlib
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Unit (a module or folder under unclip_jax/) -> units that it may import
# besides itself. "tasks.base" alone grants the contract, not the tasks.
ALLOWED: dict[str, set[str]] = {
  "utils": set(),
  # None imports another of these.
  "layers": {"utils"},
  "losses": {"utils"},
  "metrics": {"utils"},
  "diffusion": set(),
  "models": {"layers", "utils"},
  "decoding": {"layers", "utils"},
  "tasks": {"models", "diffusion", "decoding", "losses", "utils"},
  "data": {"utils"},
  "optim": {"utils"},
  "best": {"utils"},
  "flops": set(),
  "distributed": {"utils"},
  "timing": {"utils"},
  "partitioning": {"utils"},
  "tensor_files": {"utils"},
  "manifests": set(),
  "checkpoints": {"manifests", "utils"},
  "run_folder": {"utils"},
  "model_folder": {"checkpoints", "run_folder", "tensor_files", "utils"},
  "train_state": {"utils"},
  "evaluators": {"metrics", "data", "utils"},
  "upstream": {"model_folder", "data", "tasks.base", "tensor_files", "utils"},
  "init_from": {"model_folder", "upstream", "utils"},
  "features": {"upstream", "partitioning", "data", "evaluators", "utils"},
  "evaluation": {
    *("features", "model_folder", "partitioning", "data", "upstream"),
    *("tasks.base", "train_state", "utils"),
  },
  "gradients": {"optim", "partitioning", "tasks.base", "utils"},
}
# The config gives the trainer the module paths of the models and tasks.
ALLOWED["trainer"] = set(ALLOWED) - {"models", "tasks"} | {"tasks.base"}
ALLOWED["inference"] = {
  *("tasks", "models", "diffusion", "upstream", "data", "utils"),
  *("tensor_files", "model_folder"),
}
ALLOWED["interop"] = ALLOWED["inference"] | {"inference", "run_folder"}
ALLOWED["embeddings"] = {
  *("data", "metrics", "partitioning", "upstream", "utils"),
}
ALLOWED["protocols"] = {"evaluators", "metrics", "data", "utils"}
ALLOWED["stages"] = ALLOWED["inference"] | {"inference", "run_folder"}
ALLOWED["manipulations"] = {
  *("data", "metrics", "stages", "tensor_files", "utils"),
}
ALLOWED["text_to_image"] = ALLOWED["stages"] | {"stages", "manipulations"}
ALLOWED["image_to_text"] = ALLOWED["stages"] | {"stages"}
ALLOWED["pipelines"] = ALLOWED["stages"] | {
  *("stages", "manipulations", "text_to_image", "image_to_text"),
}

# Each may import anything; nobody imports them.
PROGRAMS = {
  *("train", "sample", "edit", "evaluate", "convert", "prepare_data"),
  *("serve", "describe", "__main__"),
}
OUTSIDE = {"configs", "launch", "notebooks", "tests"}
# What an extra installs may be imported inside functions only.
OPTIONAL = {
  *("tensorflow", "tensorboard", "torch", "transformers", "diffusers"),
  "gradio",
}
DOMAIN_NOUNS = ("image", "text", "clip", "diffusion", "token")


def imports(
  source: str, path: str = "<source>"
) -> Iterator[tuple[int, str, bool]]:
  """(line, dotted name, whether inside a function) of every import.

  `from a.b import c` counts as a.b.c, whether c is a module or not; relative
  imports keep their leading dots. A literal given to `import_module` counts.
  """
  tree = ast.parse(source, path)
  functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
  lazy = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, functions)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (node.module or "")
      names = [f"{base}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
      names = [
        arg.value
        for arg in node.args[:1]
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
      ]
    for name in names:
      yield node.lineno, name, id(node) in lazy


def violations(path: str, source: str) -> list[str]:
  """What a file of the package imports against the rules, one line each.

  Args:
    path: relative to the root, such as "unclip_jax/models/clip.py".
    source: its text.
  """
  parts = pathlib.PurePosixPath(path).with_suffix("").parts[1:]
  unit = parts[0]
  found = []
  if unit not in {*ALLOWED, *PROGRAMS, "__init__"}:
    found.append(
      f"{path}: {unit} has no row in ALLOWED (tests/architecture_test.py)"
    )
  for line, name, lazy in imports(source, path):
    problem = _problem(unit, name, lazy)
    if problem:
      found.append(f"{path}:{line}: {problem}")
  return found


def _problem(unit: str, name: str, lazy: bool) -> str | None:
  """Why `unit` may not import `name`, or None where it may."""
  top, _, rest = name.partition(".")
  if name.startswith("."):
    return f"relative import {name}"
  if name.endswith(".*"):
    return f"star import {name}"
  if top in OUTSIDE:
    return f"the package imports {name}"
  if top in OPTIONAL and not lazy:
    return f"{top} is optional: import it inside a function"
  if top != "unclip_jax":
    if unit == "diffusion" and top not in {
      "jax",
      "numpy",
      *sys.stdlib_module_names,
    }:
      return f"diffusion imports {name}: only jax and numpy are its own"
    return None
  target, _, member = rest.partition(".")
  if target in ("", "__version__", unit):
    return None
  if target in PROGRAMS:
    return f"imports the program {name}"
  if unit in PROGRAMS:
    return None
  allowed = ALLOWED.get(unit, set())
  qualified = f"{target}.{member.partition('.')[0]}"
  if target in allowed or qualified in allowed:
    return None
  return f"{unit} imports {name}; it may import {sorted(allowed) or 'nothing'}"


def domain_nouns(source: str) -> list[str]:
  """Lines in which a domain noun occurs, in code or comments, even as a part.

  Of words that only look so, the package's name and "context" are left out.
  """
  found = []
  for number, line in enumerate(source.splitlines(), start=1):
    text = line.lower().replace("unclip_jax", "").replace("context", "")
    nouns = [noun for noun in DOMAIN_NOUNS if noun in text]
    if nouns:
      found.append(f"line {number}: {', '.join(nouns)}: {line.strip()}")
  return found


def import_cycle(sources: dict[str, str]) -> list[str]:
  """Modules that import each other in a ring, or [].

  Args:
    sources: dotted name of every module -> its text.
  """
  graph = {
    module: {
      target
      for _, name, _ in imports(source)
      for target in (name, name.rpartition(".")[0])
      if target in sources and target != module
    }
    for module, source in sources.items()
  }
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return error.args[1]
  return []


def package_sources() -> dict[str, str]:
  """Path relative to the root -> text, of every file of the package."""
  return {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "unclip_jax").rglob("*.py"))
  }


def fail_with(problems: list[str]) -> None:
  """Fails where there are problems, and prints them and nothing else."""
  if problems:
    pytest.fail("\n".join(problems), pytrace=False)


def test_package_follows_the_import_rule() -> None:
  sources = package_sources()
  assert "unclip_jax/tasks/base.py" in sources
  found = [v for path, text in sources.items() for v in violations(path, text)]
  fail_with(found)


def test_package_has_no_import_cycle() -> None:
  sources = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
    for path, text in package_sources().items()
  }
  assert not import_cycle(sources), " -> ".join(import_cycle(sources))


@pytest.mark.parametrize("name", ["trainer.py", "gradients.py"])
def test_trainer_contains_no_domain_noun(name: str) -> None:
  source = (ROOT / "unclip_jax" / name).read_text(encoding="utf-8")
  found = domain_nouns(source)
  fail_with(found)


@pytest.mark.parametrize(
  ("path", "source", "word"),
  [
    ("utils/trees.py", "from unclip_jax.layers import norms", "utils imports"),
    ("layers/a.py", "from unclip_jax.diffusion import gaussian", "layers"),
    ("layers/a.py", "import unclip_jax.losses.contrastive", "layers imports"),
    ("diffusion/a.py", "from unclip_jax.utils import errors", "nothing"),
    ("diffusion/a.py", "import flax.linen as nn", "only jax and numpy"),
    ("diffusion/a.py", "import math, scipy.linalg", "only jax and numpy"),
    ("models/a.py", "from unclip_jax.tasks import base", "models imports"),
    ("models/a.py", "from unclip_jax import trainer", "models imports"),
    ("tasks/a.py", "from unclip_jax.data import pipeline", "tasks imports"),
    ("data/a.py", "def f():\n  import unclip_jax.optim", ":2: data imports"),
    ("evaluators/a.py", "from unclip_jax.models import clip", "evaluators"),
    ("evaluators/a.py", "from unclip_jax.tasks import base", "evaluators"),
    ("trainer.py", "from unclip_jax.tasks import decoder", "trainer imports"),
    ("trainer.py", "from unclip_jax.models import unet", "trainer imports"),
    ("trainer.py", "import_module('unclip_jax.tasks.gan')", "trainer imports"),
    ("inference.py", "from unclip_jax import trainer", "inference imports"),
    ("pipelines.py", "from unclip_jax import sample", "the program"),
    ("train.py", "from unclip_jax.evaluate import main", "the program"),
    ("train.py", "from configs.emoji import clip", "the package imports"),
    ("data/a.py", "import tests.conftest", "the package imports"),
    ("data/a.py", "from . import pipeline", "relative import"),
    ("data/a.py", "from numpy import *", "star import"),
    ("interop/a.py", "try:\n  import torch\nexcept: pass", "inside a function"),
    ("serve.py", "class A:\n  import gradio", "inside a function"),
    ("extra.py", "", "no row in ALLOWED"),
    ("extra/a.py", "import math", "no row in ALLOWED"),
  ],
)
def test_violation_is_named(path: str, source: str, word: str) -> None:
  found = violations(f"unclip_jax/{path}", source)
  assert len(found) == 1, found
  assert word in found[0]
  assert found[0].startswith(f"unclip_jax/{path}:")


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("__init__.py", "import importlib"),
    ("layers/a.py", "from unclip_jax.layers import norms\nimport flax.linen"),
    ("diffusion/a.py", "import dataclasses, jax\nfrom jax import numpy"),
    ("tasks/a.py", "from unclip_jax.models.clip import Model"),
    ("trainer.py", "from unclip_jax.tasks import base\nimport unclip_jax"),
    ("trainer.py", "from unclip_jax.tasks.base import Task"),
    ("trainer.py", "from unclip_jax import checkpoints, optim"),
    ("interop/a.py", "def f():\n  import torch"),
    ("train.py", "from unclip_jax import trainer, __version__"),
    ("describe.py", "from unclip_jax.models import unet"),
  ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
  assert violations(f"unclip_jax/{path}", source) == []


@pytest.mark.parametrize(
  "line",
  [
    "num_images = 3",
    "# the Tokenizer's",
    "optax.clip_by_global_norm(1.0)",
    'name = "diffusion_prior"',
    "caption_texts: list",
    "# UnCLIP",
  ],
)
def test_domain_noun_is_found(line: str) -> None:
  assert len(domain_nouns(f"import jax\n{line}\n")) == 1


def test_words_that_only_look_like_domain_nouns() -> None:
  assert not domain_nouns("from unclip_jax import optim\nimport contextlib\n")


def test_import_cycle_is_found() -> None:
  sources = {
    "unclip_jax.a": "from unclip_jax import b",
    "unclip_jax.b": "def f():\n  from unclip_jax.c import name",
    "unclip_jax.c": "import unclip_jax.a",
  }
  ring = import_cycle(sources)
  assert set(ring) == set(sources)
  del sources["unclip_jax.c"]
  assert import_cycle(sources) == []


_IMPORT_ALL = """
import importlib, pkgutil, sys
from absl import flags
import unclip_jax

def failed(name):
  print("failed", name, repr(sys.exc_info()[1]))

for module in pkgutil.walk_packages(
    unclip_jax.__path__, "unclip_jax.", onerror=failed):
  if module.name == "unclip_jax.__main__":
    continue
  known = set(flags.FLAGS)
  try:
    importlib.import_module(module.name)
    print("imported", module.name)
  except Exception:
    failed(module.name)
  # Programs share names of flags, and never meet in one process.
  for flag in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, flag)
print("optional", sorted(OPTIONAL & set(sys.modules)))
"""


def test_no_module_imports_an_optional_package(run_python) -> None:
  code = f"OPTIONAL = {OPTIONAL!r}\n{_IMPORT_ALL}"
  lines = run_python("-c", code).stdout.splitlines()
  failures = [line for line in lines if line.startswith("failed")]
  fail_with(failures)
  assert "imported unclip_jax.tasks.base" in lines
  assert lines[-1] == "optional []"


def test_importing_the_package_loads_nothing_slow(run_python) -> None:
  code = (
    "import sys, unclip_jax; "
    "print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
  )
  assert run_python("-c", code).stdout.strip() == "[]"
