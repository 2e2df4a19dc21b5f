"""A gold preference on SmolLM2-135M-Instruct: sentences whose words do not have the letter e.

Gold is the fraction of words without an e, of the first sentence that the model writes about a subject.
It is known exactly, so a reward model can be compared with the preference that it was trained on.

Options: run, path (folder of the model), reward (folder of a reward model; empty: gold), lora (rank of
the adapter; 0 trains all parameters), rate (of learning), rows (samples of a step), samples (of a
prompt), seed, steps, smoke.

    python -m polgrad.train --workdir=runs/x \\
      --config=experiments/smollm2_preferences.py:run=online_dpo,path=FOLDER

| run | what is learned from | labels |
|---|---|---|
| `bradley_terry` | the best and the worst sample of the model before training | gold |
| `dpo` | the same | gold, or `reward` |
| `online_dpo` | the best and the worst sample of the policy | gold, or `reward` |
| `best_of_n` | the best sample of the policy, by imitation (RAFT) | gold, or `reward` |

Measured on a CPU, one seed, with gold as the reward and LoRA of rank 8. `gold` is the mean over 48
held-out prompts of the greedy completion, cut after 16 tokens, with the standard error of the gain over
the same prompts; it is 0.641 before training.

| run | steps of samples | gold at the end | gain | samples of the first and last four steps |
|---|---|---|---|---|
| `best_of_n,rows=32` | 16 of 32 | 0.830 | 0.189 (0.019) | 0.61, 0.66 |
| `online_dpo` | 12 of 64 | 0.812 | 0.171 (0.021) | 0.60, 0.73 |
| `dpo` | 9 of 64 | 0.750 | 0.109 (0.017) | of the model before training |
| `online_dpo,rows=16,samples=2` | 12 of 16 | 0.679 | 0.038 (0.021) | 0.58, 0.64 |

In online DPO the best and the worst of 8 samples teach more than two samples do, whose gain is not
clear; both have 8 pairs a step. Its last four steps are about 12 nats from the reference (mean log-ratio
of the pairs), with two samples 3.5. Samples of the imitation gain less than its greedy completions. Both
methods learn sentences that repeat words without an e, which gold does not punish (`A cat with a long,
curly tail and a fluffy coat was a cat with`, `A lost ship was a ship that was lost to the sea`). In DPO
both completions of a pair become less likely, the worse one more so. The runs have different numbers of
steps and one seed, so the table does not rank them. A step took 20 to 90 s on 2 cores that other work
shared.

`bradley_terry,rows=128,samples=4,steps=30,rate=1e-3` is right about 0.51, 0.60 and 0.625 of the 320 new
pairs of steps 1 to 10, 11 to 20 and 21 to 30 before it trains on them (standard error 0.027; prompts
come several times, samples do not), and the Brier score falls from 0.246 to 0.227, where 0.25 is no
knowledge. In 16 steps of 8 pairs it learned nothing visible. On a file of 91 pairs of held-out prompts
it is right about 0.56 (0.05): completions of a file end with the token that ends a turn, which nearly
all samples of 16 tokens lack, so this measures another kind of row. It was not used as a reward, and
nothing was measured of over-optimisation. docs/reward_models.md shows how to measure it.
"""

import dataclasses
from functools import partial

from polgrad import collect, credit, methods, optim, presets, reward_models, tasks
from polgrad.compose import compose
from polgrad.data import sources
from polgrad.options import values
from polgrad.registry import part, weighted
from polgrad.sampling import behavior_policies

KINDS = ('old', 'new', 'small', 'big', 'lost', 'cold', 'quiet', 'bright')
SUBJECTS = (
  *('town', 'dog', 'ship', 'garden', 'king', 'road', 'song', 'farm'),
  *('storm', 'book', 'shop', 'hill', 'cat', 'moon', 'train', 'cook'),
  *('boy', 'girl', 'wolf', 'farmer', 'lake', 'clock', 'door', 'map'),
)


def without_e(completion: str) -> float:
  """Fraction of the words that have no e; 0 for less than four words."""
  words = completion.lower().split()
  return sum('e' not in word for word in words) / len(words) if len(words) >= 4 else 0.0


def prompts(*, held_out: bool = False) -> sources.Source:
  """One prompt for each kind of each subject; of every four one is held out."""
  asked = [
    f'Write one sentence about the {kind} {subject}.' for subject in SUBJECTS for kind in KINDS
  ]
  chosen = [text for i, text in enumerate(asked) if (i % 4 == 0) == held_out]
  return sources.Source(size=len(chosen), record=lambda row: {'prompt': chosen[row]})


def get_config(text: str = ''):
  o = values(
    text,
    **dict(run='online_dpo', path='', reward='', lora=8, rate=5e-4, rows=64, samples=8),
    **dict(seed=0, steps=16, smoke=False),
  )
  judge = part(reward_models.reward_model, path=o.reward) if o.reward else part(without_e)
  task = tasks.Task(
    problems=part(prompts),
    held_out=part(prompts, held_out=True),
    rewards={'gold': weighted(1.0, part(without_e))},
    prompt_length=24,
    max_new_tokens=16,
    rows=o.rows,
    evaluate_every=o.steps,
    held_out_problems=48,
    evaluation_batch=48,
  )
  model = presets.smollm2(path=o.path, lora=o.lora)
  run = dict(steps=o.steps, warm_start=0, seed=o.seed, smoke=o.smoke)
  config = compose(RUNS[o.run](o.samples), task, model, **run)
  config.phases.train.reward = {'reward': weighted(1.0, judge)}
  config.phases.train.optimizer.learning_rate = o.rate
  config.phases.train.share_prompts = o.run != 'best_of_n'  # which learns one row of a prompt
  return config


def pairs(method: methods.Method, samples: int, *, reference: bool) -> methods.Method:
  """The method on the best and the worst of samples of the policy, or of the model before training."""
  of = behavior_policies.reference if reference else behavior_policies.current
  return dataclasses.replace(
    method,
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.best_worst),
      behavior_policy=part(of),
    ),
    credit=part(credit.preference),
    anchors={'reference': part(optim.fixed)},
  )


RUNS = {
  'bradley_terry': lambda n: pairs(methods.bradley_terry(centering=0.01), n, reference=True),
  'dpo': lambda n: pairs(methods.dpo(), n, reference=True),
  'online_dpo': lambda n: pairs(methods.online_dpo(), n, reference=False),
  'best_of_n': lambda n: methods.raft(samples=n, epochs=1),
}
