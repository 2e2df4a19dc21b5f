from functools import partial

from polgrad import collect, credit, learner, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part, weighted


def relift(
  *,
  max_new_tokens: int,
  learning_rate: float,
  imitated: int = 128,
  failed: float = 0.0,
  imitation_rate: float = 1.0,
  entropy_coefficient: float = 0.001,
) -> Method:
  """ReLIFT (arXiv:2506.07527): answers of prompts that no sample solves are imitated between steps.

      each step:       loss = -(sum over tokens of r A + entropy_coefficient H) / (rows max_new_tokens)
      between steps:   loss = -token mean of log pi - entropy_coefficient (token mean of H)

  r = pi / pi_old, A is the reward minus the group mean, and H the entropy of the next token in nats.
  There is no clipping of ratios. The answer of a prompt whose samples all have the reward `failed`
  waits. When `imitated` answers wait, the newest ones make one update of the second loss after the
  update of a step, at most one a step. It has an optimizer whose moments are kept apart.

  Differences: As in `luffy`, the constants of the first loss are those of a mean over rows and tokens.
  The authors average the second loss over micro-batches of 2 to 4 rows. Here there is room for
  `imitated` - 1 answers and those of the prompts of one step; if more wait, the oldest are dropped. All
  records need an answer.

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    learning_rate: of AdamW; the run fills it in.
    imitated: answers of an update of the second loss.
    failed: reward of every sample of a prompt that is imitated.
    imitation_rate: learning rate of the second loss over that of the first.
    entropy_coefficient: of the entropy, in nats, in both losses.

  Confidence: CODE.
  """
  rate = lambda factor: float(f'{factor * learning_rate:.6g}')
  mean = part(aggregation.token_mean)
  bonus = part(penalties.negative_entropy)
  imitate = part(
    objectives.WeightedSum,
    streams={
      'likelihood': weighted(1.0, part(objectives.Supervised, aggregation=mean)),
      'bonus': weighted(
        entropy_coefficient, part(objectives.Supervised, aggregation=mean, loss=bonus)
      ),
    },
  )
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.importance_weighted),
    aggregation=part(aggregation.constant_length, length=max_new_tokens),
    penalties={'bonus': weighted(entropy_coefficient, bonus)},
  )
  return Method(
    collect=partial(collect.Unsolved, imitated=imitated, failed=failed),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=reinforce,
    optimizer=part(optim.adamw, learning_rate=rate(1.0), max_grad_norm=0.7),
    further={
      'imitation': part(
        learner.Learned,
        objective=imitate,
        optimizer=part(optim.adamw, learning_rate=rate(imitation_rate)),
      )
    },
  )
