/* The product of tokens with the sum of the matrices on their path through a tree, and its gradient. fp32.
 *
 * Full levels: the matrices are cut into panels of some rows, and the tree is walked depth first once for each panel. On
 * the way down the panel of a node is added to the sum above it, at the last full level that sum is multiplied with the
 * node's tokens; on the way up the panel of the gradient, formed at the last full level, is written and added to the one
 * above. So every number is read from memory once, every gradient written once, both in the order in which they lie, and
 * all between stays in the caches. Low-rank levels: by runs of tokens with the same nodes.
 *
 * Threads share nothing that they write: they own runs of leaves of the full levels, or panels where one leaf has most of the
 * tokens, and subtrees below. What runs have in common, the nodes above their borders, is summed in the end.
 */
#include "tiles.h"
#include "few.h"
#include "tree.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#include "adam.h"
#include "panels.h"
#include "gates.h"
#include "chain.h"
#include "low_rank.h"
#include "path.h"

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

#include "flat.h"

/* ---- full levels ---------------------------------------------------------------------------------------------------- */

#define TURN_FROM 17 /* tokens of a leaf: to turn the sum takes longer than the products of fewer, FEW at a time */

/* Outputs of the tokens of a node of the last full level, as far as the panel goes. */
static void leaf_forward(const Panel *panel, const Step *step, const float *x, float *y, Ahead *ahead) {
    const Tree *tree = panel->tree;
    Tokens of = tokens_of(tree, step);
    long last = tree->full, token = of.begin, end = of.end;
    Rows sum = above(panel, step), node = node_of(panel, step);
    long rows = padded(panel->rows), wide = pitch(panel->columns);
    int is_few = end - token < TURN_FROM;
    if (!is_few) turn(sum, node, panel->rows, panel->columns, panel->turned);
    for (; token < end; token += BATCH) {
        long tokens = least(BATCH, end - token);
        take_x(panel, x, token, tokens);
        if (panel->q) take(y + panel->p, tree->out, tree->order + token, tokens, panel->rows, panel->made, HIGH);
        for (long i = 0; i < tokens && !panel->q; i++)
            memcpy(panel->made + i * HIGH, panel->bias + last * PANEL, rows * sizeof(float));
        if (is_few)
            for (long at = 0; at < tokens; at += FEW)
                few_forward(least(FEW, tokens - at), sum, node, panel->rows, panel->columns, panel->x + at * wide, wide,
                            panel->made + at * HIGH, HIGH, ahead);
        else if (rows == panel->rows) {
            Emit to = {y + panel->p, tree->out, NULL, 0, tree->order + token, 1};
            put_product(tokens, rows, panel->columns, panel->x, wide, 1, panel->turned, rows, panel->made, HIGH, &to, ahead);
            continue;
        } else
            add_product(tokens, rows, panel->columns, panel->x, wide, 1, panel->turned, rows, panel->made, HIGH, ahead);
        put(panel->made, HIGH, tree->order + token, tokens, panel->rows, y + panel->p, tree->out, 0);
    }
}

static void panel_forward(Panel *panel, const float *x, float *y) {
    Step way[64];
    long levels = arrive(panel, way);
    for (long level = 0; level < levels && panel->q == 0; level++) descend_bias(panel, way + level);
    for (const Step *step = panel->steps; step < panel->steps + panel->count; step++) {
        if (panel->q == 0) descend_bias(panel, step);
        Ahead ahead = ahead_of(panel, step);
        if (step->level < panel->tree->full) {
            descend(panel, step, &ahead);
            continue;
        }
        leaf_forward(panel, step, x, y, &ahead);
        look(&ahead, PANEL * COLUMNS / V);
    }
}

static void full_forward(const Tree *tree, const float *x, float *y, float *work, int threads) {
    Division division = division_of(tree, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long thread = 0; thread < threads; thread++) {
        Panel panel = panel_of(tree, &division, thread, threads, work);
        for (long number = panel.first; number < panel.end; number++)
            for (long q = 0; q < tree->in; q += COLUMNS) {
                place_panel(&panel, number * division.rows, division.rows, q);
                panel_forward(&panel, x, y);
            }
    }
    forget(&division);
}

/* Gradients at the last full level: of the tokens, and of the node, written and added to that above. Returns whether the sum
 * of the matrices is there now, as a tile. */
