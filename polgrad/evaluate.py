"""Held-out accuracy: greedy, pass@k and maj@k.

A verifier that fails says nothing about the answer: its samples are in no rate, they are counted as
`evaluation/verifier_errors`.

python -m polgrad.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart
"""

import collections
import json
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app
from etils import epath

from polgrad import checkpoint, cli, metrics, sharding
from polgrad.build import Experiment, build
from polgrad.collect import completions, question
from polgrad.data import batching
from polgrad.sampling import behavior_policies
from polgrad.sampling.sampler import make_sampler
from polgrad.types import Params

EVALUATION_STEP = 2**31 - 1  # sampling noise that no training step draws
Samples = list[tuple[str, str, float]]


def mark(scores: np.ndarray, threshold: float) -> np.ndarray:
  """1 for solved (score >= threshold), 0 for not, NaN where the verifier failed; any shape."""
  return np.where(np.isnan(scores), np.nan, scores >= threshold)


def pass_at_k(marks: np.ndarray, k: int) -> float:
  """Mean over problems of 1 - C(n - c, k) / C(n, k): the unbiased estimate (arXiv:2107.03374).

  n counts a problem's verified samples and c the right ones among them. A problem with fewer than
  k verified samples has no estimate and is left out; without any problem the mean is NaN.

  Args:
    marks: f[N, samples], see `mark`.
    k: samples drawn, 1 <= k <= samples.
  """
  if not 1 <= k <= marks.shape[1]:
    raise ValueError(f'pass@{k} needs k between 1 and the {marks.shape[1]} samples')
  estimates = []
  for row in marks:
    n, c = int(np.isfinite(row).sum()), int(np.nansum(row))
    if n >= k:
      estimates.append((math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k))
  return mean(estimates)


def majority_at_k(answers: Sequence[Sequence[str]], marks: np.ndarray) -> float:
  """Share of problems whose most frequent answer is right; of equally frequent ones, the earliest.

  Samples whose verifier failed have no vote, and a problem without votes is left out.

  Args:
    answers: [N][k] texts that are equal when the answers are.
    marks: f[N, k], see `mark`; a vote counts as right if the first sample that gave it is.
  """
  right = []
  for row, verdicts in zip(answers, marks):
    votes = [(text, v) for text, v in zip(row, verdicts) if not np.isnan(v)]
    if votes:
      [(winner, _)] = collections.Counter(text for text, _ in votes).most_common(1)
      right.append(next(v for text, v in votes if text == winner))
  return mean(right)


def mean(values: Sequence[float] | np.ndarray) -> float:
  """NaN, and no warning, when there is nothing to average."""
  return float(np.mean(values)) if len(values) else math.nan


def make_evaluator(experiment: Experiment) -> Callable[[Params], tuple[dict, Samples]]:
  """Makes params -> (metrics, greedy samples) for the experiment's `evaluation`."""
  plan, policy, tokenizer = experiment.evaluation, experiment.policy, experiment.tokenizer

  def sampler(group: int, behavior_policy: Callable) -> Callable:
    return make_sampler(
      {'policy': policy},
      samples_per_prompt=group,
      max_new_tokens=plan.max_new_tokens,
      temperature=plan.temperature,
      behavior_policy=behavior_policy,
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
      rollout = sharding.to_host(
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

  greedy = sampler(1, behavior_policies.greedy)
  several = sampler(plan.samples, behavior_policies.current) if plan.samples else None

  def evaluate(params: Params) -> tuple[dict[str, float], Samples]:
    texts, scores, records = solve(greedy, params, 1)
    errors = np.isnan(scores).sum()
    found = {
      'evaluation/greedy': pass_at_k(mark(scores, plan.threshold), 1),
      'evaluation/reward': mean(scores[~np.isnan(scores)]),
    }
    samples = [(question(r), t[0], float(s[0])) for r, t, s in zip(records, texts, scores)]
    if several:
      texts, scores, _ = solve(several, params, plan.samples)
      errors += np.isnan(scores).sum()
      marks = mark(scores, plan.threshold)
      for k in sorted({1, plan.samples}):
        found[f'evaluation/pass@{k}'] = pass_at_k(marks, k)
      answers = [[answer(t, plan.answer) for t in row] for row in texts]
      found[f'evaluation/maj@{plan.samples}'] = majority_at_k(answers, marks)
    found['evaluation/verifier_errors'] = float(errors)
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
  shapes = policy.shapes()
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
