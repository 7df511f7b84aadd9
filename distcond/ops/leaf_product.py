"""Products of tokens with one matrix each, that of their leaf: what a flattened tree computes.

Legend: V tokens (one for each tree), T rows that they are made of, Q in, P out of one tree, L leaves.
"""

from torch import Tensor

from distcond.ops import native
from distcond.ops.grouped import grouped_affine
from distcond.ops.path import TreePath


def leaf_product(x_TQ: Tensor, path: TreePath, weight_LQP: Tensor, bias_LP: Tensor) -> Tensor:
    """x W + b of each token's leaf, [V, P], in the order of the tokens.

    path: of one level, whose node ids are places among the L leaves; tokens of one place more, which come last, have
    no leaf: what is said of them is of no meaning. x: one row a token, or one for all trees of a token.
    """
    if native.computes(x_TQ, weight_LQP):
        return native.leaf_product(x_TQ, path, weight_LQP, bias_LP)
    level = path.levels[0]
    leaves = [leaf if leaf < len(weight_LQP) else None for leaf in level.nodes_G.tolist()]
    matrices = (None if leaf is None else weight_LQP[leaf] for leaf in leaves)
    biases = (None if leaf is None else bias_LP[leaf] for leaf in leaves)
    return grouped_affine(path.in_order(x_TQ), matrices, biases, bias_LP.shape[1], level.sizes).index_select(0, path.place_T)
