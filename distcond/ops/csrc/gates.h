/* What the gates learn from: of each token, dy^T M x for matrices M beside that of its leaf.
 *
 * Flips: W(b') - W(b), b' being the leaf b with one bit flipped and the bits below it as they are. The matrix that is formed
 * for a leaf is also that of the tokens of the flipped leaf, which take it while it is there; only for a leaf that no token
 * reaches it is formed apart.
 */
typedef struct {
    int64_t level;       /* whose bit is flipped */
    const int64_t *row;  /* of each node: where the one with this bit flipped is stored; -1: it is zeros */
    const int64_t *twin; /* of each node of the last full level: place of that one among them; -1: no token reaches it */
} Flip;

typedef struct {
    int64_t levels; /* bits of those whose multipliers learn: M = U */
    int64_t count;  /* of the flips, whose columns follow those of the levels */
    const Flip *flips;
} Learn;

static long columns_of(const Learn *learn) { return __builtin_popcountll(learn->levels) + learn->count; }

/* Place of a level among those whose bit is set. */
static long slot_of(const Learn *learn, long level) { return __builtin_popcountll(learn->levels & (((int64_t)1 << level) - 1)); }

/* Add dy^T (above + node) x of some tokens, as far as the panel goes. above: NONE where the node is a tile. */
static void add_through(const Panel *panel, Rows above, Rows node, Tokens of, const float *x, const float *dy, long level,
                        float *through, long step) {
    const Tree *tree = panel->tree;
    long wide = pitch(panel->columns), token = of.begin, end = of.end;
    float *back = tile_of(panel, panel->grads, level); /* not in use */
    Ahead nothing = NOTHING;
    int is_few = end - token <= FEW;
    if (!is_few && above.at) {
        add_to(above, node, panel->rows, panel->columns, panel->turned, &nothing, 0);
        node = (Rows){panel->turned, pitch(panel->columns)};
    }
    for (long most = is_few ? FEW : BATCH; token < end; token += most) {
        long tokens = least(most, end - token);
        take_dy(panel, dy, token, tokens);
        if (is_few)
            few_back(tokens, above, node, panel->rows, panel->columns, panel->dy, HIGH, back, wide, &nothing);
        else
            product(tokens, panel->wide, panel->rows, panel->dy, HIGH, 1, node.at, node.step, back, wide, &nothing);
        for (long i = 0; i < tokens; i++) {
            const float *here = x + tree->source[token + i] * tree->in + panel->q;
            through[(token + i) * step] += dot(back + i * wide, here, panel->columns);
        }
    }
}

/* Add factor * dy^T bias of some tokens. */
static void add_bias_through(const Panel *panel, const float *bias, float factor, Tokens of, const float *dy, float *through,
                             long step) {
    const Tree *tree = panel->tree;
    for (long token = of.begin; token < of.end; token++)
        through[token * step] += factor * dot(dy + tree->order[token] * tree->out + panel->p, bias, panel->rows);
}

static const float *bias_at(const Panel *panel, long row) {
    return panel->tree->nodes.bias.at + row * panel->tree->nodes.bias.step + panel->p;
}

/* What the multiplier of a level would have to gain, as far as this panel of its node and the tokens of the run go. */
static void multiplier_gradient(const Panel *panel, const Step *step, const float *x, const float *dy, const Learn *learn,
                                float *through) {
    const Tree *tree = panel->tree;
    long row = tree->row[tree->bounds[step->level] + step->node], columns = columns_of(learn);
    if (row < 0) return;
    through += slot_of(learn, step->level);
    Tokens of = tokens_of(tree, step);
    if (of.begin < panel->tokens.begin) of.begin = panel->tokens.begin;
    of.end = least(of.end, panel->tokens.end);
    add_through(panel, ZEROS, node_of(panel, step), of, x, dy, step->level, through, columns);
    if (panel->q == 0) add_bias_through(panel, bias_at(panel, row), 1, of, dy, through, columns);
}

/* What the flips would have to gain at a leaf of the full levels, but for dy^T W(b) x. is_formed: whether W(b) is there as a
 * tile. open: nodes on the path. */
static void flip_gradient(Panel *panel, const Step *step, const long *open, int is_formed, const float *x, const float *dy,
                          const Learn *learn, float *through) {
    const Tree *tree = panel->tree;
    long last = tree->full, columns = columns_of(learn);
    float own_bias[PANEL] = {0};
    Tokens own = tokens_of(tree, step);
    for (long level = 0; level <= last && panel->q == 0; level++)
        if (tree->row[open[level]] >= 0) scaled(own_bias, 1, bias_at(panel, tree->row[open[level]]), panel->rows, 1);
    for (long number = 0; number < learn->count; number++) {
        const Flip *flip = learn->flips + number;
        float *to = through + columns - learn->count + number;
        if (flip->level > last) continue;
        if (panel->q == 0) add_bias_through(panel, own_bias, -1, own, dy, to, columns);
        if (flip->twin[step->node] >= 0) {
            Tokens twin = tokens_of(tree, &(Step){last, flip->twin[step->node]});
            Rows sum = is_formed ? NONE : above(panel, step), node = is_formed ? panel->sums[last] : node_of(panel, step);
            add_through(panel, sum, node, twin, x, dy, last, to, columns);
            if (panel->q == 0) add_bias_through(panel, own_bias, 1, twin, dy, to, columns);
            continue;
        }
        Rows sum = panel->sums[flip->level - 1];
        float bias[PANEL] = {0};
        Ahead nothing = NOTHING;
        for (long level = 0; level <= last; level++) {
            long row = level < flip->level ? tree->row[open[level]] : flip->row[open[level]];
            if (row < 0) continue;
            if (panel->q == 0) scaled(bias, 1, bias_at(panel, row), panel->rows, 1);
            if (level < flip->level) continue;
            add_to(sum, rows_at(panel, row), panel->rows, panel->columns, panel->turned, &nothing, 0);
            sum = (Rows){panel->turned, pitch(panel->columns)};
        }
        add_through(panel, NONE, sum, own, x, dy, last, to, columns);
        if (panel->q == 0) add_bias_through(panel, bias, 1, own, dy, to, columns);
    }
}

/* Take dy^T W(b) x, W(b) the sum of the full levels, from what the flips would have to gain; dx: dy^T W(b). */
static void take_own(const Tree *tree, const float *x, const float *dx, const Learn *learn, float *through, int threads) {
    long columns = columns_of(learn);
#pragma omp parallel for num_threads(threads) if (learn->count)
    for (long token = 0; token < tree->tokens * (learn->count > 0); token++) {
        float *to = through + (token + 1) * columns - learn->count;
        float own = dot(x + tree->source[token] * tree->in, dx + tree->order[token] * tree->in, tree->in);
        for (long number = 0; number < learn->count; number++)
            if (learn->flips[number].level <= tree->full) to[number] -= own;
    }
}
