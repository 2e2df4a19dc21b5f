"""docs/preferences.md, .json and .png from the numbers of the preference report.

`rows` are by method, preferences ('bradley_terry', 'game') and data; an entry is that of
`preferences.Found`.
"""

import json
import pathlib

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import preference_world as world

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
NUMBERS = DOCS / 'preferences.json'
EXACT = 1e-6  # total variation below which two distributions are called equal
LEAST = -10  # nats; the picture draws what is less at this place
DATA = ('on_policy', 'reference', 'other', 'partial')
COLUMNS = tuple((kind, data) for kind in ('bradley_terry', 'game') for data in DATA)
Rows = dict[str, dict[str, dict[str, dict]]]


def verdict(found: dict) -> str:
  """Where a flow ends: `tilt T`, `Nash T`, `response T`, ..., another policy, or nothing."""
  if found['largest'] > 1 - 1e-3:
    return 'one'
  if not found['ended']:
    return 'no end'
  if found['kl'] < 1e-12:
    return 'reference'
  for kind, word in (('tilt', 'tilt'), ('nash', 'Nash'), ('response', 'response')):
    if found[kind] is not None and found[kind] < EXACT:
      return f'{word} {found[f"{kind}_temperature"]:.2f}'
  return f'{away(found):.0e}' if away(found) < 5e-4 else f'{away(found):.3f}'


def away(found: dict) -> float:
  """Distance to the nearest tilt of the reference by the reward; in a game, to the nearest Nash."""
  return found['nash'] if found['tilt'] is None else found['tilt']


def cells(row: dict) -> list[str]:
  return [verdict(row[kind][data]) for kind, data in COLUMNS]


def tilts(row: dict) -> bool:
  """Whether both data sets that cover everything lead to a tilt by the reward."""
  found = [verdict(row['bradley_terry'][data]) for data in ('reference', 'other')]
  return all(x.startswith('tilt') for x in found)


def finds_nash(row: dict) -> bool:
  return verdict(row['game']['on_policy']).startswith('Nash')


def mixes(row: dict) -> bool:
  """Whether own samples lead to the best response to a mixture of policy and reference."""
  return verdict(row['game']['on_policy']).startswith('response')


def responds(row: dict) -> bool:
  """Whether the end is the regularised best response to whoever sampled the data."""
  found = [verdict(row['game'][data]) for data in ('reference', 'other')]
  return all(x.startswith('response') for x in found)


def same(row: dict, kind: str) -> bool:
  """Whether it does not matter which of the two data sets that cover everything it has."""
  one, other = row[kind]['reference'], row[kind]['other']
  ended = not {'no end', 'one'} & {verdict(one), verdict(other)}
  return ended and all(abs(one[k] - other[k]) < 1e-6 for k in ('kl', 'win_rate', 'largest'))


def endless(row: dict) -> bool:
  return any(x in ('no end', 'one') for x in cells(row))


CLASSES = {
  'the tilted policy, from any data that covers all': tilts,
  'the regularised Nash policy, from own samples': finds_nash,
  'the best response to a mixture of policy and reference': mixes,
  'no end, or a single sequence, in at least one setting': endless,
  'neither': lambda row: True,
}


def grouped(rows: Rows) -> dict[str, list[str]]:
  """Names by the first class they belong to."""
  found = {title: [] for title in CLASSES}
  for name, row in rows.items():
    found[next(t for t, belongs in CLASSES.items() if belongs(row))].append(name)
  return {title: names for title, names in found.items() if names}


