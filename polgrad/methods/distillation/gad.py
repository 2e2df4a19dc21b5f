from functools import partial

from ml_collections import ConfigDict

from polgrad import collect, credit, learner, objectives, optim
from polgrad.losses import (
  advantages,
  aggregation,
  implicit_rewards,
  listwise,
  penalties,
  surrogates,
)
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, NotNegative, part, weighted


def gad(
  *,
  learning_rate: float,
  samples_per_prompt: int,
  warm_up: AtLeastOne = 20,
  eps: float = 0.2,
  kl_coefficient: float = 0.001,
  discriminator_rate: NotNegative = 1.0,
) -> Method:
  """GAD (arXiv:2511.10643): a discriminator of the teacher's text and the student's gives the rewards.

      discriminator: loss = mean over prompts and samples y of -log sigmoid(D(y_T) - D(y))
      student: loss of `grpo` with R(y) = D(y);   before it, the likelihood of y_T

  y_T is the record's `answer`, the teacher's text; nothing else of the teacher is read, so it may have
  another tokenizer or be behind a service. D is the scalar head of the anchor `discriminator`, which
  begins as a copy of the policy and learns on every batch, after its scores were read. At its optimum
  D = log T / S + c, so the student's step is that of the reverse KL.

  Differences: The first `warm_up` updates, one pass over the data in the release, imitate y_T, while the
  discriminator learns. The release's normalisation of D is not known; here it is that of a group. The
  gradient of the student is clipped as in every run, that of the discriminator at 0.2.

  Args:
    learning_rate: of the policy; the run fills it in. The release has 1e-6 for both models.
    samples_per_prompt: of the run, 8 in the release.
    warm_up: updates that imitate.
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of the KL to the reference, k3.
    discriminator_rate: learning rate of the discriminator over that of the policy.

  Confidence: PAPER (formula), CODE (constants).
  """
  rate = float(f'{discriminator_rate * learning_rate:.6g}')
  turn = dict(every=warm_up, stages=1, last=1.0)
  mean = part(aggregation.sequence_mean)
  policy = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
    aggregation=mean,
    penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
  )
  group = part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6))
  return Method(
    collect=partial(
      collect.Rollouts, samples_per_prompt=samples_per_prompt, demonstrations=1, temperature=0.8
    ),
    credit=part(credit.scored_by, credit=part(credit.of_samples, credit=group)),
    objective=part(
      objectives.WeightedSum,
      streams={
        'sampled': weighted(1.0, policy),
        'demonstration': weighted(1.0, part(objectives.Supervised, aggregation=mean)),
      },
      schedules={
        'sampled': part(optim.progressive, **turn),
        'demonstration': part(optim.progressive_rest, **turn),
      },
    ),
    anchors={'reference': part(optim.fixed), 'discriminator': part(optim.fixed)},
    learned={'discriminator': discriminator(rate, samples_per_prompt + 1)},
  )


def discriminator(rate: float, rows: int) -> ConfigDict:
  """How the discriminator learns: its learning rate, and the rows of a group."""
  return part(
    learner.Learned,
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.last_value),
      loss=part(listwise.given_above),
      rows_per_prompt=rows,
    ),
    optimizer=part(optim.adamw, learning_rate=rate, max_grad_norm=0.2),
  )
