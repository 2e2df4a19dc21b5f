"""Completions that were drawn once, with a teacher's log-probs: files, their faults, who makes them."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from array_record.python import array_record_module

from polgrad import build, evaluate, loading, overrides, phases, stored_rows, teacher_logp
from polgrad import learner as learner_module
from polgrad.data import tokenizers
from polgrad.options import from_text
from polgrad.types import Batch
from tests import hub
from tests.data import folders

SETTINGS = dict(
  tokenizer='abc', samples_per_prompt=2, max_new_tokens=4, temperature=0.8, top_k=0, top_p=1.0,
  prefix='', stop_strings=[], vocab_size=9,
)  # fmt: skip


def entry(row, seed=0):
  random = np.random.default_rng((row, seed))
  sizes = (3, 1)
  logp = lambda: [-random.random(n).astype(np.float32) for n in sizes]
  return stored_rows.Entry(
    id=row,
    prompt=stored_rows.digest([row, 5]),
    finished=[True, False],
    tokens=[random.integers(9, size=n).astype(np.int32) for n in sizes],
    behavior_logp=logp(),
    teacher_logp=logp(),
  )


def folder(tmp_path, **settings):
  for first in (0, 3):
    path = stored_rows.file_name(str(tmp_path), first)
    stored_rows.write(path, SETTINGS | settings, [entry(row) for row in range(first, first + 3)])
  return str(tmp_path)


def test_what_was_written_is_read_bit_by_bit_in_any_order(tmp_path):
  rows = stored_rows.Rows(folder(tmp_path))
  assert len(rows) == 6
  for row in (5, 0, 3):
    found, want = rows.read(row, stored_rows.digest([row, 5])), entry(row)
    jax.tree.map(np.testing.assert_array_equal, found, want)
  assert [x.name for x in sorted(tmp_path.iterdir())] == [
    '00000000.array_record',
    '00000003.array_record',
  ]


def rewritten(path, change):
  """The file with another JSON in the entry of its second record."""
  reader = array_record_module.ArrayRecordReader(str(path))
  values = [json.loads(x) for x in reader.read([*range(reader.num_records())])]
  values[2] = change(values[2])
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for value in values:
    writer.write(json.dumps(value).encode())
  writer.close()


FAULTS = {
  'another record': (lambda x: x | {'id': 8}, 'one of record 8'),
  'a sample is missing': (lambda x: x | {'tokens': x['tokens'][:1]}, '1 samples in tokens'),
  'fewer numbers than tokens': (
    lambda x: x | {'teacher_logp': [[-1.0], [-1.0]]},
    r"sample 0 .* different lengths: {'tokens': 3, 'behavior_logp': 3, 'teacher_logp': 1}",
  ),
  'an id that is none': (lambda x: x | {'tokens': [[1, 2, 9], [1]]}, 'ids from 1 to 9.*9 tokens'),
  'not a number': (
    lambda x: x | {'teacher_logp': [[-1, -1, np.nan], [-1]]},
    'teacher_logp must be',
  ),
  'texts': (lambda x: x | {'behavior_logp': [['a'] * 3, [-1]]}, 'behavior_logp must be lists'),
  'too long': (
    lambda x: x | {name: [[0] * 5, [0]] for name in stored_rows.OF_TOKENS},
    'has 5 tokens, but must have 1 to 4',
  ),
  'a field is missing': (lambda x: {'id': x['id']}, 'expected an object with'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_damaged_entry_names_file_and_record(fault, tmp_path):
  change, message = FAULTS[fault]
  rows = folder(tmp_path)
  rewritten(tmp_path / '00000003.array_record', change)
  rows = stored_rows.Rows(rows)
  rows.read(3, entry(3).prompt)
  with pytest.raises(ValueError, match=rf'00000003.array_record, record 4: .*{message}'):
    rows.read(4, entry(4).prompt)


def test_a_record_that_is_not_there_or_had_another_prompt(tmp_path):
  rows = stored_rows.Rows(folder(tmp_path))
  with pytest.raises(ValueError, match=r'no completion of record 6; it holds 6 records.*\[5\]'):
    rows.read(6, '')
  rows.check_complete(range(6))
  path = stored_rows.file_name(str(tmp_path), 6)
  stored_rows.write(path, SETTINGS | {'until': 9}, [entry(row) for row in (6, 8)])
  rows = stored_rows.Rows(str(tmp_path))
  with pytest.raises(
    ValueError, match=r'record 7 has no completion: .*00000006.* does not have it'
  ):
    rows.check_complete(range(9))
  with pytest.raises(ValueError, match='record 2: it was drawn for another prompt'):
    rows.read(2, entry(3).prompt)
  with pytest.raises(ValueError, match=r'drawn with temperature 0\.8, this run has 1\.0'):
    rows.check({'temperature': 1.0})
  with pytest.raises(
    ValueError, match=r"drawn with tokenizer 'abc', this run has 'other'.*another path"
  ):
    rows.check({'temperature': 1.0, 'top_k': 3, 'tokenizer': 'other'})
  with pytest.raises(FileNotFoundError, match=r'none.*expected the files'):
    stored_rows.Rows(str(tmp_path / 'none'))


@pytest.mark.parametrize('kept', [0, 1000, 65536, 131071])
def test_a_file_that_is_cut_off_is_named(kept, tmp_path):
  rows = folder(tmp_path)
  path = tmp_path / '00000003.array_record'
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match=r'00000003.array_record: no file of completions'):
    stored_rows.Rows(rows)


def test_no_flipped_bit_passes_for_data(tmp_path):
  rows = folder(tmp_path)
  path = tmp_path / '00000003.array_record'
  whole = path.read_bytes()
  used = [i for i, byte in enumerate(whole) if byte]
  refused = 0
  for place in used[:: len(used) // 16]:
    changed = bytearray(whole)
    changed[place] ^= 1
    path.write_bytes(changed)
    try:
      found = stored_rows.Rows(rows)
      for row in (3, 4, 5):
        jax.tree.map(np.testing.assert_array_equal, found.read(row, entry(row).prompt), entry(row))
    except ValueError as error:
      assert '00000003.array_record' in str(error)
      refused += 1
  assert refused > 8


def test_what_could_not_be_read_back_is_not_written(tmp_path):
  path = str(tmp_path / 'x.array_record')
  bad = entry(0)._replace(teacher_logp=[np.full(3, np.nan, np.float32), np.zeros(1, np.float32)])
  with pytest.raises(ValueError, match='record 0: sample 0: teacher_logp must be finite'):
    stored_rows.write(path, SETTINGS, [bad])
  assert not list(tmp_path.iterdir())


LISTS = {
  'none': (lambda x: {}, r'teacher_top_ids must have 2 samples, because top is 2'),
  'fewer': (lambda x: x | {'teacher_top_ids': [[[1]] * 3, [[1]]]}, r'2 numbers, got \(3, 1\)'),
  'negative': (
    lambda x: x | {'teacher_top_ids': [[[1, -1]] * 3, [[1, 2]]]},
    'must not be negative, got -1',
  ),
  'more than 1': (
    lambda x: x | {'teacher_top_log_probs': [[[-0.1, -0.2]] * 3, [[-1, -2]]]},
    'no log-probs, their sum is 1.7',
  ),
}


@pytest.mark.parametrize('fault', LISTS)
def test_damaged_lists_name_file_and_record(fault, tmp_path):
  change, message = LISTS[fault]
  lists = dict(
    teacher_top_ids=[np.array([[1, 2]] * n, np.int32) for n in (3, 1)],
    teacher_top_log_probs=[np.full((n, 2), -1.5, np.float32) for n in (3, 1)],
  )
  path = tmp_path / '00000000.array_record'
  entries = [entry(row)._replace(**lists) for row in range(3)]
  stored_rows.write(str(path), SETTINGS | {'top': 2}, entries)
  found = stored_rows.Rows(str(tmp_path)).read(1, entry(1).prompt)
  jax.tree.map(np.testing.assert_array_equal, found, entries[1])
  kept = lambda x: change({k: v for k, v in x.items() if k in stored_rows.LISTED})
  others = lambda x: {k: v for k, v in x.items() if k not in stored_rows.LISTED}
  rewritten(path, lambda x: others(x) | kept(x))
  with pytest.raises(ValueError, match=rf'00000000.array_record, record 1: .*{message}'):
    stored_rows.Rows(str(tmp_path)).read(1, entry(1).prompt)


def test_files_of_one_folder_agree(tmp_path):
  rows = folder(tmp_path)
  other = stored_rows.file_name(rows, 6)
  stored_rows.write(other, SETTINGS | {'temperature': 1.0}, [entry(6)])
  with pytest.raises(ValueError, match=r'00000006.*temperature is 1\.0, but 0\.8 in .*00000000'):
    stored_rows.Rows(rows)
  stored_rows.write(other, SETTINGS, [entry(5)])
  with pytest.raises(ValueError, match=r'00000006.*record 5 is in .*00000003.array_record too'):
    stored_rows.Rows(rows)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Folders of a student and of a teacher of another family and size, with one tokenizer."""
  base = tmp_path_factory.mktemp('models')
  student = hub.small('qwen3', base / 'student')
  # As real families have it, the teacher's embedding has further rows that no token uses.
  teacher = hub.small('gemma3', base / 'teacher', tokenizer='qwen3', hidden_size=48, vocab_size=704)
  return student, teacher


