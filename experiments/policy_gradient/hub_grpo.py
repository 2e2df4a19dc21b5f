"""GRPO on a real model (arXiv:2402.03300, 2503.14476), which learns a task of reasoning-gym.

The model chats its way around sums and differences of two numbers of one or two digits. The verifier is
reasoning-gym (arXiv:2505.24760) on the last number of the reply; there are no demonstrations. The
objective is that of DAPO: clip-higher, token mean, group-normalised advantages, no KL.
Confidence: CODE (formula as in verl's recipe).
Card: S9.

    python -m polgrad.train --config=experiments/policy_gradient/hub_grpo.py:path=FOLDER \\
      --workdir=runs/hub_grpo

Measured with SmolLM2-135M-Instruct on 2 shared CPU cores, float32, one seed, median 25 s a step: greedy
accuracy on 64 held-out problems (standard error 0.06) after 0, 10, 20, 30 steps: 0.08, 0.41, 0.48,
0.52. Mean sampled reward of five steps at a time: 0.29, 0.45, 0.34, 0.66, 0.52, 0.52 (dynamic sampling
replaces groups without signal, so it reads high at first). It learns to answer at once and to the
point, and then to add; one-digit problems are few, so they also occur in training.
"""

from experiments.hub import hub_experiment, hub_options, solved, sums
from polgrad import collect, credit, objectives, optim
from polgrad.build import phase
from polgrad.losses import advantages, aggregation, surrogates
from polgrad.registry import part


def get_config(text: str = ''):
  o = hub_options(text, steps=30)
  rl = part(
    phase,
    steps=2 if o.smoke else o.steps,
    source=sums(size=2000, seed=0),
    collect=part(
      collect.rollouts,
      prompts=2 if o.smoke else 4,
      samples_per_prompt=2 if o.smoke else 8,
      prompt_length=o.prompt_length,
      max_new_tokens=4 if o.smoke else 10,
      temperature=0.7,
      max_resamples=1,
    ),
    reward=solved(),
    credit=part(credit.outcome, advantage=part(advantages.group_normalized)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=0.2, eps_high=0.28),
      aggregation=part(aggregation.token_mean),
    ),
    optimizer=part(optim.adamw, learning_rate=1e-4 if o.lora else 1e-5),
  )
  return hub_experiment(o, {'rl': rl})
