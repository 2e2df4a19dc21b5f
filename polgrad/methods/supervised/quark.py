from functools import partial

from polgrad import collect, metric_history, objectives, optim
from polgrad.losses import aggregation, divergences, penalties
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, NotNegative, Positive, part, weighted


def quark(
  *,
  max_new_tokens: int,
  quantiles: AtLeastOne = 5,
  interval: AtLeastOne = 1,
  pool: AtLeastOne = 64,
  label: str = '[quality {k}]\n',
  label_length: AtLeastOne = 8,
  kl: NotNegative = 0.05,
  entropy: NotNegative = 0.06,
  kl_rate: NotNegative = 0.0,
  kl_target: Positive = 3.0,
  entropy_rate: NotNegative = 0.0,
  entropy_target: Positive = 40.0,
) -> Method:
  """Quark (arXiv:2205.13636): likelihood of own samples, behind a label of how good they were.

      loss = token mean of -log pi(y | label, x) + kl KL(pi(. | label, x) || ref(. | x)) - entropy H(pi)

  The labels are the quantiles of the reward in a pool of samples, which is sorted anew with every step.
  The policy is then sampled behind the best label. KL and entropy are those of the next token over the
  whole vocabulary; the reference, the anchor `teacher`, does not read the label.

  Both coefficients are constants by default. With `kl_rate` and `entropy_rate` they adapt after every
  update: that of the KL is multiplied by 1 + kl_rate clip(KL / kl_target - 1, -0.2, 0.2), so it rises
  where the KL is too large, and that of the entropy by 1 - entropy_rate clip(H / entropy_target - 1,
  -0.2, 0.2), so it rises where the entropy is too small.

  Differences: Labels are texts, which the run's tokenizer writes, not K new tokens, so no logits are
  left out of the KL. The pool forgets its oldest batches. The authors sample all prompts every 500
  steps, and go through the pool in shuffled epochs. Where coefficients adapt, KL and H of a completion
  are `max_new_tokens` times the token means; the authors sum over the tokens of each completion, with
  -log pi of its tokens in the place of H. Evaluations ask behind the best label too, apart from those of
  a warm start.

  Args:
    max_new_tokens: largest number of tokens of a completion; the run fills it in.
    quantiles: number of labels; with 1 this is supervised learning on own samples.
    interval: batches from one sampling to the next.
    pool: sampled batches of the pool.
    label: text of a label, with {k}, which is 0 for the best.
    label_length: tokens of a label, at most; prompts get as many more columns.
    kl: coefficient of the KL, at the beginning if it adapts.
    entropy: coefficient of the entropy, at the beginning if it adapts.
    kl_rate: relative change of `kl` per unit of relative error; 0: it is constant. The authors have
      rows of the batch / 2500, which is 0.0512 for their 128 rows.
    kl_target: wanted KL of a completion, nats.
    entropy_rate: the same of `entropy`.
    entropy_target: wanted entropy of a completion, nats.

  Confidence: CODE.
  """
  sizes = dict(quantiles=quantiles, interval=interval, pool=pool, label=label)
  # Histories are factors that begin with 1, so a coefficient of 0 stays 0.
  control = lambda metric, target, rate: part(
    metric_history.adaptive_kl,
    metric=metric,
    target=target / max_new_tokens,
    initial=1.0,
    rate=rate,
  )
  return Method(
    collect=partial(collect.Quantiles, samples_per_prompt=1, label_length=label_length, **sizes),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      penalties={
        'kl': weighted(kl, part(divergences.reverse_kl)),
        'bonus': weighted(entropy, part(penalties.negative_entropy)),
      },
      schedules={
        'kl': part(metric_history.kl_coefficient),
        'bonus': part(metric_history.entropy_coefficient),
      },
      history={
        'kl_coefficient': control('kl', kl_target, kl_rate),
        'entropy_coefficient': control('entropy', entropy_target, -entropy_rate),
      },
    ),
    anchors={'teacher': part(optim.fixed)},
    learns='imitate',
  )
