/* Products of few tokens with above + node, a sum that is formed on the way and not kept. Tokens are padded with zeros. */
#define FEW 4

INLINE void few_column(const int n, const int m, Rows above, Rows node, long j, long left, const float *x, long width,
                       vec sum[4][FEW], Fetch *next) {
#pragma GCC unroll 4
    for (int k = 0; k < m; k++) {
        fetch_on(next);
        vec here = sum_at(1, above, node, k, j, left);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) sum[k][t] += here * load(x + t * width + j);
    }
}

/* y [n, m] += x (above + node)^T of m rows. */
INLINE void few_rows(const int n, const int m, Rows above, Rows node, long columns, const float *x, long width, float *y,
                     long height, Fetch *next) {
    vec sum[4][FEW];
    long j = 0;
#pragma GCC unroll 4
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) sum[k][t] = (vec){0};
    for (; j + V <= columns; j += V) few_column(n, m, above, node, j, V, x, width, sum, next);
    if (j < columns) few_column(n, m, above, node, j, columns - j, x, width, sum, next);
#pragma GCC unroll 4
    for (int k = 0; k < m; k++)
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) y[t * height + k] += total(sum[k][t]);
}

INLINE void forward_of(const int n, Rows above, Rows node, long rows, long columns, const float *x, long width, float *y,
                       long height, Ahead *ahead) {
    long lines = padded(columns) / V;
    for (long i = 0, m; i < rows; i += m) {
        Rows one = {above.at + i * above.step, above.step}, other = {node.at + i * node.step, node.step};
        m = rows - i >= 4 ? 4 : 1;
        Fetch next = fetch(ahead, m * lines);
        if (m == 4)
            few_rows(n, 4, one, other, columns, x, width, y + i, height, &next);
        else
            few_rows(n, 1, one, other, columns, x, width, y + i, height, &next);
    }
}

INLINE void few_strip(const int n, const int vectors, const int both, Rows above, Rows node, long rows, long j, long left,
                      const float *dy, long height, float *dx, long width, Fetch *next) {
    vec sum[FEW][STRIP];
#pragma GCC unroll 4
    for (int t = 0; t < n; t++)
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) sum[t][s] = (vec){0};
    for (long i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) {
            fetch_on(next);
            vec here = sum_at(both, above, node, i, j + s * V, left);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) sum[t][s] += all(dy[t * height + i]) * here;
        }
#pragma GCC unroll 4
    for (int t = 0; t < n; t++)
#pragma GCC unroll 4
        for (int s = 0; s < vectors; s++) store(dx + t * width + j + s * V, sum[t][s]);
}

INLINE void back_of(const int n, const int both, Rows above, Rows node, long rows, long columns, const float *dy, long height,
                    float *dx, long width, Ahead *ahead) {
    long j = 0;
    for (; j + STRIP * V <= columns; j += STRIP * V) {
        Fetch next = fetch(ahead, rows * STRIP);
        few_strip(n, STRIP, both, above, node, rows, j, V, dy, height, dx, width, &next);
    }
    for (; j < columns; j += V) {
        Fetch next = fetch(ahead, rows);
        few_strip(n, 1, both, above, node, rows, j, columns - j, dy, height, dx, width, &next);
    }
}

INLINE void few_vector(const int n, const float *dy, long height, const float *x, long width, long left, float *to, float *above,
                       int first) {
    vec sum = all(dy[0]) * load(x);
#pragma GCC unroll 4
    for (int t = 1; t < n; t++) sum += all(dy[t * height]) * load(x + t * width);
    store_some(to, sum, left);
    if (!above) return;
    if (!first) sum += load(above);
    store(above, sum);
}

INLINE void outer_of(const int n, const float *dy, long height, const float *x, long width, long rows, long columns, float *to,
                     long step, float *above, int first) {
    for (long i = 0; i < rows; i++, to += step, above += above ? pitch(columns) : 0) {
        long j = 0;
        for (; j + V <= columns; j += V) few_vector(n, dy + i, height, x + j, width, V, to + j, above ? above + j : NULL, first);
        if (j < columns) few_vector(n, dy + i, height, x + j, width, columns - j, to + j, above ? above + j : NULL, first);
    }
}

#define FOR_FEW(tokens, of, ...)                                                                                                 \
    switch (tokens) {                                                                                                            \
    case 1: of(1, __VA_ARGS__); break;                                                                                           \
    case 2: of(2, __VA_ARGS__); break;                                                                                           \
    case 3: of(3, __VA_ARGS__); break;                                                                                           \
    case 4: of(4, __VA_ARGS__); break;                                                                                           \
    }

/* y [tokens, rows] += x (above + node)^T, tokens <= FEW; x is padded with zeros. */
static void few_forward(long tokens, Rows above, Rows node, long rows, long columns, const float *x, long width, float *y,
                        long height, Ahead *ahead) {
    FOR_FEW(tokens, forward_of, above, node, rows, columns, x, width, y, height, ahead)
}

/* dx [tokens, columns] = dy (above + node), tokens <= FEW; dx is padded. above: none where its address is NULL. */
static void few_back(long tokens, Rows above, Rows node, long rows, long columns, const float *dy, long height, float *dx,
                     long width, Ahead *ahead) {
    if (above.at)
        FOR_FEW(tokens, back_of, 1, above, node, rows, columns, dy, height, dx, width, ahead)
    else
        FOR_FEW(tokens, back_of, 0, above, node, rows, columns, dy, height, dx, width, ahead)
}

/* to [rows, columns] = dy^T x, tokens <= FEW, and added to the tile above (first: set), which is padded, like x. */
static void few_outer(long tokens, const float *dy, long height, const float *x, long width, long rows, long columns, float *to,
                      long step, float *above, int first) {
    FOR_FEW(tokens, outer_of, dy, height, x, width, rows, columns, to, step, above, first)
}