PAGE = """# Where preference losses lead: the exact fixed point of every method

Made by `python -m benchmarks.preferences`, which computes expectations exactly instead of
sampling.

The policy is a free table over the {size} sequences of one or two tokens (three tokens, one of
them the stop token). Credit and objective of each method get every pair (chosen, rejected) as a
batch, with its probability 2 mu(chosen) mu(rejected) P(chosen > rejected): the two sequences are
drawn independently from mu, and the verdict from P. The exact expected gradient is followed from
the reference (gradient flow, float64, BDF with tolerance 1e-7, up to {end:.0e} units in which the
first step has speed 1, then Newton steps) to where it vanishes. Equal means a total variation
below {exact:.0e}. Losses with kinks, such as hinges, are followed by steps of falling length instead
and have ended where no probability moves by more than {settled}, which is the precision of their
numbers. Methods that read win probabilities, as self-play does, get P itself. A method takes about
four seconds.

Two kinds of preferences: `Bradley-Terry`, P = sigmoid(r - r') with rewards from {least} to {most}
(this is the setting in which a reward explains the labels), and a `game`, whose P no reward
explains (1 beats 4, 4 beats 6 and 6 beats 1, each with probability {cycle:.3f}).

Four sources of pairs: `own`, the policy that is trained (samples and labels are always fresh);
`reference`, where it starts; `other`, another policy that gives every sequence a probability; and
`partial`, the reference restricted to {seen} of the {size} sequences. The last three are data
sets that never change.

A cell says where the flow ends:

* **tilt T**: reference exp(r / T) / Z, the optimum of E[r] - T KL(pi || reference).
* **Nash T**: the policy pi = reference exp(P(. > pi) / T) / Z, which no policy beats in the game
  with KL penalty T.
* **response T**: reference exp(P(. > mu) / T) / Z, the best response to mu, who sampled the data. A
  method that compares with samples of another policy than its own has the best response to that one
  (with a geometric mixture of policy and reference, that mixture is the Nash policy of a higher T).
* **a number**: none of these. It is the total variation to the nearest tilt (in the game, to the
  nearest Nash policy), where T is chosen to make it smallest.
* **one**: all mass on one sequence (which is the limit of many distributions, so no T is meant).
* **no end**: the gradient has not vanished. The policy moves to infinity, or circles, as self-play
  without a KL does in a game.
* With `partial` data all of these are distributions over the sequences of the data.

Methods with a reference have T = {temperature} as their `beta` or `tau`, all other constants are
defaults. Methods that choose the best and the worst of many samples get two samples. An anchor
that follows the policy (a reference that is renewed, the policy at the start of a phase) is taken
to be the policy itself, which it becomes once the policy no longer moves.

![ends, likelihoods, and mass on sequences that the data lacks](preferences.png)

## What to read from it

{reading}

* **Why they differ**: with the logistic loss and Bradley-Terry labels, the best margin of each
  pair is the difference of the rewards over beta, so all pairs agree and mu does not matter.
  Without a reward the pairs contradict each other, and a loss averages the contradictions in its
  way, weighted by mu. The squared loss averages win probabilities, and its optimum is the best
  response to mu; if mu is the policy itself, that is the regularised Nash policy. Other losses
  average something else.
* **`tdpo`** ends at none of these policies with Bradley-Terry labels. Its score of a sequence is the
  sum over tokens of log(pi / reference) + KL(reference, pi). With pi = reference exp(q) / Z after a
  prefix, a token adds q less the mean of q under the reference. So the scores are sums of advantages
  under the reference, and the best ones are those of the reward r / T. The end is pi(token) =
  reference(token) exp(E_reference[r | token] / T) / Z after each prefix, from any data that covers all.
  This tilts each token by what it is worth if the reference continues, as controlled decoding does;
  the tilt of whole sequences has T log E_reference[exp(r / T) | token] in that place.
* **`cream`** reads no preferences. It prefers what the policy has made more likely than the reference
  did, as surely as the policy of the last iteration agrees. At rest that policy is the present one and
  agrees fully, so every gap grows without an end, and all mass goes to the sequence that is ahead at
  the first update. There policy and reference are equal, and mean log-probabilities decide: it is the
  sequence with the largest one under the reference, whatever the preferences and the data. In a run
  the ranks of the two policies differ, and a gap ends where sigmoid(beta h) is their agreement.
* **The likelihood of chosen answers** falls in most offline runs, and that by itself is no error: the
  optimum moves mass to good sequences wherever they are, and the rejected ones fall more. It is an
  error if the mass goes to sequences that the data lacks: a loss of margins does not see them, and
  their probability is whatever the parameters make of it.

## Where each method ends

{tables}

## Likelihood and mass that no data asked for

Bradley-Terry labels. *chosen* and *rejected* are changes of E[log pi] from the reference, in
nats. *unseen* is the probability of the sequences that the partial data lacks: {unseen:.3f} in
the reference, {wanted:.3f} in the tilted policy that has T = {temperature}. *win rate* is P(pi >
reference), KL is KL(pi || reference) in nats.

{likelihoods}

## Left out

{left_out}
"""


