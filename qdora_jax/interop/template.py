"""A chat template is a program from a stranger: it runs in a process apart.

jinja's sandbox, in which transformers runs it, keeps it from files and from
Python, but not from looping for ever or filling the memory; and what it does
with one chat says nothing of what it does with the next. So transformers
renders every chat in a process of its own, which has little time and memory for
each, stays for the next ones, and ends with this one.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Far more than any template needs for one chat.
_SECONDS, _BYTES = 5, 1_000_000_000
# For it to start, on a busy machine.
_START = 300
# Characters of a rendered chat, beside ten times what was asked with it.
_CHARACTERS = 1_000_000
# A line asks: template, variables, limits and chats, each with the lengths at
# which it is rendered. A line for each of these answers: [text, what is wrong].
_PROGRAM = """
import contextlib, json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with contextlib.suppress(ValueError, OSError):  # Not every system has it.
  resource.setrlimit(resource.RLIMIT_AS, (most, most))
_, hard = resource.getrlimit(resource.RLIMIT_CPU)

def answers(longest, template, variables, seconds, chats):
  for chat, cuts in chats:
    for n, ask in cuts:
      used = resource.getrusage(resource.RUSAGE_SELF)
      soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
      resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
      try:
        (text,), _ = render_jinja_template(
          conversations=[chat[:n]], chat_template=template,
          add_generation_prompt=ask, **variables)
        if len(text) <= longest:
          yield text, None
          continue
        yield None, ['characters', longest]
      except MemoryError:
        yield None, ['bytes', most]
      except Exception as error:
        yield None, ['refused', str(error)[:1000]]
      return

print('ready', flush=True)
for line in sys.stdin:
  characters, *request = json.loads(line)
  for answer in answers(characters + 10 * len(line), *request):
    sys.stdout.write(json.dumps(answer) + chr(10))
  sys.stdout.flush()
"""
_QUIET = {
  'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
  'TRANSFORMERS_VERBOSITY': 'error',
  'OPENBLAS_NUM_THREADS': '1',
}

Chat = Sequence[Mapping[str, Any]]
# (turns, with a generation prompt?)
Cuts = Sequence[tuple[int, bool]]


class Refused(ValueError):
  """The template's own error, in its words."""


def render(
  template: str,
  variables: Mapping[str, Any],
  chats: Sequence[tuple[Chat, Cuts]],
  where: str,
) -> Iterator[str]:
  """The text of each chat at each of its cuts, as transformers renders it.

  Args:
    template: jinja source.
    variables: what it may name beside the messages: the special tokens.
    chats: each with the lengths at which to render it, and whether the
      assistant is then asked to speak.
    where: the checkpoint, for messages.

  Raises:
    Refused: if the template raises an error.
    ValueError: if it takes too much time or memory, or says too much.
  """
  # As apply_chat_template does: a key without a value is no key.
  plain = [
    ([{k: v for k, v in t.items() if v is not None} for t in chat], cuts)
    for chat, cuts in chats
  ]
  worker, left = _take(), sum(len(cuts) for _, cuts in chats)
  try:
    worker.ask([_CHARACTERS, template, variables, _SECONDS, plain])
    while left:
      text, wrong = worker.answer()
      left -= 1
      if wrong is None:
        yield text
        continue
      what, most = wrong
      if what == 'refused':
        left = 0
        raise Refused(most)
      left = 1
      raise ValueError(
        f'{where}: its chat template (tokenizer_config.json or '
        f'chat_template.jinja) takes more than {most:,} {what} for one chat; '
        'expected one that only says what was said. Replace it, or set '
        "config.data.template='plain'"
      )
  finally:
    # What has answered all that it was asked can be asked again.
    if left:
      worker.stop()
    else:
      _idle.append((os.getpid(), worker))


class _Worker:
  """A process that renders chats."""

  def __init__(self) -> None:
    self._rest = b''
    self._process = subprocess.Popen(
      [sys.executable, '-P', '-c', _PROGRAM, str(_BYTES)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, **_QUIET},
      # Ctrl-C is for this process.
      start_new_session=True,
    )
    if self._line(_START) != b'ready':
      self.stop()
      raise RuntimeError(
        f'{sys.executable} does not start the process that renders chat '
        f'templates (status {self._process.returncode}); it says why above. '
        "Or set config.data.template='plain'"
      )

  @property
  def alive(self) -> bool:
    return self._process.poll() is None

  def ask(self, request: Any) -> None:
    # One that has died is found out when it does not answer.
    with contextlib.suppress(BrokenPipeError):
      line = json.dumps(request, default=_plain)
      self._process.stdin.write(line.encode() + b'\n')
      self._process.stdin.flush()

  def answer(self) -> tuple[str | None, tuple[str, Any] | None]:
    # The limit is of its own time; this one is for a machine that is busy.
    line = self._line(20 * _SECONDS)
    if line:
      return json.loads(line)
    if line is None or self._process.wait() == -signal.SIGXCPU:
      return None, ('seconds', _SECONDS)
    return None, ('bytes', _BYTES)

  def _line(self, seconds: float) -> bytes | None:
    """What it says next; b'' if it has ended, None if it is silent so long."""
    pipe = self._process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while b'\n' not in self._rest:
      if not poll.poll(1000 * seconds):
        return None
      more = os.read(pipe, 1 << 20)
      if not more:
        return b''
      self._rest += more
    line, _, self._rest = self._rest.partition(b'\n')
    return line

  def stop(self) -> None:
    self._process.kill()
    self._process.wait()
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.stdout.close()


# (process id, worker): a fork must not talk to its parent's.
_idle: list[tuple[int, _Worker]] = []


def _take() -> _Worker:
  """One that waits, or a new one."""
  mine = os.getpid()
  for pair in list(_idle):
    with contextlib.suppress(ValueError):  # Another thread has taken it.
      if pair[0] == mine:
        _idle.remove(pair)
        if pair[1].alive:
          return pair[1]
        pair[1].stop()
  return _Worker()


@atexit.register
def close() -> None:
  """Ends the processes that wait for chats; the next chat starts one again."""
  mine = os.getpid()
  for pair in list(_idle):
    if pair[0] == mine:
      _idle.remove(pair)
      pair[1].stop()


def _plain(value: Any) -> Any:
  """Of what JSON has no word for, as transformers shows it to a template."""
  if isinstance(value, np.generic):
    return value.item()
  return f'<{type(value).__name__}>'
