/* The low-rank levels, some at a time, by runs of tokens that pass the same nodes: those are read once, and used together while
 * they are there.
 *
 * Tokens are sorted, so the runs of a node's children are within its own: each subtree below the full levels is one piece
 * of work, whose gradients nobody else writes.
 */
#define MOST_UNITS 64 /* of a low-rank node, with that of the bias */
#define PIECES 16     /* of work for each thread */
#define CHAIN_NUMBERS 4096

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

/* Subtrees that one thread takes at a time: few enough for all threads to share, enough for memory to be asked for ahead. */
static long groups_of_a_piece(const Tree *tree, int threads) {
    long count = level_size(tree, tree->full + 1), pieces = least(PIECES * threads, count);
    return (count + pieces - 1) / pieces;
}

/* Tokens that pass the same nodes on some low-rank levels. */
typedef struct {
    long from, to;             /* levels, without the last one */
    long begin, end, node[64]; /* node: of each level, its place among those of all */
} Path;

static long end_of(const Tree *tree, long level, long at) { return node_end(tree, level, at - tree->bounds[level]); }

static Path path_from(const Tree *tree, long token, long from, long to) {
    Path path = {.from = from, .to = to, .begin = token};
    for (long level = from; level < to; level++) path.node[level] = tree->bounds[level] + first_from(tree, level, token);
    path.end = end_of(tree, to - 1, path.node[to - 1]);
    return path;
}

static void go_on(const Tree *tree, Path *path) {
    path->begin = path->end;
    for (long level = path->from; level < path->to; level++)
        path->node[level] += end_of(tree, level, path->node[level]) == path->begin;
    if (path->begin < tree->tokens) path->end = end_of(tree, path->to - 1, path->node[path->to - 1]);
}

static const float *right_of(const Tree *tree, long row) { return tree->nodes.right.at + row * tree->nodes.right.step; }

static const float *left_of(const Tree *tree, long row) { return tree->nodes.left.at + row * tree->nodes.left.step; }

/* Nodes that the path after this one does not share with it. */
static void ask_for_next(const Tree *tree, const Path *path, Queue *queue) {
    queue->count = queue->next = 0;
    for (long level = path->from; level < path->to; level++) {
        long at = path->node[level] + 1;
        if (at >= tree->bounds[level + 1] || tree->start[at] != path->end || tree->row[at] < 0) continue;
        const float *right = right_of(tree, tree->row[at]), *left = left_of(tree, tree->row[at]);
        queue->piece[queue->count++] = (Ahead){right, right + tree->rank * tree->in};
        queue->piece[queue->count++] = (Ahead){left, left + tree->left * tree->out};
    }
}

/* Levels whose nodes are worked on at a time: as many as the first cache holds beside the tokens. */
static long levels_at_once(const Tree *tree) {
    long fit = CHAIN_NUMBERS / (tree->rank * tree->in + tree->left * tree->out);
    return least(fit < 1 ? 1 : fit, MOST_ROWS / tree->left);
}

static void push(Stack *rows, const float *at, long step, long count, int unit, int add, int ends) {
    for (long i = 0; i < count; i++, rows->count++) {
        rows->at[rows->count] = at + i * step;
        rows->unit[rows->count] = unit + (int)i;
        rows->add[rows->count] = (char)add, rows->ends[rows->count] = (char)ends;
    }
}

/* Factors of the nodes of a path from some level on, of which `row` says where they are stored; those that are missing have no
 * units. Sets the units of the biases, which are 1, of so many tokens. */
static void factors_of(const Tree *tree, const Path *path, const int64_t *row, long from, Stack *right, Stack *left, float *units,
                       long tokens) {
    right->count = left->count = 0;
    for (long level = from; level < path->to; level++) {
        long here = row[path->node[level]];
        if (here < 0) continue;
        int unit = (int)left->count;
        push(right, right_of(tree, here), tree->in, tree->rank, unit, 0, 0);
        push(left, left_of(tree, here), tree->out, tree->left, unit, 0, 0);
        for (long i = 0; i < tokens && tree->left > tree->rank; i++) units[i * UNIT_STEP + unit + tree->rank] = 1;
    }
}

/* Some rows, `step` apart. */
static void rows_of(const int64_t *order, const float *x, long step, long tokens, const float **rows) {
    for (long i = 0; i < tokens; i++) rows[i] = x + order[i] * step;
}

static void low_forward(const Tree *tree, const float *x, float *y, int threads) {
    long first = tree->full + 1, most = levels_at_once(tree);
    long count = level_size(tree, first), groups = groups_of_a_piece(tree, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < count; group += groups) {
        long begin = tree->start[tree->bounds[first] + group], end = node_end(tree, first, least(group + groups, count) - 1);
        for (long level = first; level <= tree->depth; level += most) {
            Path path = path_from(tree, begin, level, least(level + most, tree->depth + 1));
            for (; path.begin < end; go_on(tree, &path)) {
                Stack right, left;
                Queue queue;
                float hidden[FEW * UNIT_STEP];
                ask_for_next(tree, &path, &queue);
                factors_of(tree, &path, tree->row, level, &right, &left, hidden, FEW);
                for (long token = path.begin; token < path.end; token += FEW) {
                    long tokens = least(FEW, path.end - token);
                    const float *from[FEW], *to[FEW];
                    rows_of(tree->source + token, x, tree->in, tokens, from);
                    rows_of(tree->order + token, y, tree->out, tokens, to);
                    chain_dots(tokens, &right, tree->in, from, hidden, &queue);
                    chain_sums(tokens, &left, tree->out, hidden, (float **)to, &queue);
                }
            }
        }
    }
}

