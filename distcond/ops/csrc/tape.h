/* What a recurrent loop is given, the memory of what it leaves for backward, and its matrix in strips. */
#define WIDE (STRIP * V) /* columns of a strip */
#define CHUNK (1 << 20)  /* least numbers of a piece of the tape */

typedef struct {
    int64_t batch, length, width, max_steps, cell, halts, records;
    float least; /* 1 - epsilon */
    const int64_t *lengths;
    const float *given;            /* [T, B, gates, width] */
    const float *weight;           /* [gates, width, 1 + width], of the flag and of the state */
    int64_t row;                   /* numbers from one of its rows to the next */
    const float *halting;          /* [width], scaled, or NULL */
    float bias;
    float *outputs, *remainder;    /* [T, B, width]; [T, B] */
    int64_t *steps;                /* [T, B] */
} Net;

typedef struct {
    const float *outputs, *remainder; /* given: [T, B, width]; [T, B] */
    float *given;                     /* [T, B, gates, width] */
    float *weight;                    /* [gates, width, 1 + width], rows one after the other */
    float *halting;                   /* [width + 1], of the scaled weights and the bias */
} Gradients;

typedef struct Piece {
    struct Piece *next;
    size_t size, used;
    float *at;
} Piece;

typedef struct {
    long count;
    int *local;       /* places among the rows that began the time step */
    int *from;        /* places among the rows of the step before; NULL: all ran on */
    int *runs_on;
    float *before[2], *after[2], *made, *weight, *h;
} Step;

typedef struct {
    long count, num_steps;
    int *rows;
    Step *steps;
} Time;

typedef struct {
    Piece *pieces;
    Time *times;
    long first, rows; /* sequences of this thread */
} Part;

typedef struct {
    long threads;
    Part *parts;
} Tape;

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

static Piece *spare = NULL;

static Piece *piece_of(size_t numbers) {
    Piece *found = NULL;
#pragma omp critical(distcond_pieces)
    for (Piece **at = &spare; *at; at = &(*at)->next)
        if ((*at)->size >= numbers) {
            found = *at, *at = found->next;
            break;
        }
    if (!found) {
        found = malloc(sizeof(Piece));
        found->size = numbers > CHUNK ? numbers : CHUNK;
        found->at = aligned_alloc(64, (found->size * sizeof(float) + 63) / 64 * 64);
    }
    found->used = 0;
    return found;
}

static void *take(Part *part, size_t numbers) {
    numbers = (numbers + 15) / 16 * 16;
    if (!part->pieces || part->pieces->used + numbers > part->pieces->size) {
        Piece *piece = piece_of(numbers);
        piece->next = part->pieces, part->pieces = piece;
    }
    float *at = part->pieces->at + part->pieces->used;
    part->pieces->used += numbers;
    return at;
}

static void give_back(Part *part) {
#pragma omp critical(distcond_pieces)
    while (part->pieces) {
        Piece *piece = part->pieces;
        part->pieces = piece->next;
        piece->next = spare, spare = piece;
    }
}

static float *zeros(size_t numbers) {
    float *at = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
    memset(at, 0, numbers * sizeof(float));
    return at;
}

/* ---- the matrix, packed ---------------------------------------------------------------------------------------------- */

/* [columns / WIDE, numbers, WIDE]: rows of what is multiplied from the left, in strips; padding is zero. */
typedef struct {
    long numbers, columns;
    float *at;
} Packed;

static Packed pack(const Net *net, int turned, int threads) {
    long width = padded(net->width), outputs = GATES[net->cell] * width;
    Packed packed = {turned ? outputs : width, turned ? width : outputs, NULL};
    long strips = (packed.columns + WIDE - 1) / WIDE;
    packed.at = zeros(strips * packed.numbers * WIDE);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < outputs; block += V) /* a block of outputs lies in one gate, and in one strip */
        for (long j = 0; j < net->width; j += V)
            for (long i = block; i < block + V && i % width < net->width; i++) {
                const float *row = net->weight + (i / width * net->width + i % width) * net->row + 1;
                long numbers = least(V, net->width - j);
                if (turned)
                    memcpy(packed.at + (j / WIDE * packed.numbers + i) * WIDE + j % WIDE, row + j, numbers * sizeof(float));
                for (long k = j; !turned && k < j + numbers; k++)
                    packed.at[(i / WIDE * packed.numbers + k) * WIDE + i % WIDE] = row[k];
            }
    return packed;
}

/* c [rows, columns] += a [rows, numbers] times the packed matrix. */
static void multiply(const Packed *packed, long rows, const float *a, long a_row, float *c, long c_row) {
    Ahead nothing = {NULL, NULL};
    for (long at = 0; at < packed->columns; at += WIDE)
        add_product(rows, least(WIDE, packed->columns - at), packed->numbers, a, a_row, 1, packed->at + at * packed->numbers, WIDE,
                    c + at, c_row, &nothing);
}
