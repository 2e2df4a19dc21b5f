from functools import partial

from polgrad import collect, objectives, optim
from polgrad.losses import implicit_rewards, listwise
from polgrad.methods.base import Method
from polgrad.registry import part


def srpo(*, beta: float = 0.01, alpha: float = 0.5, request: str = '') -> Method:
  """SRPO (arXiv:2406.01660): a policy that improves its own answers, learned from pairs.

      loss = mean over pairs of (1 - alpha) robust + alpha improve
      robust = beta^2 ((U_w - A_ww) - (U_l - A_ll))^2
      improve = (1/2 - beta (A_wl - A_ll))^2 + (-1/2 - beta (A_lw - A_ww))^2
      U_y = log(pi / reference)(y),  A_yz = log(pi / reference)(y | z)

  w is the chosen completion of a pair, l the rejected one. A_yz is taken after a prompt that shows the
  completion z and asks for a better one, so a record is six rows (`collect.Revisions`). The optimum does
  not depend on who wrote the pairs. The trained policy answers, and then revises its answer several
  times: `polgrad.sample --revise`.

  Differences: The paper's prompt for a revision is not known to us. In a conversation the request is the
  user's next turn; a prompt that is text is repeated behind the completion.

  Args:
    beta: coefficient of the KLs to the reference, of the answer and of the revision.
    alpha: weight of the loss of the revision, in [0, 1].
    request: what asks for a better completion; '' is the usual, see `batching.revision`.

  Confidence: PAPER (objective), DERIVED (loss), MEMORY (beta, alpha).
  """
  return Method(
    collect=partial(collect.Revisions, request=request),
    objective=part(
      objectives.Listwise,
      score=part(implicit_rewards.log_ratio_sum),
      loss=part(listwise.srpo, alpha=alpha),
      beta=beta,
      rows_per_prompt=6,
    ),
    anchors={'reference': part(optim.fixed)},
  )
