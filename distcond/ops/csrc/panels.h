/* A panel: the same rows of all full nodes, walked depth first. */

#define BATCH 64         /* tokens whose strip of numbers stays in the first cache */
#define HIGH (PANEL + V) /* numbers from a token of a batch to the next */

typedef struct {
    int32_t level, node;
} Step;

/* Nodes depth first, parents before children; a last one of level 0 closes every level. Returns their number without it. */
static long walk(const Tree *tree, Step *steps) {
    long count = 0, current[64];
    for (long level = 0; level <= tree->full; level++) current[level] = -1;
    for (long leaf = 0; leaf < level_size(tree, tree->full); leaf++) {
        long chain[64];
        chain[tree->full] = leaf;
        for (long level = tree->full; level > 0; level--) chain[level - 1] = tree->parent[tree->bounds[level] + chain[level]];
        for (long level = 0; level <= tree->full; level++)
            if (chain[level] != current[level]) {
                steps[count++] = (Step){level, chain[level]};
                current[level] = chain[level];
            }
    }
    steps[count] = (Step){0, 0};
    return count;
}

/* What each of some threads does: all panels of a run of steps, or all steps of some panels. */
typedef struct {
    Step *steps;
    long count, rows, panels; /* of the steps; of a panel; of the panels */
    long *cuts;               /* [threads + 1], where the runs begin; NULL: threads own panels */
} Division;

#define STEP_TOKENS 8 /* tokens whose products take as long as to read and write a node */

/* Sorted tokens. */
typedef struct {
    long begin, end;
} Tokens;

static Tokens tokens_of(const Tree *tree, const Step *step) {
    return (Tokens){tree->start[tree->bounds[step->level] + step->node], node_end(tree, step->level, step->node)};
}

/* Cut the steps behind leaves of the last full level, so that runs take about as long; NULL if one takes much longer, as where
 * a leaf has most of the tokens. */
static long *cut_steps(const Tree *tree, const Step *steps, long count, int threads) {
    long *cuts = calloc(threads + 1, sizeof(long)), whole = tree->tokens + STEP_TOKENS * count;
    long done = 0, begun = 0, longest = 0, run = 1;
    for (long at = 0; at < count; at++) {
        int is_leaf = steps[at].level == tree->full, is_end = at + 1 == count;
        Tokens tokens = tokens_of(tree, steps + at);
        done += STEP_TOKENS + (is_leaf ? tokens.end - tokens.begin : 0);
        if (!is_end && (!is_leaf || run == threads || done < whole * run / threads)) continue;
        if (done - begun > longest) longest = done - begun;
        begun = done;
        cuts[run++] = at + 1;
    }
    for (; run <= threads; run++) cuts[run] = count;
    if (4 * longest * threads <= 5 * whole) return cuts;
    free(cuts);
    return NULL;
}

static Division division_of(const Tree *tree, int threads) {
    Division division = {.steps = malloc((tree->bounds[tree->full + 1] + 1) * sizeof(Step)), .rows = PANEL};
    division.count = walk(tree, division.steps);
    if (threads > 1) division.cuts = cut_steps(tree, division.steps, division.count, threads);
    while (!division.cuts && division.rows > V && (tree->out + division.rows - 1) / division.rows < threads) division.rows /= 2;
    division.panels = (tree->out + division.rows - 1) / division.rows;
    return division;
}

static void forget(Division *division) { free(division->steps), free(division->cuts); }

/* What a thread works on, and with. */
typedef struct {
    const Tree *tree;
    const Step *steps;
    long count;                           /* of the steps */
    Tokens tokens;                        /* of the steps */
    long first, end;                      /* of its panels */
    long p, q, rows, columns, wide;       /* the panel; wide: its columns padded */
    Rows sums[64];                        /* of the nodes on the path so far */
    float *tiles, *grads, *turned, *bias; /* a tile for each level, the same, one, rows for each level */
    float *x, *dy, *made;                 /* of a batch of tokens: their columns, their rows, and what comes of them */
} Panel;

static long tile_numbers(const Tree *tree) { return PANEL * pitch(least(COLUMNS, tree->in)); }

static long thread_numbers(const Tree *tree) {
    long wide = pitch(least(COLUMNS, tree->in));
    return (2 * (tree->full + 1) + 1) * tile_numbers(tree) + (tree->full + 1) * PANEL + BATCH * (2 * wide + 2 * HIGH);
}

