from functools import partial

from polgrad import collect, objectives
from polgrad.losses import preference_losses, score_penalties
from polgrad.methods.base import Method
from polgrad.objectives import heads
from polgrad.registry import part, weighted


def rlp_uml(
  *, view_weight: float = 0.5, block: int = 4, code: int = 128, hidden: int = 512
) -> Method:
  """Reward learning on policy with a multi-view loss (arXiv:2403.19279): Bradley-Terry, and states of
  the policy's own samples that tell of each other.

      loss = mean over pairs of softplus(-(s_w - s_l)) + view_weight L
      L = (KL(q_1 || q_2) + KL(q_2 || q_1)) / 2 + softplus(-T(z_1, z_2)) + mean of softplus(T(z_1, z'_2))

  A reward model is trained on completions of an old policy, and then judges those of a new one. Here
  every record has two `samples` of the new policy beside its pair. q_1 and q_2 are Gaussians that an
  encoder makes of the states after them, z_1 and z_2 are drawn from these, and the critic T tells which
  codes are of one prompt; z' are the codes of other prompts. Encoder and critic are trained with the
  model, and are not needed to use it.

  Args:
    view_weight: lambda, the coefficient of L.
    block: records of a block, which is never split: the z' of a record are those of the others in its
      block. It divides the records of a batch.
    code: size of z.
    hidden: size of the hidden layers of encoder and critic.

  Differences: the paper takes ten samples of other prompts than those of the pairs; here they are of the
  prompts of the pairs, and the first two are read. Sizes and the critic are ours, because the paper
  gives none and there is no code.

  Confidence: PAPER.
  """
  return Method(
    collect=partial(collect.SampledPreferences),
    objective=part(
      objectives.RewardModel,
      link=part(preference_losses.logistic),
      penalties={'views': weighted(view_weight, part(score_penalties.views))},
      head=part(heads.SharedViews, block=block, code=code, hidden=hidden),
    ),
    warm_start=False,
  )
