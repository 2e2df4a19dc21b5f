from functools import partial

from polgrad import collect, credit, objectives
from polgrad.losses import advantages, aggregation, embedding_rewards, surrogates
from polgrad.methods.base import Method
from polgrad.registry import part


def grace(
  *,
  samples_per_prompt: int = 8,
  partner_samples: int = 0,
  compared: int = 1,
  negatives: str = 'own',
  cluster: float = 0.2,
  across: float = 0.2,
  scale: float = 0.1,
  truncated: float = -1.0,
  eps: float = 0.2,
) -> Method:
  """GRACE (arXiv:2510.04506): rationales are rewarded by the embeddings that they give to texts.

      R_i = (cos(q_i, p_i) - s_i + cluster c_i - across a_i) / scale
      A_i = R_i - mean_g
      loss = -token mean of min(r A, clip(r, 1 - eps, 1 + eps) A)

  A record has a text (`prompt`), a `query` that should be close to it, and `negatives` that should not.
  The policy writes a rationale for each, and p, q and n are the mean states of the policy, of length 1,
  over a text and its rationale, without the system turn. Only the rows of the prompt are trained on. s
  is the largest cosine of q_i with the n of the row, c the mean cosine of p_i with those of the other
  rows of the group, and a the mean over the other groups of the largest cosine of q_i with their p. A
  row without a stop token has the reward `truncated`. No gradient goes through embeddings, and there is
  no KL. Terms of the task's verifiers are added, if it has any.

  Differences: In the released code s is the cosine of the first row's query with its first negative
  (`negatives='first'`), one number for the group, which its mean removes again. With
  `negatives='own'`, ours, it differs between rows if the query is answered several times.

  Args:
    samples_per_prompt: answers to the prompt; the run fills it in.
    partner_samples: answers to the query and to each negative; 0 is as many as to the prompt.
    compared: texts of `negatives` that are used, the first ones.
    negatives: 'own' or 'first'.
    cluster: weight of the agreement inside the group.
    across: weight of the likeness to other groups.
    scale: divides the sum.
    truncated: reward of an answer without a stop token.
    eps: distance of the clipping bounds from 1.

  Confidence: CODE (rewards, advantages), MEMORY (loss).
  """
  return Method(
    collect=partial(
      collect.Contrasted,
      samples_per_prompt=samples_per_prompt,
      partner_samples=partner_samples,
      negatives=compared,
      unfinished_reward=truncated,
      contrast=part(
        embedding_rewards.contrastive,
        negatives=negatives,
        cluster=cluster,
        across=across,
        temperature=scale,
      ),
    ),
    credit=part(credit.outcome, advantage=part(advantages.group_mean)),
    objective=part(
      objectives.PolicyGradient,
      surrogate=part(surrogates.clipped, eps_low=eps, eps_high=eps),
      aggregation=part(aggregation.token_mean),
    ),
    minibatches=2,
  )
