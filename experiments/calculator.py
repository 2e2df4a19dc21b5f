"""Word problems whose product a small model cannot compute, with a calculator to call.

`43 boxes of 56 pens, 89 lost. Left?` A model can learn to copy the numbers into the call
`<43*56-89>` and to copy its result, and cannot learn to multiply such numbers in a short run.
`calls=false` is the same run without the calculator. The reward is 1 for the right number in the
last turn.

    python -m polgrad.train --config=experiments/calculator.py:credit=state --workdir=runs/calculator
    python -m polgrad.train --config=experiments/calculator.py:calls=false --workdir=runs/alone
    python -m polgrad.train --config=experiments/calculator.py:model=smollm2,path=FOLDER --workdir=runs/x

Options: credit ('row' is the advantage of the row for all its turns; 'turn' and 'state' compare turns of
the same number, or those that have read the same), calls, model ('tiny' or 'smollm2'), path (of the
model's folder), lora (rank of SmolLM2's adapter), warm_start, seed, steps, smoke.

Both models first learn from demonstrations of calls and answers, in `warm_start` batches: the tiny one
150 batches of 64, SmolLM2 12 of 8. A call is `<43*56-89>`, its result is put behind it.

Measured on a CPU with the tiny model, seed 0. `greedy` is the accuracy on 100 held-out problems
(standard error 0.05 at first, 0.04 at the end), `sampled` the mean reward of the ten steps before, 128
rows each (standard error about 0.02):

    step                    0    10    20    30    40    50    60    70    80    90   100
    row, greedy          0.64  0.72  0.68  0.80  0.74  0.78  0.84  0.76  0.74  0.83  0.86
    row, sampled            -  0.41  0.53  0.55  0.57  0.60  0.67  0.67  0.70  0.62  0.66
    state, greedy        0.64  0.72  0.76  0.74  0.80  0.73  0.82
    state, sampled          -  0.41  0.52  0.55  0.57  0.60  0.63
    turn, greedy         0.64  0.73  0.72  0.83  0.76  0.81
    turn, sampled           -  0.41  0.53  0.57  0.60  0.62

Reinforcement raises both, and the kinds of credit do not differ visibly. A warm start of 100 batches is
too short for it: samples then have a reward of 0.05, and the greedy accuracy is 0.23 at first and 0.13
after 70 steps. After 300 batches it is 0.94 before any reinforcement, and none of the held-out problems
is right in a model that has learned as long without calls (`calls=false`).

Measured with SmolLM2 (LoRA of rank 8, learning rate 2e-4, 2 CPU cores that other work shared), seed 0,
greedy accuracy on 50 held-out problems (standard error 0.07). `sampled` is the mean reward of the four
steps up to here, each of 8 samples of 4 problems (standard error about 0.05):

    after                    greedy   sampled   with credit=turn: greedy   sampled
    nothing, without calls     0.00         -   (answers cut after 32 tokens)
    nothing, with calls        0.00         -   (it makes no call)
    12 supervised batches      0.56         -                       0.56         -
    4 steps                       -      0.22                          -      0.21
    8 steps                       -      0.52                          -      0.52
    12 steps                   0.72      0.60                       0.72      0.60

Here too the two kinds of credit do not differ visibly. With `row`, reinforcement takes 13 wrong answers
to right ones and 5 right ones to wrong ones: the gain of 0.16 has a standard error of 0.08. Of the 13
problems in which something is lost, 3 were right and all 13 are; of the 13 with friends, `34+37*13`, 5
were right and none is: in 12 of them the model now multiplies the first two numbers. The entropy of a
token fell from 1.1 to 0.05 nats in these 12 steps. A supervised step took 7 s and a step of samples 20
to 26 s where little else ran, and four times as long under load.
"""

import dataclasses
from typing import Literal

import numpy as np

from polgrad import credit, environments, methods, optim, presets, tasks
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.environments import toolbox
from polgrad.losses import advantages
from polgrad.options import values
from polgrad.registry import part, weighted
from polgrad.rewards import verifiers

PROBLEMS = (
  ('{a} boxes of {b} pens, {c} lost. Left?', '{a}*{b}-{c}'),
  ('{a} bags of {b} nuts, {c} eaten. Left?', '{a}*{b}-{c}'),
  ('{a} rows of {b} seats and {c} more. All?', '{a}*{b}+{c}'),
  ('{c} coins, then {a} on {b} days. All?', '{c}+{a}*{b}'),
)
EXAMPLE = 'Write <12*7+5> to compute it.'  # what the system turn of SmolLM2 says of calls
CREDIT = {
  # Every token of a row has the advantage of the row, as in GRPO.
  'row': part(credit.outcome, advantage=part(advantages.leave_one_out)),
  # A turn is compared with turns of the same number of the other samples of the prompt.
  'turn': part(credit.turn_returns),
  # A turn is compared with those that have read the same, such as the same result.
  'state': part(credit.turn_returns, among='state'),
}


