/* Products of tokens with one matrix each, [in, out], of those of a flattened tree; tokens of a matrix follow each other.
 *
 * Threads take some tokens of a matrix at a time, and of that some rows, which lie in one piece, and of these some columns,
 * which the first cache holds.
 */
#define SHARE 128 /* most tokens that are taken at a time */
#define DEEP 128  /* most rows */
#define STRIP_NUMBERS (STRIP * V)

typedef struct {
    int64_t tokens, groups, leaves, in, out;
    const int64_t *order, *source; /* as in a Tree */
    const int64_t *start, *matrix; /* of each group: its first sorted token, and its matrix; `leaves`: none */
    const float *weight, *bias;    /* [leaves, in, out], [leaves, out] */
} Flat;

typedef struct {
    long matrix, begin, end;
} Share;

/* What is to be done; returns how many shares. */
static long shares_of(const Flat *flat, Share *shares) {
    long count = 0;
    for (long group = 0; group < flat->groups; group++) {
        long end = group + 1 < flat->groups ? flat->start[group + 1] : flat->tokens;
        for (long at = flat->start[group]; at < end && flat->matrix[group] < flat->leaves; at += SHARE)
            shares[count++] = (Share){flat->matrix[group], at, least(at + SHARE, end)};
    }
    return count;
}

static long flat_numbers(const Flat *flat) { return SHARE * (DEEP + V) + DEEP * STRIP_NUMBERS + SHARE * pitch(flat->out); }

static Ahead rows_ahead(const Flat *flat, long matrix, long q) {
    const float *at = flat->weight + (matrix * flat->in + q) * flat->out;
    return (Ahead){at, at + least(DEEP, flat->in - q) * flat->out};
}

static void flat_share(const Flat *flat, const Share *share, const Share *next, const float *x, float *y, float *work) {
    long tokens = share->end - share->begin, wide = pitch(flat->out);
    float *from = work, *tile = from + SHARE * (DEEP + V), *made = tile + DEEP * STRIP_NUMBERS;
    for (long i = 0; i < tokens; i++) copy(made + i * wide, flat->bias + share->matrix * flat->out, flat->out);
    for (long q = 0; q < flat->in; q += DEEP) {
        long deep = least(DEEP, flat->in - q);
        const float *weight = flat->weight + (share->matrix * flat->in + q) * flat->out;
        Ahead ahead = NOTHING;
        if (q + DEEP < flat->in)
            ahead = rows_ahead(flat, share->matrix, q + DEEP);
        else if (next && next->matrix != share->matrix)
            ahead = rows_ahead(flat, next->matrix, 0);
        take(x + q, flat->in, flat->source + share->begin, tokens, deep, from, DEEP + V);
        for (long p = 0; p < flat->out; p += STRIP_NUMBERS) {
            long rows = least(STRIP_NUMBERS, flat->out - p), high = padded(rows);
            for (long j = 0; j < deep; j++) {
                if (tokens < 4 * ROWS) look(&ahead, STRIP);
                for (long i = 0; i < rows; i += V)
                    store(tile + j * high + i, load_some(weight + j * flat->out + p + i, rows - i));
            }
            if (q + DEEP >= flat->in && high == rows) {
                Emit to = {y + p, flat->out, NULL, 0, flat->order + share->begin, 1};
                put_product(tokens, high, deep, from, DEEP + V, 1, tile, high, made + p, wide, &to, &ahead);
                continue;
            }
            add_product(tokens, high, deep, from, DEEP + V, 1, tile, high, made + p, wide, &ahead);
            if (q + DEEP >= flat->in) put(made + p, wide, flat->order + share->begin, tokens, rows, y + p, flat->out, 0);
        }
    }
}

/* Numbers of `work` that the function below needs. */
int64_t distcond_flat_work(const Flat *flat, int threads) { return threads * flat_numbers(flat); }

/* y [tokens, out] from x [.., in]. */
void distcond_flat(const Flat *flat, const float *x, float *y, float *work, int threads) {
    Share *shares = malloc((flat->groups + flat->tokens / SHARE + 1) * sizeof(Share));
    long count = shares_of(flat, shares);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long number = 0; number < count; number++)
        flat_share(flat, shares + number, number + 1 < count ? shares + number + 1 : NULL, x, y,
                   work + thread_number() * flat_numbers(flat));
    free(shares);
}
