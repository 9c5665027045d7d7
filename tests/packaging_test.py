"""setup.py, constraints.txt and the imports of the code agree."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import pathlib
import re
import sys

import pytest
from packaging import requirements, utils

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST_PARTY = {"unclip_jax", "configs", "launch", "tests", "notebooks"}
# Asked for though only other packages import them: setup.py says why.
INDIRECT = {"importlib-resources"}


@functools.cache
def setup_constants() -> dict[str, object]:
  """The constants that setup.py assigns, read without running it."""
  tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
  return {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign)
    and isinstance(node.value, ast.List | ast.Dict)
  }


def required(*extras: str) -> list[requirements.Requirement]:
  """What the default install and the given extras ask for."""
  lines = list(setup_constants()["INSTALL_REQUIRES"])
  for extra in extras:
    lines += setup_constants()["EXTRAS_REQUIRE"][extra]
  return [requirements.Requirement(line) for line in lines]


def pins() -> dict[str, str]:
  """Normalised name -> version, of constraints.txt."""
  text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
  lines = [line for line in text.splitlines() if not line.startswith("#")]
  pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
  assert all(pairs), [line for line, pair in zip(lines, pairs) if not pair]
  return {utils.canonicalize_name(pair[1]): pair[2] for pair in pairs}


def test_constraints_pin_what_setup_asks_for() -> None:
  pinned = pins()
  for requirement in required("dev"):
    version = pinned.get(utils.canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement}"
    assert version in requirement.specifier, f"{version} is not {requirement}"


def test_default_install_holds_neither_tensorflow_nor_torch() -> None:
  heavy = {"tensorflow", "tensorflow-cpu", "torch", "gradio", "jax-cuda12-pjrt"}
  assert not heavy & set(pins())


def test_environment_is_what_constraints_say() -> None:
  """CI runs what constraints.txt claims it ran."""
  if sys.version_info[:2] != (3, 11):
    pytest.skip("constraints.txt is for Python 3.11")
  differing = []
  for requirement in required():
    pinned = pins()[utils.canonicalize_name(requirement.name)]
    installed = importlib.metadata.version(requirement.name)
    if installed != pinned:
      differing.append(f"{requirement.name}: {installed}, not {pinned}")
  assert not differing, f"run make venv: {differing}"


def third_party(folder: str) -> dict[str, str]:
  """Top-level name -> a file that imports it, under a folder of the root."""
  found = {}
  for path in sorted((ROOT / folder).rglob("*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      for name in names:
        found[name.partition(".")[0]] = path.relative_to(ROOT).as_posix()
  return {
    name: path
    for name, path in found.items()
    if name not in FIRST_PARTY | sys.stdlib_module_names
  }


_distributions = functools.cache(importlib.metadata.packages_distributions)


def providers(name: str) -> set[str]:
  """Distributions that hold a top-level name; the name where none does."""
  found = _distributions().get(name, [name])
  return {utils.canonicalize_name(distribution) for distribution in found}


# What the benchmarks measure us against, where somebody has installed it; no
# extra could hold them, for they do not agree on versions of each other.
PEERS = {"dalle2_pytorch", "open_clip", "torchvision", "webdataset"}


@pytest.mark.parametrize(
  ("folder", "extras"),
  [
    ("unclip_jax", ("tpu", "gpu", "tf", "interop", "demo")),
    ("configs", ()),
    # Comparing with foreign implementations is for who has them installed.
    ("launch", ("interop",)),
    ("tests", ("dev", "interop")),
  ],
)
def test_imports_are_declared(folder: str, extras: tuple[str, ...]) -> None:
  """Nothing is imported only because something else happens to bring it.

  That a package of an extra is not imported at the top of a module is
  checked by tests/architecture_test.py.
  """
  declared = {utils.canonicalize_name(r.name) for r in required(*extras)}
  for name, path in third_party(folder).items():
    if path.endswith("bench_peers.py") and name in PEERS:
      continue
    # TensorFlow comes under several names of distributions.
    distributions = providers(name) | {f"{name}-cpu"}
    assert declared & distributions, f"{path} imports {name}: not in setup.py"


def test_every_dependency_is_imported() -> None:
  imported = set[str]().union(
    *(
      providers(name)
      for folder in ("unclip_jax", "configs", "launch")
      for name in third_party(folder)
    )
  )
  declared = {utils.canonicalize_name(r.name) for r in required()}
  assert declared - imported == INDIRECT
