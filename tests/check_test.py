"""`polgrad.check`, and what a run looks at by itself before its first step."""

import dataclasses
import json
import math
import pathlib
import pickle
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from polgrad import build, check, explain, metric_history, phases
from polgrad.checks import canaries, duplicates, findings, memory, reading, stops, tables, tracing
from polgrad.data import tokenizers
from polgrad.options import from_text
from polgrad.registry import Weighted, bind, part
from polgrad.rewards import scoring, verifiers
from polgrad.sampling import engines, speculation
from tests import runs
from tests.data import folders

BYTE = tokenizers.byte()


def file_of(folder, records):
  path = folder / 'data.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  return path


def configured(path, method='grpo', **options):
  """A run on the records of a file, all of which are trained on and none held out."""
  options = {
    'reward': 'exact_match', 'holdout': 0, 'prompt_length': 8, 'max_new_tokens': 4, 'warm_start': 0,
  } | options  # fmt: skip
  text = ','.join(f'{name}={value}' for name, value in options.items())
  return from_text(f'method={method},task=jsonl,data={path},model=tiny,smoke,{text}')


def report(config):
  """The sections of a check on data and verifiers, and all that they found."""
  sections = list(check.check_data(config, build.build(config), canary=0, most=0))
  return sections, [one for section in sections for one in section.findings]


SUMS = [{'prompt': f'{i}+{i}=', 'answer': str(2 * i)} for i in range(1, 40)]


# Lengths, masks and fates.


def test_a_run_without_faults_has_no_findings(tmp_path):
  sections, wrong = report(configured(file_of(tmp_path, SUMS)))
  assert wrong == []
  assert sections[0].title == 'config.phases.train: 39 of 39 records'
  for section in sections:
    check.show(section)


@pytest.mark.parametrize(
  ('overlong', 'fails', 'said'),
  [
    ('error', True, '1 of 40 records are too long (FILE:3)'),
    ('drop', False, '1 of 40 records are too long and dropped (FILE:3)'),
    ('truncate', False, '1 of 40 records are too long and cut (FILE:3)'),
  ],
)
def test_a_record_that_is_too_long_is_named_with_its_line(tmp_path, overlong, fails, said):
  path = file_of(tmp_path, [*SUMS[:2], {'prompt': '1' * 9, 'answer': '1'}, *SUMS[2:]])
  sections, [one] = report(configured(path, overlong=overlong))
  assert one.fails is fails and one.text == said.replace('FILE', str(path))
  assert any(f'(overlong: {overlong})' in line for line in sections[0].lines)


def test_fields_that_lack_and_characters_without_a_token_are_failures_with_their_rows(tmp_path):
  records = [{'prompt': '1', 'answer': 'é'}, {'prompt': 'é', 'answer': '2'}, *SUMS]
  _, [one] = report(configured(file_of(tmp_path, records), 'sft'))
  assert one.fails and f"{tmp_path}/data.jsonl:1, {tmp_path}/data.jsonl:2: ['é'] in" in one.text


def test_conversations_and_pairs_are_read_as_a_batch_lays_them_out(tmp_path):
  turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
  chats = file_of(tmp_path, [{'messages': turns}] * 5)
  run = build.build(configured(chats, 'sft', reward='', prompt_length=40))
  pairs = file_of(tmp_path, [{'prompt': 'a', 'chosen': 'bcd', 'rejected': 'e'}] * 5)
  other = build.build(configured(pairs, 'dpo', reward='', prompt_length=40))
  for one in (run, other):
    phase = one.phases['train']
    record = {**phase.source[0], 'id': 0}
    found = reading.read_record(record, phase.collect, one.tokenizer)
    batch = phase.collect.lay_out([record], tokenizer=one.tokenizer)
    np.testing.assert_array_equal(found.trained, batch.mask.sum(axis=1))
    whole = [p + c for p, c in zip(found.prompts, found.completions)]
    np.testing.assert_array_equal(whole, (batch.segment_ids > 0).sum(axis=1))
    np.testing.assert_array_equal(found.prompts, np.argmax(batch.mask, axis=1))


def test_rows_that_lose_their_stop_token_are_counted(tmp_path):
  path = file_of(tmp_path, [{'prompt': '1', 'answer': '2' * n} for n in (1, 3, 11, 12, 30)])
  config = configured(path, 'sft', overlong='truncate')  # 12 tokens: prompt, 10 and stop
  _, wrong = report(config)
  texts = [one.text for one in wrong]
  assert texts[0].startswith('3 of 5 records are too long and cut')
  assert texts[1].startswith('3 records are cut before their stop token')


