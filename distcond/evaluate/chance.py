"""Whether ponder steps follow difficulty: their rank correlation with loss and entropy, beside steps that were shuffled.

Legend: E examples, T positions, N positions that were asked, D measures of difficulty, S shuffles.
"""

from collections.abc import Callable, Iterator, Mapping

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
    up, so that they find chance to be narrower than it is. Of each, control/steps_loss_shuffled_low, _high: the range of the
    middle 95%, and _p, the share that correlates as highly, (1 + those) / (1 + SHUFFLES): of how much pondering follows
    difficulty, one-sided.
    """
    first = int(np.searchsorted(np.cumsum((seen.asked > 0).sum(1)), MOST_POSITIONS, side="right"))
    first = max(1, first)
    asked_ET = seen.asked[:first] > 0
    steps_N, loss_N, entropy_N = (rank_scores(of[:first][asked_ET]) for of in (seen.steps, seen.nll, seen.entropy))
    difficulty_DN = np.stack([loss_N, entropy_N])
    found_D = difficulty_DN @ steps_N
    if np.isnan(found_D).all():
        return {}
    chance = {way: [difficulty_DN @ steps_N[order_N] for order_N in shuffle(asked_ET)] for way, shuffle in WAYS.items()}
    figures: dict[str, float] = {}
    for place, name in enumerate(("loss", "entropy")):
        by_way = {way: np.array([found[place] for found in shuffled]) for way, shuffled in chance.items()}
        figures |= _beside_chance(f"control/steps_{name}", float(found_D[place]), by_way)
    return figures


def _beside_chance(name: str, found: float, chance: Mapping[str, Array]) -> dict[str, float]:
    """The figures of a correlation and of those of each way of shuffling [S]; none where all difficulties are equal."""
    if np.isnan(found):
        return {}
    figures = {f"{name}_rank_correlation": found}
    for way, shuffled_S in chance.items():
        low, high = np.percentile(shuffled_S, [2.5, 97.5])
        p = (1 + int((shuffled_S >= found - SLACK).sum())) / (1 + SHUFFLES)
        figures |= {f"{name}_{way}_low": float(low), f"{name}_{way}_high": float(high), f"{name}_{way}_p": p}
    return figures


def _anywhere(asked_ET: Array) -> Iterator[Array]:
    rng, number = np.random.default_rng(SEED), int(asked_ET.sum())
    return (rng.permutation(number) for _ in range(SHUFFLES))


def _within_sequences(asked_ET: Array) -> Iterator[Array]:
    rng, sequence_N = np.random.default_rng(SEED), np.nonzero(asked_ET)[0]
    return (_within_groups(rng, sequence_N) for _ in range(SHUFFLES))


def _whole_sequences(asked_ET: Array) -> Iterator[Array]:
    rng, place_ET = np.random.default_rng(SEED), np.zeros(asked_ET.shape, np.int64)
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


WAYS: dict[str, Callable[[Array], Iterator[Array]]] = {
    "shuffled": _anywhere,
    "within_sequences": _within_sequences,
    "at_equal_positions": _whole_sequences,
}
"From the places of the N positions to SHUFFLES orders of them, int64 [N]."