static int leaf_backward(Panel *panel, const Step *step, const float *x, const float *dy, float *dx, int is_first_panel,
                         float *out, int is_first) {
    const Tree *tree = panel->tree;
    Tokens of = tokens_of(tree, step);
    long last = tree->full, begin = of.begin, tokens = of.end - begin, wide = panel->wide, width = pitch(panel->columns);
    const int64_t *order = tree->order + begin;
    float *grad = tile_of(panel, panel->grads, last), *grad_above = last ? tile_of(panel, panel->grads, last - 1) : NULL;
    Ahead ahead = ahead_of(panel, step);
    dx += panel->q;
    if (tokens <= FEW) {
        Rows sum = above(panel, step), node = node_of(panel, step);
        take_x(panel, x, begin, tokens);
        take_dy(panel, dy, begin, tokens);
        few_back(tokens, sum, node, panel->rows, panel->columns, panel->dy, HIGH, panel->made, width, &ahead);
        put(panel->made, width, order, tokens, panel->columns, dx, tree->in, !is_first_panel);
        few_outer(tokens, panel->dy, HIGH, panel->x, width, panel->rows, panel->columns, out, tree->in, grad_above, is_first);
        return 0;
    }
    descend(panel, step, &ahead);
    const float *sum = panel->sums[last].at;
    Emit emit = {out, tree->in, grad_above, width, NULL, is_first};
    int emits = panel->columns == wide; /* whole vectors */
    for (long at = 0; at < tokens; at += BATCH) {
        long batch = least(BATCH, tokens - at);
        take_x(panel, x, begin + at, batch);
        take_dy(panel, dy, begin + at, batch);
        if (emits && at + BATCH >= tokens)
            give_product(panel->rows, wide, batch, panel->dy, 1, HIGH, panel->x, width, at ? grad : NULL, width, &emit, &ahead);
        else if (at == 0)
            product(panel->rows, wide, batch, panel->dy, 1, HIGH, panel->x, width, grad, width, &ahead);
        else
            add_product(panel->rows, wide, batch, panel->dy, 1, HIGH, panel->x, width, grad, width, &ahead);
        if (emits) {
            Emit rows = {dx, tree->in, NULL, 0, order + at, is_first_panel};
            put_product(batch, wide, panel->rows, panel->dy, HIGH, 1, sum, width, NULL, 0, &rows, &ahead);
            continue;
        }
        product(batch, wide, panel->rows, panel->dy, HIGH, 1, sum, width, panel->made, width, &ahead);
        put(panel->made, width, order + at, batch, panel->columns, dx, tree->in, !is_first_panel);
    }
    look(&ahead, PANEL * COLUMNS / V);
    if (!emits) give(grad, out, tree->in, panel->rows, panel->columns, grad_above, is_first);
    return 1;
}

static void add_bias_gradient(Panel *panel, const Step *step, const float *dy) {
    const Tree *tree = panel->tree;
    Tokens of = tokens_of(tree, step);
    float *sum = panel->bias + step->level * PANEL;
    memset(sum, 0, PANEL * sizeof(float));
    for (long token = of.begin; token < of.end; token++)
        scaled(sum, 1, dy + tree->order[token] * tree->out + panel->p, panel->rows, 1);
}

/* One panel of the gradients of full nodes, and what it adds to those of the tokens. Nodes that are open before the first step
 * or behind the last one have descendants in other runs: `sum_shared`. */
static void panel_backward(Panel *panel, const float *x, const float *dy, float *dx, int is_first_panel, const Nodes *out,
                           const Learn *learn, float *through) {
    const Tree *tree = panel->tree;
    Step way[64];
    long last = tree->full, open[64], shared = arrive(panel, way);
    int is_first[64];
    for (long level = 0; level < shared; level++) {
        if (level && learn->levels >> level & 1) multiplier_gradient(panel, way + level, x, dy, learn, through);
        open[level] = tree->bounds[level] + way[level].node;
        is_first[level] = 1;
    }
    for (const Step *step = panel->steps; step < panel->steps + panel->count; step++) {
        long level = step->level;
        if (level && learn->levels >> level & 1) multiplier_gradient(panel, step, x, dy, learn, through);
        shared = least(shared, level);
        open[level] = tree->bounds[level] + step->node;
        is_first[level] = 1;
        if (level < last) {
            Ahead ahead = ahead_of(panel, step);
            descend(panel, step, &ahead);
            continue;
        }
        if (panel->q == 0) add_bias_gradient(panel, step, dy);
        for (; level >= step[1].level && level >= shared; level--) { /* what is complete */
            float *grad = tile_of(panel, panel->grads, level),
                  *grad_above = level ? tile_of(panel, panel->grads, level - 1) : NULL;
            float *to = (float *)out->weight.at + open[level] * out->weight.step + panel->p * tree->in + panel->q;
            int sets = level && is_first[level - 1];
            if (level == last) {
                int is_formed = leaf_backward(panel, step, x, dy, dx, is_first_panel, to, sets);
                if (learn->count) flip_gradient(panel, step, open, is_formed, x, dy, learn, through);
            } else
                give(grad, to, tree->in, panel->rows, panel->columns, grad_above, sets);
            if (panel->q == 0) {
                const float *bias = panel->bias + level * PANEL;
                memcpy((float *)out->bias.at + open[level] * out->bias.step + panel->p, bias, panel->rows * sizeof(float));
                if (level) scaled(panel->bias + (level - 1) * PANEL, 1, bias, PANEL, !sets);
            }
            if (level) is_first[level - 1] = 0;
        }
    }
}

