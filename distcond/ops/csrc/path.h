/* Tokens sorted by leaf, and the nodes they pass. */

/* Sort leaves, of `bits` bits, keeping equal ones in order: order [tokens]; spare: as much. */
static void sort_leaves(const int64_t *leaf, long tokens, int bits, int64_t *order, int64_t *spare) {
    enum { DIGIT = 11 };
    for (long at = 0; at < tokens; at++) order[at] = at;
    for (int shift = 0; shift < bits; shift += DIGIT) {
        long place[(1 << DIGIT) + 1] = {0};
        for (long at = 0; at < tokens; at++) place[1 + (leaf[at] >> shift & ((1 << DIGIT) - 1))]++;
        for (long digit = 0; digit < 1 << DIGIT; digit++) place[digit + 1] += place[digit];
        for (long at = 0; at < tokens; at++) spare[place[leaf[order[at]] >> shift & ((1 << DIGIT) - 1)]++] = order[at];
        memcpy(order, spare, tokens * sizeof(int64_t));
    }
}

/* First level on which a token is not with the one before. */
static int first_apart(int64_t leaf, int64_t before, int depth) {
    int64_t differ = leaf ^ before;
    return differ ? depth - (63 - __builtin_clzll((unsigned long long)differ)) : depth + 1;
}

/* order, place [tokens]: sorted position -> token, and back. bounds [depth + 2]: where the nodes of each level begin in
 * what follows, which holds them root first: id in heap order, first sorted token, place of the parent on its level,
 * number of tokens. spare [tokens]. */
void distcond_path(const int64_t *leaf, int64_t tokens, int64_t depth, int64_t *order, int64_t *place, int64_t *bounds,
                   int64_t *nodes, int64_t *start, int64_t *parent, int64_t *count, int64_t *spare) {
    long node = 0;
    int64_t *first = spare; /* level on which a token leaves the one before */
    sort_leaves(leaf, tokens, (int)depth, order, spare);
    for (long token = 0; token < tokens; token++) {
        place[order[token]] = token;
        first[token] = token ? first_apart(leaf[order[token]], leaf[order[token - 1]], (int)depth) : 0;
    }
    for (long level = 0; level <= depth; level++) {
        long above = -1;
        bounds[level] = node;
        for (long token = 0; token < tokens; token++) {
            above += first[token] < level;
            if (first[token] > level) continue;
            nodes[node] = (((int64_t)1 << level) - 1) + (leaf[order[token]] >> (depth - level));
            parent[node] = level ? above : 0;
            start[node++] = token;
        }
        for (long at = bounds[level]; at < node; at++) count[at] = (at + 1 < node ? start[at + 1] : tokens) - start[at];
    }
    bounds[depth + 1] = node;
}
