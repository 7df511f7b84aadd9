/* The low-rank levels, a few tokens at a time: few reach a deep node, so that its row is read once and used while it is there.
 *
 * Tokens are sorted, so the runs of a node's children are within its own: each subtree below the full levels is one piece
 * of work, whose gradients nobody else writes.
 */
#define MOST_UNITS 64 /* of a low-rank node, with that of the bias */
#define PIECES 16     /* of work for each thread */
#define NODES_AHEAD 5 /* whose numbers are asked for */

static long first_from(const Tree *tree, long level, long token) {
    long low = tree->bounds[level], high = tree->bounds[level + 1];
    while (low < high) {
        long middle = (low + high) / 2;
        if (tree->start[middle] < token)
            low = middle + 1;
        else
            high = middle;
    }
    return low - tree->bounds[level];
}

/* A low-rank node, [rank, in] and [left, out]. */
typedef struct {
    Rows right, left;
} Factors;

static Factors factors_of(const Tree *tree, long row) {
    return (Factors){{tree->nodes.right.at + row * tree->nodes.right.step, tree->in},
                     {tree->nodes.left.at + row * tree->nodes.left.step, tree->out}};
}

/* Ask for a node that comes soon on this level. */
static void look_at(const Tree *tree, long level, long at) {
    long row = at < tree->bounds[level + 1] ? tree->row[at] : -1;
    if (row < 0) return;
    Factors node = factors_of(tree, row);
    Ahead right = {node.right.at, node.right.at + tree->rank * tree->in},
          left = {node.left.at, node.left.at + tree->left * tree->out};
    look(&right, tree->rank * tree->in);
    look(&left, tree->left * tree->out);
}

/* Hidden units of some tokens, [tokens, units], that of the bias 1; the others zeros where the node is missing. */
static void units_of(const Tree *tree, long row, long tokens, const float *x, float *hidden, Ahead *ahead) {
    for (long i = 0; i < tokens; i++)
        for (long unit = 0; unit < tree->left; unit++) hidden[i * MOST_UNITS + unit] = unit == tree->rank;
    if (row < 0) return;
    few_forward(tokens, NONE, factors_of(tree, row).right, tree->rank, tree->in, x, pitch(tree->in), hidden, MOST_UNITS, ahead);
}

/* Subtrees that one thread takes at a time: few enough for all threads to share, enough for memory to be asked for ahead. */
static long groups_of_a_piece(const Tree *tree, int threads) {
    long count = level_size(tree, tree->full + 1), pieces = least(PIECES * threads, count);
    return (count + pieces - 1) / pieces;
}

static void low_forward(const Tree *tree, const float *x, float *y, int threads) {
    long first = tree->full + 1, width = pitch(tree->in), height = pitch(tree->out);
    long count = level_size(tree, first), groups = groups_of_a_piece(tree, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < count; group += groups) {
        long begin = tree->start[tree->bounds[first] + group], end = node_end(tree, first, least(group + groups, count) - 1);
        for (long level = first; level <= tree->depth; level++)
            for (long place = first_from(tree, level, begin), token = begin; token < end; place++) {
                long at = tree->bounds[level] + place, stop = node_end(tree, level, place);
                long row = tree->row[at];
                Ahead nothing = NOTHING;
                look_at(tree, level, at + NODES_AHEAD);
                for (long tokens; token < stop && row >= 0; token += tokens) {
                    float hidden[FEW * MOST_UNITS], *to = y + token * height;
                    tokens = least(FEW, stop - token);
                    units_of(tree, row, tokens, x + token * width, hidden, &nothing);
                    Rows left = factors_of(tree, row).left;
                    few_back(tokens, NONE, left, tree->left, tree->out, hidden, MOST_UNITS, to, height, 1, &nothing);
                }
                token = stop;
            }
    }
}

/* Add factor * hidden^T back of some tokens. */
static void add_dots(const float *hidden, const float *back, long tokens, long units, float factor, float *to, long step) {
    for (long i = 0; i < tokens; i++) to[i * step] += factor * dot(hidden + i * MOST_UNITS, back + i * MOST_UNITS, units);
}

/* What a node has to do with the flips of the bits above it: dy^T (V' - V) x of some of its tokens. */
static void low_flips(const Tree *tree, const Learn *learn, long level, long at, long tokens, const float *x, const float *dy,
                      const float *hidden, const float *back, float *through) {
    long columns = columns_of(learn), height = pitch(tree->out);
    for (long number = 0; number < learn->count; number++) {
        const Flip *flip = learn->flips + number;
        float *to = through + columns - learn->count + number;
        if (flip->level > level) continue;
        add_dots(hidden, back, tokens, tree->left, -1, to, columns);
        if (flip->row[at] < 0) continue;
        float other_hidden[FEW * MOST_UNITS], other_back[FEW * MOST_UNITS] = {0};
        Rows left = factors_of(tree, flip->row[at]).left;
        Ahead nothing = NOTHING;
        units_of(tree, flip->row[at], tokens, x, other_hidden, &nothing);
        few_forward(tokens, NONE, left, tree->left, tree->out, dy, height, other_back, MOST_UNITS, &nothing);
        add_dots(other_hidden, other_back, tokens, tree->left, 1, to, columns);
    }
}

static void low_backward(const Tree *tree, const float *x, const float *dy, float *dx, Rows out_right, Rows out_left,
                         const Learn *learn, float *through, int threads) {
    long first = tree->full + 1, width = pitch(tree->in), height = pitch(tree->out), in = tree->in, out = tree->out;
    long wanted = columns_of(learn);
    long count = level_size(tree, first), groups = groups_of_a_piece(tree, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < count; group += groups) {
        long begin = tree->start[tree->bounds[first] + group], end = node_end(tree, first, least(group + groups, count) - 1);
        for (long level = first; level <= tree->depth; level++)
            for (long place = first_from(tree, level, begin), token = begin; token < end; place++) {
                long at = tree->bounds[level] + place, stop = node_end(tree, level, place), rank = tree->rank, left = tree->left;
                long row = tree->row[at];
                Ahead nothing = NOTHING;
                look_at(tree, level, at + NODES_AHEAD);
                float *right_grad = (float *)out_right.at + (at - tree->bounds[first]) * out_right.step;
                float *left_grad = (float *)out_left.at + (at - tree->bounds[first]) * out_left.step;
                for (long tokens, is_first = 1; token < stop; token += tokens, is_first = 0) {
                    float hidden[FEW * MOST_UNITS], back[FEW * MOST_UNITS] = {0};
                    const float *in_at = x + token * width, *grad = dy + token * height;
                    tokens = least(FEW, stop - token);
                    units_of(tree, row, tokens, in_at, hidden, &nothing);
                    if (row >= 0) {
                        Factors node = factors_of(tree, row);
                        float *to = dx + token * width;
                        few_forward(tokens, NONE, node.left, left, out, grad, height, back, MOST_UNITS, &nothing);
                        few_back(tokens, NONE, node.right, rank, in, back, MOST_UNITS, to, width, 1, &nothing);
                    }
                    few_outer(tokens, back, MOST_UNITS, in_at, width, rank, in, right_grad, in, !is_first, NULL, 0);
                    few_outer(tokens, hidden, MOST_UNITS, grad, height, left, out, left_grad, out, !is_first, NULL, 0);
                    if (learn->levels >> level & 1)
                        add_dots(hidden, back, tokens, left, 1, through + token * wanted + slot_of(learn, level), wanted);
                    low_flips(tree, learn, level, at, tokens, in_at, grad, hidden, back, through + token * wanted);
                }
            }
    }
}
