/* The product of tokens with the sum of the matrices on their path through a tree, and its gradient. fp32.
 *
 * Full levels: the matrices are cut into panels of some rows, and the tree is walked depth first once for each panel. On
 * the way down the panel of a node is added to the sum above it, at the last full level that sum is multiplied with the
 * node's tokens; on the way up the panel of the gradient, formed at the last full level, is written and added to the one
 * above. So every number is read from memory once, every gradient written once, both in the order in which they lie, and
 * all between stays in the caches. Low-rank levels: by runs of tokens with the same nodes.
 *
 * Threads share nothing that they write: they own panels of the full levels, and subtrees below.
 */
#include "tiles.h"
#include "few.h"
#include "tree.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define BATCH 64 /* tokens whose strip of numbers stays in the first cache */

#include "adam.h"
#include "panels.h"
#include "gates.h"
#include "chain.h"
#include "low_rank.h"
#include "path.h"

/* ---- full levels ---------------------------------------------------------------------------------------------------- */

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static void full_forward(const Tree *tree, const float *x, float *y, float *work, int threads) {
    long width = pitch(tree->in), height = pitch(tree->out), rows = panel_rows(tree, threads), last = tree->full;
    Step *steps = malloc((tree->bounds[last + 1] + 1) * sizeof(Step));
    long count = walk(tree, steps);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < tree->out; p += rows) {
        Panel panel = panel_of(tree, steps, count, work + thread_number() * thread_numbers(tree));
        for (long q = 0; q < tree->in; q += COLUMNS) {
            place_panel(&panel, p, rows, q);
            for (const Step *step = steps; step < steps + count; step++) {
                if (q == 0) descend_bias(&panel, step);
                Ahead ahead = ahead_of(&panel, step);
                if (step->level < last) {
                    descend(&panel, step, &ahead);
                    continue;
                }
                long begin = tree->start[tree->bounds[last] + step->node], end = node_end(tree, last, step->node);
                for (long token = begin; token < end && q == 0; token++)
                    memcpy(y + token * height + p, panel.bias + last * PANEL, padded(panel.rows) * sizeof(float));
                apply(&panel, above(&panel, step), node_of(&panel, step), end - begin, x + begin * width + q, width,
                      y + begin * height + p, height, &ahead);
                look(&ahead, PANEL * COLUMNS / V);
            }
        }
    }
    free(steps);
}

/* Gradients at the last full level: of the tokens, and of the node, written and added to that above. Returns whether the sum
 * of the matrices is there now, as a tile. */
static int leaf_backward(Panel *panel, const Step *step, const float *x, const float *dy, float *dx, int is_first_panel,
                          float *out, int is_first) {
    const Tree *tree = panel->tree;
    long width = pitch(tree->in), height = pitch(tree->out), last = tree->full;
    long begin = tree->start[tree->bounds[last] + step->node], tokens = node_end(tree, last, step->node) - begin;
    x += begin * width + panel->q, dx += begin * width + panel->q, dy += begin * height + panel->p;
    float *grad = tile_of(panel, panel->grads, last), *grad_above = last ? tile_of(panel, panel->grads, last - 1) : NULL;
    Ahead ahead = ahead_of(panel, step);
    if (tokens <= FEW) {
        Rows sum = above(panel, step), node = node_of(panel, step);
        few_back(tokens, sum, node, panel->rows, panel->columns, dy, height, dx, width, !is_first_panel, &ahead);
        few_outer(tokens, dy, height, x, width, panel->rows, panel->columns, out, tree->in, grad_above, is_first);
        return 0;
    }
    descend(panel, step, &ahead);
    const float *sum = panel->sums[last].at;
    long step_of_tile = pitch(panel->columns), wide = panel->wide;
    for (long at = 0; at < tokens; at += BATCH, x += BATCH * width, dy += BATCH * height, dx += BATCH * width) {
        long batch = least(BATCH, tokens - at);
        if (at == 0)
            product(panel->rows, wide, batch, dy, 1, height, x, width, grad, step_of_tile, &ahead);
        else
            add_product(panel->rows, wide, batch, dy, 1, height, x, width, grad, step_of_tile, &ahead);
        if (is_first_panel)
            product(batch, wide, panel->rows, dy, height, 1, sum, step_of_tile, dx, width, &ahead);
        else
            add_product(batch, wide, panel->rows, dy, height, 1, sum, step_of_tile, dx, width, &ahead);
    }
    look(&ahead, PANEL * COLUMNS / V);
    give(grad, out, tree->in, panel->rows, panel->columns, grad_above, is_first);
    return 1;
}

static void add_bias_gradient(Panel *panel, const Step *step, const float *dy) {
    long height = pitch(panel->tree->out), end = node_end(panel->tree, step->level, step->node);
    float *sum = panel->bias + step->level * PANEL;
    memset(sum, 0, PANEL * sizeof(float));
    for (long token = panel->tree->start[panel->tree->bounds[step->level] + step->node]; token < end; token++)
        scaled(sum, 1, dy + token * height + panel->p, panel->rows, 1);
}

