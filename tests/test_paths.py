"""Names, rules, and the errors of rules."""

import re

import numpy as np
import pytest

from qdora_jax import paths

TREE = {
  'embed': {'embedding': np.zeros((8, 4))},
  'layers': {
    'attn': {'q': {'kernel': np.zeros((3, 4, 4))}},
    'mlp': {'up': {'kernel': np.zeros((3, 4, 8)), 'bias': np.zeros((3, 8))}},
  },
}


def test_flatten_and_back():
  flat = paths.flatten(TREE)
  assert list(flat) == [
    'embed/embedding',
    'layers/attn/q/kernel',
    'layers/mlp/up/kernel',
    'layers/mlp/up/bias',
  ]
  assert paths.unflatten(flat) == TREE


def test_stacked_leaves_are_named_by_layer():
  flat = paths.flatten(TREE)
  names = paths.names('layers/attn/q/kernel', flat['layers/attn/q/kernel'])
  assert names == [f'layers/{n}/attn/q/kernel' for n in range(3)]
  assert paths.names('embed/embedding', flat['embed/embedding']) == [
    'embed/embedding'
  ]


def test_select_matches_whole_names_layer_by_layer():
  assert paths.select(TREE, r'layers/[02]/.*/kernel') == {
    'layers/attn/q/kernel': (True, False, True),
    'layers/mlp/up/kernel': (True, False, True),
  }


def test_a_rule_that_matches_nothing_says_what_is_near():
  with pytest.raises(ValueError, match='layers/0/mlp/up/kernel') as error:
    paths.select(TREE, 'up/kernel')
  assert "try '.*up/kernel.*'" in str(error.value)
  with pytest.raises(ValueError, match=re.escape("try '.*/up.*'")):
    paths.select(TREE, '.*/up')
  with pytest.raises(ValueError, match='matches no parameter'):
    paths.select(TREE, 'q_proj')
  with pytest.raises(ValueError, match='not a regular expression'):
    paths.select(TREE, '(')


def test_first_match_wins():
  rules = (('a.*', 1), ('ab', 2))
  assert paths.first_match(rules, 'ab', 0) == 1
  assert paths.first_match(rules, 'b', 0) == 0