def write(rows: Rows, *, left_out: dict[str, str]) -> None:
  from benchmarks.preferences import END, SETTLED

  reference = world.probabilities(world.reference())
  tilted = reference * np.exp(world.REWARDS / world.TEMPERATURE)
  unseen = ~np.isin(np.arange(world.SIZE), world.SEEN)
  text = PAGE.format(
    size=world.SIZE,
    end=END,
    settled=SETTLED,
    exact=EXACT,
    least=world.REWARDS.min(),
    most=world.REWARDS.max(),
    cycle=world.game().wins[1, 4],
    seen=len(world.SEEN),
    temperature=world.TEMPERATURE,
    reading=reading(rows),
    tables=tables(rows),
    unseen=reference[unseen].sum(),
    wanted=tilted[unseen].sum() / tilted.sum(),
    likelihoods=likelihoods(rows),
    left_out='\n'.join(f'* `{k}`: {v}.' for k, v in left_out.items()) or 'None.',
  )
  (DOCS / 'preferences.md').write_text(text)
  NUMBERS.write_text(json.dumps(rows, indent=1) + '\n')


def tables(rows: Rows) -> str:
  names = {'on_policy': 'own'}
  kinds = {'bradley_terry': 'Bradley-Terry', 'game': 'game'}
  head = [f'{kinds[kind]}, {names.get(data, data)}' for kind, data in COLUMNS]
  lines = []
  for title, members in grouped(rows).items():
    lines += [f'### {title[0].upper()}{title[1:]}', '', f'| method | {" | ".join(head)} |']
    lines += ['|---' * (len(head) + 1) + '|']
    lines += [f'| `{name}` | {" | ".join(cells(rows[name]))} |' for name in members]
    lines.append('')
  return '\n'.join(lines).rstrip()


def likelihoods(rows: Rows) -> str:
  lines = [
    '| method | own: chosen, rejected | reference: chosen, rejected | partial: chosen, rejected '
    '| unseen | win rate, KL (reference) |',
    '|---' * 6 + '|',
  ]
  for name, row in rows.items():
    of = row['bradley_terry']
    pairs = [
      f'{change(of[d]["chosen"])}, {change(of[d]["rejected"])}'
      for d in ('on_policy', 'reference', 'partial')
    ]
    rest = [f'{of["partial"]["unseen"]:.3f}']
    rest.append(f'{of["reference"]["win_rate"]:.3f}, {of["reference"]["kl"]:.2f}')
    lines.append(f'| `{name}` | {" | ".join(pairs + rest)} |')
  return '\n'.join(lines)


def change(nats: float) -> str:
  return f'{nats:+.2f}' if nats > -100 else 'below -100'


