"""A chat template is a program from a stranger: tried out before it is used.

jinja's sandbox, in which transformers runs it, keeps it from files and from
Python, but not from looping for ever or filling the memory. So it says a short
chat first, in a process of its own with little time and memory.
"""

import functools
import json
import subprocess
import sys

# Far more than any template needs for three turns.
_SECONDS, _BYTES = 5, 1_000_000_000
# The exit status that says so.
_MEMORY = 3
_CHAT = [
  {'role': 'user', 'content': 'Hello'},
  {'role': 'assistant', 'content': 'Hi'},
  {'role': 'user', 'content': 'Bye'},
]
# transformers' environment. What the template says, and whether it fails, is
# its own affair: that it ends is asked.
_PROGRAM = """
import datetime, json, resource, sys
seconds, most, chat, template = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
import jinja2.sandbox
from jinja2.ext import Extension, loopcontrols

class Generation(Extension):
  tags = {'generation'}
  def parse(self, parser):
    parser.stream.skip(1)
    return parser.parse_statements(['name:endgeneration'], drop_needle=True)

def refuse(message):
  raise jinja2.TemplateError(message)

resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
  env.filters['tojson'] = lambda x, **_: json.dumps(x)
  env.globals['raise_exception'] = refuse
  env.globals['strftime_now'] = datetime.datetime.now().strftime
  env.from_string(template).render(messages=chat, add_generation_prompt=True)
except MemoryError:
  sys.exit(3)
except Exception:
  pass
"""


@functools.cache
def check(template: str, where: str) -> None:
  """Raises ValueError if a template does not end, or takes too much memory.

  Args:
    template: jinja source.
    where: the checkpoint, for the message.
  """
  if sys.platform == 'win32':
    return  # It has no such limits.
  try:
    code = subprocess.run(
      [sys.executable, '-c', _PROGRAM],
      input=json.dumps([_SECONDS, _BYTES, _CHAT, template]),
      text=True,
      capture_output=True,
      timeout=10 * _SECONDS,
    ).returncode
  except subprocess.TimeoutExpired:
    code = -1
  if code:
    most = f'{_BYTES:,} bytes' if code == _MEMORY else f'{_SECONDS} seconds'
    raise ValueError(
      f'{where}: its chat template takes more than {most} for three turns; '
      'expected one that only says what was said. Replace it, or set '
      "config.data.template='plain'"
    )