def test_another_process_reads_the_same(tmp_path):
  config = configured(file_of(tmp_path, SUMS))
  run = build.build(config)
  for one in build.data_sections(run):
    make = pickle.loads(pickle.dumps(check.job_maker(config, one)))
    assert make().read([0, 7]) == reading.ReadJob(one.source, one.reader, run.tokenizer).read(
      [0, 7]
    )


def test_a_histogram_has_every_number_once():
  said = reading.spread('row', [3, 3, 4, 5, 9, 200], budget=9)
  assert sum(said.counts) == said.count == 6 and said.over == 1
  assert (said.median, said.most, said.largest) == (5, 200, 200)
  assert len(tables.histogram(said)) >= 2
  same = reading.spread('row', [7] * 3)
  assert same.counts == (3,) and same.edges == (7, 8)


# Repeated prompts.


def test_prompts_are_the_same_whatever_their_case_and_white_space():
  asked = [duplicates.asked({'prompt': p}) for p in ('Who  am I?', 'who am i?\n', 'Who are you?')]
  assert asked[0] == asked[1] != asked[2]
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  assert duplicates.asked_text({'messages': messages}) == 'user: a'


def test_repeated_prompts_with_another_answer_are_told_from_those_with_the_same(tmp_path):
  records = [*SUMS, SUMS[0], {**SUMS[1], 'answer': '5'}]
  _, wrong = report(configured(file_of(tmp_path, records)))
  assert '2 of 41 records repeat the prompt of an earlier one' in wrong[0].text
  assert '1 of these have another answer' in wrong[1].text and 'data.jsonl:41' in wrong[1].text
  assert not any(one.fails for one in wrong)


def test_fields_of_held_out_records_are_named_as_the_configuration_has_them():
  path = 'config.phases.train'
  held_out = f'{path}.held_out.pairs'
  assert findings.source_field(path) == f'{path}.source'
  assert findings.source_field(held_out) == held_out
  assert findings.reader_field(path) == findings.reader_field(held_out) == f'{path}.collect'
  assert findings.reader_field('config.evaluation') == 'config.evaluation'


def test_held_out_prompts_that_are_trained_on_are_found_by_a_check_and_by_the_run(tmp_path):
  held_out = tmp_path / 'held_out.jsonl'
  held_out.write_text('\n'.join(map(json.dumps, [SUMS[4], {'prompt': '0+0=', 'answer': '0'}])))
  config = configured(file_of(tmp_path, SUMS), held_out=held_out)
  _, [one] = report(config)
  assert one.text.startswith('1 of 2 held-out prompts also occur in config.phases.train.source')
  assert 'held_out.jsonl:1 is ' in one.text and 'data.jsonl:5' in one.text
  assert build.check_data(build.build(config)) == [str(one)]
  # So are held-out demonstrations, and pairs.
  measured = configured(file_of(tmp_path, SUMS), 'sft', held_out=held_out, reward='')
  sections, [other] = report(measured)
  assert other.text == one.text and other.where == 'config.phases.train.held_out.demonstrations'
  assert sections[1].title == 'config.phases.train.held_out.demonstrations: 2 of 2 records'


# Verifiers.


def verdicts(reward, records, **knobs):
  reward = {'one': Weighted(1.0, bind(part(reward, **knobs), verifiers.TABLE))}
  score = scoring.make_scorer(reward, isolate=False)
  judge = lambda texts, some: score(texts, some, list(map(len, texts)))
  found = canaries.try_verifiers(reward, judge, list(enumerate(records)))
  return found, canaries.findings('config.phases.train', found, str)


def contains(completion, record):
  """A verifier that any text with the right digits passes."""
  return float(record['answer'] in completion)


def nothing(completion, record):
  """A verifier that refuses every text."""
  return 0.0 * len(completion) * len(record)


def generous(completion, record):
  """A verifier that passes whatever the answer contains, the empty text too."""
  return float(completion in record['answer'])


def in_tags(completion, record, *, pattern=r'<result>\s*(\d+)\s*</result>'):
  """A verifier that wants tags around the answer."""
  found = re.search(pattern, completion)
  return float(found is not None and found[1] == record['answer'])


def test_right_answers_pass_and_others_do_not():
  found, wrong = verdicts(verifiers.numeric_answer, SUMS)
  [verdict] = found.verdicts
  assert verdict.tells_apart and verdict.form == canaries.BARE and len(verdict.rows) == 39
  assert wrong == []


