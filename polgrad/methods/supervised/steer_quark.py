import dataclasses
from functools import partial

from polgrad import collect, objectives
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.methods.supervised.steer import steer
from polgrad.registry import AtLeastOne, part


def steer_quark(
  *,
  steps: int,
  terms: tuple = (),
  quantiles: AtLeastOne = 5,
  interval: AtLeastOne = 1,
  pool: AtLeastOne = 64,
  label: str = '',
  label_length: AtLeastOne = 32,
) -> Method:
  """STEER, both stages (arXiv:2311.07167): after `steer`, Quark with a label for each score.

      loss = token mean of -log pi(y | labels, x)

  In the first half of the steps, the phase `imitate`, `steer` makes the initial policy. Then samples
  join a pool. Each of the named terms of the reward, which are style, similarity and fluency in the
  paper, cuts the pool into quantiles, and a row is learned behind the numbers of its quantiles. The
  policy is sampled behind the best label of all terms. Without names there is one label, that of the
  reward.

  Differences: Labels are texts, which the run's tokenizer writes, not new tokens. The pool forgets its
  oldest batches. Quantiles are of the whole pool, not of each style. The authors add the experts to the
  sampling of this stage too, with alpha (1 + step // 2000)^(-1/4). KL and entropy have the
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

  Confidence: CODE (quantiles, coefficients), PAPER (stages).
  """
  half = max(steps // 2, 1)
  names = terms or ('quality',)
  written = ''.join(f'[{name} {{{name if terms else "k"}}}]' for name in names) + '\n'
  sizes = dict(quantiles=quantiles, interval=interval, pool=pool, label_length=label_length)
  return Method(
    collect=partial(
      collect.Quantiles, samples_per_prompt=1, terms=tuple(terms), label=label or written, **sizes
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    learns='imitate',
    before={'imitate': dataclasses.replace(steer(), steps=half)},
    steps=steps - half,
  )
