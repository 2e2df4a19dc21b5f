"""docs/estimators.md, .json and .png from the numbers of the estimator report.

`rows` are points by method and staleness; a point has angle, strength, noise and progress.
"""

import json
import pathlib

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from benchmarks import tiny_world as world
from benchmarks.tiny_world import STALENESS

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
NUMBERS = DOCS / 'estimators.json'
TURNS = DOCS / 'turn_estimators.json'  # of benchmarks/turn_estimators.py
SAMPLING = DOCS / 'sampling_estimators.json'  # of benchmarks/sampling_estimators.py
Rows = dict[str, dict[str, tuple]]


def unbiased(points: dict, staleness: int) -> bool:
  """Whether the expected gradient has exactly the stated direction (a common factor is allowed)."""
  return points[str(staleness)].angle < 1e-4


CLASSES = {
  'exact on-policy and stale': lambda p: unbiased(p, 0) and unbiased(p, max(STALENESS)),
  'exact on-policy': lambda p: unbiased(p, 0),
  'nearly exact on-policy (under 5 degrees)': lambda p: p['0'].angle < 5,
  'biased by design': lambda p: True,
}


def grouped(rows: Rows) -> dict[str, list[str]]:
  """Names by the first class they belong to, the best progress on-policy first."""
  found = {title: [] for title in CLASSES}
  for name in sorted(rows, key=lambda n: -rows[n]['0'].progress):
    title = next(t for t, belongs in CLASSES.items() if belongs(rows[name]))
    found[title].append(name)
  return found


