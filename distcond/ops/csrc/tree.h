/* Nodes, tokens sorted by leaf, and the way there and back. */
#include <stdint.h>

typedef struct {
    Rows weight, bias, right, left; /* one row for each node */
} Nodes;

typedef struct {
    int64_t tokens, in, out, rank, left; /* left: rank, or rank + 1 with the bias of low-rank nodes */
    int64_t full, depth;                 /* deepest full level, deepest level */
    const int64_t *order;                /* [tokens], sorted position -> token */
    const int64_t *source;               /* the same -> row of x, which in a forest one token of each tree has in common */
    const int64_t *bounds;               /* [depth + 2], where the nodes of each level begin in what follows */
    const int64_t *start;                /* first sorted token of each node */
    const int64_t *parent;               /* place of the node above among those of its level */
    const int64_t *row;                  /* where the node is stored; -1: it is zeros */
    Nodes nodes;
} Tree;

static long level_size(const Tree *tree, long level) { return tree->bounds[level + 1] - tree->bounds[level]; }

static long node_end(const Tree *tree, long level, long node) {
    long next = tree->bounds[level] + node + 1;
    return next < tree->bounds[level + 1] ? tree->start[next] : tree->tokens;
}

/* Copy numbers of some tokens' rows, `step` apart, to rows of their own, padded with zeros. */
static void take(const float *from, long step, const int64_t *order, long tokens, long numbers, float *to, long width) {
    for (long i = 0; i < tokens; i++, to += width) {
        copy(to, from + order[i] * step, numbers);
        for (long at = numbers; at < padded(numbers); at++) to[at] = 0;
    }
}

/* Copy them back, or add them there. */
static void put(const float *from, long width, const int64_t *order, long tokens, long numbers, float *to, long step, int add) {
    for (long i = 0; i < tokens; i++, from += width)
        if (add)
            scaled(to + order[i] * step, 1, from, numbers, 1);
        else
            copy(to + order[i] * step, from, numbers);
}
