"""What a rollout of four turns costs, against one of a single turn with as many sampled tokens.

    python -m benchmarks.turns [--repeats=7]

The model has the layers of the preset `tiny` and random weights. The 32 rows of four turns read three
replies of 16 tokens (an answer and what a template writes around it), which cost nothing to make. Both
rollouts run in turn, and a ratio is of two neighbours: what a sampled token costs in the rollout of four
turns, over what it costs in the other one, reading included. On a machine with other work, CPU seconds
are the better clock. The target is 1.15.

* equal turns: all turns have 64 tokens, so all rows wait at the same time
* random turns: a token ends its turn with probability 1/64, and the single turn ends with the fourth
  such token, so rows wait at different times
* slots: the same with a queue, half of the rows at a time
* slow replies: random turns whose replies take 0.2 s, many at a time; the ratio is to replies that take
  no time. Seconds beyond 1x are those in which no other row could be decoded; CPU seconds beyond 1x are
  draws in which some rows wait
* overlap: the same replies, over such that are taken only when all rows wait; below 1x is what is won by
  decoding some rows while others wait
* read: no cost, but the tokens that the model reads in the rollout of random turns, counted inside its
  programs, and the places that are computed for them; and the tokens that it would read if no cache were
  kept between turns. Writes the table of docs/sampling.md
"""

import argparse
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import marks
from polgrad import models
from polgrad.sampling import make_sampler, make_turn_sampler
from polgrad.sampling.stopping import StopTable
from polgrad.sampling.turns import CHUNK
from polgrad.types import Batch
from polgrad.types import turns as spans_of

MODEL = dict(
  vocab_size=64, num_layers=3, width=96, num_heads=4, num_kv_heads=2, head_dim=24, mlp_width=288,
  max_length=512,
)  # fmt: skip
POLICY = models.decoder(**MODEL)
PARAMS = {'policy': POLICY.init(jax.random.key(0))}
PROMPTS, GROUP, WIDTH = 8, 4, 32
TURNS, MEAN, REPLY = 4, 64, 16
LONGEST = 440  # columns behind the prompt in rollouts of random turns
STOP = 1
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'sampling.md'


class Timed:
  """Replies of random tokens to every turn but the last one, after some seconds.

  Args:
    seconds: how long each takes.
    together: give none before all rows wait.
  """

  def __init__(self, seconds: float = 0.0, together: bool = False):
    self._seconds, self._together, self._turns = seconds, together, {}
    self._open: list[tuple[float, int]] = []
    self._random = np.random.default_rng(0)

  def ask(self, row: int, ids: list[int], ended: bool) -> None:
    self._turns[row] = self._turns.get(row, 0) + 1
    self._open.append((time.perf_counter() + self._seconds, row))

  def take(self, wait: bool) -> list:
    if self._together and not wait:
      return []
    if wait:
      last = -1 if self._together else 0
      time.sleep(max(0.0, self._open[last][0] - time.perf_counter()))
    now = time.perf_counter()
    there = [row for at, row in self._open if at <= now]
    self._open = [(at, row) for at, row in self._open if at > now]
    return [(row, self._reply() if self._turns[row] < TURNS else None) for row in there]

  def _reply(self) -> list[int]:
    return self._random.integers(2, MODEL['vocab_size'], REPLY).tolist()


def ending(policy):
  """Ends a turn with probability 1 / MEAN at every token."""
  others = policy.at[:, STOP].set(-jnp.inf)
  return others.at[:, STOP].set(jax.nn.logsumexp(others, axis=-1) - jnp.log(MEAN - 1.0))


def fourth_stop() -> StopTable:
  """Ends a row at its fourth STOP."""
  following = np.repeat(np.arange(TURNS + 1, dtype=np.uint8)[:, None], MODEL['vocab_size'], axis=1)
  following[:TURNS, STOP] += 1
  return StopTable(following, start=0, end=TURNS)


def prompts() -> tuple:
  random = np.random.default_rng(1)
  tokens = random.integers(2, MODEL['vocab_size'], (PROMPTS, WIDTH)).astype(np.int32)
  return tokens, np.ones_like(tokens, bool), np.arange(PROMPTS)


def one_turn(**settings) -> Callable[[int], Batch]:
  sample = make_sampler({'policy': POLICY}, samples_per_prompt=GROUP, **settings)
  return lambda step: sample(PARAMS, *prompts(), seed=0, step=step)


