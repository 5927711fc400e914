"""What an audit's guesses prove about epsilon: lower bounds from one run with many canaries.

A canary is a contribution that a fair coin includes or leaves out. An auditor sees what was released, guesses the
coins of some canaries and abstains on the rest; a private mechanism limits how many guesses can be right.
"""

import math
from collections.abc import Callable

import numpy as np

from fedcompute.privacy.accounting import gaussian_epsilon

# No canaries of a size that fits a model show an epsilon above it.
_LARGEST_EPSILON = 64.0
_EPSILON_STEP = 0.1
_BISECTIONS = 40
_GRID = 48


def right_guesses_probability(epsilon: float, delta: float, canaries: int, guesses: int, correct: int) -> float:
    """The most that `correct` or more right out of `guesses` guesses may have as probability under (epsilon, delta).

    Raises ValueError unless 0 <= correct <= guesses <= canaries.

    Formal guarantees: adjacency add-or-remove-one device, unit: the device that a canary stands for, with all of its
    contributions. An upper bound on the probability for every (epsilon, delta)-private mechanism and every auditor that
    makes at most `guesses` guesses, a number fixed beforehand, about `canaries` independent fair coins; nothing is
    assumed about the model, the score or the other devices. It is P[W >= correct] + 2 delta canaries max_i
    P[correct > W >= correct - i] / i with W binomial, `guesses` draws of probability 1 / (1 + exp(-epsilon)).
    Source: arXiv 2305.08846, section 5 and appendix D.
    """
    from scipy import special

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right out of {guesses} guesses about {canaries} canaries")
    if correct == 0:
        return 1.0
    right = special.expit(epsilon)
    # The probability of `guesses - correct` or fewer wrong ones: the wrong side keeps its digits for a large epsilon.
    reached = float(special.bdtr(guesses - correct, guesses, special.expit(-epsilon)))
    if delta == 0:
        return reached
    count = np.arange(correct - 1, -1, -1, dtype=np.float64)
    exact = np.exp(
        special.gammaln(guesses + 1)
        - special.gammaln(count + 1)
        - special.gammaln(guesses - count + 1)
        + special.xlogy(count, right)
        + (guesses - count) * special.log_expit(-epsilon)
    )
    missed = np.max(np.cumsum(exact) / np.arange(1, correct + 1))
    return min(1.0, reached + 2 * canaries * delta * float(missed))


def epsilon_lower_bound(guesses: int, correct: int, delta: float, canaries: int, confidence: float = 0.95) -> float:
    """Epsilon at `delta` that a mechanism has at least, with `confidence`, if `correct` of `guesses` were right.

    Raises ValueError unless 0 <= correct <= guesses <= canaries and 0 < confidence < 1.

    Formal guarantees: unit device, add-or-remove-one. The test is inverted: the result is the end of the epsilons from
    0 up whose `right_guesses_probability` is below 1 - `confidence`. So the result exceeds the true epsilon, a false
    alarm, with probability at most 1 - `confidence` over coins and noise together, for any mechanism. That bound is a
    proof; that one particular result lies below the true epsilon is statistics. A low result proves no privacy.
    """
    _check(confidence)
    allowed = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return right_guesses_probability(epsilon, delta, canaries, guesses, correct) < allowed

    # Step by step: the probability need not rise throughout where delta is large, and the first crossing counts.
    low = 0.0
    if not refuted(low):
        return 0.0
    while low + _EPSILON_STEP < _LARGEST_EPSILON and refuted(low + _EPSILON_STEP):
        low += _EPSILON_STEP
    return _last_true(refuted, low, low + _EPSILON_STEP)


def gaussian_lower_bound(guesses: int, correct: int, delta: float, canaries: int, confidence: float = 0.95) -> float:
    """As `epsilon_lower_bound`, and higher, for a mechanism whose releases together are one Gaussian release.

    The result is the epsilon at `delta` of the largest Gaussian noise that the guesses refute.

    Formal guarantees: unit device, add-or-remove-one; assumes that one device changes the releases no more than one
    Gaussian release of some noise multiplier does (Gaussian differential privacy), which is what the composed fixed
    Gaussian claims for itself, and exactly `guesses` guesses, fixed beforehand. For such a mechanism a false alarm has
    probability at most 1 - `confidence`. For another one only `epsilon_lower_bound` holds.
    Source: arXiv 2410.22235 (the recursion over numbers of correct guesses).
    """
    _check(confidence)
    separation = _last_true(
        lambda value: _refutes_gaussian(value, guesses, correct, canaries, 1 - confidence), 0.0, _LARGEST_EPSILON
    )
    return gaussian_epsilon(1 / separation, delta) if separation > 0 else 0.0


def planned_guesses(canaries: int, separation: float, delta: float, confidence: float = 0.95) -> int:
    """How many guesses promise the highest lower bound, an even number, half of them "included".

    `separation`: distance of the scores of included and left-out canaries in standard deviations, as the auditor
    expects it; infinite without noise. Promised: by a result one standard deviation worse than expected. Raises
    ValueError for fewer than 2 canaries.

    Formal guarantees: none needed: the number is chosen from public parameters, before any coin is seen, as the bounds
    of this module demand.
    """
    from scipy import optimize, special

    _check(confidence)
    if canaries < 2:
        raise ValueError(f"{canaries} canaries are too few to guess one in and one out")
    # Coins rarely fall even: four deviations of the number of included canaries are left unguessed.
    most = max(1, int(canaries / 2 - 2 * math.sqrt(canaries)))
    if math.isinf(separation):
        return 2 * most

    def expected(each: int) -> float:
        share = each / canaries
        cut = optimize.brentq(
            lambda score: (special.ndtr(-score) + special.ndtr(separation - score)) / 2 - share, -40, 40 + separation
        )
        right = min(1.0, float(special.ndtr(separation - cut)) / 2 / share)
        correct = 2 * each * right - math.sqrt(2 * each * right * (1 - right))
        return epsilon_lower_bound(2 * each, math.floor(max(0.0, correct)), delta, canaries, confidence)

    sizes = sorted({max(1, round(most ** (step / _GRID))) for step in range(_GRID + 1)})
    # Where nothing is to be expected, many guesses are: all of them right would be news.
    best: int = max(sizes, key=lambda each: (expected(each), each))
    return 2 * best


def largest_lower_bound(canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The `epsilon_lower_bound` of an auditor who guesses every canary right: no audit of this size shows more.

    Formal guarantees: those of `epsilon_lower_bound`.
    """
    return epsilon_lower_bound(canaries, canaries, delta, canaries, confidence)


def _refutes_gaussian(separation: float, guesses: int, correct: int, canaries: int, allowed: float) -> bool:
    """Whether `correct` or more right guesses with probability `allowed` contradict a Gaussian trade-off.

    Tail sums of right and wrong guesses over outcomes with at least so many right ones, both over `canaries`, bound
    each other; beginning with mass `allowed` at `correct`, each step adds the least mass that the outcome with one
    fewer right guess must have. Masses over 1 are the contradiction.
    """
    from scipy import special

    right, wrong = allowed * correct / canaries, allowed * (guesses - correct) / canaries
    for fewer in range(correct - 1, -1, -1):
        least = float(special.ndtr(special.ndtri(min(right, 1.0)) - separation))
        if least > wrong:
            right += (least - wrong) * fewer / (guesses - fewer)
            wrong = least
        if right + wrong > guesses / canaries:
            return True
    return False


def _last_true(holds: Callable[[float], bool], low: float, high: float) -> float:
    """A point where `holds`, next to one where it does not; `low` if it holds nowhere above."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} does not lie between 0 and 1")