def reading(rows: Rows) -> str:
  """The findings, from the numbers."""
  listed = lambda names: ', '.join(f'`{n}`' for n in names) or 'none'
  offline = lambda row: row['bradley_terry']['reference']
  partial = lambda row: row['bradley_terry']['partial']
  reference = world.probabilities(world.reference())
  before = reference[~np.isin(np.arange(world.SIZE), world.SEEN)].sum()
  lines = {
    'The tilted policy from Bradley-Terry labels, whatever data covers all': tilts,
    'The regularised Nash policy of the game, from own samples': finds_nash,
    'From own samples, the best response to a mixture of policy and reference': mixes,
    'The best response to whoever sampled the data': responds,
    'Another policy, but the same one from both data sets that cover all': lambda row: (
      same(row, 'bradley_terry') and not tilts(row)
    ),
    'The same policy from both data sets in the game, too': lambda row: same(row, 'game'),
    'The likelihood of chosen answers falls (data from the reference)': lambda row: (
      offline(row)['chosen'] < -EXACT
    ),
    'It rises': lambda row: offline(row)['chosen'] > EXACT,
    f'More than half of the mass on the sequences that partial data lacks (before: {before:.2f})': (
      lambda row: partial(row)['unseen'] > 0.5
    ),
    'No end, or all mass on one sequence, in at least one setting': endless,
  }
  return '\n'.join(
    f'* {title}: {listed([n for n, row in rows.items() if belongs(row)])}.'
    for title, belongs in lines.items()
  )


def drawn(found: dict) -> float:
  """The distance in the picture; NaN where there is none."""
  return np.nan if verdict(found) in ('one', 'no end') else max(away(found), 1e-7)


def draw(rows: Rows) -> None:
  """One row per method: distances, changes of likelihoods, and the mass on unseen sequences."""
  names = [name for members in grouped(rows).values() for name in members]
  lines = np.arange(len(names))
  figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 0.22 * len(names) + 2.2), layout='constrained', sharey=True,
    width_ratios=(1.3, 1, 0.8),
  )  # fmt: skip
  entries = [[rows[n][kind][data] for kind, data in COLUMNS] for n in names]
  distance = np.array([[drawn(x) for x in e] for e in entries])
  colors = plt.get_cmap('RdYlGn_r').with_extremes(bad='lightgray')
  image = left.imshow(np.log10(distance), aspect='auto', cmap=colors, vmin=-6, vmax=0)
  left.set_yticks(lines, names, fontsize=8)
  labels = ('own', 'reference', 'other', 'partial')
  left.set_xticks(range(len(COLUMNS)), labels * 2, rotation=60, fontsize=8)
  left.axvline(len(DATA) - 0.5, color='white', lw=4)
  left.set_title('to the tilted policy (Bradley-Terry) | to Nash (game)', fontsize=9)
  bar = figure.colorbar(image, ax=left, location='bottom', shrink=0.8, ticks=(-6, -4, -2, 0))
  bar.ax.set_xticklabels(('exact', '1e-4', '0.01', '1'), fontsize=8)
  bar.set_label('total variation; gray: no end, or one sequence', fontsize=8)

  data = [rows[n]['bradley_terry']['reference'] for n in names]
  chosen, rejected = (np.array([max(x[k], LEAST) for x in data]) for k in ('chosen', 'rejected'))
  middle.hlines(lines, rejected, chosen, color='lightgray', lw=1)
  middle.plot(chosen, lines, '.', color='C2', ms=8, label='chosen')
  middle.plot(rejected, lines, '.', color='C3', ms=8, label='rejected')
  middle.axvline(0, color='gray', lw=0.7, ls=':')
  middle.set_xlim(LEAST - 0.5, None)
  title = f'change of mean log-prob, nats\n(data of the reference; left edge: below {LEAST})'
  middle.set_title(title, fontsize=9)
  middle.legend(fontsize=8)
  middle.grid(axis='x', alpha=0.3)

  unseen = [rows[n]['bradley_terry']['partial']['unseen'] for n in names]
  reference = world.probabilities(world.reference())
  before = reference[~np.isin(np.arange(world.SIZE), world.SEEN)].sum()
  right.plot(unseen, lines, '.', color='C0', ms=8)
  right.axvline(before, color='gray', lw=0.7, ls=':')
  right.set_xlim(-0.02, 1.02)
  right.set_title('mass on sequences that\npartial data lacks (dotted: before)', fontsize=9)
  right.grid(axis='x', alpha=0.3)
  figure.savefig(DOCS / 'preferences.png', dpi=110)
  plt.close(figure)
