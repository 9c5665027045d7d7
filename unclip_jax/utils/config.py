"""Configs: loading, JSON, differences, overrides, and building what they name.

A config is a `ml_collections.ConfigDict` that a Python file's
`get_config(arg)` returns. It is stored as JSON (ConfigDict's own YAML can run
code when it is read); JSON knows no tuples, so lists and tuples count as
equal everywhere here and come back from a file as tuples.

The argument grammar, `FILE.py:quick,size=tiny`, is that of big_vision
(big_vision/configs/common.py).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

from unclip_jax.utils.errors import UserError

T = TypeVar("T")
ConfigDict = ml_collections.ConfigDict
Fields = Mapping[str, Any] | ConfigDict  # ConfigDict is no Mapping

_ABSENT = "(absent)"
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def load(path_with_arg: str) -> ConfigDict:
  """Runs `get_config(arg)` of a config file.

  The folder that holds the `configs` folder joins `sys.path`, so that a
  config may `from configs.emoji import clip` from any working directory.

  Args:
    path_with_arg: "configs/emoji/clip.py" or
      "configs/emoji/clip.py:quick,image_size=32".

  Returns:
    The config, locked.

  Raises:
    UserError: there is no such file, or it has no get_config(arg).
  """
  path, arg = split_argument(path_with_arg)
  module = load_module(path)
  if inspect.signature(module.get_config).parameters:
    config = module.get_config(arg or None)
  elif arg:
    raise UserError(f"the config {path} takes no argument, but got {arg!r}")
  else:
    config = module.get_config()
  return ConfigDict(config).lock()


def split_argument(path_with_arg: str) -> tuple[str, str]:
  """ "configs/emoji/clip.py:quick" -> "configs/emoji/clip.py", "quick"."""
  path, _, arg = path_with_arg.partition(".py:")
  return path if path.endswith(".py") else path + ".py", arg


def load_module(path: str) -> types.ModuleType:
  """The module of a config file; see `load`.

  Raises:
    UserError: as `load`.
  """
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    siblings = os.listdir(folder) if os.path.isdir(folder) else []
    near = suggest(
      os.path.basename(path), [n for n in siblings if n.endswith(".py")]
    )
    raise UserError(f"there is no config file {path!r}{near}")
  _put_root_on_path(path)
  name = os.path.splitext(os.path.basename(path))[0]
  spec = importlib.util.spec_from_file_location(f"_config_file_{name}", path)
  assert spec is not None and spec.loader is not None  # true for every *.py
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"{path} is not a config: it defines no get_config(arg)")
  return module


def to_json(config: Fields) -> str:
  """The config as indented JSON text; references are resolved.

  Raises:
    UserError: a value is not a number, string, bool, None, list, tuple or
      dict with string keys; the message names its place.
  """
  return json.dumps(_plain(config, "config"), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`; lists come back as tuples, the config locked.

  Raises:
    UserError: the text is not a JSON object.
  """
  try:
    fields = json.loads(text)
  except ValueError as e:
    raise UserError(f"this is not a config in JSON: {e}") from e
  if not isinstance(fields, dict):
    raise UserError(
      f"a config must be a JSON object, not {type(fields).__name__}"
    )
  return ConfigDict(_tuples(fields)).lock()


