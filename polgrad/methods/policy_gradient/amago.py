from typing import Literal

from polgrad import credit, learner, objectives, optim
from polgrad.losses import aggregation, discounted_values, surrogates
from polgrad.methods.base import Method
from polgrad.objectives import networks
from polgrad.registry import part


def amago(
  *,
  discounts: tuple = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999),
  critics: int = 4,
  improve: float = 1.0,
  imitate: float = 0.1,
  choose: Literal['positive', 'exponential'] = 'positive',
  normalize: float = 5e-4,
  follow: float = 0.003,
  critic_rate: float = 3e-4,
) -> Method:
  """AMAGO (arXiv:2310.09971): critics at several discounts, which improve the policy and filter data.

      loss = token mean of -w log pi
      w    = mean over discounts of improve (min over critics of Q - V) + imitate f(A)
      A    = mean over critics of Q - V
      Q_t  = r_t + discount V_{t+1}

  V is the mean over critics, of the state before the token. The network `critics` learns them from their
  own values one token later, see `networks.Critics`: the target is the smaller one of two random target
  critics, which follow slowly. All numbers of w are in units of the deviation of the targets at that
  discount, a moving average (PopArt, arXiv:1602.07714), and critics keep their values when it moves. f
  is 1 where A > 0 and else 0, or with `choose='exponential'` exp(A), at most 20. With improve=0 only
  tokens that f chooses are learned (CRR, arXiv:2006.15134); with imitate=0 this is an actor-critic.

  Differences: The paper's critics read an action beside the state; here a token leads to one state, so
  critics of states give Q, and V is learned and not a mean over actions. Its actor follows the gradient
  of Q at its own action, of which `improve` is the estimate by sampled tokens: on rows of the policy it
  has the same mean. The paper has an actor for each discount and replays old rows. Its critics change
  the model that they read, with the coefficient 10; here they do not, and have an optimizer for
  themselves. The first batch sets the statistics, which begin at 0 and 100 in the code. Left out are
  hindsight relabelling of goals and the changes of the transformer's layers. The paper multiplies
  rewards by 10, which changes nothing in normalised units.

  Args:
    discounts: per token.
    critics: number of critics.
    improve: coefficient of the improvement by Q; with 0 targets are means of two target critics.
    imitate: coefficient of the likelihood of chosen tokens.
    choose: f, 'positive' or 'exponential'.
    normalize: rate of the statistics of targets; 0 does not normalise.
    follow: rate at which target critics follow.
    critic_rate: learning rate of the critics.

  Confidence: CODE (formulas, constants), DERIVED (critics of states).
  """
  try:
    discounts = tuple(map(float, discounts))  # of the command line they are texts
  except ValueError as error:
    raise ValueError(f'amago: discounts={discounts}: expected numbers') from error
  network = part(
    networks.Critics,
    discounts=discounts,
    critics=critics,
    improve=improve,
    imitate=imitate,
    choose=part(getattr(discounted_values, choose)),
    normalize=normalize,
    follow=follow,
  )
  return Method(
    credit=part(credit.weighed_by_network, network='critics'),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.reinforce),
      aggregation=part(aggregation.token_mean),
    ),
    networks={
      'critics': part(
        learner.OnlineNetwork,
        network=network,
        optimizer=part(optim.adamw, learning_rate=critic_rate),
      )
    },
  )