/* One panel of the gradients of all full nodes, and what it adds to those of the tokens. */
static void panel_backward(Panel *panel, const float *x, const float *dy, float *dx, int is_first_panel, const Nodes *out,
                           const Learn *learn, float *through) {
    const Tree *tree = panel->tree;
    long last = tree->full, open[64];
    int is_first[64];
    for (const Step *step = panel->steps; step < panel->steps + panel->count; step++) {
        long level = step->level;
        if (level && learn->levels >> level & 1) multiplier_gradient(panel, step, x, dy, learn, through);
        open[level] = tree->bounds[level] + step->node;
        is_first[level] = 1;
        if (level < last) {
            Ahead ahead = ahead_of(panel, step);
            descend(panel, step, &ahead);
            continue;
        }
        if (panel->q == 0) add_bias_gradient(panel, step, dy);
        for (; level >= step[1].level; level--) { /* what is complete */
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

/* dx, through: a part for each thread. */
static void full_backward(const Tree *tree, const float *x, const float *dy, float *dx, const Nodes *out, const Learn *learn,
                          float *through, float *work, int threads) {
    long rows = panel_rows(tree, threads), wanted = columns_of(learn);
    Step *steps = malloc((tree->bounds[tree->full + 1] + 1) * sizeof(Step));
    long count = walk(tree, steps), panels = (tree->out + rows - 1) / rows;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long thread = 0; thread < threads; thread++) {
        Panel panel = panel_of(tree, steps, count, work + thread * thread_numbers(tree));
        float *own_dx = dx + thread * tree->tokens * pitch(tree->in), *own_through = through + thread * tree->tokens * wanted;
        long begin = panels * thread / threads, end = panels * (thread + 1) / threads;
        memset(own_through, 0, tree->tokens * wanted * sizeof(float));
        for (long number = begin; number < end; number++)
            for (long q = 0; q < tree->in; q += COLUMNS) {
                place_panel(&panel, number * rows, rows, q);
                panel_backward(&panel, x, dy, own_dx, number == begin, out, learn, own_through);
            }
    }
    free(steps);
}

/* ---- entries -------------------------------------------------------------------------------------------------------- */

/* Threads that have a panel each. */
static int useful_threads(const Tree *tree, int threads) { return (int)least(threads, (tree->out + V - 1) / V); }

/* Numbers of `work` that the functions below need. */
int64_t distcond_work(const Tree *tree, int64_t wanted, int threads) {
    threads = useful_threads(tree, threads);
    return tree->tokens * ((1 + threads) * pitch(tree->in) + pitch(tree->out) + threads * wanted) +
           threads * thread_numbers(tree) + 16;
}

/* y [tokens, out] from x [tokens, in]. */
void distcond_forward(const Tree *tree, const float *x, float *y, float *work, int threads) {
    float *x_sorted = work, *y_sorted = x_sorted + tree->tokens * pitch(tree->in);
    gather(x, tree->in, tree->order, tree->tokens, x_sorted, threads);
    full_forward(tree, x_sorted, y_sorted, y_sorted + tree->tokens * pitch(tree->out), useful_threads(tree, threads));
    if (tree->full < tree->depth) low_forward(tree, x_sorted, y_sorted, threads);
    scatter(y_sorted, 1, tree->out, tree->order, tree->tokens, y, threads);
}

/* Gradients: dx [tokens, in]; of the nodes, in the order of `start`, the low-rank ones for themselves; of what the gates learn
 * from, [tokens, wanted], the levels in their order, the flips behind them. */
void distcond_backward(const Tree *tree, const float *x, const float *dy, float *dx, const Nodes *out, const Learn *learn,
                       float *through, float *work, int threads) {
    long tokens = tree->tokens, width = pitch(tree->in), wanted = columns_of(learn);
    int parts = useful_threads(tree, threads);
    float *x_sorted = work, *dy_sorted = x_sorted + tokens * width, *dx_sorted = dy_sorted + tokens * pitch(tree->out);
    float *through_sorted = dx_sorted + parts * tokens * width;
    gather(x, tree->in, tree->order, tokens, x_sorted, threads);
    gather(dy, tree->out, tree->order, tokens, dy_sorted, threads);
    full_backward(tree, x_sorted, dy_sorted, dx_sorted, out, learn, through_sorted, through_sorted + parts * tokens * wanted,
                  parts);
    for (long at = tokens * wanted; at < parts * tokens * wanted; at++)
        through_sorted[at % (tokens * wanted)] += through_sorted[at];
    take_own(tree, x_sorted, dx_sorted, parts, learn, through_sorted, threads);
    if (tree->full < tree->depth)
        low_backward(tree, x_sorted, dy_sorted, dx_sorted, out, learn, through_sorted, threads);
    scatter(dx_sorted, parts, tree->in, tree->order, tokens, dx, threads);
    for (long token = 0; token < tokens; token++)
        memcpy(through + tree->order[token] * wanted, through_sorted + token * wanted, wanted * sizeof(float));
}
