from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation, divergences, logit_stats
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, NotNegative, part, weighted


def quark(
  *,
  quantiles: AtLeastOne = 5,
  interval: AtLeastOne = 1,
  pool: AtLeastOne = 64,
  label: str = '[quality {k}]\n',
  label_length: AtLeastOne = 8,
  kl: NotNegative = 0.05,
  entropy: NotNegative = 0.06,
) -> Method:
  """Quark (arXiv:2205.13636): likelihood of own samples, behind a label of how good they were.

      loss = token mean of -log pi(y | label, x) + kl KL(pi(. | label, x) || ref(. | x)) - entropy H(pi)

  The labels are the quantiles of the reward in a pool of samples, which is sorted anew with every step.
  The policy is then sampled behind the best label. KL and entropy are those of the next token over the
  whole vocabulary; the reference, the anchor `teacher`, does not read the label.

  Differences: Labels are texts, which the run's tokenizer writes, not K new tokens, so no logits are
  left out of the KL. The pool forgets its oldest batches. Both coefficients are constants. Evaluations
  ask behind the best label too, also those of a warm start, which knows no labels.

  Args:
    quantiles: number of labels; with 1 this is supervised learning on own samples.
    interval: batches from one sampling to the next.
    pool: sampled batches of the pool.
    label: text of a label, with {k}, which is 0 for the best.
    label_length: tokens of a label, at most; prompts get as many more columns.
    kl: coefficient of the KL.
    entropy: coefficient of the entropy.

  Confidence: CODE.
  """
  mean = part(aggregation.token_mean)
  sizes = dict(quantiles=quantiles, interval=interval, pool=pool, label=label)
  return Method(
    collect=partial(collect.Quantiles, samples_per_prompt=1, label_length=label_length, **sizes),
    objective=part(
      objectives.WeightedSum,
      streams={
        'pool': weighted(1.0, part(objectives.Supervised, aggregation=mean)),
        'reference': weighted(
          kl,
          part(objectives.Distillation, divergence=part(divergences.reverse_kl), aggregation=mean),
        ),
        'entropy': weighted(
          -entropy,
          part(objectives.Supervised, loss=part(logit_stats.entropy), aggregation=mean),
        ),
      },
    ),
    anchors={'teacher': part(optim.fixed)},
    learns='imitate',
  )