def diff(a: Fields, b: Fields) -> list[str]:
  """One line per leaf that differs, sorted: "optim.lr: 0.001 -> 0.0003".

  A leaf of one side only reads "(absent)" on the other side.
  """
  left, right = leaves(a), leaves(b)
  lines = []
  for name in sorted(left.keys() | right.keys()):
    if name in left and name in right and _same_leaf(left[name], right[name]):
      continue
    before = repr(left[name]) if name in left else _ABSENT
    after = repr(right[name]) if name in right else _ABSENT
    lines.append(f"{name}: {before} -> {after}")
  return lines


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Reads a config's argument: "quick,size=tiny".

  A bare key means True. A value gets the type of its default; where the
  default is None, it is read as a Python literal if it is one, else as text.

  Args:
    arg: the text after "FILE.py:", or None.
    **defaults: every key that the config understands.

  Returns:
    The defaults with the given values put in, locked.

  Raises:
    UserError: an unknown key (the nearest is named) or an unreadable value.
  """
  values = dict(defaults)
  # A comma inside brackets belongs to a tuple.
  for item in re.split(r",(?![^(\[]*[)\]])", arg or ""):
    key, equals, text = (part.strip() for part in item.partition("="))
    if not key:
      continue
    if key not in defaults:
      raise UserError(
        f"the config takes no argument {key!r}{suggest(key, defaults)}"
      )
    where = f"config argument {key!r}"
    values[key] = _read(text if equals else "true", defaults[key], where)
  return ConfigDict(values).lock()


def apply_overrides(
  config: ConfigDict, overrides: Mapping[str, str]
) -> ConfigDict:
  """Puts command-line values into a config, in place.

  Args:
    config: may be locked; is left as it was in this respect.
    overrides: dotted name -> text, for example {"optim.lr": "1e-4"}. The text
      gets the type of the value that is there; "None" is None everywhere;
      several texts may be given as "a,b". A mapping, as in
      {"data.source": "{'folder': 'a'}"}, takes the place of a whole group of
      fields.

  Returns:
    The same config.

  Raises:
    UserError: an unknown name (the nearest right one is named), a name of a
      group of fields, or text that cannot be read as that type.
  """
  for name, text in overrides.items():
    *groups, last = name.split(".")
    group: Any = config
    for key in groups:
      group = group.get(key) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or last not in group:
      raise UserError(
        f"the config has no field {name!r}{suggest(name, leaves(config))}"
      )
    old = group[last]
    if isinstance(old, ConfigDict) and text.lstrip().startswith("{"):
      group[last] = ConfigDict(_read(text, old, f"config.{name}"))
      continue
    if isinstance(old, ConfigDict):
      raise UserError(
        f"config.{name} is a group of fields, set one of them:"
        f" {', '.join(f'{name}.{key}' for key in old)}"
      )
    with group.ignore_type():
      group[last] = _read(text, old, f"config.{name}")
  return config


def fields_from_text(
  cls: type, texts: Mapping[str, str], *, where: str
) -> dict[str, Any]:
  """Fields of a dataclass from the command line.

  Args:
    cls: the dataclass; a text gets the type of the field's default.
    texts: name -> text.
    where: what messages call the group of fields.

  Raises:
    UserError: an unknown field (the nearest is named), or text that cannot be
      read as its type.
  """
  defaults = {
    field.name: "" if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(cls)
  }
  for name in texts:
    if name not in defaults:
      raise UserError(f"{where} has no field {name!r}{suggest(name, defaults)}")
  return {k: _read(v, defaults[k], f"{where}.{k}") for k, v in texts.items()}


def literal(text: str) -> Any:
  """A Python literal, lists as tuples; the text, if it is none."""
  return _read(text, None, "")


def instantiate(module_path: str, name: str, fields: Fields | None) -> Any:
  """`module_path.name(**fields)`; see `construct`.

  Raises:
    UserError: there is no such module or name in it, or a field is wrong.
  """
  module = import_module(module_path)
  if not hasattr(module, name):
    raise UserError(f"the module {module_path} has no {name!r}")
  return construct(getattr(module, name), fields, where=f"{module_path}.{name}")


def import_module(module_path: str) -> Any:
  """Imports a module that a config names.

  Raises:
    UserError: there is no such module (the nearest is named). An import that
      fails inside the module is passed on as it is.
  """
  try:
    return importlib.import_module(module_path)
  except ModuleNotFoundError as e:
    missing = e.name or ""
    if not f"{module_path}.".startswith(f"{missing}."):
      raise
  parent, _, _ = module_path.rpartition(".")
  names: list[str] = []
  if parent and parent != missing and not parent.startswith(f"{missing}."):
    path = getattr(importlib.import_module(parent), "__path__", [])
    names = [f"{parent}.{info.name}" for info in pkgutil.iter_modules(path)]
  raise UserError(
    f"there is no module {module_path!r}{suggest(module_path, names)}"
  )


def construct(
  cls: Callable[..., T],
  fields: Fields | None,
  *,
  where: str,
  **extra: Any,
) -> T:
  """`cls(**extra, **fields)` whose field errors read like config errors.

  Nested ConfigDicts become dicts and lists become tuples, so that frozen
  dataclasses and Linen modules stay hashable where their fields are.

  Args:
    cls: a dataclass, a Linen module or any callable.
    fields: the part of the config that gives its fields.
    where: the name of that part for messages, "config.task".
    **extra: fields that the program gives, not the config.

  Raises:
    UserError: an unknown field (the nearest is named), or a missing one.
  """
  parameters = dict(inspect.signature(cls).parameters)
  # Linen adds these two to every module; neither is ever in a config.
  if "parent" in parameters:
    parameters = {
      k: v for k, v in parameters.items() if k not in ("parent", "name")
    }
  kinds = [p.kind for p in parameters.values()]
  takes_any = inspect.Parameter.VAR_KEYWORD in kinds
  given = {k: _tuples(v) for k, v in _resolve(fields or {}).items()}
  known = [k for k in parameters if k not in extra]
  for key in given:
    if key in extra:
      raise UserError(f"{where}.{key} is set by the program: leave it out")
    if key not in parameters and not takes_any:
      raise UserError(f"{where} has no field {key!r}{suggest(key, known)}")
  for key, parameter in parameters.items():
    variadic = parameter.kind in (
      inspect.Parameter.VAR_KEYWORD,
      inspect.Parameter.VAR_POSITIONAL,
    )
    required = parameter.default is inspect.Parameter.empty and not variadic
    if required and key not in given and key not in extra:
      raise UserError(f"{where} lacks the field {key!r}, which has no default")
  return cls(**extra, **given)


def suggest(name: str, known: Iterable[str]) -> str:
  """The tail of a message: the nearest known name, else all of them."""
  names = [str(k) for k in known]
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
  if not near:
    # "lr" for "optim.lr": the right last part in the wrong group.
    last = name.rpartition(".")[2]
    near = [n for n in names if n.rpartition(".")[2] == last][:1]
  if near:
    return f" (did you mean {near[0]!r}?)"
  return f" (there are: {', '.join(sorted(names))})" if names else ""


def leaves(value: Fields) -> dict[str, Any]:
  """Dotted name -> value; lists as tuples, an empty group is a value."""
  flat: dict[str, Any] = {}

  def visit(name: str, node: Any) -> None:
    if isinstance(node, dict) and node:
      for key, child in node.items():
        visit(f"{name}.{key}" if name else str(key), child)
    elif name:
      flat[name] = node

  visit("", _tuples(value))
  return flat


def _put_root_on_path(path: str) -> None:
  folder = os.path.dirname(os.path.abspath(path))
  parts = folder.split(os.sep)
  if "configs" in parts:
    last = len(parts) - 1 - parts[::-1].index("configs")
    folder = os.sep.join(parts[:last]) or os.sep
  if folder not in sys.path:
    sys.path.insert(0, folder)


def _resolve(fields: Fields) -> dict[str, Any]:
  return fields.to_dict() if isinstance(fields, ConfigDict) else dict(fields)


def _plain(value: Any, where: str) -> Any:
  """`value` as JSON types, or a UserError that names the place."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (list, tuple)):
    return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, (Mapping, ConfigDict)):
    fields = _resolve(value)
    for key in fields:
      if not isinstance(key, str):
        raise UserError(f"{where} has the key {key!r}, which is not a string")
    return {k: _plain(v, f"{where}.{k}") for k, v in fields.items()}
  raise UserError(
    f"{where} is of type {type(value).__name__}, which JSON cannot hold: use"
    " numbers, strings, bools, None, tuples and dicts"
  )


