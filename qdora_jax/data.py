"""From rows to batches: packed or padded, shuffled, mixed, resumable.

A batch of B rows is a dict of arrays whose shapes never change in a run:

  tokens     i32 [B, L]   one example, or several packed; padded on the right
  positions  i32 [B, L]   0, 1, ... within each example
  segments   i32 [B, L]   1, 2, ... for the examples of a row, 0 for padding
  loss_at    i32 [B, C]   where a learned token is predicted from
  labels     i32 [B, C]   that token
  weights    f32 [B, C]   1, or 0 for padding

Logits are made at `loss_at` alone. Examples of one row cannot see each other:
attention stays within a segment.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from qdora_jax import chat, rows
from qdora_jax.chat import Example, Format
from qdora_jax.config import DataSection
from qdora_jax.rows import Row

Batch = dict[str, np.ndarray]
TooLong = Literal['drop', 'truncate']


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows to train on, by source, with their weights; others to test on.

  `overlap` is how many rows were left out of training because their question is
  held out, case and blanks aside.
  """

  train: Mapping[str, Sequence[Row]]
  weights: Mapping[str, float]
  held_out: Sequence[Row]
  overlap: int = 0


def load_data(section: DataSection) -> Data:
  """The rows a config names; no question is in both parts.

  Without a file of their own, held-out rows are taken from every source by its
  weight: of a reasoning-gym task the first, of a file random ones. Which ones
  does not depend on how many are trained on.

  Raises:
    ValueError, FileNotFoundError: saying which row of which file is not what it
      should be, or that nothing is left to train on.
  """
  sources = dict(section.mix) or {section.path or section.name: 1.0}
  total = sum(sources.values())
  held_out: list[Row] = []
  if section.eval_path:
    held_out = rows.distinct(
      rows.read(section.eval_path, section.fields, section.options)
    )[: section.eval_size]
  train: dict[str, list[Row]] = {}
  for source, weight in sources.items():
    share = round(section.eval_size * weight / total)
    if section.eval_path:
      share = 0
    apart, train[source] = _split(section, source, share)
    held_out += apart
  tested = {row.bare for row in held_out}
  overlap = 0
  for source, some in train.items():
    count = section.train_size or len(some)
    free = [n for n, row in enumerate(some) if row.bare not in tested]
    # Up to the first row that is not asked for.
    looked_at = free[count] if len(free) > count else len(some)
    train[source] = [some[n] for n in free[:count]]
    overlap += looked_at - len(train[source])
    if not train[source]:
      raise ValueError(
        f'{source}: nothing is left to train on; all of its rows are among '
        f'the {len(held_out)} held out '
        f'(config.data.eval_size={section.eval_size}). Lower it, or give other '
        'rows in config.data.eval_path'
      )
  return Data(train, sources, held_out, overlap)


def _split(
  section: DataSection, source: str, share: int
) -> tuple[list[Row], list[Row]]:
  """(held out, the rest) of one source."""
  family, _, task = source.partition('/')
  if family == 'reasoning_gym' and task:
    # Problem i is drawn from seed + i, so two seeds give overlapping sets: one
    # seed is drawn from.
    count = section.train_size or 1000
    found = rows.of_task(task, share + count, section.seed, section.options)
    return found[:share], found[share:]
  found = rows.read(source, section.fields, section.options)
  order = np.random.default_rng(section.seed).permutation(len(found))
  apart = rows.distinct(found[n] for n in order)[:share]
  places = {row.place for row in apart}
  if section.train_rows == 'random':
    found = [found[n] for n in order]
  rest = [row for row in found if row.place not in places]
  return apart, rest