def test_answers_that_a_verifier_cannot_read_are_named():
  found, [one] = verdicts(verifiers.numeric_answer, [{'prompt': '', 'answer': 'none'}, *SUMS])
  assert found.verdicts[0].errors == (0,)
  assert "on 1 of 40 records (0; answer 'none')" in one.text and not one.fails


def test_a_verifier_that_accepts_the_answers_of_others_is_named_with_its_rows():
  _, [one] = verdicts(
    contains, [*SUMS, {'prompt': '', 'answer': '1'}, {'prompt': '', 'answer': '100'}]
  )
  assert one.text.startswith('it accepts the answer of another record on') and not one.fails


def test_a_verifier_that_accepts_every_empty_text_fails():
  _, wrong = verdicts(generous, SUMS)
  assert [one.fails for one in wrong if 'empty text' in one.text] == [True]


def test_the_form_that_a_pattern_wants_is_found():
  _, [one] = verdicts(in_tags, SUMS)
  assert (
    one.text.startswith('it refuses the bare answer, but accepts the form of') and not one.fails
  )


@pytest.mark.parametrize(
  ('pattern', 'text'),
  [
    ('<answer>(.*?)</answer>', '<answer>7</answer>'),
    (r'####\s*(-?\d+)', '####7'),
    (r'\\boxed\{([^}]*)\}', r'\boxed{7}'),
    (r'(?:A|B): (.*)$', 'A: 7'),
  ],
)
def test_a_form_is_made_of_the_literal_parts_of_a_pattern(pattern, text):
  assert canaries.from_pattern(pattern)('7') == text


@pytest.mark.parametrize('pattern', [r'-?\d+', '(', r'(?<=x)(.*)'])
def test_a_pattern_without_a_group_or_an_obvious_text_gives_no_form(pattern):
  assert canaries.from_pattern(pattern) is None


def test_the_answer_is_where_the_knob_of_the_verifier_says():
  records = [{**one, 'solution': f'x{i}'} for i, one in enumerate(SUMS)]
  found, wrong = verdicts(verifiers.exact_match, records, field='solution')
  assert found.verdicts[0].tells_apart and wrong == []


def test_a_verifier_that_refuses_all_right_answers_fails_unless_it_is_of_the_user():
  _, [one] = verdicts(verifiers.choice_letter, SUMS)
  assert one.fails and one.text.startswith('it fails on all of 39 records (row 0: one: ValueError')
  _, [one] = verdicts(nothing, SUMS)
  assert not one.fails and one.text.startswith('right answers get no more than wrong ones')


@pytest.mark.parametrize(('lacking', 'fails'), [((2,), False), ((0, 1, 2), True)])
def test_a_verifier_that_fails_on_records_without_an_answer_is_named(lacking, fails):
  records = [(i, {} if i in lacking else {'answer': '7'}) for i in range(3)]
  reward = {'right': Weighted(1.0, bind(part(verifiers.numeric_answer), verifiers.TABLE))}
  score = scoring.make_scorer(reward, isolate=False)
  judge = lambda texts, some: score(texts, some, list(map(len, texts)))
  (found,) = canaries.unanswered('config.phases.train', reward, judge, records, 'a:{}'.format)
  assert found.fails == fails and found.where == 'config.phases.train.reward.right'
  assert f"{len(lacking)} of 3 records, which have no 'answer' (a:{lacking[0]}" in found.text


def test_a_run_warns_if_right_answers_get_no_more_than_an_empty_text(tmp_path):
  records = [{'prompt': one['prompt'], 'answer': one['answer']} for one in SUMS]
  config = configured(file_of(tmp_path, records))
  config.phases.train.reward.exact_match.weight = -1.0
  [line] = build.check_data(build.build(config))
  assert line.startswith('config.phases.train.reward: the right answers of 4 records get no more')
  _, wrong = report(config)
  assert wrong == []  # the verifier itself is right


# Stop tokens, memory, traces and steps.


def test_options_that_any_template_reads_are_named_without_those_that_are_set(tmp_path):
  folder = folders.chatml(tmp_path, "{{ strftime_now('%d') }}{{ color }}" + folders.CHATML)
  extra = tmp_path / 'additional_chat_templates'
  extra.mkdir()
  (extra / 'tool_use.jinja').write_text('{{ eos_token }}{{ size }}' + folders.CHATML)
  spec = part(tokenizers.huggingface, path=str(folder), template_options={'color': 'red'})
  run = types.SimpleNamespace(tokenizer=bind(spec, tokenizers.TABLE))
  section = check.check_turns(ConfigDict({'tokenizer': spec}), run, None)
  assert section.lines[-2:] == [
    '  the template asks for the date of today: it is told 2024-07-26',
    '  options of the template that are not set: size',
  ]