def four_turns(seconds: float = 0.0, together: bool = False, **settings) -> Callable[[int], Batch]:
  sample = make_turn_sampler({'policy': POLICY}, samples_per_prompt=GROUP, **settings)
  replies = lambda: Timed(seconds, together)
  return lambda step: sample(PARAMS, *prompts(), seed=0, step=step, replies=replies())


def compared(one: Callable, four: Callable, repeats: int) -> str:
  """Ratios of neighbours, in seconds and in CPU seconds per sampled token, and medians of both."""
  clocks = (time.perf_counter, time.process_time)
  costs = []  # [repeats + 1, 2 rollouts, 2 clocks]
  for step in range(repeats + 1):
    pair = {}
    for run in (one, four) if step % 2 else (four, one):
      start = np.array([clock() for clock in clocks])
      drawn = int(np.sum(run(step).mask))
      pair[run] = (np.array([clock() for clock in clocks]) - start) / drawn * 1e6
    costs.append((pair[one], pair[four]))
  told = []
  for name, (a, b) in zip(('', 'CPU '), np.transpose(costs[1:], (2, 1, 0))):
    ratios, middle = b / a, np.median
    spread = f'{middle(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f})'
    told.append(f'{middle(a):.0f} -> {middle(b):.0f} {name}us a token, {spread}')
  return '; '.join(told)


def tokens_read() -> str:
  """The table of tokens that a rollout of random turns reads."""
  passes = []
  note = lambda valid, rows, places: passes.append(
    (int(valid), int(rows) * int(places), int(places))
  )

  def decode(params, tokens, positions, valid, *rest):
    jax.debug.callback(note, jnp.sum(valid), *tokens.shape)
    return POLICY.decode(params, tokens, positions, valid, *rest)

  sample = make_turn_sampler(
    {'policy': POLICY._replace(decode=decode)},
    samples_per_prompt=GROUP,
    behavior_policy=ending,
    max_new_tokens=LONGEST,
    stop_ids=(STOP,),
  )
  batch = jax.device_get(sample(PARAMS, *prompts(), seed=0, step=0, replies=Timed()))
  jax.effects_barrier()
  drawn, real = batch.mask[:, WIDTH:], batch.segment_ids[:, WIDTH:] > 0
  # Tokens of a row before each of its turns but the first one.
  before = [WIDTH + span.start for row in drawn for span in spans_of(row)[1:]]
  least = {
    ('prompts', WIDTH): (PROMPTS * WIDTH, PROMPTS * GROUP * WIDTH),
    ('replies', CHUNK): (int((real & ~drawn).sum()), sum(before)),
    ('drawn', 1): (int(drawn.sum()), int(drawn.sum())),
  }
  lines = ['| tokens | least | read | places | anew |', '|---|---|---|---|---|']
  for (name, size), (need, anew) in least.items():
    read, computed = (sum(one[i] for one in passes if one[2] == size) for i in (0, 1))
    lines.append(f'| {name} | {need} | {read} | {computed} | {anew} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--only', default='', help='the beginning of the name of one line')
  options = parser.parse_args()
  if options.only == 'read':
    PAGE.write_text(marks.with_table(PAGE.read_text(), 'read', tokens_read()))
    return
  repeats = options.repeats
  drawn, mixed = TURNS * MEAN, dict(behavior_policy=ending, max_new_tokens=LONGEST)
  random = lambda **more: four_turns(stop_ids=(STOP,), **mixed, **more)
  single = lambda **more: one_turn(stop_table=fourth_stop(), **mixed, **more)
  some = dict(slots=PROMPTS * GROUP // 2)
  lines = {
    'equal turns': lambda: (
      one_turn(max_new_tokens=drawn),
      four_turns(max_new_tokens=drawn + (TURNS - 1) * REPLY, turn_tokens=MEAN),
    ),
    'random turns': lambda: (single(), random()),
    'slots': lambda: (single(**some), random(**some)),
    'slow replies': lambda: (random(), random(seconds=0.2)),
    'overlap': lambda: (random(seconds=0.2, together=True), random(seconds=0.2)),
  }
  for name, make in lines.items():
    if name.startswith(options.only):
      print(f'{name + ":":13} {compared(*make(), repeats)}', flush=True)


if __name__ == '__main__':
  main()