/* Gradients of the nodes whose descendants several runs have in common: sums of those of their children. */
static void sum_shared(const Tree *tree, const Division *division, const Nodes *out, int threads) {
    for (long level = tree->full - 1; level >= 0; level--)
        for (long run = 1, before = -1; run < threads; run++) {
            const Step *border = division->steps + division->cuts[run];
            if (border->level <= level) continue; /* the last step, behind all runs, is of level 0 */
            long node = passed(tree, border, level).node, size = level_size(tree, level + 1);
            const int64_t *parent = tree->parent + tree->bounds[level + 1];
            if (node == before) continue;
            before = node;
            float *weight = (float *)out->weight.at + (tree->bounds[level] + node) * out->weight.step;
            float *bias = (float *)out->bias.at + (tree->bounds[level] + node) * out->bias.step;
            long child = 0;
            while (parent[child] < node) child++;
            for (long first = child; child < size && parent[child] == node; child++) {
                long from = tree->bounds[level + 1] + child;
                scaled(weight, 1, out->weight.at + from * out->weight.step, tree->out * tree->in, child > first);
                scaled(bias, 1, out->bias.at + from * out->bias.step, tree->out, child > first);
            }
        }
}

/* dx, through: of the first thread; more_dx, and behind it: a part for each of the others. Returns the parts of dx. */
static int full_backward(const Tree *tree, const float *x, const float *dy, float *dx, float *more_dx, const Nodes *out,
                         const Learn *learn, float *through, float *work, int threads) {
    Division division = division_of(tree, threads);
    long wanted = columns_of(learn);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long thread = 0; thread < threads; thread++) {
        Panel panel = panel_of(tree, &division, thread, threads, work);
        float *own_dx = thread && !division.cuts ? more_dx + (thread - 1) * tree->tokens * tree->in : dx;
        float *own_through = through + thread * tree->tokens * wanted;
        memset(own_through, 0, tree->tokens * wanted * sizeof(float));
        for (long number = panel.first; number < panel.end; number++)
            for (long q = 0; q < tree->in; q += COLUMNS) {
                place_panel(&panel, number * division.rows, division.rows, q);
                panel_backward(&panel, x, dy, own_dx, number == panel.first, out, learn, own_through);
            }
    }
    int parts = division.cuts ? 1 : threads;
    if (division.cuts) sum_shared(tree, &division, out, threads);
    forget(&division);
    return parts;
}

/* ---- entries -------------------------------------------------------------------------------------------------------- */

/* Threads that can have a panel each. */
static int useful_threads(const Tree *tree, int threads) { return (int)least(threads, (tree->out + V - 1) / V); }

/* Numbers of `work` that the functions below need. */
int64_t distcond_work(const Tree *tree, int64_t wanted, int threads) {
    threads = useful_threads(tree, threads);
    return tree->tokens * ((threads - 1) * tree->in + threads * wanted) + threads * thread_numbers(tree) + 16;
}

/* y [tokens, out] from x [.., in]. */
void distcond_forward(const Tree *tree, const float *x, float *y, float *work, int threads) {
    full_forward(tree, x, y, work, useful_threads(tree, threads));
    if (tree->full < tree->depth) low_forward(tree, x, y, threads);
}

/* Add parts behind each other, [parts, count], to the first one, which lies elsewhere. */
static void add_parts(float *first, const float *others, long parts, long count, int threads) {
    enum { PIECE = 4096 };
#pragma omp parallel for num_threads(threads) if (parts)
    for (long at = 0; at < count * (parts > 0); at += PIECE)
        for (long part = 0; part < parts; part++) scaled(first + at, 1, others + part * count + at, least(PIECE, count - at), 1);
}

/* Gradients: dx [tokens, in]; of the nodes, in the order of `start`, the low-rank ones for themselves; of what the gates learn
 * from, [tokens, wanted], the levels in their order, the flips behind them. */
void distcond_backward(const Tree *tree, const float *x, const float *dy, float *dx, const Nodes *out, const Learn *learn,
                       float *through, float *work, int threads) {
    long tokens = tree->tokens, wanted = columns_of(learn);
    int parts = useful_threads(tree, threads);
    float *more_dx = work + parts * thread_numbers(tree), *through_sorted = more_dx + (parts - 1) * tokens * tree->in;
    float *more_through = through_sorted + tokens * wanted;
    int dx_parts = full_backward(tree, x, dy, dx, more_dx, out, learn, through_sorted, work, parts);
    add_parts(dx, more_dx, dx_parts - 1, tokens * tree->in, threads);
    add_parts(through_sorted, more_through, parts - 1, tokens * wanted, threads);
    take_own(tree, x, dx, learn, through_sorted, threads);
    if (tree->full < tree->depth) low_backward(tree, x, dy, dx, out, learn, through_sorted, threads);
    put(through_sorted, wanted, tree->order, tokens, wanted, through, wanted, 0);
}