def test_stop_tokens_whose_output_rows_were_never_trained_are_found():
  run = build.build(runs.sft.get_config('smoke'))
  draw = np.random.default_rng(0).standard_normal
  params = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), run.policy.shapes())
  [stop] = run.tokenizer.stop_ids
  assert stops.untrained(run.policy, params, (stop,)) == []
  zero = params | {'embedding': params['embedding'].at[stop].set(0)}
  assert stops.untrained(run.policy, zero, (stop,)) == [stop]
  alike = params | {'embedding': params['embedding'].at[:10].set(params['embedding'][stop])}
  assert stops.untrained(run.policy, alike, (stop,)) == [stop]
  [one] = stops.findings(run.tokenizer, [stop])
  assert one.fails and 'eos (1)' in one.text


@pytest.mark.parametrize('name', ['grpo', 'sft'])
def test_memory_is_that_of_the_arrays(name):
  run = build.build(getattr(runs, name).get_config('smoke,warm_start=0'))
  phase = run.phases['train']
  args = phase, run.policy, run.mesh, phases.opt_shardings
  uses = {u.name: u for u in memory.of_phase(*args)}
  size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  params = jax.eval_shape(run.policy.init, jax.random.key(0))
  assert uses['parameters'].device == uses['gradients'].device == size(params)
  assert uses['optimizer'].total == size(jax.eval_shape(phase.optimizer.init, params))
  if name == 'grpo':
    assert uses['anchor reference'].total == size(params)
    layers, heads, head_dim = 2, 1, 16  # of a smoke run
    numbers = phase.collect.rows * phase.collect.length * layers * heads * head_dim
    assert uses['KV cache'].total == 2 * 4 * numbers
    assert uses['weights of decoding'].total == size(params)
    less = dict(engine=engines.Own(weights='int8', cache='int8'))
    uses = {u.name: u for u in memory.of_phase(*args, **less)}
    assert uses['KV cache'].total == 2 * (numbers + 4 * numbers // head_dim)
    assert size(params) / 4 < uses['weights of decoding'].total < size(params) / 3
    # The cache of a draft has the same type; an external engine has its caches elsewhere.
    speculate = dict(collect=dataclasses.replace(phase.collect, speculate=speculation.Draft()))
    args = dataclasses.replace(phase, **speculate), *args[1:]
    uses = {u.name: u for u in memory.of_phase(*args, **less)}
    assert uses['KV cache of draft'].total == uses['KV cache'].total
    uses = memory.of_phase(*args, engine=engines.Vllm(python='python'))
    assert not [one for one in uses if 'KV' in one.name or 'decoding' in one.name]


def test_memory_on_a_mesh_is_that_of_one_device():
  config = runs.grpo.get_config('smoke,warm_start=0')
  config.mesh.fsdp = config.mesh.tensor = 2
  run = build.build(config)
  phase = run.phases['train']
  for use in memory.of_phase(phase, run.policy, run.mesh, phases.opt_shardings):
    assert use.total / 4 <= use.device < use.total, use.name


def test_memory_has_what_is_carried_over_steps_and_the_gradients_of_credit():
  size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  run = build.build(runs.addition(runs.method_of('spo_single_stream')))
  phase = run.phases['train']
  args = phase, run.policy, run.mesh, phases.opt_shardings, None
  uses = {u.name: u for u in memory.of_phase(*args, phases.begin_responses(phase))}
  # Three arrays of four bytes and a mask of one for each token of each data row, on the host.
  assert uses['responses'].total == 13 * len(phase.source) * phase.collect.length
  assert uses['responses'].when == 'host'
  counts = phase.curriculum.init(phase.source)
  assert uses['state of curriculum'].device == size(counts) > 0
  assert memory.peak([*uses.values()]) == memory.peak(memory.of_phase(*args))
  run = build.build(runs.addition(runs.method_of('gradient_guided')))
  phase = run.phases['train']
  uses = {u.name: u for u in memory.of_phase(phase, run.policy, run.mesh, phases.opt_shardings)}
  assert uses['gradients of rewards'].device == 2 * uses['gradients'].device
  assert uses['gradients of rewards'].when == 'credit'


TRACED = (
  'ppo',
  'luffy',
  'hpt',
  'dpo',
  'on_policy_distillation',
  'bapo',
  'a_star_po',
  'mdpo',
  'grpo',
  'copo',
  'l1_max',
)


@pytest.mark.parametrize('name', TRACED)
def test_the_traced_batch_has_what_the_objective_reads(name):
  run = build.build(from_text(f'method={name},task=addition,model=tiny,smoke'))
  traced = tracing.trace_objective('config.phases.train', run.phases['train'], run.policy)
  assert traced.terms and {'entropy', 'sampled/entropy'} & set(traced.metrics)


def test_the_whole_update_is_traced():
  config = runs.grpo.get_config('smoke,warm_start=0')
  assert check.check_trace(build.build(config)).findings == []
  config.phases.train.objective.history = {'mine': part(metric_history.running_mean, metric='no')}
  [one] = check.check_trace(build.build(config)).findings
  assert one.fails and one.where == 'config.phases.train' and "metric 'no'" in one.text


@pytest.mark.parametrize(
  ('text', 'history', 'said'),
  [
    ('method=bapo,low=0.9', None, 'train: the update cannot be traced: low = 0.9 <= low_limit = 0.8'),
    ('method=grpo', part(metric_history.running_mean, metric='nope'),
     "the history reads the metric 'nope'; valid: .*'entropy'"),
  ],
)  # fmt: skip
def test_what_only_the_first_trace_showed_is_refused_before_the_run(text, history, said):
  config = from_text(f'{text},task=addition,model=tiny,smoke')
  if history:
    config.phases.train.objective.history = {'mine': history}
  with pytest.raises(ValueError, match=said):
    build.check_data(build.build(config))


def test_two_steps_are_timed():
  run = build.build(runs.sft.get_config('smoke'))
  with jax.set_mesh(run.mesh):
    section = check.check_steps(run, 2, phases.begin(run, 0, None))
  assert section.findings == []
  rows = [line.split() for line in section.lines[1:3]]
  assert [row[:2] for row in rows] == [['train', 'compiles'], ['train', '2']]
  assert all(float(seconds) >= 0 for row in rows for seconds in row[2:5])
  assert '2 steps would take' in section.lines[3]


def test_steps_beside_smoke_are_refused():
  with pytest.raises(ValueError, match='options smoke and steps: a smoke run makes 2 steps'):
    from_text('method=grpo,task=addition,model=tiny,smoke,steps=3')


def test_a_negative_limit_of_a_moment_is_refused():
  with pytest.raises(ValueError, match='limit: expected a number at least 0'):
    build.build(from_text('method=m2po,limit=-1,task=addition,model=tiny,smoke'))


def test_a_template_that_writes_nothing_of_the_messages_is_refused(monkeypatch):
  config = runs.sft.get_config('smoke')
  chat = lambda messages, add_generation_prompt=True, tools=None: 'Hello'
  monkeypatch.setitem(
    tokenizers.TABLE, 'tokenizers.characters', lambda *, alphabet: BYTE._replace(chat=chat)
  )
  config.model.vocab_size = BYTE.vocab_size
  with pytest.raises(
    ValueError, match='tokenizer: the chat template writes nothing of what a user'
  ):
    build.build(config)


# The page docs/before_a_run.md.

PAGE = (pathlib.Path(__file__).parent.parent / 'docs' / 'before_a_run.md').read_text()


def test_the_page_shows_what_the_commands_print(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  exec(re.search(r'```python\n(.*?)```', PAGE, re.DOTALL)[1], {})
  text = re.search(r'polgrad\.check --config=experiments/run\.py:(\S*data=\S+)', PAGE)[1]
  config = from_text(text)
  for section in check.check_data(config, build.build(config), canary=1000, most=0):
    check.show(section)
  printed = capsys.readouterr().out
  block = re.search(r'```\n(config\.phases\.train: 92 .*?)```', PAGE, re.DOTALL)[1]
  for section in block.strip().split('\n\n'):
    assert section in printed, section


def test_the_page_shows_what_is_explained():
  file = pathlib.Path(__file__).parent.parent / 'experiments' / 'quickstart.py'
  names = {}
  exec(file.read_text(), names)
  config = names['get_config']()
  pattern = re.search("--grep='(.*?)'", PAGE)[1]
  knobs = '\n'.join(explain.knob_lines(config.to_dict(), pattern)).strip()
  assert f'```\n{knobs}\n```' in PAGE
  lines = explain.explain(config, build.build(config))
  for line in re.search(r'```\n(phase train:.*?)```', PAGE, re.DOTALL)[1].strip().split('\n'):
    assert line in lines or line.strip() == '...', line
