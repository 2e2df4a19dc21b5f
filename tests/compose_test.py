"""Methods, tasks and models composed: own files, own functions, and data that do not fit."""

import dataclasses
import json
import subprocess
import sys

import pytest

from polgrad import build, methods, presets, tasks
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.options import from_text
from polgrad.registry import part, weighted
from tests import hub
from tests.runs import grpo


def lines(path, *records) -> str:
  path.write_text('\n'.join(json.dumps(r) for r in records))
  return str(path)


PROBLEMS = [{'prompt': f'{i}+1=', 'answer': str(i + 1)} for i in range(20)]
PAIRS = [{'prompt': f'{i}+1=', 'chosen': str(i + 1), 'rejected': 'no'} for i in range(20)]
CHATS = [
  {'messages': [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': 'so'}]}
  for i in range(20)
]


@pytest.mark.parametrize(
  ('records', 'has'),
  [
    (PROBLEMS, ('problems', 'demonstrations')),
    (PAIRS, ('problems', 'pairs', 'feedback')),
    (CHATS, ('demonstrations',)),
    ([{'prompt': 'a'}, *PROBLEMS], ('problems',)),  # not every record has an answer
  ],
)
def test_a_file_offers_what_all_its_records_have(records, has, tmp_path):
  assert tasks.jsonl(data=lines(tmp_path / 'a.jsonl', *records)).has == has


@pytest.mark.parametrize(
  ('method', 'records'), [('grpo', PROBLEMS), ('dpo', PAIRS), ('sft', CHATS), ('luffy', PROBLEMS)]
)
def test_a_file_and_a_text_make_a_run(method, records, tmp_path):
  path = lines(tmp_path / 'a.jsonl', *records)
  warm = '' if method in ('sft', 'luffy', 'grpo') else ',warm_start=0'
  reward = 'reward=numeric_answer,reward.tolerance=0.5,' if records is PROBLEMS else ''
  text = f'method={method},task=jsonl,data={path},model=tiny{warm}'
  run = build.build(from_text(f'{text},{reward}prompt_length=24,max_new_tokens=4,rows=128'))
  build.check_data(run)
  phase = run.phases['train']
  assert len(phase.source) == 18  # a tenth is held out
  if method in ('grpo', 'luffy'):
    assert phase.score(['7.4'], [{'answer': '7'}], [1]).total.tolist() == [1.0]
    assert len(run.evaluation.source) == 2


def test_records_that_do_not_fit_are_found_before_the_first_step(tmp_path):
  path = lines(tmp_path / 'a.jsonl', *PROBLEMS, {'prompt': 'far too long', 'answer': '1'})
  text = (
    f'method=grpo,task=jsonl,data={path},holdout=0,reward=exact_match,model=tiny,prompt_length=8'
  )
  with pytest.raises(ValueError, match=r'config\.phases\.\w+\.source: \S+a.jsonl:21: 12 tokens'):
    build.check_data(build.build(from_text(text)))
  config = grpo.get_config('smoke')
  config.tokenizer.alphabet = '0123456789='
  with pytest.raises(ValueError, match=r"'\+'.*not in the alphabet"):
    build.check_data(build.build(config))


OWN = """
import jax.numpy as jnp
from beside import LIMIT  # a module beside the config file

from polgrad import build, credit, methods, objectives, presets, tasks
from polgrad.compose import compose
from polgrad.losses import advantages, aggregation
from polgrad.registry import part, weighted


def tanh_clip(log_ratio, advantages, *, slope: float = 2.0):
  return -advantages * jnp.tanh(slope * log_ratio) / slope


def brevity(completion, *, limit: int = LIMIT):
  return float(len(completion) <= limit)


def mine(*, slope: float = 2.0) -> methods.Method:
  return methods.Method(
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(tanh_clip, slope=slope),
      aggregation=part(aggregation.token_mean),
    ),
  )


def get_config(text=''):
  task = tasks.addition()
  task.rewards['brevity'] = weighted(0.1, part(brevity))
  made = compose(mine, task, presets.tiny(alphabet=task.alphabet), smoke=True, warm_start=0)
  with made.unlocked():
    made.evaluation = part(build.Never)
  return made
"""


def test_own_method_surrogate_and_verifier_in_an_own_file_need_no_registration(tmp_path):
  """In another process, as a user runs it; this one then builds what that has saved."""
  (tmp_path / 'mine.py').write_text(OWN)
  (tmp_path / 'beside.py').write_text('LIMIT = 3\n')
  flags = [f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/run']
  command = [sys.executable, '-m', 'polgrad.train', *flags]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert (
    saved['phases']['train']['objective']['surrogate']['name'] == f'{tmp_path}/mine.py:tanh_clip'
  )
  assert build.build(saved).phases['train'].objective.requires == {'advantages', 'proximal_logp'}


def test_budgets_come_from_the_task():
  task = dataclasses.replace(tasks.addition(), max_new_tokens=7, samples_per_prompt=4, rows=64)
  model = presets.tiny(alphabet=task.alphabet)
  phase = compose(methods.dr_grpo, task, model).phases.train
  assert phase.objective.aggregation.length == phase.collect.max_new_tokens == 7
  assert phase.collect.prompts * phase.collect.samples_per_prompt == 64
  assert compose(methods.tba, task, model).phases.train.objective.rows_per_prompt == 4
  phase = compose(methods.dapo, task, model).phases.train
  assert phase.collect.resample_ignores == ('overlong',)  # groups are compared by correctness
  overlong = phase.reward.overlong
  assert overlong.max_length == 7


@pytest.mark.parametrize('digits', [1, 3])
def test_choices_have_one_right_letter_and_fit(digits):
  text = f'method=dpo,task=choices,model=tiny,digits={digits},warm_start=0'
  run = build.build(from_text(text))
  build.check_data(run)
  train, held_out = run.phases['train'].source, run.evaluation.source
  for record in [train[i] for i in range(50)] + [held_out[i] for i in range(3)]:
    question, *lines = record['prompt'].split('\n')
    named = dict(line.split() for line in lines)
    assert list(named) == list('ABCD') and len(set(named.values())) == 4
    a, b = question.removesuffix('=').split('+')
    assert int(named[record['answer']]) == int(a) + int(b)
    assert record['chosen'] == record['answer'] != record['rejected'] in named
    assert run.evaluation.score([f'Not D: {record["answer"]}.'], [record], [4]).total == 1
  assert train[3] == build.build(from_text(text)).phases['train'].source[3]


def test_a_critic_is_given_to_methods_that_read_values_only():
  values = {
    name: from_text(f'method={name},task=addition,model=tiny').model.value_head
    for name in ('ppo', 'grpo')
  }
  assert values == {'ppo': True, 'grpo': False}


def test_a_task_of_your_own_is_a_value():
  task = tasks.Task(
    problems=part(sources.arithmetic, digits=1),
    rewards={'exact': weighted(1.0, part(tens))},
    prompt_length=8,
    max_new_tokens=4,
  )
  model = presets.tiny(alphabet=task.alphabet)
  run = build.build(compose(methods.rloo, task, model, warm_start=0))
  assert run.phases['train'].score(['10', '9'], [{}, {}], [1, 1]).total.tolist() == [1.0, 0.0]
  with pytest.raises(ValueError, match='records have none; use warm_start=0'):
    compose(methods.rloo, task, model)


def tens(completion):
  return float(completion.endswith('0'))


@pytest.mark.parametrize('model', presets.TABLE)
def test_every_model_takes_an_adapter_which_learns_faster(model, tmp_path):
  path = '' if model == 'tiny' else f',path={hub.published("qwen3", tmp_path)}'
  text = f'method=sft,task=chain_sum,model={model}{path}'
  whole, adapter = from_text(text), from_text(f'{text},lora=4')
  assert adapter.model.rank == 4 and adapter.model.base.to_dict() == whole.model.to_dict()
  rates = [c.phases.train.optimizer.learning_rate for c in (whole, adapter)]
  assert rates[1] == pytest.approx(10 * rates[0])


@pytest.mark.parametrize(
  'body', ["record['no such field']", '1 / 0', "'text'", "float('nan')", 'None']
)
def test_a_verifier_that_always_fails_is_refused_before_the_first_step(body, tmp_path):
  (tmp_path / 'own.py').write_text(f'def own(completion, record):\n  return {body}\n')
  path = lines(tmp_path / 'a.jsonl', *PROBLEMS)
  text = f'method=grpo,task=jsonl,data={path},reward={tmp_path}/own.py:own,model=tiny,smoke'
  run = build.build(from_text(f'{text},prompt_length=24,max_new_tokens=4'))
  with pytest.raises(ValueError, match=r'config\.phases\.train\.reward\.own: it fails on all of 4'):
    build.check_data(run)


def test_an_average_of_the_policy_is_an_anchor_that_is_measured():
  config = from_text('method=dpo,task=addition,model=tiny,average=0.95')
  experiment = build.build(config)
  found = experiment.phases['train'].anchors
  assert sorted(found) == ['average', 'reference'] and found['average'].keywords['decay'] == 0.95
  assert experiment.evaluation.anchors == ('average',)
  assert 'average' not in experiment.phases['warm_start'].anchors
  with pytest.raises(ValueError, match='average: expected a number at least 0 and below 1'):
    from_text('method=dpo,task=addition,model=tiny,average=1')


def test_several_texts_of_one_option_have_plus_signs_between_them():
  config = from_text('method=bnpo,terms=exact+brevity,task=addition,model=tiny')
  assert config.phases.train.collect.terms == ('exact', 'brevity')
  assert config.phases.train.credit.terms == ('exact', 'brevity')
  config.mesh.data = 1
  with pytest.raises(ValueError, match=r"collect\.terms: 'brevity' is no term"):
    build.build(config)


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    ('rft,samples=0', 'samples: expected a number at least 1'),
    ('star,iterations=1000', 'iterations: expected a number at least 1 and at most 100'),
    ('unlikelihood_sequence,sampled_weight=2', 'sampled_weight: .* at most 1, got 2'),
    ('iq_learn,discount=-1', 'discount: expected a number at least 0'),
    ('lightning_opd,clip=-1', 'clip: expected a number above 0'),
    ('rlfr,states_of=', "anchors: '' must be a name"),
    ('pass_at_k,k=4', 'k=4 needs more answers to a prompt than 4'),
    ('pkpo,k=5', 'k=5 answers, but a prompt has 4'),
  ],
)
def test_options_of_methods_that_mean_nothing_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    build.build(from_text(f'task=addition,model=tiny,smoke,method={options}'))
