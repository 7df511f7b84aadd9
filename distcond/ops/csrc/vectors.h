/* Vectors, and products of matrices that lie in the caches. fp32.
 *
 * Vectors are GCC's own, so that one source serves AVX-512, AVX2 and NEON.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define V 16
#define STRIP 4   /* vectors of a row that a block keeps in registers */
#define NARROW 12 /* rows of a block of fewer vectors */
#elif defined(__AVX__)
#define V 8
#define STRIP 2
#define NARROW 6
#else
#define V 4
#define STRIP 4
#define NARROW 8
#endif
#define ROWS 6 /* rows of a block: ROWS x STRIP accumulators, STRIP vectors, one factor */

typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * V)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec all(float value) { return value - (vec){0}; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long padded(long numbers) { return (numbers + V - 1) / V * V; }

/* GCC would make a call or a loop of bytes of memcpy. */
INLINE void copy(float *to, const float *from, long numbers) {
    long at = 0;
    for (; at + V <= numbers; at += V) store(to + at, load(from + at));
    for (; at < numbers; at++) to[at] = from[at];
}

/* From one row to the next: padded, and not by a power of two, with which rows would push each other out of the first cache. */
INLINE long pitch(long numbers) { return padded(numbers) + (padded(numbers) % 64 ? 0 : V); }

/* Past the caches, where the address allows it: what is written here is read again by nobody soon. */
INLINE void stream(float *to, vec value) {
#if defined(__AVX512F__)
    if ((uintptr_t)to % 64 == 0) {
        _mm512_stream_ps(to, (__m512)value);
        return;
    }
#elif defined(__AVX__)
    if ((uintptr_t)to % 32 == 0) {
        _mm256_stream_ps(to, (__m256)value);
        return;
    }
#endif
    store(to, value);
}

/* What memory is to be asked for while there is something to compute: a piece that lies in one. */
typedef struct {
    const float *at, *end;
} Ahead;

/* Ask for the next `lines` vectors, at once. */
INLINE void look(Ahead *ahead, long lines) {
    for (; lines > 0 && ahead->at < ahead->end; lines--, ahead->at += V) __builtin_prefetch(ahead->at, 0, 2);
}

/* Vectors to ask for one by one, as there is something to compute: a core that waits for many at once computes nothing. */
typedef struct {
    const float *at;
    long step; /* 0: they are not there, and what is asked for is asked for again */
} Fetch;

/* The next `lines` vectors. */
INLINE Fetch fetch(Ahead *ahead, long lines) {
    Fetch part = {ahead->at, ahead->end - ahead->at >= lines * V ? V : 0};
    ahead->at += part.step * lines;
    return part;
}

INLINE void fetch_on(Fetch *part) { __builtin_prefetch(part->at, 0, 2), part->at += part->step; }

#define MOST_WIDE 512 /* columns of a product at most */
static const float zero_numbers[MOST_WIDE];

/* Where a product goes instead of to c. GIVE: past the caches to rows `step` apart, and to a sum, if there is one. PUT: to rows
 * in any order. first: sum, or rows, hold nothing yet that it is to be added to. Whole vectors alone: a block that could write
 * some numbers of one would keep its sums in memory, and take 1.5 times as long. */
enum { KEEP, GIVE, PUT };
typedef struct {
    float *to;
    long step;
    float *sum;
    long sum_step;
    const int64_t *row;
    int first;
} Emit;

/* c [m, n vectors] = from + a [m, k] b [k, n vectors]; all sizes but k known when it is compiled. */
INLINE void block(const int m, const int n, long k, const float *a, long a_row, long a_step, const float *b, long b_step,
                  const float *from, long from_row, float *c, long c_row, const int how, const Emit *emit, Ahead *ahead) {
    Fetch next = fetch(ahead, k);
    vec sum[NARROW][STRIP];
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) sum[i][j] = load(from + i * from_row + j * V);
    for (long at = 0; at < k; at++) {
        vec right[STRIP];
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) right[j] = load(b + at * b_step + j * V);
        fetch_on(&next);
#pragma GCC unroll 12
        for (int i = 0; i < m; i++) {
            vec left = all(a[i * a_row + at * a_step]);
#pragma GCC unroll 4
            for (int j = 0; j < n; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            float *to = c + i * c_row;
            if (how == GIVE) {
                stream(emit->to + i * emit->step + j * V, sum[i][j]);
                if (!emit->sum) continue;
                to = emit->sum + i * emit->sum_step;
            }
            if (how == PUT) to = emit->to + emit->row[i] * emit->step;
            if (how != KEEP && !emit->first) sum[i][j] += load(to + j * V);
            store(to + j * V, sum[i][j]);
        }
}

/* A strip of n vectors, in blocks of nearly equal numbers of rows, at most `most`. */
INLINE void strip(const int n, const int most, long m, long k, const float *a, long a_row, long a_step, const float *b,
                  long b_step, const float *from, long from_row, float *c, long c_row, const int how, const Emit *emit,
                  Ahead *ahead) {
    Emit here = how == KEEP ? (Emit){0} : *emit;
    for (long blocks = (m + most - 1) / most; blocks > 0; blocks--) {
        long rows = (m + blocks - 1) / blocks;
#define CASE(rows)                                                                                                               \
    case rows:                                                                                                                   \
        if (rows <= most) block(rows, n, k, a, a_row, a_step, b, b_step, from, from_row, c, c_row, how, &here, ahead);           \
        break;
        switch (rows) {
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
            CASE(5)
            CASE(6)
#if NARROW > 6
            CASE(7)
            CASE(8)
#endif
#if NARROW > 8
                CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
        m -= rows, a += rows * a_row, from += rows * from_row, c += c ? rows * c_row : 0;
        if (how == GIVE) here.to += rows * here.step, here.sum += here.sum ? rows * here.sum_step : 0;
        if (how == PUT) here.row += rows;
    }
}

/* What is emitted of the columns from `at` on. */
INLINE Emit emit_from(const Emit *emit, long at) {
    Emit part = *emit;
    part.to += at, part.sum += part.sum ? at : 0;
    return part;
}

/* c [m, n] = from + a [m, k] b [k, n]; n a multiple of V; a by strides of its own, so that it may be a transpose. */
INLINE void product_of(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step,
                       const float *from, long from_row, float *c, long c_row, const int how, const Emit *emit, Ahead *ahead) {
    long at = 0;
#define STRIPS(vectors, most)                                                                                                    \
    for (; at + (vectors) * V <= n; at += (vectors) * V) {                                                                       \
        Emit part = how == KEEP ? (Emit){0} : emit_from(emit, at);                                                               \
        strip(vectors, most, m, k, a, a_row, a_step, b + at, b_step, from + at, from_row, c ? c + at : c, c_row, how, &part,     \
              ahead);                                                                                                            \
    }
    STRIPS(STRIP, ROWS)
#if STRIP > 2
    STRIPS(2, NARROW)
#endif
    STRIPS(1, NARROW)
}

static void keep_product(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step,
                         const float *from, long from_row, float *c, long c_row, Ahead *ahead) {
    product_of(m, n, k, a, a_row, a_step, b, b_step, from, from_row, c, c_row, KEEP, NULL, ahead);
}

/* c [m, n] = a [m, k] b [k, n]. */
INLINE void product(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step, float *c,
                    long c_row, Ahead *ahead) {
    keep_product(m, n, k, a, a_row, a_step, b, b_step, zero_numbers, 0, c, c_row, ahead);
}

/* c [m, n] += a [m, k] b [k, n]. */
INLINE void add_product(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step, float *c,
                        long c_row, Ahead *ahead) {
    keep_product(m, n, k, a, a_row, a_step, b, b_step, c, c_row, c, c_row, ahead);
}

/* from (NULL: 0) + a b, given on. */
static inline void give_product(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step,
                                const float *from, long from_row, const Emit *emit, Ahead *ahead) {
    product_of(m, n, k, a, a_row, a_step, b, b_step, from ? from : zero_numbers, from ? from_row : 0, NULL, 0, GIVE, emit, ahead);
}

/* The same, put or added where its rows belong. */
static inline void put_product(long m, long n, long k, const float *a, long a_row, long a_step, const float *b, long b_step,
                               const float *from, long from_row, const Emit *emit, Ahead *ahead) {
    product_of(m, n, k, a, a_row, a_step, b, b_step, from ? from : zero_numbers, from ? from_row : 0, NULL, 0, PUT, emit, ahead);
}

/* The sum of the numbers of a vector. */
INLINE float total(vec numbers) {
#if V == 16
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    union {
        vec all;
        half halves[2];
    } cut = {numbers};
    union {
        half all;
        quarter quarters[2];
    } more = {cut.halves[0] + cut.halves[1]};
    quarter four = more.quarters[0] + more.quarters[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
#else
    float sum = 0;
    for (int j = 0; j < V; j++) sum += numbers[j];
    return sum;
#endif
}

static float dot(const float *a, const float *b, long numbers) {
    vec sum[4] = {{0}, {0}, {0}, {0}};
    long at = 0;
    for (; at + 4 * V <= numbers; at += 4 * V)
        for (int j = 0; j < 4; j++) sum[j] += load(a + at + j * V) * load(b + at + j * V);
    for (; at + V <= numbers; at += V) sum[0] += load(a + at) * load(b + at);
    float whole = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; at < numbers; at++) whole += a[at] * b[at];
    return whole;
}

/* to = (add: +=) factor * from. */
static void scaled(float *to, float factor, const float *from, long numbers, int add) {
    long at = 0;
    if (add)
        for (; at + V <= numbers; at += V) store(to + at, load(to + at) + all(factor) * load(from + at));
    else
        for (; at + V <= numbers; at += V) store(to + at, all(factor) * load(from + at));
    for (; at < numbers; at++) to[at] = (add ? to[at] : 0) + factor * from[at];
}
