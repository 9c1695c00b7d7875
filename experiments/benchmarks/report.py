"""Tables and plots of a folder of results.

  python experiments/benchmarks/report.py [FOLDER] [--tables FILE.md]

Prints a Markdown table for each NAME.json, fit for a README, and draws NAME.png
beside it where the result says what is to be drawn. Numbers are medians, in
parentheses the quartiles of the rounds. Only what was measured on one machine,
with one commit and the same versions may be compared: of a folder that mixes
them each table says of which ground it is, and so does a warning above all.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path('runs/benchmarks')
# Okabe and Ito's, told apart by the colour-blind, too; the first is ours.
COLORS = ('#0072B2', '#E69F00', '#009E73', '#999999', '#CC79A7', '#D55E00')
COLORS += ('#56B4E9', '#F0E442', '#000000')


def cell(value: Any) -> str:
  """A value as a table shows it; of a spread, the median and its quartiles."""
  if value is None:
    return ''
  if isinstance(value, Mapping):
    middle, *ends = (number(value[k]) for k in ('median', 'low', 'high'))
    return middle if value['rounds'] < 2 else f'{middle} ({" to ".join(ends)})'
  return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
  """Two or three significant digits, and no exponent from .001 up."""
  size = abs(value)
  for digits, bound in enumerate((100, 10, 1)):
    if size >= bound:
      return f'{value:,.{digits}f}'
  for digits, bound in ((2, 0.1), (3, 0.01), (4, 0.001)):
    if size >= bound:
      return f'{value:.{digits}f}'
  return f'{value:.1e}' if size else '0'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table; columns are the rows' keys, in order, none empty."""
  heads = dict.fromkeys(key for row in rows for key in row)
  heads = [k for k in heads if any(k in r and r[k] is not None for r in rows)]
  lines = [heads, ['---'] * len(heads)]
  lines += [[cell(r[k]) if k in r else '' for k in heads] for r in rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def markdown(held: Mapping[str, Any]) -> str:
  """What was measured, its table, notes, and the command that made it."""
  notes = [f'* {note}' for note in held['notes']]
  made = f'`{held["command"]}`, {held["date"]}'
  parts = [held['what'], table(held['rows']), '\n'.join(notes), made]
  return '\n\n'.join(part for part in parts if part)


def ground(held: Mapping[str, Any]) -> str:
  """On what a result was measured, in one line: equal lines are comparable."""
  h = held['hardware']
  commit = held['commit'] or 'unknown'
  said = f'{h["cpu"]}, {h["cores"]} cores, {h["memory_gb"]:.0f} GB'
  if h['gpu']:
    memory = f', {h["gpu_memory_gb"]} GB each' if h['gpu_memory_gb'] else ''
    said = f'{h["gpus"]} x {h["gpu"]}{memory}; {said}'
  versions = ', '.join(f'{k} {v}' for k, v in held['versions'].items())
  changed = ' with changes' if commit.endswith('+') else ''
  return f'{said}; {versions}; commit {commit[:10].rstrip("+")}{changed}'


def read(folder: Path) -> list[dict[str, Any]]:
  """The results of a folder, by name.

  Raises:
    ValueError: naming the folder, or the file that is no result.
  """
  found = []
  for file in sorted(folder.glob('*.json')):
    try:
      held = json.loads(file.read_text())
      ground(held), held['rows'], held['notes'], held['plot']
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{file}: no result of a benchmark ({type(error).__name__}: {error})'
      ) from error
    found.append(held)
  if not found:
    raise ValueError(
      f'{folder}: no results (*.json); run a benchmark with --out {folder}'
    )
  return found


