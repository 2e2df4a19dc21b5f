"""Compares the completions of two models: win rate, length, reward, and KL between them.

    python -m polgrad.compare --config=... --workdir=RUN                    # with the run's reference
    python -m polgrad.compare --config=... --workdir=RUN --against=RUN2     # with another run
    python -m polgrad.compare --config=... --workdir=RUN --against=before   # before training
    python -m polgrad.compare --config=... --workdir=RUN --against=field:answer  # with given texts
    python -m polgrad.compare --config=... --workdir=RUN --curve            # every checkpoint

The problems are those of the configuration's `evaluation`. Each model makes `--samples` completions of
each, at the evaluation's temperature. Which of two is better is `config.evaluation.comparison`: by
default the one with the larger reward, and `judge.compare` asks a language model. The numbers are
explained in `polgrad.preference_evaluation`. With --curve they are measured for every checkpoint that
the run has kept, and drawn over the KL: over-optimisation is a proxy reward (that of the last phase)
that still rises where the gold reward (that of the evaluation) falls.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from polgrad import checkpoint, cli, evaluate, mirrors, sharding
from polgrad import preference_evaluation as numbers
from polgrad.build import TABLE, Experiment, build
from polgrad.collect import question
from polgrad.compiling import jit
from polgrad.learner import forward_in_pieces
from polgrad.sampling import behavior_policies
from polgrad.types import Batch, Params
from polgrad.whole_files import writing

_AGAINST = flags.DEFINE_string(
  'against',
  'reference',
  'An anchor of the run, `before` (the model before training), `field:NAME` (texts of the records), or '
  'the folder of another run.',
)
_AGAINST_STEP = flags.DEFINE_integer(
  'against_step', -1, 'Checkpoint of the other run; -1 is the newest.'
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 1, 'Completions of each problem.', lower_bound=1, upper_bound=1024
)
_CURVE = flags.DEFINE_bool('curve', False, 'Measure every checkpoint of the run.')


class Made(NamedTuple):
  """Completions of N problems, S of each."""

  records: list[dict]  # [N]
  prompts: list[str]  # [N], the texts that the model was given
  texts: list[list[str]]  # [N][S]
  lengths: np.ndarray  # f[N, S], characters
  scores: np.ndarray  # f[N, S], rewards; NaN where a verifier failed
  rollouts: list[tuple[Batch, int]]  # each with the number of rows that count


def make(experiment: Experiment, sample: Callable, params: Params, samples: int) -> Made:
  """The completions of a model."""
  rollouts, prompts = [], []

  def look(rollout: Batch, rows: int, others: Mapping[str, Callable]) -> None:
    rollouts.append((rollout, rows))
    prompts.extend(others['prompt']()[::samples])

  found = evaluate.attempt(experiment, sample, params, samples, look)
  lengths = np.array([[len(text) for text in row] for row in found.texts], float)
  return Made(found.records, prompts, found.texts, lengths, found.scores, rollouts)


def of_field(experiment: Experiment, made: Made, field: str) -> Made:
  """The texts in a field of the records as completions, once for each sample of `made`.

  Raises:
    ValueError: a record has no such text.
  """
  for record in made.records:
    if not isinstance(record.get(field), str):
      raise ValueError(
        f'--against=field:{field}: record {record["id"]} has no such text; its fields: {sorted(record)}'
      )
  samples = made.scores.shape[1]
  texts = [[record[field]] * samples for record in made.records]
  lengths = np.array([[len(text) for text in row] for row in texts], float)
  return made._replace(
    texts=texts, lengths=lengths, scores=score(experiment.evaluation, made, texts), rollouts=[]
  )


def score(judged: Any, made: Made, texts: Sequence[Sequence[str]]) -> np.ndarray:
  """Rewards f[N, S] of texts by the verifiers of an evaluation or a phase; NaN where one failed."""
  samples = made.scores.shape[1]
  flat = [text for row in texts for text in row]
  records = [record for record in made.records for _ in range(samples)]
  others = {'prompt': lambda: [prompt for prompt in made.prompts for _ in range(samples)]}
  found = judged.score(flat, records, [len(text) for text in flat], others)
  return found.total.reshape(-1, samples)


def wins_of(experiment: Experiment, one: Made, other: Made) -> tuple[np.ndarray, list[str]]:
  """P(the completion of `one` is better), f[N, S], and what failed; NaN where something did."""
  pairs, prompts, known = [], [], np.isfinite(one.scores) & np.isfinite(other.scores)
  for n, s in zip(*np.nonzero(known)):
    pairs.append(
      {
        **{'first': one.texts[n][s], 'second': other.texts[n][s], 'record': one.records[n]},
        **{'first_reward': one.scores[n, s], 'second_reward': other.scores[n, s]},
      }
    )
    prompts.append(one.prompts[n])
  found = experiment.evaluation.compare(pairs, {'prompt': lambda: prompts})
  wins = np.full(one.scores.shape, np.nan)
  wins[known] = found.wins
  return wins, found.messages


def make_divergence(experiment: Experiment) -> Callable[..., numbers.Divergence]:
  """Makes `divergence(made, params, other) -> Divergence`, of the samples of the first parameters."""
  plan, mesh = experiment.evaluation, experiment.mesh
  settings = dict(fields=frozenset(), temperature=plan.temperature)
  look = jit(
    lambda params, batch: forward_in_pieces(experiment.policy, params, batch, **settings).logp
  )

  def divergence(made: Made, params: Params, other: Params) -> numbers.Divergence:
    ratios, masks = [], []
    for rollout, rows in made.rollouts:
      plain = Batch(tokens=rollout.tokens, segment_ids=rollout.segment_ids, mask=rollout.mask)
      placed = sharding.place_batch(mesh, plain)
      one, two = (sharding.to_host(look(x, placed)) for x in (params, other))
      ratios.append((one - two)[:rows])
      masks.append(np.asarray(rollout.mask)[:rows])
    shape = (*made.scores.shape, -1)
    ratio, mask = np.concatenate(ratios), np.concatenate(masks)
    return numbers.divergence(ratio.reshape(shape), mask.reshape(shape))

  return divergence


def measure(experiment: Experiment, one: Made, other: Made) -> tuple[dict[str, float], list[str]]:
  """Win rate and means of two sets of completions, and what failed in words."""
  wins, messages = wins_of(experiment, one, other)
  of_prompts = numbers.by_prompt(wins)
  low, high = numbers.bootstrap(of_prompts)
  controlled = numbers.length_controlled(wins.ravel(), one.lengths.ravel(), other.lengths.ravel())
  found = {
    'win_rate': numbers.mean_and_error(of_prompts)[0],
    'win_rate_low': low,
    'win_rate_high': high,
    'length_controlled_win_rate': controlled.win_rate,
    'prompts': len(of_prompts),
    'failed_comparisons': int(np.isnan(wins).sum()),
  }
  for name, x in (('', one), ('_against', other)):
    found[f'reward{name}'] = evaluate.mean(x.scores[np.isfinite(x.scores)])
    found[f'characters{name}'] = evaluate.mean(x.lengths.ravel())
  return found, messages


def opponent(experiment: Experiment) -> Callable[[int], Params | None]:
  """The other parameters for a checkpoint of the run, by --against; None: there are only texts.

  Raises:
    FileNotFoundError: --against is the path of a folder that does not exist.
    ValueError: texts against episodes; when called, --against is no anchor of the run's checkpoint.
  """
  name = _AGAINST.value
  if name.startswith('field:'):
    if experiment.evaluation.has_environment:
      raise ValueError(
        f'--against={name}: the problems are episodes of an environment, which texts of the data have '
        'no turns of; name a model'
      )
    return lambda step: None
  if name == 'before':
    before = evaluate.init_params(experiment.policy, experiment.mesh, experiment.seed)
    return lambda step: before
  folder = os.path.expanduser(name)
  if os.path.isdir(folder):
    checkpoints = os.path.join(folder, 'checkpoints')
    params = evaluate.restore_params(experiment, checkpoints, _AGAINST_STEP.value)
    return lambda step: params
  if os.sep in name:
    raise FileNotFoundError(f'--against={name}: there is no such folder')
  return lambda step: evaluate.restore_params(experiment, cli.checkpoint_folder(), step, name)


def draw(rows: Sequence[Mapping[str, float]], path: str) -> None:
  """The curves of --curve over KL: win rate with its interval, gold and proxy reward."""
  from matplotlib.figure import Figure  # here, because it takes half a second

  rows = sorted(rows, key=lambda row: row['kl'])
  column = lambda name: np.array([row[name] for row in rows], float)
  figure = Figure(figsize=(10, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  kl = column('kl')
  left.fill_between(kl, column('win_rate_low'), column('win_rate_high'), alpha=0.2)
  left.plot(kl, column('win_rate'), '.-', label='win rate, with its 95% interval')
  left.plot(kl, column('length_controlled_win_rate'), '.--', color='C1', label='at equal lengths')
  left.axhline(0.5, color='gray', lw=0.7, ls=':')
  right.plot(kl, column('reward'), '.-', color='C2', label='gold: reward of the evaluation')
  if np.isfinite(column('proxy_reward')).any():
    right.plot(kl, column('proxy_reward'), '.-', color='C3', label='proxy: reward of the phase')
  for axis, title in ((left, 'win rate'), (right, 'mean reward')):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel('KL to the opponent, nats', fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    axis.spines[['top', 'right']].set_visible(False)
  for row in rows:
    left.annotate(f'{row["step"]:.0f}', (row['kl'], row['win_rate']), fontsize=7, alpha=0.7)
  figure.savefig(path, dpi=110)


def steps_of_the_run() -> list[int]:
  """The checkpoints to measure.

  Raises:
    FileNotFoundError: there is none.
    ValueError: --curve without a run, or together with --step, or with texts.
  """
  if not (cli.WORKDIR.value or cli.CHECKPOINTS.value):
    raise ValueError('name the run by --workdir')
  folder = cli.checkpoint_folder()
  if not epath.Path(folder).is_dir():
    raise FileNotFoundError(f'{folder}: expected the checkpoints of a run')
  checkpoints = checkpoint.manager(folder)
  if not _CURVE.value:
    return [checkpoint.numbered(checkpoints, folder, cli.STEP.value)]
  if cli.STEP.value != cli.STEP.default:
    raise ValueError('--curve measures all checkpoints, so it takes no --step')
  if _AGAINST.value.startswith('field:') or not cli.WORKDIR.value:
    raise ValueError('--curve needs --workdir, where it writes, and a model as --against')
  found = sorted(checkpoints.all_steps())
  return found or [checkpoint.numbered(checkpoints, folder)]


def compare_checkpoints(
  experiment: Experiment, steps: Sequence[int], find: Callable[[int], Params | None]
) -> list[dict[str, float]]:
  """The numbers of each checkpoint."""
  samples = _SAMPLES.value
  sample = evaluate.sampler(experiment, samples, behavior_policies.current)
  divergence = make_divergence(experiment)
  phase = experiment.phases[experiment.order[-1]] if experiment.order else None
  rows, last, two = [], None, None  # `two` are the completions of the opponent `last`
  for step in steps:
    try:
      other = find(step)
    except ValueError as error:  # a checkpoint of a phase that does not have the anchor
      if step != steps[-1]:
        print(f'left out: {error}', file=sys.stderr)
        continue
      raise
    params = evaluate.restore_params(experiment, cli.checkpoint_folder(), step, cli.PARAMS.value)
    one = make(experiment, sample, params, samples)
    # An opponent that is the same for all steps makes its completions once.
    if other is None:
      two = of_field(experiment, one, _AGAINST.value.removeprefix('field:'))
    elif other is not last:
      two, last = make(experiment, sample, other, samples), other
    found, messages = measure(experiment, one, two)
    for message in messages:
      print(message, file=sys.stderr)
    if other is not None:
      kl = divergence(one, params, other)
      found |= {'kl': kl.k1, 'kl_error': kl.k1_error, 'kl_k3': kl.k3, 'kl_k3_error': kl.k3_error}
    # Verifiers alone are no proxy reward where an environment pays as well.
    judged = phase and phase.reward and not experiment.evaluation.has_environment
    proxy = score(phase, one, one.texts) if judged else np.array([])
    rows.append({'step': step, **found, 'proxy_reward': evaluate.mean(proxy[np.isfinite(proxy)])})
    show(one, two, experiment.show_samples)
  return rows


def show(one: Made, other: Made, number: int) -> None:
  """The first completions of both models, on stderr."""
  for record, texts, others in list(zip(one.records, one.texts, other.texts))[:number]:
    print(f'{question(record)!r}: {texts[0]!r} against {others[0]!r}', file=sys.stderr)


def main(argv: list[str]) -> None:
  cli.start(argv, needed=['config'])
  with cli.refusals():
    experiment = build(cli.config(TABLE))
    if not experiment.evaluation.every:
      raise ValueError('config.evaluation: the experiment has no held-out problems')
    steps = steps_of_the_run()
    with jax.set_mesh(experiment.mesh):
      rows = compare_checkpoints(experiment, steps, opponent(experiment))
  plain = [{k: v if np.isfinite(v) else None for k, v in row.items()} for row in rows]
  print(json.dumps(plain if _CURVE.value else plain[0], indent=2))
  if _CURVE.value:
    with mirrors.reading(cli.workdir()) as here:
      path = os.path.join(here, 'overoptimization')
      with writing(f'{path}.json') as file:
        file.write(json.dumps(plain, indent=1) + '\n')
      draw(rows, f'{path}.png')
    path = os.path.join(cli.workdir(), 'overoptimization')
    print(f'wrote {path}.json and {path}.png', file=sys.stderr)


if __name__ == '__main__':
  cli.run(main)
