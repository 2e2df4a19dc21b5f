"""Draws completions once and stores the teacher's log-probs of their tokens, for `lightning_opd`.

    python -m polgrad.teacher_logp --teacher=TEACHER \\
      --config=experiments/run.py:method=lightning_opd,task=...,model=hf,path=STUDENT,completions=FOLDER
    python -m polgrad.train --workdir=RUN \\
      --config=experiments/run.py:method=lightning_opd,task=...,model=hf,path=STUDENT,completions=FOLDER

For reinforcement on stored rows (offline) no teacher is needed, and so no --teacher:

    python -m polgrad.teacher_logp --config=experiments/run.py:method=grpo,task=addition,model=tiny \\
      --config.phases.train.collect.name=Stored --config.phases.train.collect.path=FOLDER

The configuration is that of the run: its last phase says what is drawn for which records, and where the
files go. The student is the model of the configuration before training or a checkpoint, as
`polgrad.loading` says, and the teacher is a Hugging Face folder with the same tokenizer, of any family
and size; or, with --teacher_url, a model behind a service, as for `teachers.service`. With the setting
`top` of the collector the files also list the teacher's likeliest tokens. Every file is whole or absent,
so the command can be stopped and started again: it makes the files that are not there.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from polgrad import cli, evaluate, loading, paths, sharding, stored_rows, teachers
from polgrad.build import Experiment, Phase
from polgrad.collect import Stored
from polgrad.collect.base import draws_of, laid_out
from polgrad.compiling import jit
from polgrad.data import batching, tokenizers
from polgrad.learner import forward_in_pieces
from polgrad.models.policy import Policy
from polgrad.types import Batch, Layout, Params

_TEACHER = flags.DEFINE_string(
  'teacher', '', 'Folder of the teacher; with --workdir also the name of an anchor of that run.'
)
_URL = flags.DEFINE_string(
  'teacher_url', '', 'Service that has the teacher, up to /v1; --teacher is then its name there.'
)
_ROWS = flags.DEFINE_integer('file_rows', 1024, 'Data records of a file.', lower_bound=1)


def phase_of(experiment: Experiment) -> Phase:
  """The phase that reads the files.

  Raises:
    ValueError: the last phase reads none, or names no folder.
  """
  phase = experiment.phases[experiment.order[-1]] if experiment.order else None
  if phase is None or not isinstance(phase.collect, Stored):
    raise ValueError(
      'the last phase of the configuration reads no stored completions; take method=lightning_opd, or '
      'the collector collect.Stored'
    )
  if not phase.collect.path:
    raise ValueError('name the folder of the files: completions=FOLDER')
  return phase


def reads_teacher(phase: Phase) -> bool:
  """Whether the phase reads anything of the teacher in the files."""
  read = phase.objective.requires | phase.credit.requires
  return bool(phase.collect.top) or any(name.startswith('teacher_') for name in read)


def make_entries(
  experiment: Experiment, phase: Phase, params: Params, score: Callable[[Batch], dict[str, Any]]
) -> Callable[[Sequence[dict]], list[stored_rows.Entry]]:
  """Makes the function from records to their completions with log-probs.

  Args:
    params: of the student.
    score: rows -> what the teacher says of them, by name, see `make_score`.
  """
  settings, index = phase.collect, len(experiment.order) - 1
  context = settings.within(evaluate.context(experiment, phase, index))
  sampler, tokenizer = settings.sampler, context.tokenizer
  size = dict(samples_per_prompt=settings.samples_per_prompt)
  draw = draws_of(sampler, context, **size)
  lay = functools.partial(sampler.lay_out, tokenizer=tokenizer, cut=settings.cut)

  def entries(records: Sequence[dict]) -> list[stored_rows.Entry]:
    # The last batch is filled up with copies of its last record, so that one shape compiles.
    padded = [*records, *[records[-1]] * (settings.prompts - len(records))]
    prompts = laid_out(lay, padded)
    drawn = draw({'policy': params}, prompts, padded, prompts.ids, seed=context.seed, step=0).batch
    found = drawn.with_arrays(**sharding.to_host(score(drawn)))
    return [entry(found, prompts, n, settings.samples_per_prompt) for n in range(len(records))]

  return entries


def entry(batch: Batch, prompts: Any, number: int, samples: int) -> stored_rows.Entry:
  """The completions of prompt `number` in sampled rows (NumPy)."""
  rows = range(number * samples, (number + 1) * samples)
  of = lambda x: [x[row].reshape(len(batch.mask[row]), -1)[batch.mask[row]] for row in rows]
  of_tokens = lambda x: [values[:, 0] for values in of(x)]
  return stored_rows.Entry(
    id=int(prompts.ids[number]),
    prompt=stored_rows.digest(prompts.tokens[number][prompts.mask[number]]),
    finished=[bool(batch.finished[row]) for row in rows],
    tokens=of_tokens(batch.tokens),
    behavior_logp=of_tokens(batch.behavior_logp),
    teacher_logp=of_tokens(batch.teacher_logp),
    **{name: of(batch[name]) for name in stored_rows.LISTED if name in batch},
  )


def make_score(
  experiment: Experiment, phase: Phase, teacher: Policy, params: Params
) -> Callable[[Batch], dict[str, Any]]:
  """Makes the function from sampled rows to what the teacher says of them.

  That is `teacher_logp` f32[B, T], and for files that list tokens `teacher_top_ids` i32[B, T, top] and
  `teacher_top_log_probs` f32[B, T, top].
  """
  top = phase.collect.top
  stats = teachers.likeliest(top) if top else {}
  settings = dict(stats=stats, temperature=phase.collect.temperature)
  layout = Layout(phase.collect.prompt_length)

  @jit
  def look(params: Params, rows: Batch) -> dict[str, Any]:
    found = forward_in_pieces(teacher, params, rows, **settings)
    return {f'teacher_{name}': x for name, x in {'logp': found.logp, **found.stats}.items()}

  def score(batch: Batch) -> dict[str, Any]:
    rows = Batch(tokens=batch.tokens, segment_ids=batch.segment_ids, mask=batch.mask, layout=layout)
    return look(params, sharding.place_batch(experiment.mesh, rows))

  return score


def own_score(batch: Batch) -> dict[str, Any]:
  """What the files say of the teacher where there is none: the log-probs of the policy that drew."""
  return {'teacher_logp': batch.behavior_logp}


def make_score_of_service(phase: Phase, tokenizer: Any, name: str, url: str) -> Callable:
  """`make_score` of a teacher that is behind a service.

  Raises:
    ValueError: it gives no log-probs, or not at the temperature of the phase.
  """
  top, temperature = phase.collect.top, phase.collect.temperature
  model = teachers.service(model=name, url=url, top=max(top, 1))
  teachers.check(model, tokenizer, temperature, '--teacher_url')
  asked = {n: k for n, k in model.entries.items() if top or n == 'logp'}
  teachers.ask_first(model, asked, temperature, '--teacher_url')
  return lambda batch: teachers.arrays_of(model, 'teacher', batch, asked, temperature)


def store(
  phase: Phase,
  tokenizer: tokenizers.Tokenizer,
  entries: Callable[[Sequence[dict]], list[stored_rows.Entry]],
  *,
  vocab_size: int,
  file_rows: int = 1024,
  made_by: dict[str, str],
) -> int:
  """Writes the files that are not there yet; returns how many records they hold.

  Args:
    tokenizer: of the run.
    entries: of `make_entries`.
    vocab_size: of the student's model.
    file_rows: data records of a file.
    made_by: what else the files say of themselves.

  Raises:
    ValueError: the folder has files of other settings, or a record does not fit the run.
  """
  settings, source = phase.collect, phase.source
  folder = str(paths.local(settings.folder))
  own = settings.own(tokenizer)
  head = settings.settings(own) | {'vocab_size': vocab_size} | made_by
  first = jax.process_index() == 0
  if first:
    os.makedirs(folder, exist_ok=True)
  count = 0
  for begin in tqdm(range(0, len(source), file_rows), unit='file', disable=not first):
    path = stored_rows.file_name(folder, begin)
    rows = range(begin, min(begin + file_rows, len(source)))
    head['until'] = rows.stop  # other --file_rows, or more data, would leave records without a file
    if os.path.exists(path):
      check_file(path, head)
      continue
    records = [{**source[row], 'id': row} for row in rows]
    fates = [batching.fate(settings.sampler, record, own) for record in records]
    kept = [record for record, fate in zip(records, fates) if fate in ('kept', 'cut')]
    made = []
    for at in range(0, len(kept), settings.prompts):
      made += entries(kept[at : at + settings.prompts])
    count += len(made)
    if first:
      stored_rows.write(path, head, made)
  return count


def check_file(path: str, head: dict[str, Any]) -> None:
  """Refuses a file that is there already, but was made otherwise.

  Raises:
    ValueError: names the file and what differs.
  """
  found = stored_rows.head(path)
  for name, value in head.items():
    if found.get(name) != value:
      raise ValueError(
        f'{path}: it is there already, with {name} {found.get(name)!r}, now {value!r}; take another '
        'folder, or delete its files'
      )


def main(argv: list[str]) -> None:
  loading.start(argv)
  with cli.refusals():
    experiment, params = loading.load(loading.config())
    phase = phase_of(experiment)
    if not _TEACHER.value and (_URL.value or reads_teacher(phase)):
      raise ValueError('name the teacher: --teacher=FOLDER, or its name at --teacher_url')
    if _TEACHER.value and not _URL.value:
      tokenizers.check_same(experiment.tokenizer, _TEACHER.value, '--teacher')
    student = cli.WORKDIR.value or str(cli.CONFIG.value and cli.CONFIG.value.model.get('path', ''))
    with jax.set_mesh(experiment.mesh):
      if not _TEACHER.value:
        score = own_score
      elif _URL.value:
        served = (_TEACHER.value, _URL.value)
        score = make_score_of_service(phase, experiment.tokenizer, *served)
      else:
        teacher = loading.beside(_TEACHER.value, experiment, same=False)
        score = make_score(experiment, phase, *teacher)
      count = store(
        phase,
        experiment.tokenizer,
        make_entries(experiment, phase, params, score),
        vocab_size=experiment.policy.config.vocab_size,
        file_rows=_ROWS.value,
        made_by={'teacher': _TEACHER.value, 'student': student},
      )
  print(f'wrote {count} records to {phase.collect.path}')


if __name__ == '__main__':
  cli.run(main)
