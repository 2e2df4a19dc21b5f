"""When a model asks a stronger one for help, within a budget of requests: learned from episodes.

    python -m experiments.intervention_helper --workdir=runs/help     # adds to docs/interventions.jsonl
    python -m experiments.intervention_helper --table

An episode is a worksheet of four sums of numbers with one digit or two, one sum a turn. The first wrong
answer ends it, and it is solved if all are right. Before each turn a decision model reads the sums that
are left, and chooses who answers: the policy (`-`) or the helper (`?`). The helper is a copy of the
policy that was trained for longer. It is a stand-in for a larger model. The phases are those of
`polgrad.tabular.interventions`:

1.  Episodes in which a fair coin chooses who answers. A reward model (`methods.reward_regression`)
    learns from their outcomes: p(s, who), the probability that the worksheet is solved from here.
2.  States of a turn with similar p(s, -) and p(s, ?) form a group. The frequencies of moves between
    groups make a process. Its plan at the smallest price with at most `budget` expected requests labels
    every state of the episodes.
3.  Supervised fine-tuning of a copy of the policy on pairs of state and label is the decision model.

Then new worksheets are answered with its greedy decisions, and with four others: it never asks,
it always asks, a coin asks as often as the decision model, and the plan itself, which
reads the success model.

Differences: how states are grouped, and that the success model is told who answers, are choices of this
experiment. Confidence: PAPER (the phases), MEMORY (the form of the recursion).
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from polgrad import build, methods, presets, tasks, train
from polgrad.compiling import jit
from polgrad.compose import compose
from polgrad.data import batching, sources
from polgrad.environments import Environment, Step
from polgrad.losses import implicit_rewards
from polgrad.registry import part
from polgrad.sampling import behavior_policies, make_sampler
from polgrad.tabular import interventions
from polgrad.types import Params

TURNS = 4
DIGITS = (0.5, 0.5)  # probabilities that the numbers of a sum have one digit, or two
ALONE, ASK = '-', '?'
ALPHABET = '0123456789+=,' + ALONE + ASK
LONGEST = 6 * TURNS  # characters of a state
QUESTION = 6  # characters of a sum with `=`
ANSWER = 4  # tokens of an answer, the stop token included
BATCH = 512  # rows that are sampled or scored at once
LEVELS = 4  # quantiles of the predicted success, and of what help adds to it
RESULTS = pathlib.Path(__file__).parents[1] / 'docs/interventions.jsonl'
FAILED, SOLVED, BEGIN, FIRST = 0, 1, 2, 3  # numbers of states; groups are numbered from FIRST


# The worksheets.


def drawn(random: np.random.Generator) -> tuple[str, str]:
  """A sum, such as `12+34`, and its answer."""
  digits = 1 + int(random.choice(len(DIGITS), p=DIGITS))
  a, b = random.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits, 2).tolist()
  return f'{a}+{b}', str(a + b)


def practice() -> sources.Source:
  """Sums as in the worksheets, from which policy and helper learn to answer a turn."""

  def record(row):
    text, answer = drawn(np.random.default_rng((row, 40)))
    return {'prompt': text + '=', 'answer': answer}

  return sources.Source(100_000, record)


def worksheet(row: int) -> dict:
  """The record of a number: `prompt`, the sums as in `12+34,5+7=`, and `answers`."""
  random = np.random.default_rng((row, 41))
  sums, answers = zip(*(drawn(random) for _ in range(TURNS)))
  return {'prompt': ','.join(sums) + '=', 'answers': list(answers)}


class Sheet(NamedTuple):
  """A worksheet that is being answered."""

  sums: tuple[str, ...]
  answers: tuple[str, ...]

  @property
  def text(self) -> str:
    """What the success model and the decision model read: all sums that are left."""
    return ','.join(self.sums) + '='

  @property
  def question(self) -> str:
    """What the policy and the helper read: the next sum."""
    return self.sums[0] + '='


class Worksheet(Environment):
  """One sum a turn. The first wrong answer ends the episode; the last right one has the reward 1."""

  IN_PROCESS = True

  def reset(self, record: Mapping, seed: int) -> Sheet:
    del seed
    return Sheet(tuple(record['prompt'][:-1].split(',')), tuple(record['answers']))

  def step(self, state: Sheet, text: str) -> Step:
    if text != state.answers[0]:
      return Step(state, done=True)
    state = Sheet(state.sums[1:], state.answers[1:])
    if not state.sums:
      return Step(state, reward=1.0, done=True)
    return Step(state, state.question)


# Episodes.


class Played(NamedTuple):
  """N episodes of at most H turns."""

  texts: list[list[str]]  # [N][turns that were taken], the state before each
  asked: np.ndarray  # bool[N, H]; False after the end
  solved: np.ndarray  # bool[N]


Decide = Callable[[Sequence[str]], np.ndarray]  # states of a turn -> bool, whether to ask
Predict = Callable[[Sequence[str]], np.ndarray]  # states -> p(s, -) and p(s, ?), f[N, 2]
Act = Callable[[Sequence[str], np.ndarray, int], list[str]]  # questions, asked, turn -> answers


def play(records: Sequence[Mapping], decide: Decide, act: Act) -> Played:
  """Answers worksheets, all of them turn by turn."""
  environment = Worksheet()
  states = [environment.reset(record, 0) for record in records]
  texts, left = [[] for _ in records], list(range(len(records)))
  asked, solved = np.zeros((len(records), TURNS), bool), np.zeros(len(records), bool)
  for turn in range(TURNS):
    if not left:
      break
    now = [states[i] for i in left]
    asked[left, turn] = chosen = np.asarray(decide([state.text for state in now]), bool)
    answers = act([state.question for state in now], chosen, turn)
    following = []
    for i, state, answer in zip(left, now, answers, strict=True):
      texts[i].append(state.text)
      step = environment.step(state, answer)
      states[i], solved[i] = step.state, step.reward > 0
      if not step.done:
        following.append(i)
    left = following
  return Played(texts, asked, solved)


def by_turn(played: Played) -> list[list[str]]:
  """The states before each turn, of the episodes that have reached it."""
  return [[texts[turn] for texts in played.texts if len(texts) > turn] for turn in range(TURNS)]


def outcomes(played: Played) -> list[dict]:
  """A record for every turn: who answered it, and whether the worksheet was solved in the end."""
  return [
    {'prompt': text, 'answer': ASK if asked else ALONE, 'solved': float(solved)}
    for texts, row, solved in zip(played.texts, played.asked, played.solved)
    for text, asked in zip(texts, row)
  ]


# States in groups.


class Grouping(NamedTuple):
  """Groups of states of the same turn, by quantiles."""

  level: np.ndarray  # [H, LEVELS - 1], between values of the mean of the two predictions
  gain: np.ndarray  # [H, LEVELS, LEVELS - 1], of their difference, within each level

  def __call__(self, turn: int, predicted: np.ndarray) -> np.ndarray:
    """Numbers of the groups, i[N].

    Args:
      predicted: f[N, 2], success if the policy answers now, and if the helper does.
    """
    level = np.searchsorted(self.level[turn], predicted.mean(axis=1))
    gains = predicted[:, 1] - predicted[:, 0]
    gain = (gains[:, None] > self.gain[turn, level]).sum(axis=1)
    return FIRST + LEVELS * level + gain


def grouped(predicted: Sequence[np.ndarray]) -> Grouping:
  """Quantiles of predictions f[N_h, 2] of the states of each turn; a turn without any has one group."""
  inner = np.arange(1, LEVELS) / LEVELS
  levels, gains = [], []
  for one in predicted:
    one = one if len(one) else np.zeros((1, 2))
    mean, gain = one.mean(axis=1), one[:, 1] - one[:, 0]
    edges = np.quantile(mean, inner)
    level = np.searchsorted(edges, mean)
    within = [gain[level == k] if (level == k).any() else gain for k in range(LEVELS)]
    levels.append(edges)
    gains.append([np.quantile(some, inner) for some in within])
  return Grouping(np.array(levels), np.array(gains))


def numbered(played: Played, groups: Sequence[np.ndarray]) -> interventions.Rollouts:
  """Episodes as rows of numbers. A first step, before which nothing differs, draws the first state.

  Args:
    groups: i[N_h] for each turn, of the episodes that have reached it, in their order.
  """
  lengths = np.array([len(texts) for texts in played.texts])
  ends = np.where(played.solved, SOLVED, FAILED)
  states = np.repeat(ends[:, None], TURNS + 2, axis=1)
  states[:, 0] = BEGIN
  for turn, group in enumerate(groups):
    states[lengths > turn, turn + 1] = group
  asked = np.concatenate([np.zeros((len(lengths), 1), bool), played.asked], axis=1)
  return interventions.Rollouts(states, asked, played.solved)


# The models.


class Model(NamedTuple):
  """A language model with its parameters."""

  experiment: build.Experiment
  params: Params


def trained(config, folder: pathlib.Path, begin: Params | None = None) -> Model:
  """Trains as `polgrad.train` does, in its folder; from the parameters `begin` if they are given."""
  with train.prepare(config, str(folder), '', step=-1, on_mismatch='stop') as session:
    if begin is not None and not int(session.state.step):
      copied = jax.tree.map(lambda x: x.copy(), begin)  # updates overwrite their input
      session = session._replace(state=session.state.replace(params=copied))
    return Model(session.experiment, train.run_phases(session).params)


def read_states(path: pathlib.Path, records: Sequence[Mapping]) -> tasks.Task:
  """The task of records with a state and one character as its answer; they are written to a file."""
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return tasks.Task(
    demonstrations=part(sources.jsonl, path=str(path)),
    alphabet=ALPHABET,
    prompt_length=LONGEST,
    max_new_tokens=2,
    demonstration_rows=128,
  )


def in_batches(function: Callable, rows: Sequence) -> list:
  """Results for all rows of a function of `BATCH` rows; the last batch is filled up."""
  found = []
  for start in range(0, len(rows), BATCH):
    piece = list(rows[start : start + BATCH])
    found += list(function(piece + [piece[-1]] * (BATCH - len(piece))))[: len(piece)]
  return found


def writer(experiment: build.Experiment, length: int, new: int, behavior_policy: Callable):
  """A function of parameters, prompts and a number for the noise that gives the completions."""
  tokenizer = experiment.tokenizer
  sample = make_sampler(
    {'policy': experiment.policy},
    max_new_tokens=new,
    behavior_policy=behavior_policy,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    mesh=experiment.mesh,
  )

  def write(params: Params, texts: Sequence[str], noise: tuple[int, int]) -> list[str]:
    seed, step = noise

    def batch(rows):
      records = [{'prompt': text, 'id': i} for i, text in rows]
      prompts = batching.prompts(records, tokenizer, length=length)
      drawn = jax.device_get(
        sample({'policy': params}, prompts.tokens, prompts.mask, prompts.ids, seed=seed, step=step)
      )
      ids = [row[mask] for row, mask in zip(drawn.tokens, drawn.mask)]
      return [tokenizer.decode([i for i in row if i not in tokenizer.stop_ids]) for row in ids]

    return in_batches(batch, list(enumerate(texts)))

  return write


def scorer(model: Model) -> Predict:
  """What a success model says of states."""
  policy, tokenizer = model.experiment.policy, model.experiment.tokenizer

  @jit
  def score(params, batch):
    values = policy.value(params, policy.hidden(params, batch.tokens, batch.segment_ids))
    return implicit_rewards.last_value(values, batch.mask)

  def rows(records):
    return jax.device_get(
      score(model.params, batching.supervised(records, tokenizer, length=LONGEST + 2))
    )

  def predicted(texts):
    records = [{'prompt': text, 'answer': who} for text in texts for who in (ALONE, ASK)]
    return np.clip(np.array(in_batches(rows, records)), 0, 1).reshape(-1, 2)

  return predicted


# The experiment.


class Sizes(NamedTuple):
  """Episodes, and batches of each training."""

  episodes: int = 4000  # with random requests
  held_out: int = 2000  # with each way to decide
  policy: int = 250  # batches of 64 sums
  helper: int = 500  # further batches
  success: int = 150  # batches of 128 states
  decision: int = 80  # batches of 128 states


SMOKE = Sizes(64, 64, 2, 2, 2, 2)


class Study(NamedTuple):
  """A seed of the experiment: where it keeps its runs, its models, and what draws their answers."""

  folder: pathlib.Path
  seed: int
  policy: Model
  helper: Model
  write: Callable  # answers to questions, drawn at temperature 1
  choose: Callable  # decisions on states, greedy

  def act(self, number: int) -> Act:
    """Answers of policy and helper; sets of episodes with different numbers have different noise."""

    def answers(questions, asked, turn):
      found = np.empty(len(questions), object)
      for who, model in enumerate((self.policy, self.helper)):
        rows = np.flatnonzero(asked == who)
        noise = (self.seed, (number * TURNS + turn) * 2 + who)
        found[rows] = self.write(model.params, [questions[i] for i in rows], noise)
      return found.tolist()

    return answers

  def records(self, first: int, count: int) -> list[dict]:
    return [worksheet(self.seed * 10_000_000 + first + i) for i in range(count)]


def configuration(task: tasks.Task, method: methods.Method, steps: int, seed: int):
  """A training of the tiny model, which begins at random parameters."""
  model = presets.tiny(alphabet=ALPHABET)
  run = dict(steps=steps, seed=seed, learning_rate=1e-3, warm_start=0, trackers='none')
  return compose(method, task, model, **run)


def begun(folder: pathlib.Path, seed: int, sizes: Sizes) -> Study:
  """Trains the policy, and a copy of it for longer."""
  task = tasks.Task(
    demonstrations=part(practice),
    alphabet=ALPHABET,
    prompt_length=QUESTION,
    max_new_tokens=ANSWER,
    demonstration_rows=64,
  )
  sft = lambda steps, seed: configuration(task, methods.sft(), steps, seed)
  policy = trained(sft(sizes.policy, seed), folder / 'policy')
  helper = trained(sft(sizes.helper, seed + 1000), folder / 'helper', policy.params)
  write = writer(policy.experiment, QUESTION, ANSWER, behavior_policies.current)
  choose = writer(policy.experiment, LONGEST, 1, behavior_policies.greedy)
  return Study(folder, seed, policy, helper, write, choose)


def coin(rate: float, seed: int) -> Decide:
  """Asks with a probability, whatever the state."""
  random = np.random.default_rng((seed, 1))
  return lambda texts: random.random(len(texts)) < rate


def explored(study: Study, sizes: Sizes) -> tuple[Played, Predict]:
  """Phase 1: episodes with random requests, and what a model of their outcomes predicts."""
  seen = play(study.records(0, sizes.episodes), coin(0.5, study.seed), study.act(0))
  task = read_states(study.folder / 'outcomes.jsonl', outcomes(seen))
  method = methods.reward_regression(target_field='solved')
  config = configuration(task, method, sizes.success, study.seed)
  return seen, scorer(trained(config, study.folder / 'success'))


class Planned(NamedTuple):
  """Phase 2: the plan at the price of a budget."""

  price: float
  requests: float  # that it expects in an episode
  solved: float  # probability that it expects
  decide: Decide


def planned(seen: Played, predict: Predict, budget: float) -> Planned:
  """Plans on groups of states that the success model makes."""
  predicted = [predict(texts) for texts in by_turn(seen)]
  grouping = grouped(predicted)
  rollouts = numbered(seen, [grouping(turn, one) for turn, one in enumerate(predicted)])
  process = interventions.fitted(rollouts, FIRST + LEVELS**2)
  price = interventions.affordable(process, BEGIN, budget)
  plan = interventions.planned(process, price)

  def decide(texts):
    turn = TURNS - 1 - texts[0].count(',')
    return plan.ask[turn + 1, grouping(turn, predict(texts))]

  return Planned(price, float(plan.usage[0, BEGIN]), float(plan.solved[0, BEGIN]), decide)


def imitated(
  study: Study, seen: Played, teacher: Decide, folder: pathlib.Path, sizes: Sizes
) -> Decide:
  """Phase 3: a copy of the policy learns the choices of the plan in all states that were seen."""
  labels = [
    {'prompt': text, 'answer': ASK if ask else ALONE}
    for texts in filter(None, by_turn(seen))
    for text, ask in zip(texts, teacher(texts))
  ]
  folder.mkdir(exist_ok=True)
  task = read_states(folder / 'labels.jsonl', labels)
  config = configuration(task, methods.sft(), sizes.decision, study.seed)
  model = trained(config, folder / 'decision', study.policy.params)
  return lambda texts: np.array([c == ASK for c in study.choose(model.params, texts, (0, 0))])


def measured(played: Played) -> dict[str, float]:
  """Requests of an episode, and the fraction of episodes that were solved."""
  return {'requests': float(played.asked.sum(axis=1).mean()), 'solved': float(played.solved.mean())}


def run(folder: pathlib.Path, seed: int, budgets: Sequence[float], sizes: Sizes) -> Iterator[dict]:
  """All phases, and new worksheets with each way to decide: a line of the results for each budget."""
  folder.mkdir(parents=True, exist_ok=True)
  study = begun(folder, seed, sizes)
  seen, predict = explored(study, sizes)
  for budget in budgets:
    plan = planned(seen, predict, budget)
    decide = imitated(study, seen, plan.decide, folder / f'budget_{budget:g}', sizes)
    yield {'seed': seed, 'budget': budget, **compared(study, plan, decide, sizes)}


def compared(study: Study, plan: Planned, decide: Decide, sizes: Sizes) -> dict:
  """What each way to decide asks for and solves on new worksheets, and what the plan expected."""
  records = study.records(5_000_000, sizes.held_out)
  play_with = lambda one: measured(play(records, one, study.act(1)))
  ways = {'never asks': coin(0, 0), 'always asks': coin(1, 0), 'plan': plan.decide, 'model': decide}
  found = {name: play_with(one) for name, one in ways.items()}
  # Episodes that fail early have fewer requests, so the rate of the coin is corrected once.
  wanted, rate = found['model']['requests'], found['model']['requests'] / TURNS
  first = play_with(coin(rate, study.seed + 1))['requests']
  found['coin'] = play_with(coin(rate * wanted / first if first else 0, study.seed + 2))
  expected = {'price': plan.price, 'requests': plan.requests, 'solved': plan.solved}
  return {'expected': expected, **found}


# The table.


ROWS = {
  'never asks': 'never asks',
  'coin': 'a coin asks, as often as the decision model',
  'model': 'decision model',
  'plan': 'plan, with the success model',
  'always asks': 'always asks',
}


def table(results: Sequence[Mapping]) -> str:
  """Means over seeds (lowest to highest), for every budget."""
  lines = ['| budget | who decides | requests | solved |', '|---|---|---|---|']
  for budget in sorted({one['budget'] for one in results}):
    seeds = [one for one in results if one['budget'] == budget]
    for name, words in ROWS.items():
      cells = [span([one[name][key] for one in seeds]) for key in ('requests', 'solved')]
      lines.append(f'| {budget:g} | {words} | {cells[0]} | {cells[1]} |')
  return '\n'.join(lines)


def span(values: Sequence[float]) -> str:
  return f'{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def read() -> list[dict]:
  """The results; of a seed and a budget the last ones."""
  lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
  found = [json.loads(line) for line in lines]
  return list({(one['seed'], one['budget']): one for one in found}.values())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', help='folder of the runs; each seed has one')
  parser.add_argument('--budgets', type=float, nargs='+', default=[1.0], help='requests an episode')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of everything')
  parser.add_argument('--smoke', action='store_true', help='sizes that show that the parts fit')
  parser.add_argument('--table', action='store_true', help=f'print the table of {RESULTS.name}')
  given = parser.parse_args()
  if given.table:
    if not read():
      parser.error(f'{RESULTS} has no results yet: run with --workdir first')
    print(table(read()))
    return
  if not given.workdir:
    parser.error('--workdir is needed, or --table')
  for seed in given.seeds:
    folder = pathlib.Path(given.workdir).expanduser() / f'seed_{seed}'
    for line in run(folder, seed, given.budgets, SMOKE if given.smoke else Sizes()):
      print(json.dumps(line), flush=True)
      if not given.smoke:
        with RESULTS.open('a') as file:
          file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
  main()
