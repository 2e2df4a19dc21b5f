"""A look inside a run: kept rows, the page of runs, and the tokens of a row."""

import dataclasses
import html.parser
import math
import os
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from benchmarks import view_in_browser
from benchmarks.view_in_browser import HOSTILE, bytes_batch
from polgrad import build, inspect, methods, overrides, row_files, train
from polgrad.data import tokenizers
from polgrad.digests import digests
from polgrad.view import __main__ as viewer
from polgrad.view import charts, page, runs, tokens
from tests import examples
from tests.runs import addition, dpo, sft

PAGE = pathlib.Path(__file__).parents[1] / 'docs/looking_inside.md'
pytestmark = pytest.mark.usefixtures('undrawn')


def config(warm_start=0, **rollouts):
  """Two steps of DAPO on small batches, perhaps after supervised ones."""
  made = addition(methods.TABLE['dapo'](max_new_tokens=5), warm_start=warm_start, minibatches=1)
  made.phases.train.collect.max_resamples = 0
  made.rollouts.update({'every': 1, 'rows': 6, **rollouts})
  return made


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, state) of a finished run."""
  workdir = str(tmp_path_factory.mktemp('look') / 'first')
  return workdir, train.run(config(), workdir)


def store(workdir, **settings):
  os.makedirs(workdir, exist_ok=True)
  return row_files.Store(
    str(workdir), **{'step': 10**6, 'past': ('train',), 'limit': 2**30} | settings
  )


class TestFiles:
  def test_hold_every_array_of_the_batch_bit_for_bit(self, tmp_path):
    batch = examples.batch().with_arrays(extra=np.arange(16.0).reshape(8, 2))
    batch = batch.replace(segment_ids=np.maximum(batch.segment_ids, batch.mask))
    _, tokenizer = bytes_batch(['a'])
    store(tmp_path).write_rows('train', 7, batch, 6, tokenizer=tokenizer)
    found = row_files.as_batch(row_files.read(str(tmp_path / 'rollouts/train-000007.parquet')))
    assert set(found.names()) == set(batch.names())
    for name in batch:
      x = np.asarray(batch[name])[:6]
      inside = np.where(batch.segment_ids[:6] > 0, x, 0) if x.shape == (6, 6) else x
      np.testing.assert_array_equal(found[name], inside, err_msg=name)
      assert found[name].dtype == x.dtype

  def test_of_a_run_have_texts_rewards_with_their_terms_and_the_step_of_its_metrics(self, run):
    paths = row_files.files(run[0], row_files.ROLLOUTS)
    names = [row_files.split_name(os.path.basename(p)) for p in paths]
    assert names == [('train', 1), ('train', 2)]
    stored = row_files.read(paths[-1])
    assert len(stored.rows) == 8 and stored.meta['of'] == 16  # two whole groups
    experiment = build.build(config())
    terms = build.build(config()).phases['train'].reward
    for row in stored.rows:
      assert row['rewards'] == pytest.approx(
        sum(t.weight * row[f'reward/{n}'] for n, t in terms.items())
      )
      ids = row['tokens'][row['start'] :]
      assert experiment.tokenizer.decode(ids) == row['completion']
      assert ''.join(row['pieces'][: row['start']]) == row['prompt']
      assert row['length'] == sum(row['mask']) and row['sampled_at'] == row['number'] == 1
    samples = row_files.read(row_files.files(run[0], row_files.EVALUATIONS)[-1])
    assert len(samples.rows) == 8 and samples.rows[0].keys() >= {'prompt', 'completion', 'rewards'}

  def test_change_nothing_in_what_is_trained_on(self, tmp_path):
    batch, tokenizer = bytes_batch(['a', 'b'])
    before = digests(batch)
    store(tmp_path).write_rows('train', 1, batch, 2, tokenizer=tokenizer)
    assert digests(batch) == before

  def test_are_not_written_if_nothing_is_to_be_kept(self, tmp_path):
    experiment = build.build(config(every=0))
    assert train.open_store(experiment, None, str(tmp_path)) is None
    assert not list(tmp_path.iterdir())

  def test_of_later_steps_and_half_written_ones_are_dropped_where_a_run_resumes(self, tmp_path):
    batch, tokenizer = bytes_batch(['a'])
    kept = store(tmp_path)
    for phase, step in (('a/b', 1), ('train', 2), ('train', 5), ('later', 2)):
      kept.write_rows(phase, step, batch, 1, tokenizer=tokenizer)
    (tmp_path / 'rollouts/train-000003.parquet.tmp').write_text('half')
    (tmp_path / 'rollouts/notes.txt').write_text('mine')
    store(tmp_path, step=2, past=('a/b', 'train'))
    found = set(os.listdir(tmp_path / 'rollouts'))
    assert found == {'a%2Fb-000001.parquet', 'train-000002.parquet', 'notes.txt'}

  def test_are_whole_or_absent_and_a_full_disk_is_named_once(self, tmp_path, monkeypatch, caplog):
    batch, tokenizer = bytes_batch(['a'])

    def fails(table, file, **_):
      file.write(b'PAR1')
      raise OSError('no space')

    monkeypatch.setattr(row_files.pq, 'write_table', fails)
    kept = store(tmp_path)
    with caplog.at_level('WARNING'):
      for step in (1, 2):
        kept.write_rows('train', step, batch, 1, tokenizer=tokenizer)
    assert os.listdir(tmp_path / 'rollouts') == []
    assert caplog.text.count('rows of train, update 1, are not kept: no space') == 1
    assert 'update 2' not in caplog.text

  def test_beyond_the_limit_the_oldest_are_deleted(self, tmp_path):
    batch, tokenizer = bytes_batch(['a'])
    kept = store(tmp_path)
    kept.write_rows('train', 1, batch, 1, tokenizer=tokenizer)
    [path] = row_files.files(str(tmp_path), row_files.ROLLOUTS)
    kept.limit = int(2.5 * os.path.getsize(path))
    for step in (2, 3, 4):
      kept.write_rows('train', step, batch, 1, tokenizer=tokenizer)
    names = [os.path.basename(p) for p in row_files.files(str(tmp_path), row_files.ROLLOUTS)]
    assert names == ['train-000003.parquet', 'train-000004.parquet']

  @pytest.mark.parametrize('content', [b'', b'PAR1', b'{}', b'PAR1' + bytes(100) + b'PAR1'])
  def test_that_are_broken_are_refused_by_name(self, tmp_path, content):
    path = tmp_path / 'train-000001.parquet'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'train-000001\.parquet'):
      row_files.read(str(path))

  def test_have_the_terms_only_of_rows_that_were_drawn_in_the_step(self):
    batch, tokenizer = bytes_batch(['a', 'b'])
    batch = batch.replace(staleness=np.array([0, 1], np.float32))
    terms = {'exact': np.array([0.5, 0.25])}
    table = row_files.table_of('train', 1, batch, 2, tokenizer=tokenizer, terms=terms)
    assert table['reward/exact'].to_pylist() == [0.5, None]

  def test_give_a_character_of_several_tokens_to_its_last(self):
    tokenizer = tokenizers.byte()
    ids = [*tokenizer.encode('aé€😀'), 258, 0xFF, 97]
    found = row_files.pieces(ids, tokenizer)
    assert found == ['a', '', 'é', '', '', '€', '', '', '', '😀', '⟨stop⟩', '', '\ufffda']


VOID = {'meta', 'input', 'br', 'hr', 'img', 'link'}  # tags without an end


class Strict(html.parser.HTMLParser):
  """Reads a page, and refuses tags that are not closed in order, and attributes without quotes."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.attributes, self.text = [], [], [], ''
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, k, v) for k, v in attrs]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, k, v) for k, v in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def check(text):
  """What holds for every page: it is well formed, loads nothing, and its drawings are finite."""
  read = Strict(text)
  assert not {'script', 'img', 'iframe', 'link', 'object', 'form'} & set(read.tags)
  assert not re.search(r'url\(|@import|https?://|javascript:', text)
  for tag, key, value in read.attributes:
    assert not key.startswith('on'), (tag, key)
    assert key not in ('src', 'srcset', 'data', 'action')
    assert key != 'href' or value.startswith('#')
    if key in ('x', 'y', 'x1', 'x2', 'y1', 'y2', 'cx', 'cy', 'r', 'points', 'viewbox'):
      assert all(math.isfinite(float(x)) for x in re.split('[ ,]', value)), (tag, key, value)
  assert "default-src 'none'" in text and not re.search('[\x00-\x08\x0b-\x1f]', text)
  ids = [value for _, key, value in read.attributes if key == 'id']
  assert len(ids) == len(set(ids))
  return read


