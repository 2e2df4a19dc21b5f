"""Do second attempts pay? The claims of ExIt and of IGPO, each against the same run without them.

    python -m benchmarks.second_attempts             # all settings, three seeds; resumes
    python -m benchmarks.second_attempts igpo grpo   # some of them
    python -m benchmarks.second_attempts --table     # only writes the tables into docs/curricula.md

All runs of a seed begin with the supervised checkpoint of `benchmarks.hybrids` and take the same number
of steps of 16 sums of two digits with 8 samples each, at the same learning rate.

IGPO: the fraction of groups whose own samples are all wrong, and that of groups that are still without a
right row after the attempts with hints. `without_hints` makes the same attempts and replaces no row.
ExIt: accuracy of greedy answers to 400 held-out sums, then of greedy answers to a prompt that shows the
first answer, and so on. `grpo` never saw such a prompt.

Results are appended to docs/second_attempts.jsonl, one line a run.
"""

import argparse
import dataclasses
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable

import jax

from benchmarks import hybrids, marks
from benchmarks.curricula import run
from polgrad import build, methods
from polgrad.data import batching
from polgrad.evaluate import attempt, sampler
from polgrad.methods import Method
from polgrad.sampling import behavior_policies
from polgrad.types import Params

RESULTS, PAGE = hybrids.DOCS / 'second_attempts.jsonl', hybrids.DOCS / 'curricula.md'
REVISIONS = 3
HINTED = functools.partial(
  methods.igpo, shortest=1, longest=1
)  # an answer has at most three digits


def without_hints() -> Method:
  """IGPO that draws its attempts and replaces no row by them."""
  return HINTED(replaced=0.0)


SETTINGS: dict[str, Callable[..., Method]] = {
  'without_hints': without_hints,
  'igpo': HINTED,
  'grpo': functools.partial(methods.exit_iteration, new=1.0),
  'exit_iteration': methods.exit_iteration,
}


def load(name: str, seed: int, steps: int):
  config = hybrids.load(SETTINGS[name], seed, steps)
  config.evaluation.every = 0
  return config


@functools.cache
def reviser(seed: int) -> Callable[[Params], list[float]]:
  """Makes the measurement of `revised`, whose programs are the same for all settings of a seed."""
  config = load('exit_iteration', seed, 1)  # its prompts have room for an attempt
  config.evaluation.every = 1
  config.evaluation.prompt_length = config.phases.train.collect.prompt_length
  experiment = build.build(config)
  with jax.set_mesh(experiment.mesh):
    greedy = sampler(experiment, 1, behavior_policies.greedy)
  return functools.partial(revised, experiment, greedy)


def revised(experiment: build.Experiment, greedy: Callable, params: Params) -> list[float]:
  """Accuracy of the first greedy answers, and of those to prompts that show the answer before.

  The prompt is the same as in `collect.Iterated` with its defaults: the problem, the answer, and the
  problem once more.
  """
  plan, found = experiment.evaluation, []
  source = [plan.source[i] for i in range(min(plan.problems, len(plan.source)))]
  records = source
  with jax.set_mesh(experiment.mesh):
    for _ in range(1 + REVISIONS):
      asked = dataclasses.replace(plan, source=records)
      got = attempt(dataclasses.replace(experiment, evaluation=asked), greedy, params, 1)
      found.append(round(float((got.scores >= plan.threshold).mean()), 4))
      records = [batching.revision(record, text) for record, [text] in zip(source, got.texts)]
  return found


def measure(name: str, seed: int, steps: int, warm_start: int) -> dict:
  """Trains with one method; what became of hopeless groups, and accuracy with and without attempts."""
  params = hybrids.warm(seed, warm_start)
  before = reviser(seed)(params)
  params, rows = run(load(name, seed, steps), 'train', params)
  mean = lambda key: round(statistics.mean(row[key] for row in rows if key in row), 4)
  groups = (
    {key: mean(f'hints/{key}') for key in ('hopeless', 'rescued')}
    if 'hints/hopeless' in rows[0]
    else {}
  )
  return {
    'setting': name,
    'seed': seed,
    'steps': steps,
    'warm_start': warm_start,
    **groups,
    'before': before,
    'after': reviser(seed)(params),
  }


def read() -> list[dict]:
  return marks.read(RESULTS)


def by_setting(results: list[dict]) -> dict[str, list[dict]]:
  """The results of each setting in the order of `SETTINGS`, by seed."""
  found = defaultdict(dict)
  for one in results:
    found[one['setting']][one['seed']] = one
  return {name: [one for _, one in sorted(found[name].items())] for name in SETTINGS if found[name]}


def hints_table(results: list[dict]) -> str:
  """One row a setting with hints: groups without a right row, before and after the attempts."""
  lines = [
    '| setting | groups without a right sample | after the attempts | fewer | accuracy at the end |',
    '|---|---|---|---|---|',
  ]
  for name, runs in by_setting(results).items():
    if 'hopeless' in runs[0]:
      own = [one['hopeless'] for one in runs]
      left = [one['hopeless'] - one['rescued'] for one in runs]
      fewer = [one['rescued'] / one['hopeless'] for one in runs]
      cells = [f'`{name}`', *map(_numbers, (own, left)), _percent(fewer), _numbers(_first(runs))]
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def revisions_table(results: list[dict]) -> str:
  """One row a setting: accuracy of first answers, and of those after 1, 2, ... attempts were shown."""
  numbers = ' | '.join(f'after {i}' for i in range(1, REVISIONS + 1))
  lines = [f'| setting | first answers | {numbers} |', '|---|' + '---|' * (REVISIONS + 1)]
  found = {k: runs for k, runs in by_setting(results).items() if 'hopeless' not in runs[0]}
  first = next(iter(found.values()))
  rows = {'checkpoint': [one['before'] for one in first]}
  rows |= {f'`{name}`': [one['after'] for one in runs] for name, runs in found.items()}
  for name, curves in rows.items():
    lines.append(f'| {name} | {" | ".join(map(_numbers, zip(*curves)))} |')
  return '\n'.join(lines)


def _first(runs: list[dict]) -> list[float]:
  return [one['after'][0] for one in runs]


def _numbers(values) -> str:
  """`0.412 (0.380, 0.444)`: the mean, and the number of each seed."""
  values = list(values)
  return f'{statistics.mean(values):.3f} ({", ".join(f"{x:.3f}" for x in values)})'


def _percent(values: list[float]) -> str:
  return f'{statistics.mean(values):.0%} ({", ".join(f"{x:.0%}" for x in values)})'


def with_tables(text: str, results: list[dict]) -> str:
  """The text of the page with the tables of these results between their marks."""
  for mark, table in (('hints', hints_table), ('revisions', revisions_table)):
    text = marks.with_table(text, mark, table(results))
  return text


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('settings', nargs='*', metavar='SETTING', help=', '.join(SETTINGS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--warm_start', type=int, default=180)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.settings} - SETTINGS.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(SETTINGS)}')
  if not args.table:
    done = {(one['setting'], one['seed']) for one in read()}
    for seed in range(args.seeds):
      for name in args.settings or SETTINGS:
        if (name, seed) not in done:
          found = measure(name, seed, args.steps, args.warm_start)
          print(found, flush=True)
          marks.append(RESULTS, found)
  print(hints_table(read()), revisions_table(read()), sep='\n\n')
  PAGE.write_text(with_tables(PAGE.read_text(), read()))


if __name__ == '__main__':
  main()
