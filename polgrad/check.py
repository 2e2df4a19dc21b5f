"""Checks a run before it is run: data, masks, stop tokens, verifiers, memory and time.

    python -m polgrad.check --config=experiments/quickstart.py

All records are read and tokenised as the run will read them, verifiers judge right and wrong answers,
updates are traced, and two real steps of every phase are made. Nothing is written. Exit code 1: the run
would stop or could not learn, and the lines that begin with FAIL say why; 2: the configuration is
refused, as by `polgrad.train`; 0: neither, but look at the warnings. docs/before_a_run.md explains the
output.
"""

import functools
import itertools
import json
import operator
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags
from tqdm import tqdm

from polgrad import cli, collect, paths, phases
from polgrad.build import (
  TABLE,
  DataSection,
  Experiment,
  HeldOut,
  Tried,
  build,
  check_texts,
  data_sections,
  leaks,
  look_outside,
  try_environment,
)
from polgrad.checks import canaries, duplicates, memory, reading, stops, tables, tracing
from polgrad.checks.findings import Finding
from polgrad.data import chat, sources, tokenizers
from polgrad.registry import bind

_STEPS = flags.DEFINE_integer('steps', 2, 'Steps of every phase to make and time; 0: none.')
_CANARIES = flags.DEFINE_integer(
  'canaries', 1000, 'Records of every source, evenly spaced, that verifiers are tried on; 0: all.'
)
_READ = flags.DEFINE_integer(
  'read', 0, 'Records of every source, evenly spaced, that are read; 0: all.'
)


class Section(NamedTuple):
  """A part of the report."""

  title: str
  lines: Sequence[str]
  findings: Sequence[Finding] = ()


def make_job(
  tokenizer: Mapping, source: Mapping, reader: Mapping | None, plan: Mapping
) -> reading.ReadJob:
  """The job of reading a source, of configurations as JSON; it needs no device."""
  read = (
    bind(reader, collect.TABLE) if reader else bind(plan, {'build.HeldOut': HeldOut}, 'evaluation')
  )
  return reading.ReadJob(bind(source, sources.TABLE), read, bind(tokenizer, tokenizers.TABLE))


def job_maker(
  config: ml_collections.ConfigDict, section: DataSection
) -> Callable[[], reading.ReadJob]:
  """A function that makes the job of a section in another process; it can be sent there."""
  spec, source = specs(config, section)
  tokenizer = json.loads(config.tokenizer.to_json_best_effort())
  return functools.partial(make_job, tokenizer, source, spec.get('collect'), spec)


def specs(config: ml_collections.ConfigDict, section: DataSection) -> tuple[dict, dict]:
  """The configurations, as JSON, of the phase or evaluation of a section, and of its source."""
  path, _, held_out = section.path.removeprefix('config.').partition('.held_out.')
  plain = json.loads(config.to_json_best_effort())
  spec = functools.reduce(operator.getitem, path.split('.'), plain)
  return spec, spec['held_out'][held_out] if held_out else spec['source']


def read_section(
  config: ml_collections.ConfigDict, run: Experiment, section: DataSection, most: int
) -> list[reading.RecordFacts]:
  """Reads the records of a section, with a progress bar."""
  rows, found = sources.spaced(section.rows, most), []
  with tqdm(total=len(rows), desc=f'reading {section.path}', mininterval=0.5, leave=False) as bar:
    job = reading.ReadJob(section.source, section.reader, run.tokenizer)
    for piece in reading.read_all(rows, job, job_maker(config, section)):
      found += piece
      bar.update(len(piece))
  return found


