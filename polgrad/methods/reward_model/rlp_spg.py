from functools import partial

from polgrad import collect, objectives
from polgrad.data import sources
from polgrad.losses import preference_losses
from polgrad.methods.base import Method
from polgrad.registry import part


def rlp_spg(*, confidence: float = 0.5, answer: str = '(?s)(.*)', draw_seed: int = 0) -> Method:
  """Reward learning on policy with synthetic preferences (arXiv:2403.19279): Bradley-Terry on given
  pairs, and on pairs that samples of the policy make themselves.

      loss = mean over pairs of softplus(-(s_w - s_l))

  A reward model is trained on completions of an old policy, and then judges those of a new one. Records
  with `chosen` and `rejected` are given pairs; a file needs some. Others have `completions`, samples of
  the new policy, and their `rewards` by the reward model so far. If at least `confidence` of the samples
  of a prompt say the same, the one of them with the highest reward is preferred to a random one that
  says something else; other prompts are left out.

  Args:
    confidence: gamma, the fraction of the samples that must say the same.
    answer: regular expression: samples say the same if the first groups of its last matches are equal,
      such as `#### (.*)`. By default whole texts are compared. A record may say it itself, with a list
      `clusters`, one number or text for each sample.
    draw_seed: of the draw of the other sample.

  Differences: the paper calls samples the same if each entails the other, as a language model says;
  `clusters` has room for its answers. To refine a reward model, begin with its folder as the model's
  path. Training the policy again is another run.

  Confidence: PAPER.
  """
  return Method(
    source=partial(sources.confident_pairs, confidence=confidence, answer=answer, seed=draw_seed),
    collect=partial(collect.Preferences),
    objective=part(objectives.RewardModel, link=part(preference_losses.logistic)),
    warm_start=False,
  )