/* What the gates learn from some tokens of a path: hidden^T back of each node. */
static void low_multipliers(const Tree *tree, const Learn *learn, const Path *path, long tokens, const float *hidden,
                            const float *back, float *through) {
    for (long level = path->from; level < path->to && learn->levels; level++)
        for (long i = 0; i < tokens && learn->levels >> level & 1; i++) {
            long at = i * UNIT_STEP + (level - path->from) * tree->left;
            through[i * columns_of(learn) + slot_of(learn, level)] += dot(hidden + at, back + at, tree->left);
        }
}

/* The same of flips: dy^T (V' - V) x. */
static void low_flips(const Tree *tree, const Learn *learn, const Path *path, long tokens, const float *const *x,
                      const float *const *dy, const float *hidden, const float *back, float *through) {
    long columns = columns_of(learn);
    for (long number = 0; number < learn->count; number++) {
        const Flip *flip = learn->flips + number;
        float *sum = through + columns - learn->count + number, other_hidden[FEW * UNIT_STEP], other_back[FEW * UNIT_STEP];
        long begin = flip->level > path->from ? flip->level : path->from, skipped = (begin - path->from) * tree->left;
        if (begin >= path->to) continue;
        Stack right, left;
        Queue nothing = {.count = 0};
        factors_of(tree, path, flip->row, begin, &right, &left, other_hidden, FEW);
        for (long token = 0; token < tokens; token += FEW) {
            long few = least(FEW, tokens - token);
            chain_dots(few, &right, tree->in, x + token, other_hidden, &nothing);
            chain_dots(few, &left, tree->out, dy + token, other_back, &nothing);
            for (long i = 0; i < few; i++) {
                long own = (token + i) * UNIT_STEP + skipped;
                sum[(token + i) * columns] += dot(other_hidden + i * UNIT_STEP, other_back + i * UNIT_STEP, left.count) -
                                              dot(hidden + own, back + own, (path->to - begin) * tree->left);
            }
        }
    }
}

/* Where the gradients of the nodes go, of which some tokens of a path are the next. */
static void gradients_of(const Tree *tree, const Path *path, const Nodes *out, long token, long end, Stack *right, Stack *left) {
    right->count = left->count = 0;
    for (long level = path->from; level < path->to; level++) {
        long at = path->node[level], place = at - tree->bounds[tree->full + 1];
        int unit = (int)left->count, add = tree->start[at] < token, ends = end_of(tree, level, at) == end;
        push(right, out->right.at + place * out->right.step, tree->in, tree->rank, unit, add, ends);
        push(left, out->left.at + place * out->left.step, tree->out, tree->left, unit, add, ends);
    }
}

/* Nodes of a path, all of which exist, and their tokens. */
static void path_backward(const Tree *tree, const Path *path, const float *x, const float *dy, float *dx, const Nodes *out,
                          const Learn *learn, float *through, Queue *queue) {
    long wanted = columns_of(learn);
    float hidden[RUN * UNIT_STEP], back[RUN * UNIT_STEP];
    Stack right, left, right_grad, left_grad;
    factors_of(tree, path, tree->row, path->from, &right, &left, hidden, least(RUN, path->end - path->begin));
    for (long token = path->begin; token < path->end; token += RUN) {
        long tokens = least(RUN, path->end - token);
        const float *in[RUN], *grad[RUN], *to[RUN];
        rows_of(tree->source + token, x, tree->in, tokens, in);
        rows_of(tree->order + token, dy, tree->out, tokens, grad);
        rows_of(tree->order + token, dx, tree->in, tokens, to);
        for (long i = 0; i < tokens; i += FEW) {
            long few = least(FEW, tokens - i);
            chain_dots(few, &right, tree->in, in + i, hidden + i * UNIT_STEP, queue);
            chain_dots(few, &left, tree->out, grad + i, back + i * UNIT_STEP, queue);
            chain_sums(few, &right, tree->in, back + i * UNIT_STEP, (float **)to + i, queue);
        }
        gradients_of(tree, path, out, token, token + tokens, &right_grad, &left_grad);
        chain_outer(tokens, &right_grad, tree->in, back, in);
        chain_outer(tokens, &left_grad, tree->out, hidden, grad);
        low_multipliers(tree, learn, path, tokens, hidden, back, through + token * wanted);
        low_flips(tree, learn, path, tokens, in, grad, hidden, back, through + token * wanted);
    }
}

static void low_backward(const Tree *tree, const float *x, const float *dy, float *dx, const Nodes *out, const Learn *learn,
                         float *through, int threads) {
    long first = tree->full + 1, count = level_size(tree, first), groups = groups_of_a_piece(tree, threads);
    long most = levels_at_once(tree);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long group = 0; group < count; group += groups) {
        long begin = tree->start[tree->bounds[first] + group], end = node_end(tree, first, least(group + groups, count) - 1);
        for (long level = first; level <= tree->depth; level += most) {
            Path path = path_from(tree, begin, level, least(level + most, tree->depth + 1));
            for (; path.begin < end; go_on(tree, &path)) {
                Queue queue;
                ask_for_next(tree, &path, &queue);
                path_backward(tree, &path, x, dy, dx, out, learn, through, &queue);
            }
        }
    }
}