def config_of(student, rows, **options):
  text = ''.join(f',{name}={value}' for name, value in options.items())
  return from_text(
    f'method=lightning_opd,task=addition,digits=1,model=hf,path={student},smoke,'
    f'completions={rows}{text}'
  )


def test_a_teacher_of_another_family_scores_what_the_student_drew(models, tmp_path):
  student, teacher = models
  run = build.build(config_of(student, tmp_path / 'rows'))
  phase = teacher_logp.phase_of(run)
  phase = dataclasses.replace(
    phase,
    source=dataclasses.replace(phase.source, size=6),
    collect=dataclasses.replace(phase.collect, top=4),
  )
  params = evaluate.init_params(run.policy, run.mesh, 0)
  policy, weights = loading.beside(teacher, run, same=False)
  calls = []

  def store(file_rows=3, **settings):
    def entries(records):
      calls.append([record['id'] for record in records])
      return make(records)

    tokenizers.check_same(run.tokenizer, teacher, '')
    score = teacher_logp.make_score(run, phase, policy, weights)
    make = teacher_logp.make_entries(run, phase, params, score)
    size = dict(vocab_size=run.policy.config.vocab_size, file_rows=file_rows)
    made_by = {'teacher': teacher, 'student': student}
    return teacher_logp.store(phase, run.tokenizer, entries, **size, made_by=made_by | settings)

  with jax.set_mesh(run.mesh):
    assert store() == 6 and calls == [[0, 1, 2], [3, 4, 5]]
    # Again: nothing is made anew but what is missing, and that is the same.
    path = pathlib.Path(stored_rows.file_name(str(tmp_path / 'rows'), 3))
    before = path.read_bytes()
    path.unlink()
    alone = dataclasses.replace(phase.collect)  # has not read the files yet
    with pytest.raises(
      ValueError, match=r'record 3 has no completion: .*; 3 records .*teacher_logp'
    ):
      alone.read_files(phase.source, run.tokenizer)
    assert store() == 3 and calls[2:] == [[3, 4, 5]]
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"00000000.*with teacher .*, now 'other'"):
      store(teacher='other')
    # A run looks for every record before its first step.
    phase.collect.read_files(phase.source, run.tokenizer)
    more = dataclasses.replace(phase.source, size=8)
    lacks = (
      r'record 6 has no completion: .*rows has no file with it, the last .*00000003.*; 2 records'
    )
    with pytest.raises(ValueError, match=lacks):
      phase.collect.read_files(more, run.tokenizer)
    # Files may list more than a run reads, and not less.
    fewer, other = (dataclasses.replace(phase.collect, top=n) for n in (2, 5))
    fewer.read_files(phase.source, run.tokenizer)
    with pytest.raises(ValueError, match=r'00000000.* drawn with top 4, this run has 5'):
      other.read_files(phase.source, run.tokenizer)
    # A larger file would need the records of two.
    with pytest.raises(ValueError, match=r'00000000.*with until 3, now 4'):
      store(file_rows=4)

    # The teacher's log-probs of the tokens, from its logits, in float64.
    records = [{**phase.source[row], 'id': row} for row in (4, 1, 2, 3)]
    prompts = phase.collect.lay_out(records, tokenizer=run.tokenizer)
    found = phase.collect.found(prompts, run.tokenizer)
    collect = phase.collect.make(evaluate.context(run, phase, 0))
    state = phases.begin(run, 0, None)
    batch = collect(state, lambda count: records[:count], 0).batch
  assert batch.staleness.max() == 0 and batch.sampled_at.max() == 0
  for name, model, own in (
    ('teacher_logp', policy, weights),
    ('proximal_logp', run.policy, state.params),
  ):
    hidden = model.hidden(own, batch.tokens, batch.segment_ids)
    logits = np.asarray(model.unembed(own, hidden), np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(logp, batch.tokens[:, 1:, None], 2)[..., 0]
    where = batch.mask[:, 1:]
    np.testing.assert_allclose(batch[name][:, 1:][where], want[where], atol=2e-5)
    if model is policy:  # the teacher's likeliest tokens, and places without one
      lists = [batch[x].reshape(*batch.mask.shape, 4) for x in stored_rows.LISTED]
      np.testing.assert_array_equal(lists[0][:, 1:][where], np.argsort(-logp)[where][:, :4])
      want = -np.sort(-logp)[where][:, :4]
      np.testing.assert_allclose(lists[1][:, 1:][where], want, atol=2e-5)
      assert (lists[0][~batch.mask] == -1).all()
  # The student has not moved yet: what drew the tokens is what is trained.
  np.testing.assert_allclose(batch.proximal_logp, batch.behavior_logp, atol=1e-5)
  for row, one in enumerate(found):
    np.testing.assert_array_equal(batch.tokens[row][batch.mask[row]], one.tokens[0])
  want = np.where(batch.mask, batch.teacher_logp - batch.proximal_logp, 0)
  np.testing.assert_allclose(batch.advantages, want, atol=1e-6)


def test_offline_reinforcement_needs_no_teacher(models):
  """The files then have the log-probs of the policy that drew in the place of those of a teacher."""
  to = 'config.phases.train.collect'
  offline = from_text('method=grpo,task=addition,digits=1,model=tiny,smoke,warm_start=0')
  offline = overrides.apply(offline, {f'{to}.name': 'Stored', f'{to}.path': '/rows'}, build.TABLE)
  phase = teacher_logp.phase_of(build.build(offline))
  assert not teacher_logp.reads_teacher(phase) and not phase.collect.recompute_proximal
  ids, mask, logp = np.zeros((1, 2), np.int32), np.ones((1, 2), bool), np.float32([[0, -1]])
  rows = Batch(tokens=ids, segment_ids=ids, mask=mask, behavior_logp=logp)
  np.testing.assert_array_equal(teacher_logp.own_score(rows)['teacher_logp'], [[0, -1]])
  opd = build.build(config_of(models[0], '/rows'))
  assert teacher_logp.reads_teacher(teacher_logp.phase_of(opd))


def test_runs_that_do_not_fit_the_files_are_refused(models, tmp_path):
  student, _ = models
  with pytest.raises(ValueError, match=r'the last phase .* reads no stored completions'):
    teacher_logp.phase_of(
      build.build(from_text('method=grpo,task=addition,model=tiny,smoke,warm_start=0'))
    )
  with pytest.raises(ValueError, match='completions=FOLDER'):
    teacher_logp.phase_of(build.build(config_of(student, '')))
  folders.llama3(tmp_path)
  own = tokenizers.huggingface(path=student)
  with pytest.raises(ValueError, match=r'--teacher: .* has another tokenizer: its id \d+ .*sft'):
    tokenizers.check_same(own, str(tmp_path), '--teacher')
  with pytest.raises(FileNotFoundError, match=r'config.phases.train.collect: .*teacher_logp'):
    build.check_data(build.build(config_of(student, tmp_path / 'none')))


def test_a_teacher_of_another_family_fits_and_one_of_another_tokenizer_does_not(models, tmp_path):
  student, teacher = models
  text = 'method={},task=addition,model=hf,path={},smoke,teacher={}'
  run = build.build(from_text(text.format('on_policy_distillation', student, teacher)))
  phase = run.phases['train']
  sizes = [model.config.vocab_size for model in (run.policy, phase.frozen['teacher'])]
  assert sizes == [640, 704]
  learner = phase.learner(run.policy)
  rows = np.zeros((2, phase.collect.length), np.int32)
  batch = Batch(tokens=rows, segment_ids=rows, mask=rows > 0)
  given = {'logits': run.policy, 'teacher': phase.frozen['teacher']}
  shapes = [model.shapes() for model in given.values()]
  look = lambda own, other: learner_module.forward(
    run.policy, own, batch, stats=learner.objective.stats, teacher=(given['teacher'], other)
  )
  assert jax.eval_shape(look, *shapes).stats
  # What samples from both models needs one size.
  with pytest.raises(ValueError, match=r'frozen.teacher: its vocabulary has 704.* needs one size'):
    build.build(from_text(text.format('minillm', student, teacher)))
  folders.llama3(tmp_path)
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(pathlib.Path(teacher) / name, tmp_path)
  with pytest.raises(ValueError, match=r'train.frozen.teacher: .* has another tokenizer: its id'):
    build.build(from_text(text.format('sampled_distillation', student, tmp_path)))


def test_the_digest_of_a_tokenizer_is_that_of_its_ids(models):
  student, teacher = models
  one, other = (tokenizers.huggingface(path=path) for path in (student, teacher))
  assert tokenizers.digest(one) == tokenizers.digest(other)
  found = {
    tokenizers.digest(x) for x in (one, tokenizers.byte(), tokenizers.characters(alphabet='ab'))
  }
  assert len(found | {tokenizers.digest(tokenizers.characters(alphabet='ba'))}) == 4