@dataclasses.dataclass(frozen=True)
class Counts:
  """What became of the examples.

  Attributes:
    examples: those trained on.
    tokens: theirs.
    learned: tokens among them that are learned.
    dropped: examples left out for their length.
    truncated: examples cut for their length.
    packed: rows they are laid out in; an epoch.
    length: L, a row's length.
    split: conversations of which every turn is an example of its own, because
      the chat template rewrites earlier turns (see `chat.encode_turns`).
    turns: examples made of them, too long ones included.
  """

  examples: int
  tokens: int
  learned: int
  dropped: int
  truncated: int
  packed: int
  length: int
  split: int = 0
  turns: int = 0

  @property
  def filled(self) -> float:
    """Share of the rows' places that hold a token: packing's efficiency."""
    return self.tokens / (self.packed * self.length)

  def __str__(self) -> str:
    lost = [
      f'{n:,} {what}'
      for n, what in ((self.dropped, 'dropped'), (self.truncated, 'truncated'))
      if n
    ]
    return (
      f'{self.examples:,} examples, {self.tokens:,} tokens, {self.learned:,} '
      f'of them learned; {self.packed:,} rows of {self.length} tokens, '
      f'{self.filled:.0%} filled'
      + (f'; TOO LONG: {" and ".join(lost)}' if lost else '')
      + (
        f'; {self.split:,} conversations were split into {self.turns:,} '
        'examples, one an assistant turn: the chat template rewrites earlier '
        'turns'
        if self.split
        else ''
      )
    )


