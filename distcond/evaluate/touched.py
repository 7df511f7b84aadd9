"""Bytes of weights that one example touches: what has to come from memory when it is computed on its own.

Legend: V visits of a tree layer, K depth.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from distcond.evaluate.visits import Visited
from distcond.nn import TreeLinear
from distcond.positions import Array
from distcond.train.table_files import tree_layers


def dense_bytes(body: nn.Module) -> int:
    """Of all parameters, and buffers of gates that do not learn, outside of embeddings and of the nodes of trees."""
    total = 0
    for module in body.modules():
        if not isinstance(module, TreeLinear | nn.Embedding):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            total += sum(tensor.nbytes for tensor in own if tensor.is_floating_point())
    return total


def embedding_bytes(body: nn.Module, distinct: float) -> float:
    """Of the rows of its embeddings of bytes or tokens that an example of so many distinct ones reads."""
    tables = [module.weight for module in body.modules() if isinstance(module, nn.Embedding)]
    return distinct * sum(table[0].nbytes for table in tables)


def node_bytes(layer: TreeLinear, visits: Visited, length: int) -> Array:
    """Of the nodes of a layer that exist on the paths of each example with a visit, each once, float64 [examples].

    length: T, positions of an example.
    """
    example_V, leaf_V = visits.position // length, visits.leaf
    order_V = np.lexsort((leaf_V, example_V))
    example_V, leaf_V = example_V[order_V], leaf_V[order_V]
    deepest_V = _deepest_level(layer, leaf_V)
    total_E = np.zeros(int(example_V[-1]) + 1 if len(example_V) else 0)
    for level in range(layer.depth + 1):
        node_V = leaf_V >> (layer.depth - level)
        is_new_V = np.ones(len(node_V), bool)
        is_new_V[1:] = (node_V[1:] != node_V[:-1]) | (example_V[1:] != example_V[:-1])
        store = layer.layout.full if level <= layer.full_depth else layer.layout.low
        np.add.at(total_E, example_V[is_new_V & (deepest_V >= level)], 4.0 * store.width)
    return total_E


def bytes_touched(body: nn.Module, visits: Mapping[str, Visited], length: int, distinct: float) -> float | None:
    """Mean over examples: dense weights once, the embedding's rows of its `distinct` bytes, and every node on its paths once.

    A weight counts once however many positions and steps read it: it stays in the cache. Nodes are fp32. None where it is not
    known which leaves the examples visit.
    """
    layers = tree_layers(body)
    if layers.keys() - visits.keys():
        return None
    nodes = sum(float(node_bytes(layer, visits[name], length).mean()) for name, layer in layers.items())
    return dense_bytes(body) + embedding_bytes(body, distinct) + nodes


def _deepest_level(layer: TreeLinear, leaf_V: Array) -> Array:
    """Deepest level with a node on the path to each leaf."""
    if layer.table is None:
        return np.full(len(leaf_V), layer.depth)
    leaf_G, index_V = np.unique(leaf_V, return_inverse=True)
    return np.asarray(layer.table.deepest_level(torch.from_numpy(leaf_G)).numpy()[index_V])
