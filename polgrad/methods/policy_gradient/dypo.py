from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import (
  advantages,
  aggregation,
  implicit_rewards,
  listwise,
  penalties,
  row_choices,
  surrogates,
)
from polgrad.methods.base import Method
from polgrad.registry import Fraction, part, weighted


def dypo(
  *,
  samples_per_prompt: int,
  alpha: Fraction = 0.5,
  beta: float = 1.0,
  imitation: float = 1.0,
  traces: str = '',
  limit: int = 0,
  threshold: float = 1.0,
  eps: float = 0.2,
  kl_coefficient: float = 0.001,
) -> Method:
  """DYPO (arXiv:2604.08926): imitation, or reinforcement with pairs, by the success of a prompt.

      all samples right:  the prompt is left out
      none is right:      imitation (token mean of -log pi over a demonstration)
      otherwise:          alpha (mean over rows of the token mean of
                          -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coefficient k3)
                          + (1 - alpha) (mean over pairs of a right row s and a wrong row f
                          of -log sigmoid(beta (d_s - d_f)))

  d = log pi - log reference of a row, summed over its tokens; r = pi / pi_old, and A is the reward
  minus the group mean, divided by the standard deviation of the group. Pairs are of one prompt. The
  demonstration is one of several teachers' if `traces` names a field with a list of them: an average
  over independent teachers has less of their individual bias, and as much of the bias that they share.

  At pi = reference the pairs have the gradient of (beta / 2) / (P (1 - P)) times REINFORCE with the
  group mean as baseline, P the fraction of right rows. So they lower no variance at the beginning;
  their weight falls as pairs become separated.

  Differences: All pairs of a prompt are used, and the reference is the policy when the phase begins; the
  paper leaves both open. Its coefficient of the KL is not known.

  Args:
    samples_per_prompt: samples of each prompt; the run fills it in.
    alpha: weight of reinforcement; the pairs have the rest.
    beta: multiplies log-ratios in pairs.
    imitation: weight of imitation.
    traces: field of the records with several demonstrations; '' takes the answer.
    limit: largest number of right samples of a prompt that is imitated.
    threshold: smallest reward of a right sample.
    eps: distance of the clipping bounds from 1.
    kl_coefficient: of k3, nats.

  Confidence: PAPER (formulas), MEMORY (kl_coefficient).
  """
  imitate = part(objectives.Supervised, aggregation=part(aggregation.token_mean))
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
    aggregation=part(aggregation.sequence_mean),
    penalties={'kl': weighted(kl_coefficient, part(penalties.k3))},
  )
  compare = part(
    objectives.Listwise,
    score=part(implicit_rewards.log_ratio_sum),
    loss=part(listwise.right_and_wrong, threshold=threshold),
    beta=beta,
    rows_per_prompt=samples_per_prompt + 1,  # with the demonstration
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_normalized, ddof=1, eps=1e-6))
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1, traces=traces),
    credit=part(credit.gated, credit=outcome, limit=limit, threshold=threshold, drop_solved=True),
    objective=part(
      objectives.WeightedSum,
      streams={
        'demonstration': weighted(imitation, imitate),
        'sampled': weighted(alpha, reinforce),
        'pairs': weighted(1 - alpha, compare),
      },
      rows={'pairs': part(row_choices.of_stream, kind='sampled')},
    ),
    anchors={'reference': part(optim.fixed)},
  )