PAGE = """# What the estimators do: exact bias and noise of every policy-gradient method

Made by `python -m benchmarks.estimators`, which computes expectations exactly instead of sampling.

The policy is a free table over {sequences} sequences of one to three tokens (three tokens, one of them
the stop token), the reward is 0 or 1, and {group} samples are drawn. Credit and objective of each
method get all {groups} groups with their probabilities, so that the mean and the covariance of the
gradient are exact. The policy comes from {steps} exact gradient steps (mean reward {before:.2f} to
{after:.2f}); at staleness s the samples are those of the policy s steps earlier (KL to the present
policy {kls}).

* **angle**: degrees between the expected gradient and that of the objective that the method states
  (E[R], with its KL, entropy or chi-square term where it has one). 0 is unbiased up to a factor, 90
  is useless, and beyond 90 degrees a step goes downhill.
* **noise**: standard deviation of the gradient over the length of its mean. Averaging n batches
  divides it by sqrt(n); it does nothing to the angle.
* **progress**: E[g] . u / sqrt(E|g|^2) with u the true direction: the fraction of a step's length that
  climbs. It weighs bias against noise at this sample budget; 1 would be the exact gradient.

![progress, angle and noise by method](estimators.png)

## What to read from it

{reading}

Three things explain most of it.

* **What is divided by sampled lengths is biased**: a mean over each sequence's tokens (`grpo`, `gspo`,
  `gmpo`, `sapo`) most, a mean over all tokens of the batch (`dapo`, `tis`, ...) a little, a constant
  or a sum not at all.
* **A ratio corrects staleness and pays in noise; a clip does not correct it.** PPO's one-sided clip
  silences tokens that have already moved the way of their advantage. After enough steps in the
  right direction those are the tokens that carry the signal, and the mean of the rest can point
  backwards: a clip says "stop", it is no estimate for stale data. Sequence bounds as narrow as
  GSPO's say so after one step. Corrections that keep the token (`tis`, `cispo`, `icepop`,
  `decoupled_ppo`, `a3po`) or weigh the sequence (`mis`, `harpg`, `topr`) stay close.
* **Regressions** (`opmd`, `copg`, `tba`, `dro_v`, `a_star_po`) **are unbiased on-policy.** On stale
  samples they leave the gradient, though their residual still pulls to the same optimum. In
  `tbrm` the value moves too, so it never follows the gradient of the policy alone.

## All numbers

Critics are at rest (exact values of the sampling policy), moving baselines too; greedy baselines are
exact, those of the reference have many samples. Methods that bring an optimizer show the
gradient that this optimizer gets. Left out: {left_out}.

{tables}

## Where a method changes what is sampled

Made by `python -m benchmarks.sampling_estimators`. Four prompts, with success rates of about .05,
.3, .6 and .95 and separate logits, are answered by two tokens, of which one pair is right;
there is no stop token, so no length adds a bias, and groups are four rows unless the row says
otherwise. Functions of the repository choose prompts, groups and rows, and are called for every
result of their random numbers; those of `vade` are continuous, so its probabilities are integrals,
by quadrature. The policy is at rest: older groups are as the present policy draws them, and what
curricula track is exact. Where groups are replayed, half of those of a step are new and the others
come from three older ones, but dull ones are replaced wherever they are. `revisit` draws two groups,
one again and one new, after each prompt was tried once.

* **angle, strength, noise** compare with the gradient of E[R] over uniform prompts. Strength is the
  length of the expected gradient over that of the true one. The variance of the gradient is
  (strength times noise)^2, in units of the squared true gradient. A mean over tokens halves the
  strength here.
* **stated** is angle and strength for what the row climbs by its own account, where that is another
  objective: E[R] over the prompts or the beginnings that are drawn; for group-normalised rewards
  the mean of F(p), with F' = sqrt((G - 1) / G) sum_k C(G, k) p^k (1 - p)^(G - k) sqrt(k (G - k)) /
  (G p (1 - p)), where `confucius3` weighs each summand by 2 - k / G.
* **prompts**: the factor of the gradient of each prompt's success rate, divided by the mean factor.
  E[R] has 1, 1, 1, 1.

### What is sampled, with an unbiased loss

The loss is REINFORCE with a leave-one-out baseline, summed over tokens (without a baseline where
rows are chosen by their rewards).

{sampling_laws}

### Sampling of whole methods

Without their entropy, KL and imitation terms. A step has one prompt where nothing else is said.
`grace` has two texts, with one answer to each query and negative, and fixed random states; its
reward is that of embeddings, so E[R] is the mean reward, whose gradient is taken by all answers, and
what it states is that of each row by its own answer alone.

{sampling_methods}

### What follows

* **Dynamic sampling has no bias beyond that of its credit.** A group with equal rewards has no
  gradient, so replacing it multiplies the mean by 1 + q + ... + q^n, with q the probability of such
  a group and n the attempts. It buys signal a group at the cost of more samples. The same holds
  where remembered groups take the places of dull ones.
* **Temperatures that differ by 5% between tokens** (`hapo`) move the gradient by a degree. The 36
  degrees of the whole method are those of its weights of tokens, as in the tables above.
* **Replay by priority is unbiased with b = 1 and weights that are not scaled.** Scaled by the
  largest weight of what is remembered, the factor depends on what is remembered, and the direction
  is off by hundredths of a degree. With a smaller b the biases of these priorities are small too,
  because they differ mostly between groups with and without a gradient.
* **Rows of an old run carry its probabilities.** Here its logits were half as large. Ratios of tokens
  take most of the bias away; what is left is that of the prefix, whose ratio they do not have.
* **Prompts that are drawn more often count more**: a curriculum climbs E[R] over the distribution
  of prompts that it draws, exactly, and is off for uniform ones. Weights 1 / (n q) undo it. Budgets
  are the same, since a mean over rows or tokens counts a prompt by its completions.
* **Beginnings of the answer move weight to hard prompts.** The loss then climbs the success rate
  behind the beginning, and given tokens have no gradient. In `igpo` only groups without a right row
  change.
* **Copies share the beginning of their row**, so the mean of a group holds a part of what the shared
  token earns, and takes it away. Where two of four rows may be copied behind a reply (`agentic_arpo`;
  here the reply is between the two tokens), that is some 7 degrees. Leaves of trees that fork at
  their least likely token, of which one of the best is always trained on (`treerl`), are 9 off.
* **Rows that avoid others make up for them, and overdo it.** A policy that has learned to avoid two
  rows (`props`) draws what is missing with a probability that is not its own. The noise falls, but
  the bias grows with the steps that it makes: .8 degrees at a learning rate of .01, 14 at .1, where
  a prompt that is nearly always answered right counts twice.
* **A reward that compares the rows of a group loses a part to the mean of the group.** In `grace` the
  agreement inside a group is a reward of all of its rows. What remains of its weight is the fraction
  (G - 2) / (G - 1): one half in groups of three, 6/7 in groups of eight. Without this term the
  gradient of a row by its own answer is exact. Most of the gradient of the mean reward belongs to
  answers that are not trained on, to queries and negatives, hence the angle of 74 degrees.
* **Rows that are drawn again by their rewards are no samples of the policy.** Without a correction
  they favour hard prompts. With rewards 0 and 1, `best_half` is `best_worst`, and `power` is
  `best`.
* **Dividing by the deviation of four rewards hardly changes the weights of prompts** (1.02 to .97);
  in large groups it would be 1 / sqrt(p (1 - p)).

## Over several turns

Made by `python -m benchmarks.turn_estimators`, in the same way, for the credit that
[turn_credit.md](turn_credit.md) describes. Two environments of `polgrad/tabular/turns.py` answer turns
of one or two tokens, and give a reward for every turn:

* *deterministic*: two turns; what is right in the second depends on the first, and the first turn that
  is rewarded at once leads to the worse place.
* *stochastic*: one first turn ends the episode, and another one is answered at random.

Groups are {turn_group} samples of the policy that is trained, and critics are exact. The true gradient
is that of E[sum of the rewards of all turns].

### Credit alone, with the loss of REINFORCE summed over tokens

{turn_credits}

### Whole methods

Beside the credit, these have the biases of their losses: means over sampled lengths, clips, whitening.

{turn_methods}
"""


