/* Tiles: [rows, columns] of a matrix, padded to whole vectors with zeros, that stay in the second cache. */
#include "vectors.h"

#define COLUMNS MOST_WIDE /* most columns of a tile */
#define PANEL 128         /* most rows: a wider panel reads tokens less often, a narrower one stays in the cache */

typedef struct {
    const float *at;
    long step; /* numbers from one row to the next */
} Rows;

static const Rows ZEROS = {zero_numbers, 0}; /* stands for any tile of zeros */
static const Rows NONE = {NULL, 0};
static const Ahead NOTHING = {NULL, NULL};

/* The first numbers of a vector, zeros after them. */
INLINE vec load_some(const float *from, long numbers) {
    if (numbers >= V) return load(from);
    vec some = {0};
    memcpy(&some, from, numbers * sizeof(float));
    return some;
}

/* V numbers of row i of above + node (both: 0: of node alone) from column j, of which so many are left. */
INLINE vec sum_at(const int both, Rows above, Rows node, long i, long j, long left) {
    vec sum = load_some(node.at + i * node.step + j, left);
    if (both) sum += load_some(above.at + i * above.step + j, left);
    return sum;
}

INLINE void store_some(float *to, vec value, long numbers) {
    if (numbers >= V)
        stream(to, value);
    else
        memcpy(to, &value, numbers * sizeof(float));
}

/* tile [rows, columns] = above + node. */
static void add_to(Rows above, Rows node, long rows, long columns, float *tile, Ahead *ahead, int look_here) {
    for (long i = 0; i < rows; i++, tile += pitch(columns)) {
        Fetch next = look_here ? fetch(ahead, columns / V) : (Fetch){node.at, 0};
        long j = 0;
        for (; j + V <= columns; j += V) fetch_on(&next), store(tile + j, sum_at(1, above, node, i, j, V));
        if (j < columns) store(tile + j, sum_at(1, above, node, i, j, columns - j));
    }
}

/* Write a tile to [rows, columns] of a matrix, and add it to that of the node above (first: set it). */
static void give(const float *tile, float *to, long step, long rows, long columns, float *above, int first) {
    long width = pitch(columns);
    for (long i = 0; i < rows; i++, to += step, tile += width, above += above ? width : 0) {
        long j = 0;
        for (; j + V <= columns; j += V) stream(to + j, load(tile + j));
        if (j < columns) store_some(to + j, load(tile + j), columns - j);
        if (above && first) memcpy(above, tile, padded(columns) * sizeof(float));
        if (above && !first)
            for (j = 0; j < columns; j += V) store(above + j, load(above + j) + load(tile + j));
    }
}

/* Up to V x V numbers of above + node, turned in log2(V) rounds of exchanges between rows whose numbers differ in one bit. */
INLINE void transpose_block(Rows above, Rows node, long i, long j, long rows, long columns, float *to, long to_row) {
    vec row[V];
    lanes number;
    for (int k = 0; k < V; k++) number[k] = k;
    if (rows - i >= V && columns - j >= V) {
#pragma GCC unroll 16
        for (int k = 0; k < V; k++) row[k] = sum_at(1, above, node, i + k, j, V);
    } else
        for (int k = 0; k < V; k++) {
            row[k] = (vec){0};
            if (i + k < rows) row[k] = sum_at(1, above, node, i + k, j, columns - j);
        }
#pragma GCC unroll 4
    for (int bit = V / 2; bit > 0; bit /= 2) {
        lanes is_high = (number & bit) != 0; /* -1 where it is */
        lanes low = number + (is_high & (V - bit)), high = number + bit + (is_high & (V - bit));
#pragma GCC unroll 16
        for (int k = 0; k < V; k++)
            if (!(k & bit)) {
                vec one = row[k], other = row[k + bit];
                row[k] = __builtin_shuffle(one, other, low);
                row[k + bit] = __builtin_shuffle(one, other, high);
            }
    }
#pragma GCC unroll 16
    for (int k = 0; k < V; k++) store(to + k * to_row, row[k]);
}

/* to [columns, rows], both padded, = transpose of above + node. */
static void turn(Rows above, Rows node, long rows, long columns, float *to) {
    for (long i = 0; i < rows; i += V)
        for (long j = 0; j < columns; j += V)
            transpose_block(above, node, i, j, rows, columns, to + j * padded(rows) + i, padded(rows));
}
