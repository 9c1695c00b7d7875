"""Names of parameters: 'a/b/c', one per layer of a stack, chosen by regex.

A parameter tree is nested dicts; whatever is not a dict is a leaf. Layers that
a scan runs over are stacked under a component called `layers`, with a leading
layer axis on every array; their names still count layers: the leaf at
`layers/attn/q/kernel` of 30 layers is `layers/0/attn/q/kernel` and so on.
Rules are regular expressions that must match a whole name.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

STACK = 'layers'


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/b/c': leaf} of nested dicts, in the tree's order."""
  return dict(_walk(tree, ()))


def _walk(node: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  if not isinstance(node, Mapping):
    yield '/'.join(prefix), node
    return
  for key, child in node.items():
    yield from _walk(child, (*prefix, key))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def names(path: str, leaf: Any) -> list[str]:
  """The names a leaf answers to: its path, or one per layer if stacked."""
  parts = path.split('/')
  if STACK not in parts:
    return [path]
  at = parts.index(STACK) + 1
  return [
    '/'.join([*parts[:at], str(n), *parts[at:]]) for n in range(leaf.shape[0])
  ]


def of(path: Any) -> str:
  """'layers/attn/q/kernel/lora_a' from a key path of jax.tree_util."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def select(
  tree: Mapping[str, Any], pattern: str, rule: str = 'the rule'
) -> dict[str, tuple[bool, ...]]:
  """Which names of each leaf a regex matches, leaves without any left out.

  Args:
    tree: nested dicts.
    pattern: regular expression that must match a whole name.
    rule: what the pattern is called in messages: 'adapter.targets'.

  Returns:
    {path: (matched, ...)}, one bool per layer for stacked leaves.

  Raises:
    ValueError: if the pattern is no regex or matches nothing; the message lists
      the nearest names.
  """
  try:
    regex = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'{rule} {pattern!r} is not a regular expression: {error}'
    ) from None
  found = {
    path: tuple(regex.fullmatch(n) is not None for n in names(path, leaf))
    for path, leaf in flatten(tree).items()
  }
  found = {path: hits for path, hits in found.items() if any(hits)}
  if not found:
    raise nothing_matches(pattern, tree, rule)
  return found


def nothing_matches(
  pattern: str, tree: Mapping[str, Any], rule: str = 'the rule'
) -> ValueError:
  """The error for a rule that matches no parameter, naming near ones."""
  have = [names(path, leaf)[0] for path, leaf in flatten(tree).items()]
  partial = [n for n in have if re.search(pattern, n)]
  hint = ''
  if partial:
    whole = f'.*{pattern.removeprefix(".*").removesuffix(".*")}.*'
    hint = f' It matches a part of {partial[0]!r}: try {whole!r}.'
  return ValueError(
    f'{rule} {pattern!r} matches no parameter. Rules match whole names such as '
    f'{", ".join(map(repr, near(pattern, have)))}.{hint}'
  )


def near(name: str, have: Iterable[str]) -> list[str]:
  """The up to three names most like a given one."""
  have = list(have)
  return difflib.get_close_matches(name, have, n=3, cutoff=0.3) or have[:3]


def beside(path: str | Path) -> str:
  """A hint for a file that is not there: what lies beside it, or ''."""
  folder = Path(path).expanduser().parent
  have = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  found = difflib.get_close_matches(Path(path).name, have, n=3)
  return f'; beside it: {", ".join(found)}' if found else ''


def first_match(
  rules: Iterable[tuple[str, Any]], name: str, default: Any
) -> Any:
  """The value of the first rule (regex, value) that matches the whole name."""
  for pattern, value in rules:
    if re.fullmatch(pattern, name):
      return value
  return default
