/* Adam on rows: one pass over each, in place. */

typedef struct {
    float beta1, beta2, eps;
} Adam;

/* w = decay w - size m / (sqrt(v) / root + eps), after the moments took the gradient in. */
INLINE void adam_vector(const Adam *adam, vec gradient, float *data, float *first, float *second, float decay, float size,
                        float root) {
    vec m = load(first), v = load(second), denominator;
    m += all(1 - adam->beta1) * (gradient - m);
    v = all(adam->beta2) * v + all(1 - adam->beta2) * gradient * gradient;
#if defined(__AVX512F__)
    denominator = (vec)_mm512_sqrt_ps((__m512)v);
#else
    for (int j = 0; j < V; j++) denominator[j] = __builtin_sqrtf(v[j]);
#endif
    store(first, m);
    store(second, v);
    store(data, all(decay) * load(data) - all(size) * m / (denominator / all(root) + all(adam->eps)));
}

/* The sum of squares, of pieces that are added in their order. */
double distcond_square(const float *numbers, int64_t count, int threads) {
    enum { PIECE = 1 << 14, SUMS = 32 };
    long pieces = (count + PIECE - 1) / PIECE;
    double *parts = malloc((pieces + 1) * sizeof(double)), sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long piece = 0; piece < pieces; piece++) {
        long at = piece * PIECE, end = least(at + PIECE, count);
        double some[SUMS] = {0};
        for (; at + SUMS <= end; at += SUMS)
            for (int j = 0; j < SUMS; j++) some[j] += (double)numbers[at + j] * numbers[at + j];
        for (; at < end; at++) some[0] += (double)numbers[at] * numbers[at];
        for (int j = 1; j < SUMS; j++) some[0] += some[j];
        parts[piece] = some[0];
    }
    for (long piece = 0; piece < pieces; piece++) sum += parts[piece];
    free(parts);
    return sum;
}

/* Rows of data and moments, [.., width]; gradient [count, width]; decay, size, root: one for each row. */
void distcond_adam(const Adam *adam, const int64_t *rows, int64_t count, int64_t width, const float *gradient, float *data,
                   float *first, float *second, const float *decay, const float *size, const float *root, int threads) {
    enum { PIECE = 1 << 14 };
    long pieces = (width + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long number = 0; number < count * pieces; number++) {
        long at = number / pieces, begin = number % pieces * PIECE, end = least(begin + PIECE, width), row = rows[at] * width;
        long next = pieces == 1 && at + 1 < count ? rows[at + 1] * width : row; /* is fetched meanwhile: it may lie anywhere */
        for (long j = begin; j + V <= end; j += V) {
            __builtin_prefetch(data + next + j, 1);
            __builtin_prefetch(first + next + j, 1);
            __builtin_prefetch(second + next + j, 1);
            adam_vector(adam, load(gradient + at * width + j), data + row + j, first + row + j, second + row + j, decay[at],
                        size[at], root[at]);
        }
        long tail = begin + (end - begin) / V * V, left = end - tail;
        float spare[4][V] = {{0}};
        if (!left) continue;
        memcpy(spare[0], gradient + at * width + tail, left * sizeof(float));
        memcpy(spare[1], data + row + tail, left * sizeof(float));
        memcpy(spare[2], first + row + tail, left * sizeof(float));
        memcpy(spare[3], second + row + tail, left * sizeof(float));
        adam_vector(adam, load(spare[0]), spare[1], spare[2], spare[3], decay[at], size[at], root[at]);
        memcpy(data + row + tail, spare[1], left * sizeof(float));
        memcpy(first + row + tail, spare[2], left * sizeof(float));
        memcpy(second + row + tail, spare[3], left * sizeof(float));
    }
}