class TestThePageOfRuns:
  @pytest.fixture
  def hostile(self, tmp_path):
    """The folder of a run all of whose texts are hostile."""
    return view_in_browser.hostile_run(str(tmp_path / 'a<b>&"run'))

  def test_has_curves_completions_problems_and_configurations(self, run):
    text = page.of_runs([run[0]], runs.Limits())
    read = check(text)
    names = [n for n in charts.metrics([runs.metrics.read(f'{run[0]}/metrics.jsonl')])]
    assert all(name in read.text for name in names)
    assert read.tags.count('svg') > 10 and read.tags.count('polyline') >= read.tags.count('svg')
    stored = row_files.read(row_files.files(run[0], row_files.ROLLOUTS)[-1])
    for row in stored.rows:
      assert row['completion'] in read.text.replace('⟨stop⟩', '')
    assert 'phases.train.optimizer.learning_rate' in read.text
    assert 'evaluation/greedy' in read.text and '8 of 8 problems' in read.text

  def test_keeps_hostile_texts_as_texts(self, hostile, run):
    read = check(page.of_runs([hostile, run[0]], runs.Limits()))
    shown = HOSTILE.replace('\x00', '␀').replace('\x1b', '␛').replace('\ud800', '?')
    assert shown in read.text.replace('↵', '')
    assert 'a<b>&"run' in read.text and '<!--' in read.text

  def test_lists_what_differs_between_runs_and_from_the_defaults(self, run, tmp_path):
    other = tmp_path / 'second'
    store(other)
    made = config()
    made.seed, made.phases.train.optimizer.learning_rate = 3, 0.5
    (other / 'config.json').write_text(made.to_json())
    found = runs.read([run[0], str(other)], runs.Limits())
    assert dict(runs.differences(found)) == {
      'phases.train.optimizer.learning_rate': ['0.0001', '0.5'],
      'seed': ['0', '3'],
    }
    chosen = {path: (default, values) for path, default, values in runs.chosen(found)}
    assert chosen['seed'] == ('0', ['0', '3']) and chosen['rollouts.every'] == ('10', ['1', '1'])
    assert chosen['phases.train.collect.samples_per_prompt'][0] == '8'

  def test_is_bounded(self, tmp_path):
    kept = store(tmp_path / 'long')
    batch, tokenizer = bytes_batch(['x' * 3000] * 8)
    for step in range(1, 9):
      kept.write_rows('train', step, batch, 8, tokenizer=tokenizer)
    text = page.of_runs([str(tmp_path / 'long')], runs.Limits(steps=4, rows=4, tokens=2000))
    read = check(text)
    assert read.tags.count('i') < 2100 and 'tokens left out' in read.text
    assert re.findall(r'train, update (\d)', read.text) == ['1', '3', '6', '8']
    assert read.text.count('4 of the 8 rows of this batch') == 4
    assert len(text) < 2**20

  def test_leaves_out_files_that_cannot_be_read_and_says_so(self, hostile):
    broken = pathlib.Path(hostile) / 'rollouts/train-000009.parquet'
    broken.write_bytes(b'noise')
    (pathlib.Path(hostile) / 'config.json').write_text('[')
    read = check(page.of_runs([hostile], runs.Limits()))
    assert 'train-000009.parquet: no file of rows' in read.text and 'config.json' in read.text

  def test_refuses_a_folder_that_is_no_run(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='expected the folder of a run'):
      page.of_runs([str(tmp_path)], runs.Limits())

  def test_is_written_by_the_main(self, run, tmp_path, capsys):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(out=str(tmp_path / 'new/view.html'), compilation_cache=''):
      viewer.main(['view', run[0]])
    assert check((tmp_path / 'new/view.html').read_text()).tags.count('svg')
    assert 'open it in a browser' in capsys.readouterr().out


