"""Texts beside references: the packages' own figures, known at the ends."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('sacrebleu')
pytest.importorskip('nltk')
pytest.importorskip('pycocoevalcap')

import sacrebleu
from nltk.translate.nist_score import corpus_nist

from qdora_jax import nlg

pytestmark = pytest.mark.filterwarnings('ignore')
SAID = [
  'Blue Spice is a coffee shop in the city centre .',
  'The Vaults is a pub near the river with a high rating .',
  'There is a cheap family friendly restaurant called Wildwood .',
]
WANTED = [
  [SAID[0], 'A coffee shop in the city centre area called Blue Spice .'],
  ['By the river there is a highly rated pub called The Vaults .'],
  ['Wildwood is cheap .', 'Wildwood is a family restaurant that is cheap .'],
]


def test_figures_are_those_of_the_packages():
  found, notes = nlg.compare(SAID, WANTED)
  # sacrebleu's own reading of rows with fewer references.
  streams = [[w[0] for w in WANTED], [w[1] if w[1:] else None for w in WANTED]]
  bleu = sacrebleu.corpus_bleu(SAID, streams)
  assert found['BLEU'].value == pytest.approx(bleu.score)
  nist = corpus_nist(
    [[text.split() for text in some] for some in WANTED],
    [text.split() for text in SAID],
  )
  assert found['NIST'].value == pytest.approx(nist)
  for measure in found.values():
    assert measure.low <= measure.value <= measure.high
  assert ('METEOR' in found) != bool(notes)


def test_the_same_texts_have_the_most_and_other_texts_nothing():
  same, _ = nlg.compare(SAID, [[text] for text in SAID])
  assert same['BLEU'].value == pytest.approx(100)
  assert same['ROUGE-L'].value == pytest.approx(1)
  assert same['CIDEr'].value == pytest.approx(10, rel=1e-3)
  other, _ = nlg.compare(['xyzzy', 'qux', ''], WANTED)
  assert other['BLEU'].value == pytest.approx(0, abs=1e-6)
  for name in ('ROUGE-L', 'NIST', 'CIDEr'):
    assert other[name].value == 0
  assert np.isfinite([m.high for m in other.values()]).all()


def write_wordnet(folder):
  """WordNet's files with one synset: an auto is a car."""
  folder.mkdir(parents=True)
  for name in ('noun', 'verb', 'adj', 'adv'):
    for file in (f'data.{name}', f'index.{name}', f'{name}.exc'):
      (folder / file).touch()
  (folder / 'index.sense').touch()
  (folder / 'lexnames').write_text('00\tnoun.all\t1\n')
  (folder / 'data.noun').write_text(
    '00000000 00 n 02 car 0 auto 0 000 | a motor vehicle  \n'
  )
  (folder / 'index.noun').write_text(
    ''.join(f'{word} n 1 0 1 0 00000000  \n' for word in ('auto', 'car'))
  )


def test_meteor_knows_synonyms_where_wordnet_is(tmp_path):
  """By nltk, which looks stems up: of words that are their own stems.

  In a process of its own: nltk keeps what it has once loaded.
  """
  write_wordnet(tmp_path / 'corpora' / 'wordnet')
  program = (
    'from qdora_jax import nlg\n'
    "found, notes = nlg.compare(['an auto'], [['a car']])\n"
    "print(found['METEOR'].value, notes)"
  )
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', program],
    env={**os.environ, 'NLTK_DATA': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  # One of two words in one chunk: a mean of 1/2, halved for its order.
  assert (done.stdout, done.stderr) == ('0.25 []\n', '')


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='2 answers and 3 lists'):
    nlg.compare(SAID[:2], WANTED)