def get_config(text: str = ''):
  o = values(
    text,
    **dict(credit='row', calls=True, model='tiny', path='', lora=8, warm_start=-1),
    **dict(seed=0, steps=-1, smoke=False),
  )
  warm_start, steps, rate = {'tiny': (150, 60, 3e-4), 'smollm2': (12, 12, 2e-4)}[o.model]
  if o.model == 'tiny':
    task = short(o.calls)
    model = presets.tiny(alphabet=task.alphabet)
  else:
    task = chat(o.calls)
    model = presets.smollm2(path=o.path, lora=o.lora)
  method = dataclasses.replace(
    methods.dr_grpo(max_new_tokens=task.max_new_tokens),
    credit=CREDIT[o.credit],
    minibatches=1,
    optimizer=part(optim.adamw, learning_rate=rate, b2=0.99),
  )
  if not task.demonstrations:
    warm_start = 0
  elif o.warm_start >= 0:
    warm_start = o.warm_start
  run = dict(steps=steps if o.steps < 0 else o.steps, seed=o.seed, smoke=o.smoke)
  config = compose(method, task, model, warm_start=warm_start, **run)
  config.phases.train.share_prompts = o.model == 'smollm2'
  return config


def problems(
  *, first: int = 0, size: int = 5000, turns: Literal['answer', 'call', 'both'] = 'answer'
) -> sources.Source:
  """Problems such as `43 boxes of 56 pens, 89 lost. Left?`; each number of a row is one problem.

  Args:
    first: number of the first problem.
    size: number of problems.
    turns: the `answer` of a record is the number, the call, or in odd rows the number and in even
      rows the call; before a number, the prompt then ends with the call and its result.
  """

  def record(row):
    random = np.random.default_rng((first + row, 17))
    text, expression = PROBLEMS[random.integers(len(PROBLEMS))]
    a, b, c = map(int, random.integers(11, 100, 3))
    prompt, call = (form.format(a=a, b=b, c=c) for form in (text, f'<{expression}>'))
    answer = str(a * b + (-c if '-' in expression else c))
    if turns == 'both' and row % 2:
      return {'prompt': f'{prompt}{call}{answer}>', 'answer': answer}
    return {'prompt': prompt, 'answer': answer if turns == 'answer' else call}

  return sources.Source(size, record)


def short(calls: bool) -> tasks.Task:
  """The task for a model of characters: a call is `<43*56-89>`, its result `2319>`."""
  tools = part(
    environments.Tools, tools={'calculate': part(toolbox.calculate)}, form='inline', max_turns=3
  )
  return tasks.Task(
    problems=part(problems),
    demonstrations=part(problems, turns='both' if calls else 'answer'),
    held_out=part(problems, first=1_000_000, size=200),
    rewards={'exact': weighted(1.0, part(verifiers.exact_match))},
    environment=tools if calls else None,
    turn_tokens=12 if calls else 0,
    stop_strings=('>',) if calls else (),
    alphabet='0123456789+-*<>,.? ALabcdefghilmnoprstuwxy',
    prompt_length=56,
    max_new_tokens=24,
    length=64,
    rows=128,
    demonstration_rows=64,
    evaluate_every=10,
    held_out_problems=100,
    evaluation_batch=100,
  )


def chat(calls: bool) -> tasks.Task:
  """The task for a model that was tuned to chat; its system turn has an example of a call."""
  made = tasks.calculator(digits=2, calls=1)
  tools = part(
    environments.Tools,
    tools={'calculate': part(toolbox.calculate)},
    form='inline',
    description=EXAMPLE,
    max_turns=2,
  )
  made = dataclasses.replace(
    made,
    environment=tools,
    demonstrations=part(told, source=made.demonstrations),
    prompt_length=52,
    length=72,
    rows=32,
    demonstration_rows=8,
    evaluate_every=12,
    held_out_problems=50,
  )
  if calls:
    return made
  without = dict(environment=None, turn_tokens=0, observation_tokens=0, stop_strings=())
  return dataclasses.replace(
    made,
    **without,
    demonstrations=None,
    system=tasks.calculator().system.replace('with', 'without'),
  )


def told(*, source: sources.Part) -> sources.Source:
  """The demonstrations with the system turn that the environment writes."""
  tools = environments.Tools(
    tools={'calculate': toolbox.calculate}, form='inline', description=EXAMPLE
  )
  system = [{'role': 'system', 'content': tasks.calculator().system}]

  def record(row):
    fields = dict(source[row])
    user = {'role': 'user', 'content': fields.pop('prompt')}
    return {**fields, **tools.opened({'messages': [*system, user]})}

  return dataclasses.replace(source, record=record)
