"""lm_eval's tasks give on our model what they give on its own Hugging Face one.

And tokens are drawn among those transformers would draw among.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('lm_eval')

import safetensors.numpy
import tiny
import torch
import transformers

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  cli,
  finetune,
  freeze,
  harness,
  load_pretrained,
  tasks,
)
from qdora_jax.export import export_merged
from qdora_jax.generate import Draw, pick

pytestmark = pytest.mark.filterwarnings('ignore')
TASKS = {
  'ours_choice': """
    output_type: multiple_choice
    doc_to_text: "Q: {{question}}\\nA:"
    doc_to_choice: choices
    doc_to_target: label
    num_fewshot: 2
    fewshot_split: test
    metric_list:
      - {metric: acc, aggregation: mean, higher_is_better: true}
      - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  """,
  'ours_words': """
    output_type: generate_until
    doc_to_text: "{{question}} "
    doc_to_target: "{{choices[0]}}"
    generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 40}
    metric_list:
      - {metric: exact_match, aggregation: mean, higher_is_better: true}
  """,
  'ours_text': """
    output_type: loglikelihood_rolling
    doc_to_text: ""
    doc_to_target: "{{question}} {{choices}}"
    metric_list:
      - metric: word_perplexity
        aggregation: weighted_perplexity
        higher_is_better: false
  """,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model, and tasks over a file of ours."""
  folder = tmp_path_factory.mktemp('harness')
  tiny.write(folder / 'model')
  # It is to say nothing that its tokenizer does not know.
  file = folder / 'model' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  known = len(load_pretrained(folder / 'model')[2])
  tensors['model.embed_tokens.weight'][known:] = 0
  safetensors.numpy.save_file(tensors, file, {'format': 'pt'})
  draw = np.random.default_rng(0)
  words = ['red', 'green', 'blue', 'round', 'small', 'apple', 'pear', 'tree']
  records = []
  for n in range(12):
    choices = [str(word) for word in draw.permutation(words)[: 2 + n % 3]]
    question = f'Which is it, {" or ".join(map(str, draw.permutation(words)))}?'
    records.append({'question': question, 'choices': choices, 'label': n % 2})
  data = folder / 'data.jsonl'
  data.write_text('\n'.join(map(json.dumps, records)))
  (folder / 'tasks').mkdir()
  (folder / 'tasks' / 'group.yaml').write_text(
    'group: ours_group\ntask: [ours_choice, ours_words]\n'
    'aggregate_metric_list:\n- {metric: acc, weight_by_size: true}\n'
  )
  for name, body in TASKS.items():
    lines = '\n'.join(line[4:] for line in body.splitlines())
    (folder / 'tasks' / f'{name}.yaml').write_text(
      f'task: {name}\ndataset_path: json\ntest_split: test\n'
      f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n{lines}\n'
    )
  return folder


def test_tasks_score_the_same_as_on_the_harness_own_model(folder, monkeypatch):
  from lm_eval.models.huggingface import HFLM

  monkeypatch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  their = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'model', dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'model')
  hf = HFLM(pretrained=their, tokenizer=tokenizer, batch_size=3, max_length=256)
  model, params, own = load_pretrained(folder / 'model')
  lm = harness.Harness(model, params, own, batch_size=5, max_length=256)
  results = [
    harness.harness(
      each, list(TASKS), include_path=str(folder / 'tasks'), limit=12
    )
    for each in (lm, hf)
  ]
  ours, theirs = (r['results'] for r in results)
  for name in TASKS:
    keys = [key for key in theirs[name] if ',' in key and 'stderr' not in key]
    assert keys
    for key in keys:
      assert ours[name][key] == pytest.approx(theirs[name][key], rel=1e-4), key
  # And of each document what the model said of it.
  ours, theirs = (r['samples'] for r in results)
  for name in TASKS:
    for mine, want in zip(ours[name], theirs[name], strict=True):
      if name == 'ours_words':
        assert mine['resps'] == want['resps']
        continue
      got, expected = (
        np.array(
          [r[0][0] if isinstance(r[0], tuple) else r[0] for r in s['resps']],
          float,
        )
        for s in (mine, want)
      )
      np.testing.assert_allclose(got, expected, rtol=1e-4)
  assert len({str(sample['resps']) for sample in ours['ours_words']}) > 1