def report(results: Sequence[Mapping[str, Any]]) -> str:
  """All tables, under headings, and on what they were measured."""
  grounds = list(dict.fromkeys(map(ground, results)))
  parts = []
  if len(grounds) > 1:
    parts.append(
      f'**These results are of {len(grounds)} different machines, commits or '
      'versions: compare within a table, never between tables of different '
      'ground.**'
    )
  for held in results:
    mark = ''
    if len(grounds) > 1:
      mark = f' (ground {1 + grounds.index(ground(held))})'
    parts.append(f'### {held["name"]}{mark}\n\n{markdown(held)}')
  lines = [f'{n}. {said}' for n, said in enumerate(grounds, 1)]
  parts.append('Measured on\n\n' + '\n'.join(lines))
  return '\n\n'.join(parts)


def draw(held: Mapping[str, Any], file: Path) -> None:
  """Bars of the medians of held['plot'], whiskers their quartiles.

  The columns before the first spread say what a bar is of: the last of them its
  color, if there are several, and the first, if there are three, its panel.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  key = held['plot']
  rows = [row for row in held['rows'] if isinstance(row[key], Mapping)]
  heads = list(rows[0])
  first = next(
    n for n, k in enumerate(heads) if isinstance(rows[0][k], Mapping)
  )
  panel, *middle = heads[:first] if first > 2 else [None, *heads[:first]]
  color = middle.pop() if len(middle) > 1 else None
  panels = dict.fromkeys(row[panel] for row in rows) if panel else {None: None}
  sides = dict.fromkeys(row[color] for row in rows) if color else {None: None}
  ordered = sorted(sides, key=lambda side: side not in (None, 'ours'))
  colors = dict(zip(ordered, COLORS, strict=False))
  of = {
    p: [row for row in rows if panel is None or row[panel] == p] for p in panels
  }
  heights = [0.8 + 0.22 * len(group) for group in of.values()]
  figure, axes = plt.subplots(
    len(of),
    figsize=(7.5, sum(heights) + 0.6),
    height_ratios=heights,
    squeeze=False,
    layout='constrained',
    sharex=True,
  )
  ends = [row[key][k] for row in rows for k in ('low', 'high')]
  for ax, (name, group) in zip(axes[:, 0], of.items(), strict=True):
    place, places, before = 0.0, [], None
    for row in group:
      label = ', '.join(str(row[k]) for k in middle)
      place += 1 if label == before else 1.6
      places.append((place, label))
      before = label
      spread = row[key]
      m = spread['median']
      ax.barh(
        place,
        m,
        height=0.9,
        color=colors[row[color] if color else None],
        xerr=[[m - spread['low']], [spread['high'] - m]],
        error_kw={'lw': 1, 'capsize': 2, 'ecolor': '#333333'},
      )
    labels = dict.fromkeys(label for _, label in places)
    centers = [
      sum(p for p, x in places if x == label)
      / sum(1 for _, x in places if x == label)
      for label in labels
    ]
    ax.set_yticks(centers, list(labels))
    ax.tick_params(axis='y', length=0)
    ax.invert_yaxis()
    if min(ends) > 0 and max(ends) > 30 * min(ends):
      ax.set_xscale('log')
    ax.grid(axis='x', color='#dddddd', lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[['top', 'right', 'left']].set_visible(False)
    if panel:
      ax.set_title(f'{panel}: {name}', loc='left', fontsize=10)
  axes[-1, 0].set_xlabel(f'{key} (median, quartiles)')
  if color:
    bars = [plt.Rectangle((0, 0), 1, 1, color=colors[side]) for side in ordered]
    figure.legend(
      bars, ordered, loc='outside upper center', ncols=4, frameon=False
    )
  figure.savefig(file, dpi=130)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, nargs='?', default=FOLDER)
  parser.add_argument('--tables', type=Path, help='write them here, too')
  args = parser.parse_args()
  try:
    results = read(args.folder)
  except ValueError as error:
    raise SystemExit(str(error)) from error
  text = report(results)
  print(text)
  if args.tables:
    args.tables.write_text(text + '\n')
  for held in results:
    if held['plot']:
      draw(held, args.folder / f'{held["name"]}.png')


if __name__ == '__main__':
  main()
