"""Losses of pair methods that look at single tokens, at weights of pairs or at the whole batch."""

import jax
import numpy as np
from scipy import stats

from tests.preference.harness import (
  average,
  confidence,
  logistic,
  mean,
  pair,
  ratio,
  sigmoid,
  soft,
  total,
)
from tests.preference.oracles_pairs import margin


def log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def noise_of(x):
  """The noise of the first update, which is a function of its number alone."""
  key = jax.random.fold_in(jax.random.key(0), 0)
  return np.asarray(jax.random.uniform(key, x['mask'].shape))


def reference_kl(x):
  """Of each row, the sum over its tokens of sum_v ref(v) (log ref(v) - log pi(v))."""
  ref, own = log_softmax(x['teacher_logits']), log_softmax(x['logits'])
  return total((np.exp(ref) * (ref - own)).sum(axis=-1), x['mask'])


def tdpo1(x, const):
  chosen, rejected = pair(reference_kl(x), x)
  return soft(logistic, 0.1 * (margin(x, 'teacher_logp') - (rejected - chosen)), x)


def tdpo2(x, const):
  rejected, chosen = pair(reference_kl(x), x)[1], pair(reference_kl(const), x)[0]
  return soft(logistic, 0.1 * (margin(x, 'teacher_logp') - 0.7 * (rejected - chosen)), x)


def damped(x, damping):
  """LD-DPO, token by token."""
  scores = np.zeros(len(x['mask']))
  for i in range(0, len(scores), 2):
    shared = x['mask'][i : i + 2].sum(axis=1).min()
    for row in (i, i + 1):
      for place, t in enumerate(np.flatnonzero(x['mask'][row])):
        gap = x['logp'][row, t] - x['reference_logp'][row, t]
        scores[row] += gap if place < shared else damping * gap
  chosen, rejected = pair(scores, x)
  return soft(logistic, 0.1 * (chosen - rejected), x)


def drawn(x, noise):
  """SamPO: the m tokens of a row with the smallest noise, m the length of the shorter row."""
  kept = np.zeros_like(x['mask'])
  for i in range(len(kept)):
    first = i - i % 2
    shared = x['mask'][first : first + 2].sum(axis=1).min()
    tokens = np.flatnonzero(x['mask'][i])
    kept[i, tokens[np.argsort(noise[i, tokens])][:shared]] = True
  return kept


def sampo(x, const):
  kept = drawn(x, noise_of(x))
  chosen, rejected = pair(total(x['logp'] - x['reference_logp'], kept), x)
  return soft(logistic, 0.1 * (chosen - rejected), x)


def sampo_apart(x, const):
  noise = noise_of(x)
  again = jax.random.uniform(jax.random.key(int(noise[0, 0] * 2**23)), noise.shape)
  own, reference = drawn(x, noise), drawn(x, np.asarray(again))
  chosen, rejected = pair(total(x['logp'], own) - total(x['reference_logp'], reference), x)
  return soft(logistic, 0.1 * (chosen - rejected), x)


def humanline(low, high):
  def loss(x, const):
    clipped = np.clip(x['logp'] - x['reference_logp'], low, high)
    chosen, rejected = pair(total(clipped, x['mask']), x)
    return soft(logistic, 0.1 * (chosen - rejected), x)

  return loss


def weighted(weight, z, x):
  p = confidence(x)
  return average(weight * (p * logistic(z) + (1 - p) * logistic(-z)), x)


def aligned(typical, cap):
  """WPO; the weight reads `const`, because it carries no gradient."""

  def loss(x, const):
    rows = mean(const['logp'] - typical(log_softmax(const['logits'])), const['mask'])
    weight = np.minimum(cap, np.exp(rows[::2] + rows[1::2]))
    return weighted(weight, 0.01 * margin(x), x)

  return loss


collision = lambda log_probs: np.log(np.exp(2 * log_probs).sum(axis=-1))
greedy = lambda log_probs: log_probs.max(axis=-1)


def semantic(alpha):
  def loss(x, const):
    return weighted(np.exp(-alpha * (1 - x['similarity'][::2])), 0.1 * margin(x), x)

  return loss


