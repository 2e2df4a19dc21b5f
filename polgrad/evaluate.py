"""Held-out accuracy: greedy, pass@k and maj@k.

python -m polgrad.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart
"""

import collections
import json
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app
from etils import epath

from polgrad import checkpoint, cli, metrics, sharding
from polgrad.build import Experiment, build
from polgrad.collect import completions, to_host
from polgrad.data import batching
from polgrad.sampling import roles
from polgrad.sampling.sampler import make_sampler
from polgrad.types import Params

EVALUATION_STEP = 2**31 - 1  # sampling noise that no training step draws
Samples = list[tuple[str, str, float]]


def pass_at_k(correct: np.ndarray, k: int) -> float:
  """Mean over problems of 1 - C(n - c, k) / C(n, k): the unbiased estimate (arXiv:2107.03374).

  Args:
    correct: bool[N, n], n samples of each problem; k <= n.
  """
  n, c = correct.shape[1], correct.sum(axis=1)
  if not 1 <= k <= n:
    raise ValueError(f'pass@{k} needs between 1 and {n} samples')
  i = np.arange(n)[None, :]
  terms = np.where(i > n - c[:, None] - 1, 1 - k / (i + 1.0), 1.0)
  return float(np.mean(1 - np.where(n - c < k, 0.0, np.prod(terms, axis=1))))


def majority_at_k(answers: Sequence[Sequence[str]], correct: np.ndarray) -> float:
  """Share of problems whose most frequent answer is right; of equally frequent ones, the earliest.

  Args:
    answers: [N][n] texts that are equal when the answers are.
    correct: bool[N, n]; a vote counts as right if the first sample that gave it is.
  """
  right = []
  for row, marks in zip(answers, correct):
    winner, _ = collections.Counter(row).most_common(1)[0]
    right.append(marks[list(row).index(winner)])
  return float(np.mean(right))


def make_evaluator(experiment: Experiment) -> Callable[[Params], tuple[dict, Samples]]:
  """Makes params -> (metrics, greedy samples) for the experiment's `evaluation`."""
  plan, policy, tokenizer = experiment.evaluation, experiment.policy, experiment.tokenizer

  def sampler(group: int, role: Callable) -> Callable:
    return make_sampler(
      {'policy': policy},
      group_size=group,
      max_new_tokens=plan.max_new_tokens,
      temperature=plan.temperature,
      role=role,
      mesh=experiment.mesh,
      stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id,
    )

  def solve(sample: Callable, params: Params, group: int):
    """Texts [N][group], scores f[N, group] and records of the first `problems` rows."""
    rows = range(min(plan.problems, len(plan.source)))
    texts, scores, records = [], [], []
    for start in range(0, len(rows), plan.batch):
      piece = [{**plan.source[i], 'id': i} for i in rows[start : start + plan.batch]]
      padded = piece + [piece[-1]] * (plan.batch - len(piece))  # one shape, one compilation
      prompts = batching.prompts(padded, tokenizer, length=plan.prompt_length)
      rollout = to_host(
        sample(
          {'policy': params},
          prompts.tokens,
          prompts.mask,
          prompts.ids,
          seed=experiment.seed,
          step=EVALUATION_STEP,
        )
      )
      n = len(piece) * group
      texts += completions(rollout, tokenizer)[:n]
      lengths = rollout.mask.sum(axis=1)[:n]
      owners = [r for r in piece for _ in range(group)]
      scores.append(plan.score(texts[-n:], owners, [int(x) for x in lengths]).total)
      records += piece
    grouped = [texts[i : i + group] for i in range(0, len(texts), group)]
    return grouped, np.concatenate(scores).reshape(-1, group), records

  greedy = sampler(1, roles.greedy)
  several = sampler(plan.samples, roles.current) if plan.samples else None

  def evaluate(params: Params) -> tuple[dict[str, float], Samples]:
    texts, scores, records = solve(greedy, params, 1)
    found = {
      'evaluation/greedy': float(np.mean(scores >= plan.threshold)),
      'evaluation/reward': float(np.nanmean(scores)),
    }
    questions = [r.get('prompt') or r['messages'][-1]['content'] for r in records]
    samples = [(q, t[0], float(s[0])) for q, t, s in zip(questions, texts, scores)]
    if several:
      texts, scores, _ = solve(several, params, plan.samples)
      correct = scores >= plan.threshold
      for k in sorted({1, plan.samples}):
        found[f'evaluation/pass@{k}'] = pass_at_k(correct, k)
      answers = [[answer(t, plan.answer) for t in row] for row in texts]
      found[f'evaluation/maj@{plan.samples}'] = majority_at_k(answers, correct)
    return found, samples

  return evaluate


def answer(text: str, pattern: str) -> str:
  """The last match's first group, or the whole text; without space around it."""
  matches = re.findall(pattern, text)
  return (matches[-1] if matches and matches[-1] else text).strip()


def restore_params(experiment: Experiment, folder: str, step: int = -1) -> Params:
  """The policy's parameters from a checkpoint of `train`; step -1 is the newest."""
  if not epath.Path(folder).is_dir():
    raise FileNotFoundError(f'{folder}: expected the checkpoints of a run')
  checkpoints = checkpoint.manager(folder)
  step = checkpoint.latest(checkpoints, folder) if step < 0 else step
  policy = experiment.policy
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  shardings = sharding.param_shardings(experiment.mesh, policy.axes(shapes), shapes)
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return checkpoint.restore(checkpoints, step, 'params', like)


def main(argv: list[str]) -> None:
  cli.start(argv)
  experiment = build(cli.CONFIG.value)
  if not experiment.evaluation.every:
    raise ValueError('config.evaluation: the experiment has no held-out problems')
  with jax.set_mesh(experiment.mesh):
    params = restore_params(experiment, cli.checkpoint_folder(), cli.STEP.value)
    found, samples = make_evaluator(experiment)(params)
  metrics.show_samples('held out, greedy', samples[: experiment.show_samples])
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  app.run(main)
