"""How many completions each prompt of a step gets, if their sum is given."""

import numpy as np

Array = np.ndarray


def expected_contrast(rates: Array, most: int) -> Array:
  """The expected number of wrong completions beside at least one right one, f64[P, most + 1].

  Column B is U(B, p) = B (1 - p) (1 - (1 - p)^(B - 1)) = E[(B - k) 1{0 < k < B}], k ~ Binomial(B, p):
  the utility of B completions of a prompt of success rate p (V_0, arXiv:2602.03584).

  U is not concave in B: for p = 0.3 its increments first rise, so a greedy choice may be wrong.

  Args:
    rates: f[P], success rates.
    most: the largest number of completions.

  >>> print(expected_contrast(np.array([0.3]), 8)[0, [1, 2, 8]].round(5))
  [0.      0.42    5.13882]
  """
  number, wrong = np.arange(most + 1), 1 - np.asarray(rates, np.float64)[:, None]
  return number * wrong * (1 - wrong ** np.maximum(number - 1, 0))


def allocate_budget(gains: Array, total: int, *, low: int = 0, high: int | None = None) -> Array:
  """The numbers n[P] with sum `total` and low <= n <= high that maximise sum_i gains[i, n_i], exactly.

  A dynamic programme over prompts takes O(P total (high - low)) operations. Of equally good choices the
  first prompts get the most.

  Args:
    gains: f[P, Bmax + 1], what n completions of each prompt are worth; column n is n completions.
    total: completions of all prompts together.
    low: least number for a prompt.
    high: largest number for a prompt; None is Bmax.

  Returns:
    i[P].

  Raises:
    ValueError: the bounds allow no such numbers.

  >>> gains = expected_contrast(np.array([0.0, 0.3, 0.9]), 8)
  >>> print(allocate_budget(gains, 12, low=2))
  [2 8 2]
  """
  gains = np.asarray(gains, np.float64)
  prompts, columns = gains.shape
  high = columns - 1 if high is None else high
  if not 0 <= low <= high < columns or not prompts * low <= total <= prompts * high:
    raise ValueError(
      f'{prompts} prompts with {low} to {high} completions each cannot have {total} together '
      f'(gains are known up to {columns - 1})'
    )
  # best[s]: the largest sum of gains of the prompts so far, if s completions above `low` are left.
  room = total - prompts * low
  best, choices = np.full(room + 1, -np.inf), np.zeros((prompts, room + 1), int)
  best[room] = 0.0
  for i in range(prompts):
    after = np.full(room + 1, -np.inf)
    for more in range(min(high - low, room), -1, -1):
      reached = best[more:] + gains[i, low + more]
      better = reached > after[: room + 1 - more]
      after[: room + 1 - more][better] = reached[better]
      choices[i, : room + 1 - more][better] = more
    best = after
  # Walk back from the end, where nothing is left.
  found, left = np.zeros(prompts, int), 0
  for i in range(prompts - 1, -1, -1):
    found[i] = low + choices[i, left]
    left += choices[i, left]
  return found


def routing_label(rewards: Array, costs: Array, *, beta: float) -> Array:
  """beta R + (1 - beta) (1 - c): what a value predicts that chooses among policies of different cost.

  c is the cost over the largest one, so the cheapest policy need not be free (V_0, arXiv:2602.03584; how
  costs are normalised is our choice).

  Args:
    rewards: f[...], in [0, 1].
    costs: f[...], at least 0, such as tokens or prices.
    beta: weight of the reward, in [0, 1].

  Raises:
    ValueError: a negative cost, or `beta` outside [0, 1].

  >>> print(routing_label(np.array([1.0, 0.0]), np.array([4.0, 1.0]), beta=0.5))
  [0.5   0.375]
  """
  rewards, costs = np.asarray(rewards, np.float64), np.asarray(costs, np.float64)
  if not 0 <= beta <= 1 or (costs < 0).any():
    raise ValueError(f'beta={beta} must be in [0, 1], and costs at least 0, got {costs}')
  return beta * rewards + (1 - beta) * (1 - costs / max(costs.max(initial=0.0), 1e-30))


def routed(values: Array) -> Array:
  """The policy of each prompt, i[P]: the one with the largest predicted value; of equals the first.

  Args:
    values: f[M, P], predictions of `routing_label` for M policies.
  """
  return np.argmax(np.asarray(values), axis=0)
