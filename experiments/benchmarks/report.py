"""Tables and plots of a folder of results.

  python experiments/benchmarks/report.py [FOLDER] [--plots FOLDER]

Prints a Markdown table for each result, fit for a README, and writes NAME.png
beside NAME.json where the result says what is to be drawn. Results of different
machines, commits or versions are not comparable: the report says which are
which, above each table and once more at the end.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def cell(value: Any) -> str:
  """A value as a table shows it; of a spread, the median and its quartiles."""
  if value is None:
    return ''
  if isinstance(value, Mapping):
    middle, *ends = (number(value[k]) for k in ('median', 'low', 'high'))
    return middle if value['rounds'] < 2 else f'{middle} ({" to ".join(ends)})'
  return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
  """Three significant digits, never an exponent."""
  size = abs(value)
  for digits, bound in enumerate((100, 10, 1, 0.1, 0.01)):
    if size >= bound:
      return f'{value:,.{digits}f}'
  return f'{value:.3g}' if size >= 1e-4 or not size else f'{value:.2g}'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table; columns are the rows' keys, in order, none empty."""
  heads = dict.fromkeys(key for row in rows for key in row)
  heads = [k for k in heads if any(k in r and r[k] is not None for r in rows)]
  lines = [heads, ['---'] * len(heads)]
  lines += [[cell(r[k]) if k in r else '' for k in heads] for r in rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def markdown(held: Mapping[str, Any]) -> str:
  return table(held['rows']) + '\n' + '\n'.join(held['notes'])
