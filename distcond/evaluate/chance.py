"""Whether ponder steps follow difficulty: their rank correlation with loss and entropy, beside steps that were shuffled.

Legend: E examples, T positions, N positions that were asked.
"""

from collections.abc import Callable, Iterator

import numpy as np

from distcond.positions import Array, Positions
from distcond.rank_correlation import rank_scores

SHUFFLES = 199
"Of each kind: the least p-value is 1 in 200."
MOST_POSITIONS = 2**16
"That are looked at: those of the first sequences."
SEED = 0
SLACK = 1e-12
"Correlations that differ by less are equal: they are sums in another order."


def steps_beside_chance(seen: Positions) -> dict[str, float]:
    """Spearman's rank correlation of steps with loss and with entropy, over positions with a target; empty if steps are equal.

    control/steps_loss_rank_correlation, and the same with the steps shuffled, SHUFFLES times by a fixed seed, in three ways:
    shuffled: over the whole set. within_sequences: among the positions of each sequence, so that it does not count that some
    sequences get more steps. at_equal_positions: sequences with targets at the same places exchange their steps as a whole:
    what the place in the sequence decides stays, and so does what neighbours have in common, which the other two ways break
    up, so that they find chance to be narrower than it is. Of each: low and high, the range of the middle 95%, and p, the
    share that correlates as highly, (1 + those) / (1 + SHUFFLES): of how much pondering follows difficulty, one-sided.
    """
    first = int(np.searchsorted(np.cumsum((seen.asked > 0).sum(1)), MOST_POSITIONS, side="right"))
    first = max(1, first)
    asked_ET, steps_ET = seen.asked[:first] > 0, seen.steps[:first]
    figures: dict[str, float] = {}
    for name, of in (("loss", seen.nll), ("entropy", seen.entropy)):
        figures |= _beside_chance(f"control/steps_{name}", steps_ET, of[:first], asked_ET)
    return figures


def _beside_chance(name: str, steps_ET: Array, difficulty_ET: Array, asked_ET: Array) -> dict[str, float]:
    steps_N, difficulty_N = rank_scores(steps_ET[asked_ET]), rank_scores(difficulty_ET[asked_ET])
    found = float(steps_N @ difficulty_N)
    if np.isnan(found):
        return {}
    figures = {f"{name}_rank_correlation": found}
    ways = {"shuffled": f"{name}_p", "within_sequences": f"{name}_within_sequences_p"}
    ways["at_equal_positions"] = f"{name}_at_equal_positions_p"
    for (way, p), shuffle in zip(ways.items(), (_anywhere, _within_sequences, _whole_sequences), strict=True):
        rng = np.random.default_rng(SEED)
        chance = np.array([steps_N[order_N] @ difficulty_N for order_N in shuffle(rng, asked_ET)])
        low, high = np.percentile(chance, [2.5, 97.5])
        at_least = int((chance >= found - SLACK).sum())
        figures |= {f"{name}_{way}_low": float(low), f"{name}_{way}_high": float(high), p: (1 + at_least) / (1 + SHUFFLES)}
    return figures


Shuffle = Callable[[np.random.Generator, Array], Iterator[Array]]
"From the places of the N positions to SHUFFLES orders of them, int64 [N]."


def _anywhere(rng: np.random.Generator, asked_ET: Array) -> Iterator[Array]:
    number = int(asked_ET.sum())
    return (rng.permutation(number) for _ in range(SHUFFLES))


def _within_sequences(rng: np.random.Generator, asked_ET: Array) -> Iterator[Array]:
    sequence_N = np.nonzero(asked_ET)[0]
    return (_within_groups(rng, sequence_N) for _ in range(SHUFFLES))


def _whole_sequences(rng: np.random.Generator, asked_ET: Array) -> Iterator[Array]:
    place_ET = np.zeros(asked_ET.shape, np.int64)
    place_ET[asked_ET] = np.arange(asked_ET.sum())
    alike_E = np.unique(asked_ET, axis=0, return_inverse=True)[1].ravel()
    by_group_E = np.argsort(alike_E, kind="stable")
    for _ in range(SHUFFLES):
        from_E = np.empty(len(alike_E), np.int64)
        from_E[by_group_E] = by_group_E[_within_groups(rng, alike_E[by_group_E])]
        yield place_ET[from_E][asked_ET]


def _within_groups(rng: np.random.Generator, group_N: Array) -> Array:
    """An order of N numbers that leaves each in its group; groups ascend."""
    return np.argsort(group_N + rng.random(len(group_N)))