def turn_tables() -> dict[str, str]:
  """The tables of the report over several turns: of credits, then of methods, which are one word."""
  rows = json.loads(TURNS.read_text())
  worlds = list(next(iter(rows.values())))
  head = [
    '| | ' + ' | '.join(f'angle, noise, progress: {w}' for w in worlds) + ' |',
    '|---' * 3 + '|',
  ]
  tables = {'turn_credits': [*head], 'turn_methods': [*head]}
  for name, points in rows.items():
    method = name.replace('_', '').isalpha() and name != 'outcome'
    cells = [
      f'{_degrees(p["angle"])}, {p["noise"]:.2f}, {p["progress"]:.2f}' for p in points.values()
    ]
    label = f'`{name}`' if method else name
    tables['turn_methods' if method else 'turn_credits'].append(
      f'| {label} | {" | ".join(cells)} |'
    )
  return {key: '\n'.join(lines) for key, lines in tables.items()}


def sampling_tables() -> dict[str, str]:
  """The tables of what is sampled: of laws, then of methods, whose names begin with theirs."""
  rows = json.loads(SAMPLING.read_text())
  head = ['| | angle, strength, noise | stated: angle, strength | prompts |', '|---' * 4 + '|']
  tables = {'sampling_laws': [*head], 'sampling_methods': [*head]}
  for name, p in rows.items():
    key = 'sampling_methods' if name.startswith('`') else 'sampling_laws'
    stated = p['stated_angle'], p['stated_strength']
    other = not np.allclose(stated, (p['angle'], p['strength']))
    cells = [
      f'{_small(p["angle"])}, {p["strength"]:.2f}, {p["noise"]:.2f}',
      f'{_small(stated[0])}, {stated[1]:.2f}' if other else 'E[R]',
      ', '.join(f'{x:.2f}' for x in p['prompts']),
    ]
    tables[key].append(f'| {name} | {" | ".join(cells)} |')
  return {key: '\n'.join(lines) for key, lines in tables.items()}


def write(rows: Rows, *, group: int, left_out: dict[str, str]) -> None:
  groups = grouped(rows)
  header = '| method | ' + ' | '.join(f'angle, noise, progress at {s}' for s in STALENESS) + ' |'
  tables = []
  for title, names in groups.items():
    tables += [f'### {title.capitalize()}', '', header, '|---' * (len(STALENESS) + 1) + '|']
    for name in names:
      cells = [f'{_degrees(p.angle)}, {p.noise:.2f}, {p.progress:.2f}' for p in rows[name].values()]
      tables.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
    tables.append('')
  policies = world.trajectory()
  now = world.probabilities(policies[-1])
  kls = [
    np.sum(p * np.log(p / now))
    for s in STALENESS
    for p in [world.probabilities(policies[len(policies) - 1 - s])]
  ]
  text = PAGE.format(
    sequences=len(world.POLICY.tokens),
    group=group,
    groups=len(world.POLICY.tokens) ** group,
    steps=max(STALENESS),
    before=world.probabilities(policies[0]) @ world.REWARDS,
    after=now @ world.REWARDS,
    kls=', '.join(f'{kl:.4f} at {s}' for s, kl in zip(STALENESS, kls) if s),
    reading=reading(rows, groups),
    left_out='; '.join(f'`{k}` ({v})' for k, v in left_out.items()),
    tables='\n'.join(tables).rstrip(),
    turn_group=group,
    **turn_tables(),
    **sampling_tables(),
  )
  (DOCS / 'estimators.md').write_text(text)
  numbers = {n: {s: p._asdict() for s, p in own.items()} for n, own in rows.items()}
  NUMBERS.write_text(json.dumps(numbers, indent=1) + '\n')