def check_records(section: DataSection, found: list[reading.RecordFacts]) -> Section:
  """Lengths, masks, fates and repeated prompts of the records of a section."""
  said = reading.summary(found, section.reader)
  lines = []
  head = ('tokens of', 'count', 'median', '95%', 'max', 'room', 'over')
  rows = [
    (s.name, f'{s.count:,}', s.median, s.most, s.largest, s.budget or '-', f'{s.over:,}')
    for s in said.spreads
  ]
  if rows:
    lines += tables.table(head, rows)
  for s in said.spreads[-1:]:
    lines += [f'  {s.name}s by length:', *tables.histogram(s)]
  fates = ', '.join(f'{count:,} {fate}' for fate, count in sorted(said.fates.items()))
  lines.append(f'  records: {fates} (overlong: {section.reader.overlong})')
  if said.tokens:
    lines.append(
      f'  trained: {said.trained / said.tokens:.1%} of {said.tokens:,} tokens, before anything is cut; '
      f'{len(said.untrained):,} records have a row without a trained token'
    )
  good = [one for one in found if one.asked]
  again = duplicates.repeated(
    [one.row for one in good], [one.asked for one in good], [one.answered for one in good]
  )
  lines.append(f'  prompts that repeat an earlier one: {len(again.rows):,}')
  wrong = reading.findings(section.path, found, said, section.reader.overlong, section.source.place)
  wrong += duplicates.findings(section.path, again, said.records, section.source.place)
  return Section(f'{section.path}: {said.records:,} of {section.rows:,} records', lines, wrong)


def check_verifiers(section: DataSection, run: Experiment, most: int) -> Section:
  """What the verifiers of a section say of right and wrong answers."""
  rows = sources.spaced(section.rows, most)
  records = [(i, section.source[i]) for i in tqdm(rows, 'reading answers', leave=False)]
  judge = functools.partial(section.judged.judge, tokenizer=run.tokenizer)
  canary = canaries.try_verifiers(section.judged.reward, judge, records)
  head = (
    'verifier',
    'tried',
    'right refused',
    'empty accepted',
    'other accepted',
    'failed',
    'form',
  )
  lines = tables.table(
    head,
    [
      (v.name, f'{len(v.rows):,}', *map(len, (v.refused, v.accepted_empty, v.accepted_other, v.errors)),
       v.form)
      if v.tells_apart
      else (v.name, f'{len(v.rows):,}', 'all', '-', '-', len(v.errors), v.form)
      for v in canary.verdicts
    ],
  ) if canary.verdicts else []  # fmt: skip
  lines += [line for note in canary.notes for line in tables.wrapped(note)]
  title = f'{section.path}.reward: right answers, an empty text, and the answers of other records'
  place = section.source.place
  wrong = canaries.findings(section.path, canary, place)
  wrong += canaries.unanswered(section.path, section.judged.reward, judge, records, place)
  return Section(title, lines, wrong)


def check_environment(section: DataSection, tried: Tried) -> Section:
  """What the environment of a section answers to an empty turn."""
  said = lambda one: 'the episode is over' if one.done else repr(one.said[:60])
  lines = tables.table(
    ('record', 'milliseconds', 'reward', 'answer'),
    [
      (section.source.place(one.row), f'{1000 * one.seconds:.1f}', f'{one.reward:g}', said(one))
      if not one.failure
      else (
        section.source.place(one.row),
        '-',
        '-',
        f'{one.failure.kind}: {one.failure.reason}'[:60],
      )
      for one in tried.answers
    ],
  )
  environment = section.reader.environment
  name, most = type(environment).__name__, environment.max_turns
  title = f'{section.path}: {name} answers an empty turn; an episode has {most} turns at most'
  return Section(title, lines, tried.findings)


def check_turns(config: ml_collections.ConfigDict, run: Experiment, params: Any) -> Section:
  """How turns end, and what the chat template depends on."""
  found = stops.stops(run.tokenizer)
  ids = tuple(found.stopping)
  bad = stops.untrained(run.policy, params, ids) if params is not None else []
  state = lambda i: 'unknown' if params is None else 'no' if i in bad else 'yes'
  lines = tables.table(
    ('stops sampling', 'id', 'ends trained rows', 'the model can draw it'),
    [(name, i, 'yes' if i == ids[0] else '', state(i)) for i, name in found.stopping.items()],
  )
  if params is None:
    lines.append(
      '  unknown: whether the output rows are trained is looked at with --steps=1 or more'
    )
  if found.ending:
    lines.append(f'  after an assistant turn the template writes {found.ending!r}')
  if found.opening:
    lines.append(f'  the generation prompt begins the assistant turn with {found.opening!r}')
  if 'date' in config.tokenizer:
    templates = tokenizers.templates(config.tokenizer.path)
    dated = any(map(chat.reads_date, templates))
    told = f'it is told {config.tokenizer.date}' if dated else 'no'
    lines.append(f'  the template asks for the date of today: {told}')
    read = set().union(*map(chat.options_read, templates))
    if unset := sorted(read - {'tools', *config.tokenizer.template_options}):
      lines += tables.wrapped(f'options of the template that are not set: {", ".join(unset)}')
  return Section('turns', lines, stops.findings(run.tokenizer, bad))