def complete(x):
  """Pairs of which both rows have tokens."""
  return np.flatnonzero(x['mask'].any(axis=1).reshape(-1, 2).all(axis=1))


def adaptive(dropped=0.2, rate=0.6, corrected=False):
  """beta-DPO in its first update, from the averages 0 and 0."""

  def loss(x, const):
    where = complete(x)
    h = margin(const)[where]
    center, width = 0.1 * h.mean(), 0.1 * h.std(ddof=1)
    if corrected:
      center, width = h.mean(), h.std(ddof=1)
    noise = noise_of(x)[::2, 0][where]
    keys = -(((h - center) / width) ** 2) / 2 - np.log(-np.log(noise))
    kept = np.argsort(-keys)[: int(len(where) * (1 - dropped))]
    beta = max(1e-3, 0.1 * (1 + rate * (h[kept].mean() - center)))
    z, p = beta * margin(x)[where][kept], confidence(x)[where][kept]
    return (p * logistic(z) + (1 - p) * logistic(-z)).mean()

  return loss


def aot_paired(x, const):
  """Policy margins and reference margins, each sorted by itself."""
  where = complete(x)
  own, reference = (
    np.subtract(*pair(total(x[name], x['mask']), x))[where] for name in ('logp', 'reference_logp')
  )
  order = np.argsort(own)
  z, p = 0.01 * (own[order] - np.sort(reference)), confidence(x)[where][order]
  return (p * logistic(z) + (1 - p) * logistic(-z)).mean()


def first_part(x, const):
  """SeRA keeps all pairs in the first part of the run, so it is DPO."""
  return soft(logistic, 0.1 * margin(x), x)


def opa(x, const):
  """Weighted tokens in the pair's term; the anchor has a term for every row, chosen or rejected."""
  log_ratio, mask = x['logp'] - x['reference_logp'], x['mask']
  chosen, rejected = pair(total(x['token_weights'] * log_ratio, mask), x)
  z, p = 0.1 * total(log_ratio, mask), x['label']
  rows = (p * logistic(z) + (1 - p) * logistic(-z))[mask.any(axis=1)]
  return soft(logistic, 0.1 * (chosen - rejected), x) + 2 * rows.mean()


def opa_per_token(x, const):
  """A logistic function at every position where one of the rows has a token, averaged over them."""
  ratios = np.where(x['mask'], x['token_weights'] * (x['logp'] - x['reference_logp']), 0)
  losses = []
  for i in 2 * complete(x):
    z, p = 0.1 * (ratios[i] - ratios[i + 1]), x['label'][i]
    where = x['mask'][i] | x['mask'][i + 1]
    losses.append((p * logistic(z) + (1 - p) * logistic(-z))[where].mean())
  z, p = 0.1 * ratio(x), x['label']
  rows = (p * logistic(z) + (1 - p) * logistic(-z))[x['mask'].any(axis=1)]
  return np.mean(losses) + 0.5 * 2 * rows.mean()