def _degrees(angle: float) -> str:
  return '0' if angle < 1e-4 else f'{angle:.1f}'


def _small(angle: float) -> str:
  """With three decimals where one would say 0."""
  return f'{angle:.3f}' if 1e-4 <= angle < 0.1 else _degrees(angle)


def reading(rows: Rows, groups: dict[str, list[str]]) -> str:
  """The findings, from the numbers."""
  last = str(max(STALENESS))
  listed = lambda names: ', '.join(f'`{n}`' for n in names) or 'none'
  broken = sorted((n for n in rows if rows[n][last].angle > 60), key=lambda n: -rows[n][last].angle)
  steady = [n for n in rows if rows[n][last].angle < 15 and rows[n][last].progress > 0.3]
  quiet = sorted(rows, key=lambda n: rows[n]['0'].noise)[:5]
  best = sorted(rows, key=lambda n: -rows[n][last].progress)[:8]
  lines = {
    f'Unbiased on-policy, and still at staleness {last}': groups['exact on-policy and stale'],
    'Unbiased on-policy only': groups['exact on-policy'],
    f'Further than 60 degrees off at staleness {last}': broken,
    f'Within 15 degrees and above progress 0.3 at staleness {last}': sorted(steady),
    'The least noise on-policy': quiet,
    f'The most progress at staleness {last}': best,
  }
  return '\n'.join(f'* {title}: {listed(names)}.' for title, names in lines.items())


def draw(rows: Rows) -> None:
  """One row per method: progress at every staleness; angle and noise at the smallest and the largest."""
  names = sorted(rows, key=lambda n: -rows[n]['0'].progress)
  lines = np.arange(len(names))
  figure, (left, *right) = plt.subplots(
    1, 3, figsize=(14, 0.17 * len(names) + 1.5), layout='constrained', sharey=True
  )
  progress = np.array([[p.progress for p in rows[n].values()] for n in names])
  image = left.imshow(progress, aspect='auto', cmap='RdYlGn', vmin=-0.6, vmax=0.6)
  left.set_yticks(lines, names, fontsize=7)
  left.set_xticks(range(len(STALENESS)), STALENESS)
  left.set_xlabel('staleness, gradient steps')
  left.set_title('progress of a step')
  figure.colorbar(image, ax=left, location='bottom', shrink=0.8)

  titles = {
    'angle': 'angle to the stated gradient, degrees',
    'noise': 'noise: standard deviation / mean',
  }
  ends = (0, max(STALENESS))
  for axis, (quantity, title) in zip(right, titles.items()):
    found = {s: np.array([getattr(rows[n][str(s)], quantity) for n in names]) for s in ends}
    axis.hlines(lines, found[ends[0]], found[ends[1]], color='lightgray', lw=1)
    for staleness, color in zip(ends, ('C0', 'C3')):
      axis.plot(found[staleness], lines, '.', color=color, ms=7, label=f'staleness {staleness}')
    axis.set_title(title)
    axis.grid(axis='x', alpha=0.3)
  right[0].axvline(90, color='gray', lw=0.7, ls=':')
  right[0].legend(loc='upper right')
  right[1].set_xscale('log')
  right[1].set_xticks((1, 1.5, 2, 3, 4, 6), ('1', '1.5', '2', '3', '4', '6'), minor=False)
  right[1].xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  figure.savefig(DOCS / 'estimators.png', dpi=110)
  plt.close(figure)