class TestCharts:
  def test_axes_have_round_ticks_within_their_values(self):
    for values in ([0, 1], [3], [-2e9, 7], [1e-9, 1.1e-9], [0, 0], [5, 5 + 1e-14], [-1e299, 1e299]):
      scale = charts.scale(np.array(values, float), 0, 100)
      assert 1 <= len(scale.ticks) <= 12 and scale.low < scale.high
      assert all(0 <= scale.place(t) <= 100 for t in [*scale.ticks, *values])
    assert charts.scale(np.array([0.0, 350]), 0, 1).ticks == [0, 100, 200, 300]
    assert charts.scale(np.array([1.0, 2]), 0, 1, whole=True).ticks == [1, 2]
    # Ticks that lie close together have the digits that tell them apart.
    assert charts.labels([0, 0.5, 1500]) == ['0', '0.5', '1500']
    assert charts.labels([1, 1.00002, 1.00004]) == ['1', '1.00002', '1.00004']

  def test_many_points_are_averaged_and_have_a_running_mean(self):
    rows = [{'step': i, 'phase': 'a', 'x': float(i % 2)} for i in range(3000)]
    found = charts.points(rows, 'x')
    assert len(found) == charts.POINTS and found[:, 1].mean() == pytest.approx(0.5)
    [(_, [chart])] = charts.families([rows])
    values = [float(text.rpartition(' ')[2]) for _, _, text in chart.curves[0].dots]
    assert chart.curves[0].smooth and np.ptp(values) < 0.05
    [(_, [chart])] = charts.families([rows[:10]])
    assert not chart.curves[0].smooth

  def test_leave_out_what_is_no_number_and_constant_metrics(self):
    rows = [{'step': i, 'phase': 'a', 'x': None if i == 1 else i, 'same': 2} for i in range(4)]
    [(name, [chart])] = charts.families([rows])
    assert (name, chart.name, len(chart.curves[0].dots)) == ('Other', 'x', 3)
    assert charts.constants([rows]) == {'same': '2'}
    assert charts.phase_begins([*rows, {'step': 4, 'phase': 'b'}]) == [(4, 'b')]