# What a checkpoint holds, by the beginnings of the names in the table of memory.
KEPT = ('parameters', 'optimizer', 'anchor', 'network', 'state of', 'responses')


def check_memory(run: Experiment, workdir: str) -> Section:
  """Bytes of every phase on a device, beside what the device and the disk have."""
  lines, wrong = [], []
  stats = run.mesh.devices.flat[0].memory_stats() or {}
  limit = stats.get('bytes_limit', 0)
  has = 'the device' if limit else 'this machine'
  limit = limit or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  for name in run.order:
    phase = run.phases[name]
    uses = memory.of_phase(
      phase,
      run.policy,
      run.mesh,
      phases.opt_shardings,
      None if run.sampled_on is run.mesh else run.sampled_on,
      phases.begin_responses(phase),
      run.engine,
    )
    rows = [(u.name, tables.size(u.total), tables.size(u.device), u.when) for u in uses]
    lines += tables.table((f'phase {name}', 'in all', 'a device', 'when'), rows)
    most = memory.peak(uses)
    lines += tables.wrapped(
      f'at most {tables.size(most)} at a time, and activations, which are not counted; {has} has '
      f'{tables.size(limit)}'
    )
    if most > limit:
      text = f'{tables.size(most)} without activations, but {has} has {tables.size(limit)}'
      mend = 'more devices in config.mesh.fsdp, more micro_batches, or a smaller model'
      wrong.append(Finding(f'config.phases.{name}', text, mend, fails=True))
  kept = [u for u in uses if u.name.startswith(KEPT)]
  disk = (run.keep_checkpoints + 1) * sum(u.total for u in kept)
  if paths.REMOTE in workdir:
    lines.append(f'  checkpoints: up to {tables.size(disk)} in {workdir}')
    return Section('memory', lines, wrong)
  place = os.path.abspath(os.path.expanduser(workdir or '.'))
  while not os.path.exists(place):
    place = os.path.dirname(place)
  free = shutil.disk_usage(place).free
  lines.append(f'  checkpoints: up to {tables.size(disk)}; {place} has {tables.size(free)} free')
  if disk > free and run.checkpoint_every:
    text = f'checkpoints take up to {tables.size(disk)}, but {place} has {tables.size(free)} free'
    wrong.append(Finding('config.keep_checkpoints', text, 'choose another --workdir'))
  return Section('memory', lines, wrong)


