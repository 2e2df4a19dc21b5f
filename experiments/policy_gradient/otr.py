"""OTR (arXiv:2509.26313): supervised learning as REINFORCE on one token drawn at each position.

loss = token mean of -sum_a q_a R_a log pi_a, q = softmax(logits / 1.3) as data, R = 1 for the
token of the data and -0.1 for every other. The paper draws 256 tokens from q; this is the
expectation over them. A token is learned in proportion to its probability, so what is far from the
policy is hardly imitated. The warm start stands for the pretrained model that the paper goes on
from.

Confidence: PAPER (reward), MEMORY (constants), DERIVED (expectation).
Card: 79.

    python -m polgrad.train --config=experiments/policy_gradient/otr.py --workdir=runs/otr
"""

from experiments.common import addition, arithmetic_experiment, options, warm_start
from polgrad import collect, objectives, optim
from polgrad.build import phase
from polgrad.losses import aggregation, logit_stats
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, smoke=False)
  otr = part(
    phase,
    steps=o.steps,
    source=addition(),
    collect=part(collect.demonstrations, rows=64, length=12),
    objective=part(
      objectives.Supervised,
      aggregation=part(aggregation.token_mean),
      loss=part(logit_stats.one_token_rollout, beta=-0.1, temperature=1.3),
    ),
    optimizer=part(optim.adamw, learning_rate=1e-4),
  )
  return arithmetic_experiment({'sft': warm_start(), 'otr': otr}, smoke=o.smoke)
