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
model's folder), seed, steps, smoke.

Both models first learn from demonstrations of calls and answers: the tiny one 300 batches of 64, SmolLM2
20 batches, whose template knows no tools, so that calls are described in the system turn.

Measured on a CPU with the tiny model, one seed. `greedy` is the accuracy on 100 held-out problems
(standard error 0.02), `sampled` the mean reward of the ten steps before, 128 rows each:

    step                    0    10    20    30    40    50    60
    row, greedy          0.94  0.95  0.95  0.96  0.97  0.99  0.98
    row, sampled            -  0.85  0.89  0.87  0.89  0.90  0.92
    state, greedy        0.94  0.96  0.94  0.99  0.96  0.97  0.95
    state, sampled          -  0.85  0.89  0.88  0.83  0.94  0.92

Most of it is learned in the supervised phase: reinforcement raises the reward of samples from 0.77 in
the first step, and the two kinds of credit do not differ visibly. Without calls the same supervised
phase ends with none of the held-out problems right. SmolLM2 was not trained.
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
CREDIT = {
  # Every token of a row has the advantage of the row, as in GRPO.
  'row': part(credit.outcome, advantage=part(advantages.leave_one_out)),
  # A turn is compared with turns of the same number of the other samples of the prompt.
  'turn': part(credit.turn_returns),
  # A turn is compared with those that have read the same, such as the same result.
  'state': part(credit.turn_returns, among='state'),
}


def get_config(text: str = ''):
  o = values(text, credit='row', calls=True, model='tiny', path='', seed=0, steps=60, smoke=False)
  task = short(o.calls) if o.model == 'tiny' else chat(o.calls)
  method = dataclasses.replace(
    methods.dr_grpo(max_new_tokens=task.max_new_tokens), credit=CREDIT[o.credit], minibatches=1
  )
  if o.model == 'tiny':
    method = dataclasses.replace(method, optimizer=part(optim.adamw, learning_rate=3e-4, b2=0.99))
  model = (
    presets.tiny(alphabet=task.alphabet) if o.model == 'tiny' else presets.smollm2(path=o.path)
  )
  steps = {'tiny': 300, 'smollm2': 20}[o.model] if task.demonstrations else 0
  return compose(method, task, model, warm_start=steps, steps=o.steps, seed=o.seed, smoke=o.smoke)


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
  """The task for a model that was tuned to chat, whose template knows no tools."""
  made = dataclasses.replace(
    tasks.calculator(digits=2, form='described'), rows=32, evaluate_every=10, held_out_problems=50
  )
  if calls:
    return dataclasses.replace(made, demonstrations=part(described, source=made.problems))
  return dataclasses.replace(made, environment=None, turn_tokens=0, observation_tokens=0)


def described(*, source: sources.Part) -> sources.Source:
  """The conversations in which a problem is solved with one call, as `environments.Tools` has them."""
  told = environments.Tools(tools={'calculate': toolbox.calculate}, form='described')

  def record(row):
    fields = source[row]
    call = f'{{"name": "calculate", "arguments": {{"expression": "{fields["expression"]}"}}}}'
    turns = [
      {'role': 'user', 'content': fields['prompt']},
      {'role': 'assistant', 'content': f'<tool_call>{call}</tool_call>'},
      {'role': 'user', 'content': f'<tool_response>\n{fields["answer"]}\n</tool_response>'},
      {'role': 'assistant', 'content': fields['answer']},
    ]
    system = [{'role': 'system', 'content': tasks.calculator(digits=2).system}]
    return told.opened({'messages': system + turns})

  return dataclasses.replace(source, record=record)
