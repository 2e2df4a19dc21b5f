"""Does it pay to imitate and to reinforce at once? SFT then GRPO against hybrids, at equal data.

    python -m benchmarks.hybrids              # all methods, three seeds; resumes where it stopped
    python -m benchmarks.hybrids srft hpt     # some of them
    python -m benchmarks.hybrids --table      # only writes docs/hybrids.md and docs/hybrids.png

All methods of a seed begin with the same supervised checkpoint, and take the same number of steps of 16
problems with 8 samples each. Hybrids read the answers of these problems in the same steps.
`sft_then_grpo` learns the answers of as many problems first, 16 a step, and then makes the steps of
`grpo`, which reads no answers. All updates have the same learning rate. Accuracy is that of greedy
answers to 400 held-out problems. Results are appended to docs/hybrids.jsonl, one line a run.
"""

import argparse
import functools
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Callable

from benchmarks import marks
from benchmarks.curricula import run
from polgrad import methods, presets, tasks
from polgrad.compose import compose
from polgrad.methods import Method
from polgrad.types import Params

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
RESULTS, PAGE, PICTURE = (DOCS / f'hybrids.{kind}' for kind in ('jsonl', 'md', 'png'))
RATE, PROMPTS, SAMPLES, POINTS = 2e-4, 16, 8, 6


def chord(*, steps: int) -> Method:
  """CHORD with the schedule of its default, in the same fractions of a run of this length."""
  return methods.chord(warmup=steps // 3, decay=steps - steps // 3)


grpo = functools.partial(methods.grpo, kl_coefficient=0.0)
# The phases that each makes from the checkpoint, one after the other.
SETTINGS: dict[str, tuple[Callable[..., Method], ...]] = {
  'grpo': (grpo,),
  'sft_then_grpo': (methods.sft, grpo),
  'chord': (chord,),
  'hpt': (methods.hpt,),
  'luffy': (methods.luffy,),
  'srft': (methods.srft,),
}


def load(method: Callable[..., Method], seed: int, steps: int, warm_start: int = 1):
  """The run of one method; its supervised phase gives the checkpoint that all share."""
  config = compose(
    method,
    tasks.addition(),
    presets.tiny(alphabet=tasks.addition().alphabet),
    steps=steps,
    seed=seed,
    prompts=PROMPTS,
    warm_start=warm_start,
    learning_rate=RATE,
    trackers='none',
  )
  config.samples_every = config.checkpoint_every = config.rollouts.every = 0
  config.show_samples = 0
  config.evaluation.every = max(steps // POINTS, 1)
  config.mesh.data = 1
  if method is methods.sft:
    config.phases.train.collect.rows = PROMPTS
  return config


@functools.cache
def warm(seed: int, warm_start: int) -> Params:
  """The parameters after the supervised phase that all methods of a seed share."""
  config = load(grpo, seed, 1, warm_start)
  config.evaluation.every = 0
  return run(config, 'warm_start', None)[0]


def measure(name: str, seed: int, steps: int, warm_start: int) -> dict:
  """Trains with one method; the accuracy after every few steps of each of its phases."""
  params, curves = warm(seed, warm_start), []
  for method in SETTINGS[name]:
    params, rows = run(load(method, seed, steps), 'train', params)
    greedy = [round(row['evaluation/greedy'], 4) for row in rows if 'evaluation/greedy' in row]
    curves.append(greedy)
  return {
    'method': name,
    'seed': seed,
    'steps': steps,
    'warm_start': warm_start,
    'curves': curves,
  }


def read() -> list[dict]:
  return marks.read(RESULTS)


def by_method(results: list[dict]) -> dict[str, list[dict]]:
  """The results of each method in the order of `SETTINGS`, by seed."""
  found = defaultdict(dict)
  for one in results:
    found[one['method']][one['seed']] = one
  return {name: [one for _, one in sorted(found[name].items())] for name in SETTINGS if found[name]}


def table(results: list[dict]) -> str:
  """One row a method: answers and samples that it read, and accuracy half way and at the end."""
  found = by_method(results)
  first = next(iter(found.values()))
  lines = [
    '| method | answers read | samples drawn | half way | at the end, by seed | mean |',
    '|---|---|---|---|---|---|',
    f'| checkpoint | | | | {_listed([one["curves"][0][0] for one in first])} | '
    f'{statistics.mean(one["curves"][0][0] for one in first):.3f} |',
  ]
  for name, runs in found.items():
    steps = runs[0]['steps']
    answers = 0 if name == 'grpo' else PROMPTS * steps
    last = [one['curves'][-1] for one in runs]
    ends = [curve[-1] for curve in last]
    cells = [
      f'`{name}`',
      f'{answers:,}',
      f'{PROMPTS * SAMPLES * steps:,}',
      f'{statistics.mean(curve[len(curve) // 2] for curve in last):.3f}',
      _listed(ends),
      f'{statistics.mean(ends):.3f}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _listed(numbers: list[float]) -> str:
  return ', '.join(f'{x:.3f}' for x in numbers)


def with_table(text: str, results: list[dict]) -> str:
  """The text of the page with the table of these results between its two marks."""
  return marks.with_table(text, 'table', table(results))


def draw(results: list[dict]) -> None:
  """The curves: means over seeds, in the last phase of each method."""
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5))
  for name, runs in by_method(results).items():
    curves = [one['curves'][-1] for one in runs]
    steps = [runs[0]['steps'] * i / (len(curves[0]) - 1) for i in range(len(curves[0]))]
    means, low, high = ([f(x) for x in zip(*curves)] for f in (statistics.mean, min, max))
    [line] = axes.plot(steps, means, marker='o', markersize=3, label=name)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.08)
  axes.set(xlabel='steps with samples', ylabel='held-out problems solved, greedy', ylim=(0, 1))
  axes.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(PICTURE, dpi=90)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('methods', nargs='*', metavar='METHOD', help=', '.join(SETTINGS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--warm_start', type=int, default=180)
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  if unknown := {*args.methods} - SETTINGS.keys():
    parser.error(f'unknown {sorted(unknown)}; valid: {list(SETTINGS)}')
  if not args.table:
    done = {(one['method'], one['seed']) for one in read()}
    for seed in range(args.seeds):
      for name in args.methods or SETTINGS:
        if (name, seed) not in done:
          found = measure(name, seed, args.steps, args.warm_start)
          print(name, seed, found['curves'], flush=True)
          marks.append(RESULTS, found)
  print(table(read()))
  PAGE.write_text(with_table(PAGE.read_text(), read()))
  draw(read())


if __name__ == '__main__':
  main()
