import dataclasses
from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.methods.supervised.steer import steer
from polgrad.registry import AtLeastOne, part
from polgrad.rewards import combinations
from polgrad.sampling import behavior_policies


def steer_quark(
  *,
  steps: int,
  terms: tuple = (),
  quantiles: AtLeastOne = 5,
  interval: AtLeastOne = 1,
  pool: AtLeastOne = 64,
  label: str = '',
  label_length: AtLeastOne = 32,
  style_field: str = '',
  strength: float = 0.4,
  top_p: float = 0.9,
  weaker_every: AtLeastOne = 2000,
) -> Method:
  """STEER, both stages (arXiv:2311.07167): after `steer`, Quark with a label for each score.

      loss = token mean of -log pi(y | labels, x)
      y ~ policy (expert / antiexpert)^alpha,   alpha = strength (1 + floor(step / weaker_every))^(-1/4)

  In the first half of the steps, the phase `imitate`, `steer` makes the initial policy. Then samples
  join a pool. Each of the named terms of the reward, which are style, similarity and fluency in the
  paper, cuts the pool into quantiles, and a row is learned behind the numbers of its quantiles. The
  policy is sampled behind the best label of all terms. Without names there is one label, that of the
  reward, the product of all terms. The experts still help, less and less; name their folders in
  `frozen` of both phases, `imitate` and `train`, as in `steer`. Without folders they are equal, and
  change nothing.

  Differences: Labels are texts, which the run's tokenizer writes, not new tokens; the experts read them
  too. The pool forgets its oldest batches. The code samples every 2500 steps. KL and entropy have the
  coefficient 0, as there.

  Args:
    steps: batches of the run; the run fills it in.
    terms: names of terms of the reward that have their own quantiles.
    quantiles: numbers of each term.
    interval: batches from one sampling to the next.
    pool: sampled batches of the pool.
    label: text of a label, with {NAME} of every term, or {k} without terms; '' is '[NAME {NAME}]' of
      each.
    label_length: tokens of a label, at most; prompts get as many more columns.
    style_field: field of the records with the style that is asked for; quantiles are then those of each
      style, as in the code. '' is one style.
    strength: alpha of both stages, at the start of the second; 0 there samples the policy alone.
    top_p: probability of the tokens that the reference, and later the policy, allows.
    weaker_every: batches after which alpha falls.

  Confidence: CODE (quantiles, coefficients, strength), PAPER (stages).
  """
  half = max(steps // 2, 1)
  names = terms or ('quality',)
  written = ''.join(f'[{name} {{{name if terms else "k"}}}]' for name in names) + '\n'
  sizes = dict(quantiles=quantiles, interval=interval, pool=pool, label_length=label_length)
  contrast = part(
    behavior_policies.fading_contrast, strength=strength, top_p=top_p, every=weaker_every
  )
  helped = {'behavior_policy': contrast} if strength else {}
  return Method(
    collect=partial(
      collect.Quantiles,
      samples_per_prompt=1,
      terms=tuple(terms),
      label=label or written,
      strata_field=style_field,
      **sizes,
      **helped,
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    combine=part(combinations.product),
    anchors={name: part(optim.fixed) for name in ('expert', 'antiexpert')} if strength else {},
    learns='imitate',
    before={'imitate': dataclasses.replace(steer(strength=strength, top_p=top_p), steps=half)},
    steps=steps - half,
  )