/* The panels of one of the threads. */
static Panel panel_of(const Tree *tree, const Division *division, long thread, long threads, float *work) {
    long begin = division->cuts ? division->cuts[thread] : 0, end = division->cuts ? division->cuts[thread + 1] : division->count;
    long numbers = tile_numbers(tree), levels = (tree->full + 1) * numbers, wide = pitch(least(COLUMNS, tree->in));
    const Step *steps = division->steps + begin;
    work += thread * thread_numbers(tree);
    float *batch = work + 2 * levels + numbers + (tree->full + 1) * PANEL;
    return (Panel){.tree = tree,
                   .steps = steps,
                   .count = end - begin,
                   .tokens = {tokens_of(tree, steps).begin, begin < end ? tokens_of(tree, steps + (end - begin - 1)).end : 0},
                   .first = division->cuts ? 0 : division->panels * thread / threads,
                   .end = division->cuts ? division->panels : division->panels * (thread + 1) / threads,
                   .tiles = work,
                   .grads = work + levels,
                   .turned = work + 2 * levels,
                   .bias = work + 2 * levels + numbers,
                   .x = batch,
                   .dy = batch + BATCH * wide,
                   .made = batch + BATCH * (wide + HIGH)};
}

static void place_panel(Panel *panel, long p, long most_rows, long q) {
    panel->p = p, panel->rows = least(most_rows, panel->tree->out - p);
    panel->q = q, panel->columns = least(COLUMNS, panel->tree->in - q), panel->wide = padded(panel->columns);
}

static float *tile_of(const Panel *panel, float *tiles, long level) { return tiles + level * tile_numbers(panel->tree); }

/* The part of a stored node that the panel is about; zeros where it is missing. */
static Rows rows_at(const Panel *panel, long row) {
    const Tree *tree = panel->tree;
    if (row < 0) return ZEROS;
    return (Rows){tree->nodes.weight.at + row * tree->nodes.weight.step + panel->p * tree->in + panel->q, tree->in};
}

static Rows node_of(const Panel *panel, const Step *step) {
    return rows_at(panel, panel->tree->row[panel->tree->bounds[step->level] + step->node]);
}

/* The part of the next node, if that lies in one piece. */
static Ahead ahead_of(const Panel *panel, const Step *step) {
    if (step + 1 >= panel->steps + panel->count || panel->columns < panel->tree->in) return NOTHING;
    Rows next = node_of(panel, step + 1);
    return (Ahead){next.at, next.at + (next.step ? panel->rows * panel->columns : 0)};
}

static Rows above(const Panel *panel, const Step *step) { return step->level ? panel->sums[step->level - 1] : ZEROS; }

/* Add a node to the sum above it. */
static void descend(Panel *panel, const Step *step, Ahead *ahead) {
    float *tile = tile_of(panel, panel->tiles, step->level);
    int is_last = step->level == panel->tree->full; /* then there will be products */
    add_to(above(panel, step), node_of(panel, step), panel->rows, panel->columns, tile, ahead, !is_last);
    panel->sums[step->level] = (Rows){tile, pitch(panel->columns)};
}

static void descend_bias(Panel *panel, const Step *step) {
    const Tree *tree = panel->tree;
    long row = tree->row[tree->bounds[step->level] + step->node];
    float *sum = panel->bias + step->level * PANEL;
    for (long i = 0; i < PANEL; i++) {
        float here = row < 0 || i >= panel->rows ? 0 : tree->nodes.bias.at[row * tree->nodes.bias.step + panel->p + i];
        sum[i] = step->level ? sum[i - PANEL] + here : here;
    }
}

/* The node of a level on the way to a step. */
static Step passed(const Tree *tree, const Step *step, long level) {
    Step up = *step;
    for (; up.level > level; up.level--) up.node = tree->parent[tree->bounds[up.level] + up.node];
    return up;
}

/* Walk to the first step, where it is not a root; returns how many nodes are passed. */
static long arrive(Panel *panel, Step *way) {
    long levels = panel->count ? panel->steps->level : 0;
    Ahead nothing = NOTHING;
    for (long level = 0; level < levels; level++) {
        way[level] = passed(panel->tree, panel->steps, level);
        descend(panel, way + level, &nothing);
    }
    return levels;
}

/* Fetch the part of some tokens that the panel is about. */
static void take_x(const Panel *panel, const float *x, long token, long tokens) {
    const Tree *tree = panel->tree;
    take(x + panel->q, tree->in, tree->source + token, tokens, panel->columns, panel->x, pitch(panel->columns));
}

static void take_dy(const Panel *panel, const float *dy, long token, long tokens) {
    take(dy + panel->p, panel->tree->out, panel->tree->order + token, tokens, panel->rows, panel->dy, HIGH);
}
