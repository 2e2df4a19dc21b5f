from functools import partial

from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, penalties, surrogates
from polgrad.methods.base import Method, choice
from polgrad.registry import part, weighted


@choice('soft', {False: ('limit',), True: ()})
def hpt(
  *,
  max_new_tokens: int,
  learning_rate: float,
  soft: bool = False,
  limit: int = 0,
  threshold: float = 1.0,
  imitation: float = 1.0,
  reinforcement: float = 8.0,
  entropy_coefficient: float = 0.001,
  skip_grad_norm: float = 80.0,
) -> Method:
  """HPT (arXiv:2509.04419): prompts that no sample solves imitate, all others reinforce.

      imitation:     loss = -imitation token mean of log pi over the demonstration
      reinforcement: loss = -reinforcement (sum over tokens of r A + entropy_coefficient H)
                            / (rows max_new_tokens)

  A prompt with at most `limit` solved samples keeps only its demonstration, and any other prompt
  only its samples. The loss is the sum of both parts. r = pi / pi_old, A is the reward minus
  the group mean, and H the entropy of the next token. There is no clipping of ratios. A gradient
  longer than 1 is scaled to the norm 1, and an update whose gradient is longer than
  `skip_grad_norm` is skipped.

  With `soft`, a table of the authors' code is the gate, and `limit` is not read. The more samples are
  solved, the less the demonstration weighs, and the more the samples: 1 and 0 up to one solved sample
  of eight, 1/2 and 1/8 with two, 1/4 and 1/4 with three, 1/8 and 1/2 with four, 0 and 1 from five on.

  Differences: Imitation is averaged over the tokens of the demonstrations in use. Their number
  shrinks as the policy learns. The authors divide the token sum of reinforcement by 8192, the
  longest answer, and not by the rows, and add up the losses of micro-batches of at most 32768
  tokens. Beside imitation, which is a mean in each of them, reinforcement therefore weighs as many
  means over rows as a micro-batch has rows: 8, if answers have half of the largest length. The
  number of rows of a minibatch gives the plain sum. Their entropy is a mean over tokens, those of
  demonstrations included. They make two updates a batch (minibatches=2).

  Args:
    max_new_tokens: largest number of tokens of an answer; the run fills it in.
    learning_rate: of AdamW; the run fills it in.
    soft: whether weights change with the number of solved samples.
    limit: largest number of solved samples of a prompt that is imitated.
    threshold: smallest reward of a solved sample.
    imitation: weight of imitation; the authors have 0.3 for their smallest model (1.5B).
    reinforcement: weight of reinforcement, as a number of rows.
    entropy_coefficient: of the entropy, in nats.
    skip_grad_norm: norm of the gradient above which an update is skipped.

  Confidence: CODE (gate, losses, constants), DERIVED (weight of reinforcement).
  """
  # Of the softer gate, the advantage of a demonstration is its weight.
  mean = part(aggregation.token_mean)
  weighed = part(objectives.PolicyGradient, surrogate=part(surrogates.reinforce), aggregation=mean)
  imitate = weighed if soft else part(objectives.Supervised, aggregation=mean)
  reinforce = part(
    objectives.PolicyGradient,
    surrogate=part(surrogates.importance_weighted),
    aggregation=part(aggregation.constant_length, length=max_new_tokens),
    penalties={'bonus': weighted(entropy_coefficient, part(penalties.negative_entropy))},
  )
  outcome = part(credit.outcome, advantage=part(advantages.group_mean))
  streams = {
    'demonstration': weighted(imitation, imitate),
    'sampled': weighted(reinforcement, reinforce),
  }
  hard = part(credit.gated, credit=outcome, limit=limit, threshold=threshold)
  graded = part(credit.graded, credit=outcome, threshold=threshold)
  return Method(
    collect=partial(collect.Rollouts, demonstrations=1),
    credit=graded if soft else hard,
    objective=part(objectives.WeightedSum, streams=streams),
    optimizer=part(
      optim.adamw, learning_rate=learning_rate, max_grad_norm=1.0, skip_grad_norm=skip_grad_norm
    ),
  )
