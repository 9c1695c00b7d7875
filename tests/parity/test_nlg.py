"""Texts beside references: the packages' own figures, known at the ends."""

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


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='2 answers and 3 lists'):
    nlg.compare(SAID[:2], WANTED)
