"""Texts beside references: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

Each from a well-kept package (the extra `eval`): BLEU by sacrebleu (13a tokens,
case kept, several references), ROUGE-L by rouge-score (F-measure, the best
reference), NIST and METEOR by nltk, CIDEr by pycocoevalcap (lower case, split
at blanks: its own tokenizer is a Java program). METEOR needs nltk's WordNet and
is left out, and said so, without (`python -m nltk.downloader wordnet`). The E2E
challenge's own script tokenizes otherwise: its figures are near these, and not
equal to them.
"""

import importlib.util
import math
from collections.abc import Sequence

import numpy as np

from qdora_jax.intervals import Measure, bootstrap

RESAMPLES = 300


def check() -> None:
  """Raises ImportError, naming the extra, where a package is not installed."""
  for name in ('nltk', 'sacrebleu', 'rouge_score', 'pycocoevalcap'):
    if importlib.util.find_spec(name) is None:
      raise ImportError(
        f"texts are compared with {name}: pip install 'qdora_jax[eval]'"
      )


def compare(
  answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, Measure], list[str]]:
  """All measures of texts beside their references, and what was left out.

  Args:
    answers: a text for each input.
    references: one or more for each.

  Returns:
    ({'BLEU': ..., 'ROUGE-L': ..., ...}, notes). BLEU from 0 to 100, ROUGE-L and
    METEOR from 0 to 1, CIDEr from 0 to 10, NIST from 0.

  Raises:
    ImportError: naming the extra, if a package is not installed.
    ValueError: for no answers, or other counts of both.
  """
  if not answers or len(answers) != len(references):
    raise ValueError(
      f'compare: {len(answers)} answers and {len(references)} lists of '
      'references; expected as many of both, and at least one'
    )
  check()
  import nltk
  import sacrebleu
  from nltk.translate.nist_score import corpus_nist
  from pycocoevalcap.cider.cider_scorer import CiderScorer
  from rouge_score.rouge_scorer import RougeScorer

  count = len(answers)
  most = max(map(len, references))
  streams = [
    [some[n] if n < len(some) else None for some in references]
    for n in range(most)
  ]
  bleu = sacrebleu.BLEU()
  # Its own statistics of each text: resampled without reading texts anew.
  stats = np.array(bleu._extract_corpus_statistics(answers, streams))
  found = {
    'BLEU': bootstrap(
      lambda at: (
        bleu._compute_score_from_stats(stats[at].sum(0).tolist()).score
      ),
      count,
      resamples=RESAMPLES,
    )
  }
  rouge = RougeScorer(['rougeL'])
  longest = np.array(
    [
      max(
        rouge.score(reference, answer)['rougeL'].fmeasure for reference in some
      )
      for answer, some in zip(answers, references, strict=True)
    ]
  )
  found['ROUGE-L'] = bootstrap(lambda at: longest[at].mean(), count)
  said = [answer.split() for answer in answers]
  wanted = [[text.split() for text in some] for some in references]

  def nist(at: np.ndarray) -> float:
    longest = max(len(said[n]) for n in at)
    if not longest:
      return 0.0
    return corpus_nist(
      [wanted[n] for n in at], [said[n] for n in at], min(5, longest)
    )

  found['NIST'] = bootstrap(nist, count, resamples=50)
  cider = CiderScorer()
  for answer, some in zip(answers, references, strict=True):
    cider.cook_append(answer.lower(), [text.lower() for text in some])
  _, each = cider.compute_score()
  each = np.nan_to_num(np.asarray(each))
  found['CIDEr'] = bootstrap(lambda at: each[at].mean(), count)
  notes = []
  try:
    nltk.corpus.wordnet.ensure_loaded()
    meteors = np.array(
      [
        nltk.translate.meteor(some, answer)
        for answer, some in zip(said, wanted, strict=True)
      ]
    )
    found['METEOR'] = bootstrap(lambda at: meteors[at].mean(), count)
  except LookupError:
    notes.append(
      "METEOR is left out: nltk's WordNet is not installed (python -m "
      'nltk.downloader wordnet)'
    )
  assert all(math.isfinite(measure.value) for measure in found.values())
  return found, notes
