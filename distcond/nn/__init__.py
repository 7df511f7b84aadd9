"""Layers and models. `TreeLinear` and `AdaptiveComputation` need torch alone and fit into anyone's code."""

from distcond.nn.budget import StepBudget
from distcond.nn.flat import FlatTree, flatten
from distcond.nn.halting import AdaptiveComputation, FixedComputation, PonderStats
from distcond.nn.linear import make_linear
from distcond.nn.model import pondering, tree_options
from distcond.nn.pondernet import PonderNet
from distcond.nn.tree import TreeLinear

__all__ = [
    "AdaptiveComputation",
    "FixedComputation",
    "FlatTree",
    "PonderNet",
    "PonderStats",
    "StepBudget",
    "TreeLinear",
    "flatten",
    "make_linear",
    "pondering",
    "tree_options",
]
