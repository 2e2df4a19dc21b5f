from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import aggregation
from polgrad.methods.base import Method
from polgrad.registry import AtLeastOne, part
from polgrad.rewards import combinations
from polgrad.sampling import behavior_policies


def steer(
  *, samples: AtLeastOne = 8, kept: AtLeastOne = 1, strength: float = 0.4, top_p: float = 0.9
) -> Method:
  """STEER (arXiv:2311.07167): supervised learning on the best samples of a product of experts.

      loss = -token mean of log pi,   y the `kept` samples of a prompt with the highest rewards
      reward = prod_i score_i^weight_i
      y ~ reference (expert / antiexpert)^strength, over the `top_p` most likely tokens of the reference

  The anchors `expert` and `antiexpert` are models of the style that is wanted and of the one that is
  not. Their Hugging Face folders are named in `frozen` of the phase,

      --config.phases.train.frozen.expert.name=pretrained --config.phases.train.frozen.expert.path=FOLDER

  and so `antiexpert`. Without folders all three are the policy at the start, and this is supervised
  learning on the best samples of the policy. The scores are the terms of the
  task's reward; those of the paper, all in [0, 1], are style, similarity of meaning, and fluency. A
  sample with one bad score has a low product, which a sum could hide.

  This is the first stage, which makes data and the initial policy; `steer_quark` has both.

  Differences: Samples are learned in the step that draws them, while the paper collects all before it
  trains. The code keeps the best of all pairs; here each prompt keeps its best ones.

  Args:
    samples: samples of a prompt.
    kept: samples of a prompt that are learned, the best ones.
    strength: alpha, of the experts; it varies in the paper's generation of data.
    top_p: probability of the tokens that the reference allows.

  Confidence: CODE (decoding, strength; that the score is the product), PAPER (choice of the best).
  """
  contrast = part(behavior_policies.expert_contrast, strength=strength, top_p=top_p)
  return Method(
    collect=partial(
      collect.Rollouts,
      samples_per_prompt=samples,
      choose=part(collect.picks.best, rows=kept),
      behavior_policy=contrast,
    ),
    objective=part(objectives.Supervised, aggregation=part(aggregation.token_mean)),
    combine=part(combinations.product),
    anchors={name: part(optim.fixed) for name in ('reference', 'expert', 'antiexpert')},
    learns='imitate',
  )