class TestTokens:
  def test_have_levels_by_sign_and_size(self):
    row = {'advantages': [0.0, -2.0, 1.0, math.nan], 'behavior_logp': [0.0, -0.1, -5.0, -99.0]}
    assert tokens.levels(row) == {'advantages': [0, -4, 2, 0], 'behavior_logp': [0, 1, 4, 4]}

  def test_of_long_rows_leave_out_the_middle(self):
    n = 50
    row = {'pieces': list('x' * n), 'tokens': [1] * n, 'mask': [True] * n, 'column': 2}
    found = tokens.tokens(row, most=10, first=4)
    assert len(found) == 11 and found[5].text.strip() == '… 36 tokens left out …'
    assert found[0].numbers.startswith('column 6,') and found[-1].numbers.startswith('column 51,')


class TestInspect:
  def test_a_demonstration_a_pair_and_a_problem_are_laid_out_as_the_run_does(self, run):
    for made, rows in ((sft, 1), (dpo, 2)):
      experiment = build.build(made.get_config('smoke'))
      view = inspect.of_record(experiment, '', 5)
      assert len(view.rows) == rows
      for row in view.rows:
        assert ''.join(row['pieces'][: row['start']]) == row['prompt']
        assert row['mask'] == [i >= row['start'] for i in range(len(row['mask']))]
    view = inspect.of_record(build.build(config()), '', 5)
    assert not any(view.rows[0]['mask']) and view.rows[0]['completion'] == ''
    assert 'logp' not in view.rows[0]

  def test_a_record_has_the_log_probs_of_a_checkpoint(self, run):
    experiment = build.build(config())
    with jax.set_mesh(experiment.mesh):
      view = inspect.of_record(experiment, 'train', 5, f'{run[0]}/checkpoints')
    [row] = view.rows
    assert math.isnan(row['logp'][0]) and all(x < 0 for x in row['logp'][1:])
    assert all(0 < x < math.log(14) + 1e-3 for x in row['entropy'][1:])

  def test_clipped_tokens_are_those_of_the_surrogates_definition(self, run):
    """An independent form of the clip of PPO (arXiv:1707.06347) with DAPO's bounds."""
    experiment = build.build(config())
    phase = experiment.phases['train']
    stored = row_files.read(row_files.files(run[0], row_files.ROLLOUTS)[-1])
    batch, random = row_files.as_batch(stored), np.random.default_rng(0)
    shape = batch.mask.shape
    with jax.set_mesh(experiment.mesh):
      logp = inspect.judged(experiment, phase, run[1], batch)['logp']
      old = np.where(batch.mask, logp + random.normal(size=shape) * 0.4, 0).astype(np.float32)
      advantages = random.choice([-1.0, 0.0, 2.0], shape).astype(np.float32)
      batch = batch.replace(behavior_logp=old, proximal_logp=old, advantages=advantages)
      found = inspect.judged(experiment, phase, run[1], batch)
    ratio = np.exp(np.float64(logp) - old)
    beyond = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    np.testing.assert_array_equal(found['clipped'], batch.mask & beyond)
    np.testing.assert_allclose(np.exp(found['log_ratio'][batch.mask]), ratio[batch.mask], rtol=1e-5)
    push = np.where(beyond, 0, ratio * advantages)[batch.mask] / batch.mask.sum()
    np.testing.assert_allclose(found['push'][batch.mask], push, rtol=1e-4, atol=1e-7)

  def test_a_stored_row_is_shown_in_the_shell_and_as_a_page(self, run, tmp_path, capsys):
    path = row_files.files(run[0], row_files.ROLLOUTS)[-1]
    flags.FLAGS.mark_as_parsed()
    out = tmp_path / 'row.html'
    with flagsaver.flagsaver(
      rollout=path, row=2, out=str(out), numbers=True, compilation_cache='', config=None
    ):
      inspect.main(['inspect'])
    said, read = capsys.readouterr().out, check(out.read_text())
    for word in ('advantage', 'ratio', 'clipped', 'entropy', 'policy log-prob'):
      assert word.split()[0] in said and word in read.text
    assert row_files.read(path).rows[2]['completion'] in read.text

  def test_rows_of_another_phase_than_the_checkpoint_are_shown_without_its_policy(self, run):
    experiment = build.build(config(warm_start=2))
    stored = row_files.read(row_files.files(run[0], row_files.ROLLOUTS)[0])
    folder = f'{run[0]}/checkpoints'
    view = inspect.of_rollout(experiment, stored, 0, folder)
    assert 'is of the phase warm_start' in view.note and 'logp' not in view.rows[0]
    with pytest.raises(ValueError, match='--step=2: that checkpoint is of the phase warm_start'):
      inspect.of_rollout(experiment, stored, 0, folder, 2)

  def test_refusals_name_the_flag_and_what_is_there(self, run):
    experiment = build.build(config())
    with pytest.raises(ValueError, match=r'--row=10\d*: the source of train has'):
      inspect.of_record(experiment, '', 10**9)
    with pytest.raises(ValueError, match="unknown phase 'trian'; did you mean 'train'"):
      inspect.of_record(experiment, 'trian', 0)
    view = inspect.of_record(experiment, '', 0)
    with pytest.raises(ValueError, match="--color: the row has no 'kl'"):
      inspect.show(view, Console(), ['kl'], False)

  def test_the_best_checkpoint_of_a_folder_without_any_is_refused(self, run, tmp_path, capsys):
    shutil.copy(os.path.join(run[0], 'config.json'), tmp_path)
    flags.FLAGS.mark_as_parsed()
    with (
      flagsaver.flagsaver(workdir=str(tmp_path), compilation_cache='', config=None),
      flagsaver.flagsaver((inspect.cli.STEP, 'best')),
      pytest.raises(SystemExit),
    ):
      inspect.main(['inspect'])
    assert '--step: there are no checkpoints in' in capsys.readouterr().err

  def test_hostile_tokens_stay_text(self):
    batch, tokenizer = bytes_batch([HOSTILE])
    experiment = dataclasses.replace(build.build(config()), tokenizer=tokenizer)
    view = inspect.View('<b>', '&', inspect.rows_of(experiment, 'train', batch, {}))
    assert '<script>alert(1)' in check(inspect.html(view)).text


def test_values_that_are_not_defaults_are_listed_with_these():
  made = config()
  made.phases.train.optimizer.learning_rate = 7.0
  made.log_every = 2
  made.tokenizer.name = '/nowhere.py:mine'  # a part that is not here is passed over
  found = overrides.not_default(made, build.TABLE)
  assert found['phases.train.optimizer.learning_rate'][0] == 7.0
  assert found['evaluation.name'] == ('build.HeldOut', 'build.Never')
  assert 'phases.train.shuffle' not in found and found['log_every'] == (2, 1)


def test_the_commands_of_the_page_have_flags_that_exist():
  commands = re.findall(r'^ *(python -m polgrad\.\w+.*)$', PAGE.read_text(), re.MULTILINE)
  assert len(commands) > 5
  for command in commands:
    for word in shlex.split(command.partition('#')[0])[3:]:
      name = re.match(r'--(?:no)?([\w.]+)', word)
      assert not name or name[1].startswith('config.') or name[1] in flags.FLAGS, word
