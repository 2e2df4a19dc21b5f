"""Standard evaluation: lm-eval finds on our models what it finds on those of transformers."""

import doctest
import functools
import json
import sys

import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from polgrad import build, evaluate, lm_eval, loading
from tests import hub

flags.FLAGS.mark_as_parsed()

QUESTIONS = [
  {'question': 'The capital of France is', 'choices': ['Paris', 'Rome', 'a cat'], 'answer': 0},
  {'question': 'Grass is', 'choices': ['blue', 'green'], 'answer': 1},
  {'question': 'Two plus two is', 'choices': ['four', 'five', 'six hundred'], 'answer': 0},
  {'question': 'Ice is made of', 'choices': ['sand', 'frozen water'], 'answer': 1},
]
TEXTS = [
  'The quick brown fox jumps over the lazy dog.',
  'naïve café, 東京 and 🙂: bytes of several tokens.\n\nA second paragraph follows here.',
]
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
task: {name}
output_type: {kind}
"""
TASKS = {
  'own_choices': (
    'multiple_choice',
    [*QUESTIONS],
    'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    'metric_list: [{metric: acc}, {metric: acc_norm}]\n',
  ),
  'own_words': (
    'generate_until',
    [*QUESTIONS],
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
    'generation_kwargs: {until: ["."], max_gen_toks: 8}\n'
    'metric_list: [{metric: exact_match}]\n',
  ),
  'own_texts': (
    'loglikelihood_rolling',
    [{'text': text} for text in TEXTS],
    'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    'metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n',
  ),
}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """The names of three tasks, and lm-eval's manager, which knows them by their folder."""
  folder = tmp_path_factory.mktemp('tasks')
  for name, (kind, records, rest) in TASKS.items():
    file = folder / f'{name}.jsonl'
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    (folder / f'{name}.yaml').write_text(DATA.format(file=file, name=name, kind=kind) + rest)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_HOME', str(folder / 'cache'))
    # The index of lm-eval's own tasks takes seconds.
    short = functools.partial(TaskManager, include_defaults=False)
    patch.setattr('lm_eval.tasks.TaskManager', short)
    patch.setattr('datasets.config.HF_DATASETS_CACHE', str(folder / 'cache'))
    yield [*TASKS], str(folder)


def model(folder, rows):
  config = loading.bare(folder)
  config.mesh.data = 1
  experiment = build.build(config)
  params = evaluate.init_params(experiment.policy, experiment.mesh, 0)
  return lm_eval.Model(experiment, params, rows)


def both(folder, names, include, rows=4, **settings):
  """Answers and scores of ours, and of lm-eval's backend for transformers in float32."""
  torch.set_num_threads(1)
  theirs = HFLM(folder, device='cpu', dtype=torch.float32, batch_size=4)
  settings |= dict(bootstrap_iters=0)
  return (
    lm_eval.evaluate(model(folder, rows), names, lm_eval.find_tasks(names, [include]), **settings),
    simple_evaluate(
      theirs,
      tasks=names,
      task_manager=lm_eval.find_tasks(names, [include]),
      batch_size=4,
      **settings,
    ),
  )


def same(ours, theirs):
  """Compares all answers, and all scores."""
  for name, samples in theirs['samples'].items():
    for own, other in zip(ours['samples'][name], samples, strict=True):
      assert own['arguments'] == other['arguments']
      for mine, wanted in zip(own['filtered_resps'], other['filtered_resps'], strict=True):
        assert mine == pytest.approx(wanted, abs=1e-3)
  for name, scores in theirs['results'].items():
    numbers = {key: x for key, x in scores.items() if isinstance(x, float)}
    assert numbers and {key: ours['results'][name][key] for key in numbers} == pytest.approx(
      numbers, rel=1e-4
    )


def test_scores_of_smollm2_are_those_of_the_backend_for_transformers(smollm2, tasks):
  same(*both(smollm2, ['own_choices'], tasks[1], rows=5, limit=2))


def test_scores_and_texts_with_a_bos_token_are_those_of_the_backend_for_transformers(
  tasks, tmp_path
):
  same(*both(hub.small('llama3', tmp_path), *tasks, num_fewshot=1))


def test_prompts_in_a_chat_template_are_those_of_the_backend_for_transformers(tasks, tmp_path):
  settings = dict(apply_chat_template=True, system_instruction='Be short.', num_fewshot=1)
  folder = hub.small('qwen3', tmp_path)
  same(*both(folder, ['own_choices', 'own_texts'], tasks[1], **settings))


def test_the_main_prints_a_table_and_writes_the_results(tasks, tmp_path, capsys):
  folder, out = hub.small('qwen3', tmp_path), tmp_path / 'new/results.json'
  given = dict(model=folder, tasks=['own_choices'], include_path=[tasks[1]], out=str(out), limit=2)
  with flagsaver.flagsaver(compilation_cache='', **given):
    lm_eval.main(['lm_eval'])
  assert '|own_choices|' in capsys.readouterr().out
  found = json.loads(out.read_text())
  assert found['n-samples']['own_choices']['effective'] == 2 and 'samples' not in found


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({}, 'name tasks: --tasks='),
    ({'tasks': ['own_choicez']}, "--tasks: unknown 'own_choicez'; did you mean 'own_choices'?"),
    ({'include_path': ['/no']}, '--include_path: there is no folder /no'),
  ],
)
def test_wrong_names_are_refused_in_one_line(given, said, tasks, capsys):
  given = {'include_path': [tasks[1]], 'model': 'unread', 'compilation_cache': ''} | given
  with flagsaver.flagsaver(**given), pytest.raises(SystemExit) as ended:
    lm_eval.main(['lm_eval'])
  told = capsys.readouterr().err
  assert ended.value.code == 2 and said in told and told.count('\n') == 1


def test_without_lm_eval_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
  with pytest.raises(ImportError, match=r'pip install "polgrad\[eval\]"'):
    lm_eval.find_tasks(['x'], [])


def test_a_long_pair_keeps_its_end_and_one_token_of_context():
  assert lm_eval._last([1, 2, 3], [4, 5], 4) == ([2, 3], [4, 5])
  assert lm_eval._last([1, 2, 3], [4, 5], 2) == ([3], [5])


def test_lengths_are_rounded_up_to_few():
  assert not doctest.testmod(lm_eval).failed
  assert [lm_eval.bucket(n, 1000) for n in (32, 49, 65, 97, 129, 193)] == [
    32,
    64,
    96,
    128,
    192,
    256,
  ]
