/* Products of few tokens with the rows of all low-rank nodes on their path at once: a token is read once for all of them.
 *
 * Units: the hidden units of those nodes one after the other, [tokens, UNIT_STEP].
 */
#define MOST_ROWS 256 /* of one kind that are worked on at a time */
#define UNIT_STEP (MOST_ROWS + V)
#define RUN 16 /* tokens whose units are kept until their nodes' gradients are formed */

/* Some rows, the unit of each, and, of gradients, whether there is a sum to add to, and whether it is complete then. */
typedef struct {
    long count;
    const float *at[MOST_ROWS];
    int unit[MOST_ROWS];
    char add[MOST_ROWS], ends[MOST_ROWS];
} Stack;

/* What comes next, in pieces. */
typedef struct {
    Ahead piece[2 * 64];
    long count, next;
} Queue;

INLINE void look_on(Queue *queue, long lines) {
    for (; queue->next < queue->count && lines > 0; queue->next++) {
        Ahead *piece = &queue->piece[queue->next];
        long here = least(lines, (piece->end - piece->at + V - 1) / V);
        look(piece, here);
        lines -= here;
        if (piece->at < piece->end) return;
    }
}

INLINE void dots_block(const int n, const int m, const Stack *rows, long first, long columns, const float *const *x,
                       float *units) {
    const float *const *at = rows->at + first;
    vec sum[8][FEW];
    long j = 0;
#pragma GCC unroll 8
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) sum[k][t] = (vec){0};
    for (; j + V <= columns; j += V)
#pragma GCC unroll 8
        for (int k = 0; k < m; k++) {
            vec here = load(at[k] + j);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) sum[k][t] += here * load(x[t] + j);
        }
    if (j < columns)
#pragma GCC unroll 8
        for (int k = 0; k < m; k++) {
            vec here = load_some(at[k] + j, columns - j);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) sum[k][t] += here * load_some(x[t] + j, columns - j);
        }
#pragma GCC unroll 8
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) units[t * UNIT_STEP + rows->unit[first + k]] = total(sum[k][t]);
}

INLINE void dots_of(const int n, const Stack *rows, long columns, const float *const *x, float *units, Queue *queue) {
    long i = 0, lines = padded(columns) / V;
    if (n * 8 <= V) /* sums that registers hold */
        for (; i + 8 <= rows->count; i += 8) {
            look_on(queue, 8 * lines);
            dots_block(n, 8, rows, i, columns, x, units);
        }
    for (; i + 4 <= rows->count; i += 4) {
        look_on(queue, 4 * lines);
        dots_block(n, 4, rows, i, columns, x, units);
    }
    for (; i < rows->count; i++) {
        look_on(queue, lines);
        dots_block(n, 1, rows, i, columns, x, units);
    }
}

INLINE void sums_strip(const int n, const int vectors, const Stack *rows, long j, long left, const float *units,
                       float *const *y) {
    vec sum[FEW][2 * STRIP];
#pragma GCC unroll 4
    for (int t = 0; t < n; t++)
#pragma GCC unroll 8
        for (int s = 0; s < vectors; s++) sum[t][s] = load_some(y[t] + j + s * V, left);
    for (long i = 0; i < rows->count; i++)
#pragma GCC unroll 8
        for (int s = 0; s < vectors; s++) {
            vec here = load_some(rows->at[i] + j + s * V, left);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) sum[t][s] += all(units[t * UNIT_STEP + rows->unit[i]]) * here;
        }
#pragma GCC unroll 4
    for (int t = 0; t < n; t++)
#pragma GCC unroll 8
        for (int s = 0; s < vectors; s++)
            if (left < V)
                memcpy(y[t] + j + s * V, &sum[t][s], left * sizeof(float));
            else
                store(y[t] + j + s * V, sum[t][s]);
}

INLINE void sums_of(const int n, const Stack *rows, long columns, const float *units, float *const *y, Queue *queue) {
    long j = 0;
    if (n <= 2)
        for (; j + 2 * STRIP * V <= columns; j += 2 * STRIP * V) {
            look_on(queue, rows->count * 2 * STRIP);
            sums_strip(n, 2 * STRIP, rows, j, V, units, y);
        }
    for (; j + STRIP * V <= columns; j += STRIP * V) {
        look_on(queue, rows->count * STRIP);
        sums_strip(n, STRIP, rows, j, V, units, y);
    }
    for (; j < columns; j += V) sums_strip(n, 1, rows, j, columns - j, units, y);
}

/* units = x rows^T of at most FEW tokens. */
static void chain_dots(long tokens, const Stack *rows, long columns, const float *const *x, float *units, Queue *queue) {
    FOR_FEW(tokens, dots_of, rows, columns, x, units, queue)
}

/* y += units rows of at most FEW tokens. */
static void chain_sums(long tokens, const Stack *rows, long columns, const float *units, float *const *y,
                       Queue *queue){FOR_FEW(tokens, sums_of, rows, columns, units, y, queue)}

INLINE void outer_strip(const int m, const int vectors, long tokens, const Stack *rows, long first, long j, long left,
                        const float *units, const float *const *x) {
    vec sum[4][STRIP];
#pragma GCC unroll 4
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) {
            sum[k][s] = (vec){0};
            if (rows->add[first + k]) sum[k][s] = load_some(rows->at[first + k] + j + s * V, left);
        }
    for (long t = 0; t < tokens; t++) {
        vec here[STRIP];
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) here[s] = load_some(x[t] + j + s * V, left);
#pragma GCC unroll 4
        for (int k = 0; k < m; k++) {
            vec factor = all(units[t * UNIT_STEP + rows->unit[first + k]]);
#pragma GCC unroll 4
            for (int s = 0; s < vectors; s++) sum[k][s] += factor * here[s];
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) {
            float *to = (float *)rows->at[first + k] + j + s * V;
            if (left < V)
                memcpy(to, &sum[k][s], left * sizeof(float));
            else if (rows->ends[first + k])
                stream(to, sum[k][s]);
            else
                store(to, sum[k][s]);
        }
}

INLINE void outer_rows(const int m, long tokens, const Stack *rows, long first, long columns, const float *units,
                       const float *const *x) {
    long j = 0;
    for (; j + STRIP * V <= columns; j += STRIP * V) outer_strip(m, STRIP, tokens, rows, first, j, V, units, x);
    for (; j < columns; j += V) outer_strip(m, 1, tokens, rows, first, j, columns - j, units, x);
}

/* rows = (add: +=) units^T x. */
static void chain_outer(long tokens, const Stack *rows, long columns, const float *units, const float *const *x) {
    long i = 0;
    for (; i + 4 <= rows->count; i += 4) outer_rows(4, tokens, rows, i, columns, units, x);
    for (; i < rows->count; i++) outer_rows(1, tokens, rows, i, columns, units, x);
}
