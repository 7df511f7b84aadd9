/* Nodes, tokens sorted by leaf, and the way there and back. */
#include <stdint.h>

typedef struct {
    Rows weight, bias, right, left; /* one row for each node */
} Nodes;

typedef struct {
    int64_t tokens, in, out, rank, left; /* left: rank, or rank + 1 with the bias of low-rank nodes */
    int64_t full, depth;                 /* deepest full level, deepest level */
    const int64_t *order;                /* [tokens], sorted position -> token */
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

static void gather(const float *from, long numbers, const int64_t *order, long tokens, float *to, int threads) {
    long width = pitch(numbers);
#pragma omp parallel for num_threads(threads)
    for (long at = 0; at < tokens; at++) {
        memcpy(to + at * width, from + order[at] * numbers, numbers * sizeof(float));
        memset(to + at * width + numbers, 0, (width - numbers) * sizeof(float));
    }
}

/* Put the sum of some parts, each [tokens, numbers], into the order of the tokens. */
static void scatter(float *parts, long count, long numbers, const int64_t *order, long tokens, float *to, int threads) {
    long width = pitch(numbers);
#pragma omp parallel for num_threads(threads)
    for (long at = 0; at < tokens; at++) {
        float *sum = parts + at * width;
        for (long part = 1; part < count; part++) scaled(sum, 1, sum + part * tokens * width, width, 1);
        memcpy(to + order[at] * numbers, sum, numbers * sizeof(float));
    }
}