class Batches:
  """An endless, shuffled sequence of batches: a function of seed and step.

  `batches[n]` is batch n; `iter(batches)` is a grain iterator, whose
  `get_state` and `set_state` hold its position.

  Example:
    >>> examples = [encode(tokenizer, row) for row in rows]
    >>> batches = Batches(examples, batch_size=8, seq_len=512, packing=True)
  """

  def __init__(
    self,
    examples: Sequence[Example] | Mapping[str, Sequence[Example]],
    batch_size: int,
    seq_len: int = 0,
    *,
    seed: int = 0,
    packing: bool = False,
    too_long: TooLong = 'drop',
    weights: Mapping[str, float] | None = None,
  ):
    """Fits the examples into rows and fixes the shapes.

    Args:
      examples: what to train on, or several such sources by name.
      batch_size: B.
      seq_len: a row's length at most; 0 takes the longest example's.
      seed: of the order; every epoch has its own.
      packing: lays several examples into one row, the longest first, each where
        it fits best; once, so that epochs differ in the order of rows.
      too_long: what happens to an example longer than seq_len.
      weights: each source's share of the examples; None: as many as it has.

    Raises:
      ValueError: if no example is left.
    """
    named = examples if isinstance(examples, Mapping) else {'data': examples}
    weights = weights or {name: len(some) for name, some in named.items()}
    self.batch_size = batch_size
    fitted = {
      name: _fit(some, seq_len, too_long) for name, some in named.items()
    }
    for name, (fits, _) in fitted.items():
      if not fits:
        if not named[name]:
          raise ValueError(f'{name}: there are no examples')
        raise ValueError(
          f'{name}: none of {len(named[name])} examples can be learned from '
          f'within train.seq_len={seq_len}: the shortest has '
          f'{min(map(len, named[name]))} tokens. Raise it, or set it to 0'
        )
    every = [example for fits, _ in fitted.values() for example in fits]
    longest = max(map(len, every))
    # Whole vector registers; the model's products like multiples of 8.
    self.length = -(-(seq_len if packing and seq_len else longest) // 8) * 8
    layouts = {
      name: _layout(fits, self.length, packing)
      for name, (fits, _) in fitted.items()
    }
    laid_out = [row for layout in layouts.values() for row in layout]
    self.learned = max(
      sum(int(e.learned[1:].sum()) for e in row) for row in laid_out
    )
    self.counts = Counts(
      len(every),
      sum(map(len, every)),
      sum(int(e.learned[1:].sum()) for e in every),
      sum(len(some) for some in named.values()) - len(every),
      sum(cut for _, cut in fitted.values()),
      len(laid_out),
      self.length,
      sum(e.part == 1 for some in named.values() for e in some),
      sum(e.part > 0 for some in named.values() for e in some),
    )
    orders, shares = [], []
    for n, (name, layout) in enumerate(layouts.items()):
      # grain's seeds have 32 bits.
      own = int(np.random.default_rng((seed, n)).integers(2**32))
      # Without an end grain has a length of 2^63 - 1, which it rounds up:
      # batches of one row would be more than Python counts.
      order = grain.MapDataset.source(layout).shuffle(seed=own)
      orders.append(order.repeat(2**50 // len(layout)))
      # A weight counts examples; grain mixes rows.
      shares.append(weights[name] * len(layout) / len(fitted[name][0]))
    mixed = orders[0]
    if len(orders) > 1:
      mixed = grain.MapDataset.mix(
        orders, weights=[share / sum(shares) for share in shares]
      )
    self._layouts = laid_out
    self._batches = mixed.batch(batch_size, batch_fn=self._arrays)

  def __getitem__(self, step: int) -> Batch:
    return self._batches[step]

  def __iter__(self) -> grain.DatasetIterator:
    # In memory already: grain's 16 threads and 500 batches ahead would take
    # the time they hide from whoever traces and compiles.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(self._batches.to_iter_dataset(options))

  def once(self) -> Iterator[Batch]:
    """Every example once, in order; the last batch filled up with weight 0."""
    for start in range(0, len(self._layouts), self.batch_size):
      part = self._layouts[start : start + self.batch_size]
      yield self._arrays([*part, *[()] * (self.batch_size - len(part))])

  def _arrays(self, part: Sequence[Sequence[Example]]) -> Batch:
    """The batch of some rows, each a few examples."""
    shape, short = (len(part), self.length), (len(part), self.learned)
    batch = {
      'tokens': np.zeros(shape, np.int32),
      'positions': np.zeros(shape, np.int32),
      'segments': np.zeros(shape, np.int32),
      'loss_at': np.zeros(short, np.int32),
      'labels': np.zeros(short, np.int32),
      'weights': np.zeros(short, np.float32),
    }
    for row, examples in enumerate(part):
      at = learned = 0
      for n, example in enumerate(examples, 1):
        here = np.s_[row, at : at + len(example)]
        batch['tokens'][here] = example.tokens
        batch['positions'][here] = np.arange(len(example))
        batch['segments'][here] = n
        # Nothing stands before the first token to predict it from.
        places = np.flatnonzero(example.learned[1:])
        there = np.s_[row, learned : learned + len(places)]
        batch['loss_at'][there] = at + places
        batch['labels'][there] = example.tokens[places + 1]
        batch['weights'][there] = 1
        at += len(example)
        learned += len(places)
    return batch


def _fit(
  examples: Sequence[Example], seq_len: int, too_long: TooLong
) -> tuple[list[Example], int]:
  """The examples that can be used, and how many of them were cut."""
  fits, cut = [], 0
  for example in examples:
    if seq_len and len(example) > seq_len:
      if too_long == 'drop':
        continue
      example = dataclasses.replace(
        example,
        tokens=example.tokens[:seq_len],
        learned=example.learned[:seq_len],
      )
      cut += bool(example.learned[1:].any())
    if example.learned[1:].any():
      fits.append(example)
  return fits, cut


def _layout(
  examples: Sequence[Example], length: int, packing: bool
) -> list[list[Example]]:
  """Rows of examples: one each, or packed best fit first, longest first."""
  if not packing:
    return [[example] for example in examples]
  room: list[tuple[int, int]] = []
  packed: list[list[Example]] = []
  for example in sorted(examples, key=len, reverse=True):
    place = bisect.bisect_left(room, (len(example), -1))
    if place == len(room):
      left, row = length, len(packed)
      packed.append([])
    else:
      left, row = room.pop(place)
    packed[row].append(example)
    bisect.insort(room, (left - len(example), row))
  return packed


def encode_all(
  tokenizer: Any,
  some: Iterable[Row],
  form: Format,
  progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> list[list[Example]]:
  """The examples of each row: one, or one a turn (see `chat.encode_turns`)."""
  return list(chat.encode_rows(tokenizer, progress(some), form))