def check_steps(run: Experiment, count: int, state: Any) -> Section:
  """Makes the first steps of every phase, and times them; nothing is saved."""
  rows, wrong, notes = [], [], []
  for index, name in enumerate(run.order):
    silent = []
    state = phases.begin(run, index, state) if index else state
    doing = phases.start_phase(run, state, phases.Logs())
    doing.work_ahead(state)
    path = f'config.phases.{name}'
    for step in tqdm(range(min(count, doing.phase.steps)), f'steps of {name}', leave=False):
      draw = doing.draw(state)
      started = time.perf_counter()
      try:
        collected = doing.collect(state, draw, step)
        middle = time.perf_counter()
        state, reports = doing.update_all(state, collected.batch, step, collected.further)
        collected = doing.finished(collected, step)
      except Exception as error:  # whatever stops a step is what is asked for here
        text = f'step {step} fails: {type(error).__name__}: {str(error)[:300]}'
        wrong.append(Finding(path, text, fails=True))
        break
      ended = time.perf_counter()
      state = doing.advance(state, collected, draw)
      row = phases.summary(reports, collected, ended - started)
      silent.append(row['silent'])
      times = (f'{x:.2f}' for x in (middle - started, ended - middle, ended - started))
      shown = (f'{row[k]:.3g}' if k in row else '-' for k in ('loss', 'grad_norm', 'reward'))
      rows.append((name, 'compiles' if step == 0 else step + 1, *times, *shown))
      if step:
        left = tables.duration(doing.phase.steps * (ended - started))
        notes.append(
          f'  {name}: {doing.phase.steps:,} steps would take {left}, without evaluations'
        )
    if silent and all(silent):
      text = 'no step has a gradient'
      mend = 'all rewards of each group may be equal: is the task too hard, or the reward broken?'
      wrong.append(Finding(path, text, mend))
  head = ('phase', 'step', 'collect s', 'update s', 'step s', 'loss', 'grad_norm', 'reward')
  lines = tables.table(head, rows) + notes
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  lines.append(f'  this process has used at most {tables.size(most)} of memory')
  stats = run.mesh.devices.flat[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    lines.append(f'  the first device has used at most {tables.size(stats["peak_bytes_in_use"])}')
  return Section(f'{count} steps of every phase', lines, wrong)


def check_data(
  config: ml_collections.ConfigDict, run: Experiment, *, canary: int, most: int
) -> Iterator[Section]:
  """The sections on data and verifiers, one after the other.

  Args:
    canary, most: records of a source that verifiers are tried on, and that are read; 0: all.
  """
  sections, asked, seen = data_sections(run), {}, set()
  outside = check_outside(run)
  if outside.findings or any(phase.elsewhere for phase in run.phases.values()):
    yield outside
  for section in sections:
    found = read_section(config, run, section, most)
    asked[section.path] = [(one.row, one.asked) for one in found if one.asked]
    yield check_records(section, found)
  if any(section.held_out for section in sections):
    wrong = leaks(sections, asked)
    yield Section('held-out prompts in training data', _none_if(wrong), wrong)
  for section in sections:
    tried = try_environment(section, run.tokenizer)
    if tried.answers:
      yield check_environment(section, tried)
    spec, source = specs(config, section)
    key = json.dumps([source, spec['reward']])
    if section.judged and section.judged.reward and key not in seen:
      seen.add(key)
      yield check_verifiers(section, run, canary)


def check_outside(run: Experiment) -> Section:
  """Whether the files of collectors are whole, and services answer."""
  wrong = []
  for name, phase in run.phases.items():
    try:
      look_outside(name, phase, run.tokenizer)
    except (ValueError, OSError) as error:
      where, _, text = str(error).partition(': ')
      wrong.append(Finding(where, text, fails=True))
  return Section('files and services of every phase', _none_if(wrong), wrong)


def check_trace(run: Experiment) -> Section:
  """Traces the update of every phase."""
  wrong = []
  for name, phase in run.phases.items():
    try:
      tracing.trace_objective(f'config.phases.{name}', phase, run.policy)
      tracing.trace_update(f'config.phases.{name}', phase, run.policy, run.mesh)
    except ValueError as error:
      where, _, text = str(error).partition(': ')
      wrong.append(Finding(where, text, fails=True))
  return Section('trace of every update', _none_if(wrong), wrong)


def check_run(
  config: ml_collections.ConfigDict, run: Experiment, *, workdir: str, steps: int
) -> Iterator[Section]:
  """The sections on updates, memory, turns and time, one after the other."""
  traced = check_trace(run)
  yield traced
  yield check_memory(run, workdir)
  with jax.set_mesh(run.mesh):
    if not steps or traced.findings:
      yield check_turns(config, run, None)
      return
    state = phases.begin(run, 0, None)
    yield check_turns(config, run, state.params)
    yield check_steps(run, steps, state)


def _none_if(wrong: Sequence[Finding]) -> list[str]:
  return [] if wrong else ['  nothing to report']


def show(section: Section) -> None:
  """Prints a section, and what is wrong in it."""
  print('\n'.join(['', section.title, *section.lines]))
  for one in section.findings:
    print('\n'.join(tables.wrapped(str(one), '  FAIL ' if one.fails else '  warning ', '    ')))
  sys.stdout.flush()


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  with cli.refusals():
    config = cli.config(TABLE)
    run = build(config)
    check_texts(run)
  wrong = []
  with cli.refusals():  # weights that cannot be read, for example
    for section in itertools.chain(
      check_data(config, run, canary=_CANARIES.value, most=_READ.value),
      check_run(config, run, workdir=cli.WORKDIR.value or '', steps=_STEPS.value),
    ):
      show(section)
      wrong += section.findings
  fails = sum(one.fails for one in wrong)
  print(f'\n{fails} failures, {len(wrong) - fails} warnings')
  sys.exit(1 if fails else 0)


if __name__ == '__main__':
  cli.run(main)