def aot_unpaired(x, const):
  """Every row against the row of its rank among the others; the other row is a constant. The mean has
  each match twice, so the gradient of each row is doubled. That this is the gradient of the sorted loss
  of the paper is tested in tokens_test.py."""
  where, good = x['mask'].any(axis=1), x['label'] >= 0.5
  own, fixed = 0.01 * ratio(x), 0.01 * ratio(const)
  losses = []
  for mine, others in ((good & where, ~good & where), (~good & where, good & where)):
    order = np.flatnonzero(mine)[np.argsort(fixed[mine])]
    partners = np.sort(fixed[others])
    for place, row in enumerate(order):
      z = 2 * own[row] - fixed[row] - partners[place * len(partners) // len(order)]
      p = x['label'][row]
      losses.append(p * logistic(z) + (1 - p) * logistic(-z))
  return float(np.mean(losses))


def humanline_kto(x, const):
  clipped = total(np.clip(x['logp'] - x['reference_logp'], -1.0, 1.5), x['mask'])
  where = x['mask'].any(axis=1)
  point = max(0.1 * const['mismatched_log_ratio'][where].mean(), 0)
  z, p = 0.1 * clipped - point, x['label']
  loss = 1.1 * p * (1 - sigmoid(z)) + (1 - p) * (1 - sigmoid(-z))
  return float(loss[where].mean())


def cream(x, const):
  """Of each group the best and the worst row by the policy's own rewards, and the mean agreement."""
  rewards = [
    total(x[n] - x['reference_logp'], x['mask']) for n in ('proximal_logp', 'previous_logp')
  ]
  groups = [np.flatnonzero(x['mask'].any(axis=1) & (x['group_ids'] == g)) for g in (0, 1)]
  taus = [stats.kendalltau(*(r[rows] for r in rewards))[0] for rows in groups]
  p = np.mean([(tau + 1) / 2 for tau in taus])
  losses = []
  for rows in groups:
    best, worst = rows[np.argmax(rewards[0][rows])], rows[np.argmin(rewards[0][rows])]
    z = 0.1 * (ratio(x)[best] - ratio(x)[worst])
    losses.append(p * logistic(z) + (1 - p) * logistic(-z))
  return float(np.mean(losses))


def bootstrapped(x, const, fraction=0.5, ensemble=0.3):
  """SeRA with its own pairs: of all groups, the pairs with the largest margins; the loss of a prompt is
  the sum over its kept pairs."""
  there, pairs = x['mask'].any(axis=1), []
  before = total(x['previous_logp'] - x['reference_logp'], x['mask'])
  now = total(x['proximal_logp'] - x['reference_logp'], x['mask'])
  for prompt in np.unique(x['group_ids']):
    rows = np.flatnonzero((x['group_ids'] == prompt) & there)
    own = [row for row in rows if x['stream'][row] == 0]
    pairs.append((prompt, rows[np.argmax(before[rows])], rows[np.argmin(before[rows])]))
    pairs.append((prompt, *sorted(own, key=lambda row: -x['label'][row])))
  gap = lambda pair, r: r[pair[1]] - r[pair[2]]
  order = sorted(pairs, key=lambda p: -ensemble * gap(p, now) - (1 - ensemble) * gap(p, before))
  kept = order[: int(np.ceil(fraction * len(pairs)))]
  losses = [logistic(0.2 * gap(pair, ratio(x))) for pair in kept]
  return sum(losses) / len({prompt for prompt, *_ in kept})


ORACLES = {
  'aot_paired': aot_paired,
  'aot_unpaired': aot_unpaired,
  'beta_dpo': adaptive(),
  'cream': cream,
  'humanline_dpo': humanline(-1.0, 1.5),
  'humanline_kto': humanline_kto,
  'ld_dpo': lambda x, const: damped(x, 0.5),
  'opa_dpo': opa,
  'sampo': sampo,
  'sem_dpo': semantic(1.0),
  'sera': first_part,
  'tdpo': tdpo1,
  'wpo': aligned(collision, 1.0),
}
VARIANTS = [
  (
    'sera',
    dict(bootstrap=True, beta=0.2, fraction=0.5, ensemble=0.3, samples_per_prompt=2),
    bootstrapped,
  ),
  ('opa_dpo', dict(per_token=True, anchor_coefficient=0.5), opa_per_token),
  ('beta_dpo', dict(dropped=0.5, rate=-0.4, correct_bias=True), adaptive(0.5, -0.4, True)),
  ('humanline_dpo', dict(low=-0.3, high=0.2), humanline(-0.3, 0.2)),
  ('ld_dpo', dict(damping=0.1), lambda x, const: damped(x, 0.1)),
  ('sampo', dict(shared=False), sampo_apart),
  ('sem_dpo', dict(alpha=4.0), semantic(4.0)),
  ('tdpo', dict(second=True, alpha=0.7), tdpo2),
  ('wpo', dict(greedy=True), aligned(greedy, 1.0)),
  ('wpo', dict(cap=np.inf), aligned(collision, np.inf)),
]
