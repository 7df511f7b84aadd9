/* Leaves of tokens, tokens sorted by them, the nodes that they pass, and where nodes are stored. */

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
    int level = differ ? depth - (63 - __builtin_clzll((unsigned long long)differ)) : depth + 1;
    return level < 0 ? 0 : level; /* another tree */
}

/* Leaves of gates [count, bits], one row for each of `trees` trees of a token: tree << bits | bits, of which the first says
 * whether the first gate is above 0. */
void distcond_leaf(const float *gates, int64_t count, int64_t trees, int64_t bits, int64_t *leaf) {
    for (long at = 0; at < count; at++) {
        leaf[at] = at % trees;
        for (long bit = 0; bit < bits; bit++) leaf[at] = leaf[at] << 1 | (gates[at * bits + bit] > 0);
    }
}

/* Rows of which a number is NaN or infinite. */
int64_t distcond_nonfinite(const float *numbers, int64_t rows, int64_t width) {
    long count = 0;
    for (long at = 0; at < rows; at++) {
        int is_finite = 1;
        for (long j = 0; j < width; j++) is_finite &= numbers[at * width + j] - numbers[at * width + j] == 0;
        count += !is_finite;
    }
    return count;
}

/* First of some ascending numbers, from `low` on, that is not below a key; most keys are near the one before. */
static long search_from(const int64_t *numbers, long count, long low, int64_t key) {
    long step = 1, high;
    if (low && numbers[low - 1] >= key) low = 0;
    while (low + step <= count && numbers[low + step - 1] < key) low += step, step *= 2;
    high = least(low + step, count);
    while (low < high) {
        long middle = (low + high) / 2;
        if (numbers[middle] < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Firsts of some ascending numbers that are not below KEYS keys, searched for side by side, so that cache misses overlap. */
enum { KEYS = 32 };
INLINE void search_together(const int64_t *numbers, long count, const int64_t *keys, long *low) {
    for (int j = 0; j < KEYS; j++) low[j] = 0;
    for (long left = count; left > 0; left /= 2)
        for (int j = 0; j < KEYS; j++) low[j] += numbers[low[j] + left / 2] < keys[j] ? left - left / 2 : 0;
}

/* Places of keys [count] among ascending ones [size]; where there is none, found is left as it is. */
void distcond_find(const int64_t *keys, int64_t count, const int64_t *known, const int64_t *places, int64_t size, int64_t *found,
                   int threads) {
    enum { PIECE = 4096, FAR = 64 };
#pragma omp parallel for schedule(static) num_threads(threads) if (count > PIECE)
    for (long begin = 0; begin < count; begin += PIECE) {
        long at = begin, end = least(begin + PIECE, count), lows[KEYS], low = 0;
        if (size / FAR > count && end - begin >= KEYS)
            for (; at < end; at += KEYS) {
                at = least(at, end - KEYS);
                search_together(known, size, keys + at, lows);
                for (int j = 0; j < KEYS; j++)
                    if (lows[j] < size && known[lows[j]] == keys[at + j]) found[at + j] = places[lows[j]];
            }
        for (; at < end; at++) {
            low = search_from(known, size, low, keys[at]);
            if (low < size && known[low] == keys[at]) found[at] = places[low];
        }
    }
}

/* order, place [tokens]: sorted position -> token, and back. bounds [depth + 2]: where the nodes of each level begin in
 * what follows, which holds them root first: id, first sorted token, place of the parent on its level,
 * number of tokens. spare [tokens]. */
void distcond_path(const int64_t *leaf, int64_t tokens, int64_t depth, int64_t trees, int64_t *order, int64_t *place,
                   int64_t *bounds, int64_t *nodes, int64_t *start, int64_t *parent, int64_t *count, int64_t *spare) {
    long node = 0;
    int64_t *first = spare; /* level on which a token leaves the one before */
    sort_leaves(leaf, tokens, (int)depth + (trees > 1 ? 64 - __builtin_clzll(trees - 1) : 0), order, spare);
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
            nodes[node] = trees * (((int64_t)1 << level) - 1) + (leaf[order[token]] >> (depth - level));
            parent[node] = level ? above : 0;
            start[node++] = token;
        }
        for (long at = bounds[level]; at < node; at++) count[at] = (at + 1 < node ? start[at + 1] : tokens) - start[at];
    }
    bounds[depth + 1] = node;
}