def _tuples(value: Any) -> Any:
  """ConfigDicts to dicts and lists to tuples, all the way down."""
  if isinstance(value, (Mapping, ConfigDict)):
    return {k: _tuples(v) for k, v in _resolve(value).items()}
  if isinstance(value, (list, tuple)):
    return tuple(_tuples(v) for v in value)
  return value


def _same_leaf(a: Any, b: Any) -> bool:
  # NaN differs from itself, but is no change of a config.
  return a == b or (a != a and b != b)


def _read(text: str, old: Any, where: str) -> Any:
  """Text as a value of the type of `old`."""
  if text == "None":
    return None
  if isinstance(old, bool):
    if text.lower() not in _BOOLS:
      raise UserError(f"{where} must be true or false, not {text!r}")
    return _BOOLS[text.lower()]
  if isinstance(old, str):
    return text
  try:
    if isinstance(old, int):
      return int(text) if "e" not in text.lower() else _whole(float(text))
    if isinstance(old, float):
      return float(text)
    value = _tuples(ast.literal_eval(text))
  except (ValueError, SyntaxError, OverflowError) as e:
    if old is None:
      return text
    if old and isinstance(old, tuple) and all(isinstance(x, str) for x in old):
      return tuple(text.split(","))
    kind = "whole number" if isinstance(old, int) else type(old).__name__
    raise UserError(f"{where} must be a {kind}, not {text!r}") from e
  if isinstance(old, (list, tuple)) and not isinstance(value, tuple):
    return (value,)
  return value


def _whole(number: float) -> int:
  if not number.is_integer():
    raise ValueError(f"{number} is not whole")
  return int(number)
