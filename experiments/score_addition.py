"""SCoRe (arXiv:2409.12917) on two-digit addition, on a model that is trained from scratch.

The model answers `12+34=` with `46.`, reads `?` and answers again. Stage I reinforces the second answer
and holds the first one; stage II reinforces both, with a bonus for a correction. A supervised phase of
400 batches first teaches both answers, the second one behind right and wrong first ones. Options: stages
(1 or 2), warm_start, rate (of learning), seed, steps (of each stage), smoke.

    python -m polgrad.train --config=experiments/score_addition.py --workdir=runs/score

Measured on a CPU, seed 0. `sampled` is the mean reward over 20 steps of 256 rows (standard error about
0.01), `greedy` the accuracy on 200 held-out sums (0.03). `mended` and `spoilt` are the greedy answers of
these 200 that the second attempt turns from wrong to right, and from right to wrong.

    steps up to              0     20     40     60     80 |  100    120    140    160
    first, sampled           -   0.54   0.56   0.63   0.62 | 0.59   0.63   0.67   0.66
    second, sampled          -   0.54   0.60   0.69   0.70 | 0.64   0.68   0.74   0.71
    first, greedy         0.72   0.69   0.64   0.78   0.73 | 0.71   0.78   0.74   0.79
    second, greedy        0.73   0.67   0.74   0.81   0.83 | 0.70   0.82   0.79   0.78
    mended                  13      7     23     10     22 |    9     15     13      4
    spoilt                  10     11      4      4      2 |   10      7      4      7

After the supervised phase a second attempt is no better than the first one. After stage I it mends 22 of
the 55 wrong answers and spoils 2 of the 145 right ones. Stage II raises the first answer, and the second
one no further: the greedy ones are equal at the end, within their errors. With a supervised phase of 200
batches and a learning rate of 1e-4 both answers ended equal, at 0.13.
"""

import dataclasses

from polgrad import environments, methods, presets, tasks
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.options import values
from polgrad.registry import part
from polgrad.rewards import verifiers


def get_config(text: str = ''):
  o = values(text, stages=2, warm_start=400, rate=5e-4, seed=0, steps=80, smoke=False)
  task = twice()
  model = presets.tiny(alphabet=task.alphabet)
  run = dict(learning_rate=o.rate, steps=o.steps, seed=o.seed, smoke=o.smoke)
  config = compose(methods.score_stage_one(), task, model, warm_start=o.warm_start, **run)
  if o.stages == 2:
    second = compose(methods.score_stage_two(), task, model, warm_start=0, **run)
    config.phases.stage_two = second.phases.train
    config.order = (*config.order, 'stage_two')
  return config


def twice() -> tasks.Task:
  """Addition with two attempts: `12+34=`, an answer `46.`, the request `?`, and another answer."""
  base = tasks.addition()
  attempts = dict(
    verifier=part(verifiers.numeric_answer), until_right=False, max_turns=2, feedback='?'
  )
  return dataclasses.replace(
    base,
    demonstrations=part(answers, source=base.problems),
    rewards={},
    environment=part(environments.Attempts, rewarded='every', **attempts),
    held_out_environment=part(environments.Attempts, rewarded='last', **attempts),
    turn_tokens=5,
    stop_strings=('.',),
    alphabet=base.alphabet + '.?',
    prompt_length=12,
    max_new_tokens=11,
    length=18,
    rows=256,
    evaluate_every=20,
    held_out_problems=200,
    evaluation_batch=200,
  )


def answers(*, source: sources.Part) -> sources.Source:
  """First answers, and second ones after a wrong or a right first one, in equal numbers of records.

  The wrong ones are of the next problem, so that nothing is learned of how to make a wrong answer.
  """

  def record(row):
    problem, after = source[row // 2], source[(row // 2 + 1) % len(source)]
    given = {'answer': problem['answer'] + '.'}
    if row % 2 == 0:
      return {**given, 'prompt': problem['prompt']}
    first = problem if row % 4 == 1 else after
    return {**given, 'prompt': f'{problem["prompt"]}{first["answer"]}.?'}

  return dataclasses.replace(source, size=2 * len(source), record=record)