def test_by_command_with_and_without_the_adapter(folder, monkeypatch, capsys):
  monkeypatch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  rows = [{'prompt': f'{n}', 'completion': 'red'} for n in range(9)]
  (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  options = {'data.path': str(folder / 'rows.jsonl'), 'data.eval_size': 0}
  options |= {'train.steps': 1, 'data.train_size': 0}
  config = tiny.run_config(folder / 'model', **options)
  finetune.fine_tune(config, folder / 'run')
  capsys.readouterr()
  words = ['evaluate', '--workdir', str(folder / 'run'), '--limit', '2']
  names = 'ours_choice,ours_text'
  words += ['--harness', names, '--include-path', str(folder / 'tasks')]
  for more in ([], ['--base']):
    assert cli.main([*words, *more]) == 0
    out = capsys.readouterr().out
    assert '|ours_choice|' in out and '|acc ' in out
  # With what its table says, kept and listed.
  kept = json.loads((folder / 'run' / 'benchmarks.json').read_text())
  assert [entry['source'] for entry in kept] == 2 * names.split(',')
  last, text, base, _ = kept
  assert (last['model'], base['model']) == ('last', 'base')
  assert (last['total'], last['available']) == (2, 12)
  figures = r'\|acc *\|↑ *\| *([\d.]+)\|± *\| *([\d.]+)\|'
  value, error = re.search(figures, out).groups()
  acc = base['measures']['acc']
  assert acc['value'] == pytest.approx(float(value), abs=1e-4)
  half = (acc['high'] - acc['low']) / 2
  assert half == pytest.approx(1.96 * float(error), abs=1e-3)
  # Of a perplexity it gives no standard error.
  words = text['measures']['word_perplexity']
  assert words['value'] > 1 and words['low'] is words['high'] is None
  assert cli.main(['runs', str(folder / 'run')]) == 0
  assert 'ours_choice: acc' in capsys.readouterr().out


def test_qdora_scores_as_its_merged_weights_do_there(
  folder, monkeypatch, tmp_path
):
  """NF4 and an adapter, frozen; and a group of tasks is listed, too."""
  from lm_eval.models.huggingface import HFLM

  monkeypatch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  source = folder / 'model'
  model, base, tok, adapter = load_pretrained(
    source, QuantSpec(), AdapterSpec('dora', rank=4)
  )
  adapter = tiny.perturbed(adapter)
  export_merged(tmp_path, base, adapter, source, 'float32')
  their = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  hf = HFLM(pretrained=their, tokenizer=tokenizer, batch_size=3, max_length=256)
  params = freeze(base, adapter)
  lm = harness.Harness(model, params, tok, batch_size=5, max_length=256)
  path = str(folder / 'tasks')
  ours, theirs = (
    harness.harness(each, ['ours_group', 'ours_text'], include_path=path)
    for each in (lm, hf)
  )
  for name in ('ours_choice', 'ours_text'):
    mine, want = (
      [r[0][0] if isinstance(r[0], tuple) else r[0] for r in sample['resps']]
      for found in (ours, theirs)
      for sample in found['samples'][name][:1]
    )
    np.testing.assert_allclose(
      np.array(mine, float), np.array(want, float), rtol=1e-4
    )
    for key, value in theirs['results'][name].items():
      if ',' in key and 'stderr' not in key:
        assert ours['results'][name][key] == pytest.approx(value, rel=1e-4)
  listed = {result.source: result for result in harness.results(ours)}
  assert set(listed) == {'ours_group', 'ours_choice', 'ours_words', 'ours_text'}
  group = listed['ours_group']
  assert (group.total, group.available) == (24, 24)
  assert (
    group.measures['acc'].value == listed['ours_choice'].measures['acc'].value
  )
  with pytest.raises(ValueError, match="no task 'ours_choise'; near: ours_ch"):
    harness.harness(lm, ['ours_choise'], include_path=path)


@pytest.mark.parametrize(
  'temperature, top_k, top_p',
  [(1.0, 5, 1.0), (0.7, 0, 0.8), (1.3, 20, 0.5), (2.0, 0, 0.05), (1.0, 1, 1.0)],
)
def test_tokens_are_drawn_among_those_of_transformers(
  temperature, top_k, top_p
):
  """Each of them, no other, and as often as their probability says."""
  from transformers.generation import logits_process

  logits = np.random.default_rng(0).normal(0, 2, (1, 40)).astype(np.float32)
  steps = [logits_process.TemperatureLogitsWarper(temperature)]
  if top_k:
    steps.append(logits_process.TopKLogitsWarper(top_k))
  if top_p < 1:
    steps.append(logits_process.TopPLogitsWarper(top_p))
  want = torch.tensor(logits)
  for step in steps:
    want = step(None, want)
  want = torch.softmax(want, -1).numpy()[0]
  count = 40_000
  settings = {
    'temperature': jnp.float32(temperature),
    'top_p': jnp.float32(top_p),
    'key': jax.random.key(1),
  }
  many = jnp.broadcast_to(jnp.asarray(logits), (count, 40))
  draw = Draw(True, top_k, top_p < 1)
  drawn = np.asarray(jax.jit(pick, static_argnums=1)(many, draw, settings, 0))
  share = np.bincount(drawn, minlength=40) / count
  assert set(np.flatnonzero(share)) <= set(np.flatnonzero(want))
  # Five standard deviations of a share.
  assert (np.abs(share - want) <= 5 * np.sqrt(want / count) + 1e-9).all()


def test_hellaswag_is_read_as_the_harness_reads_it():
  datasets = pytest.importorskip('datasets')
  from lm_eval.tasks.hellaswag import utils

  record = {
    'activity_label': 'Home',
    'ctx_a': '[header] How to paint [title] Buy paint. [step]  Choose it.',
    'ctx_b': 'then THEY',
    'ctx': '[header] How to paint [title] Buy paint. [step]  Choose it. then',
    'endings': [' go [substeps] home. ', 'paint [title] it', 'c', 'd'],
    'label': '1',
  }
  (theirs,) = utils.process_docs(datasets.Dataset.from_list([record]))
  (row,) = tasks.find('hellaswag').rows(record)
  assert row['context'] == theirs['query']
  assert row['choices'] == [f' {choice}' for choice in theirs['choices']]
  assert row['label'] == theirs['gold']
