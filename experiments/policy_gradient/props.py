"""PROPS (arXiv:2311.08290): who samples moves away from what was sampled already.

Half of each group is drawn by the policy, the other half by a copy of it that was trained to avoid
the first, loss = token mean of max(r, clip(r, 0.7, 1.3)), r = copy / policy, until their KL is
above 0.01. All rows together come closer to the policy's distribution than independent ones, so
they are used as if they were on-policy: PPO's clipped loss around the policy. Ours: 4 epochs of 4
minibatches for 16, two rounds a rollout, group-normalised rewards for a critic.

Confidence: CODE.
Card: 142.

    python -m polgrad.train --config=experiments/policy_gradient/props.py --workdir=runs/props
"""

from experiments.common import addition_phase, arithmetic_experiment, options, warm_start
from polgrad import collect, credit, objectives, optim
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = options(text, steps=150, group=8, smoke=False)
  explored = part(
    collect.explored, prompts=32, samples_per_prompt=o.group, rounds=2, prompt_length=6,
    max_new_tokens=5, optimizer=part(optim.adamw, learning_rate=1e-3), epochs=4, minibatches=4, eps=0.3,
    kl_limit=0.01,
  )  # fmt: skip
  phase = addition_phase(
    collect=explored,
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.2),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
    steps=o.steps,
  )
  return arithmetic_experiment({'sft': warm_start(), 'rl': phase}, smoke=o.smoke)
