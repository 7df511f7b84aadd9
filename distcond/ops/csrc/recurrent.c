/* A recurrent cell of one matrix under adaptive computation, over whole sequences, and its gradient. fp32.
 *
 * Every thread takes sequences of its own from their first step to their last, so none waits for another; rows that halt
 * leave, so the products shrink. What backward needs is kept on a tape of memory that is used again by the next batch.
 * The matrix is multiplied in strips of columns that are packed once a pass.
 */
#include "vectors.h"
#include "activations.h"
#include "cells.h"
#include <math.h>
#include "tape.h"

#define COLLECTED (1 << 19) /* most numbers of gradients that are collected before they are multiplied */

/* ---- forward --------------------------------------------------------------------------------------------------------- */

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* The outputs of the matrix, to which the state's part is still to be added. */
static void start_outputs(const Net *net, const Time *time, const Step *step, const float *given, int is_first) {
    long width = padded(net->width), gates = GATES[net->cell], numbers = SAVED[net->cell] * width;
    for (long i = 0; i < step->count; i++) {
        const float *from = given + time->rows[step->local[i]] * gates * net->width;
        for (long gate = 0; gate < gates; gate++, from += net->width) {
            float *to = step->made + i * numbers + gate * width;
            memcpy(to, from, net->width * sizeof(float));
            memset(to + net->width, 0, (width - net->width) * sizeof(float));
            for (long j = 0; is_first && j < net->width; j++) to[j] += net->weight[(gate * net->width + j) * net->row];
        }
    }
}

/* The next step of the rows that run on; count 0: there are none. */
static Step next_step(const Net *net, Part *part, const Step *step) {
    long width = padded(net->width), states = STATES[net->cell];
    Step next = {.local = take(part, step->count), .from = take(part, step->count)};
    for (long i = 0; i < step->count; i++)
        if (step->runs_on[i]) next.local[next.count] = step->local[i], next.from[next.count++] = i;
    for (long s = 0; s < states; s++) {
        next.before[s] = next.count == step->count ? step->after[s] : take(part, next.count * width);
        for (long i = 0; next.count < step->count && i < next.count; i++)
            memcpy(next.before[s] + i * width, step->after[s] + next.from[i] * width, width * sizeof(float));
    }
    if (next.count == step->count) next.from = NULL;
    return next;
}

/* Halting probability, and with it the weight of the state; whether any row runs on. */
static int halt(const Net *net, const Step *step, int is_last, float *spent, float *left, int64_t *steps, long number) {
    long width = padded(net->width);
    int anyone = 0;
    for (long i = 0; i < step->count; i++) {
        long place = step->local[i];
        steps[place] = number;
        if (!net->halts) {
            step->weight[i] = is_last, step->runs_on[i] = anyone = 1;
            continue;
        }
        float h = sigmoid(dot(step->after[0] + i * width, net->halting, net->width) + net->bias);
        int runs_on = !is_last && !(spent[place] + h >= net->least); /* NaN runs on */
        step->h[i] = h, step->runs_on[i] = runs_on;
        step->weight[i] = runs_on ? h : 1.0f - spent[place];
        if (runs_on)
            spent[place] += h, anyone = 1;
        else
            left[place] = step->weight[i];
    }
    return anyone;
}

/* One time step of the thread's rows: their states become the mean-field states. */
static void ponder(const Net *net, const Packed *packed, Part *part, Time *time, float *const state[2], long t, float *work) {
    long width = padded(net->width), states = STATES[net->cell], numbers = SAVED[net->cell] * width, count = 0;
    time->rows = take(part, part->rows);
    for (long row = 0; row < part->rows; row++)
        if (net->lengths[part->first + row] > t) time->rows[count++] = row;
    time->count = count, time->num_steps = 0;
    if (!count) return;
    float *spent = work, *left = work + part->rows, *mean[2] = {work + 2 * part->rows, work + (2 + width) * part->rows};
    int64_t *steps = (int64_t *)(work + (2 + 2 * width) * part->rows);
    memset(work, 0, (2 + 2 * width) * part->rows * sizeof(float));
    Step step = {.count = count, .local = take(part, count)};
    for (long s = 0; s < states; s++) {
        step.before[s] = take(part, count * width);
        for (long i = 0; i < count; i++)
            memcpy(step.before[s] + i * width, state[s] + time->rows[i] * width, width * sizeof(float));
    }
    for (long i = 0; i < count; i++) step.local[i] = i;
    const float *given = net->given + (t * net->batch + part->first) * GATES[net->cell] * net->width;
    long room = 4;
    time->steps = take(part, room * sizeof(Step) / sizeof(float));
    for (long number = 1; step.count; number++) {
        if (time->num_steps == room) {
            Step *more = take(part, 2 * room * sizeof(Step) / sizeof(float));
            memcpy(more, time->steps, room * sizeof(Step));
            time->steps = more, room *= 2;
        }
        step.made = take(part, step.count * numbers);
        step.weight = take(part, step.count), step.h = take(part, step.count), step.runs_on = take(part, step.count);
        for (long s = 0; s < states; s++) step.after[s] = take(part, step.count * width);
        start_outputs(net, time, &step, given, number == 1);
        multiply(packed, step.count, step.before[0], width, step.made, numbers);
        for (long i = 0; i < step.count; i++) {
            float *before[2] = {step.before[0] + i * width, step.before[1] + i * width};
            float *after[2] = {step.after[0] + i * width, step.after[1] + i * width};
            cell_forward(net->cell, width, step.made + i * numbers, before, after);
        }
        int is_last = number == net->max_steps, anyone = halt(net, &step, is_last, spent, left, steps, number);
        for (long s = 0; s < states; s++)
            for (long i = 0; i < step.count; i++)
                if (net->halts || is_last)
                    scaled(mean[s] + step.local[i] * width, step.weight[i], step.after[s] + i * width, width, 1);
        time->steps[time->num_steps++] = step;
        if (is_last || !anyone) break;
        step = next_step(net, part, &step);
    }
    for (long i = 0; i < count; i++) {
        long place = t * net->batch + part->first + time->rows[i];
        for (long s = 0; s < states; s++)
            memcpy(state[s] + time->rows[i] * width, mean[s] + i * width, width * sizeof(float));
        net->steps[place] = steps[i], net->remainder[place] = left[i];
    }
}

static void forward_part(const Net *net, const Packed *packed, Part *part) {
    long width = padded(net->width);
    float *work = zeros((4 + 4 * width) * part->rows), *state[2] = {work, work + width * part->rows};
    for (long t = 0; t < net->length; t++) {
        ponder(net, packed, part, &part->times[t], state, t, work + 2 * width * part->rows);
        for (long row = 0; row < part->rows; row++)
            memcpy(net->outputs + (t * net->batch + part->first + row) * net->width, state[0] + row * width,
                   net->width * sizeof(float));
        if (!net->records) give_back(part);
    }
    free(work);
}

/* Outputs, steps and remainders of all sequences; the tape for backward, which distcond_tape_free takes. */
Tape *distcond_recurrent_forward(const Net *net, int threads) {
    Tape *tape = malloc(sizeof(Tape));
    Packed packed = pack(net, 0, threads);
    tape->threads = threads;
    tape->parts = calloc(threads, sizeof(Part));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long number = 0; number < threads; number++) {
        Part *part = tape->parts + number;
        part->first = net->batch * number / threads;
        part->rows = net->batch * (number + 1) / threads - part->first;
        part->times = calloc(net->length, sizeof(Time));
        forward_part(net, &packed, part);
    }
    free(packed.at);
    return tape;
}

void distcond_tape_free(Tape *tape) {
    for (long number = 0; number < tape->threads; number++) {
        give_back(tape->parts + number);
        free(tape->parts[number].times);
    }
    free(tape->parts);
    free(tape);
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

/* What a thread adds up, and what it has collected: gradients of the outputs of the matrix, and the states that they met. */
typedef struct {
    float *weight, *flag, *halting; /* [gates, width, width]; [gates, width]; [width + 1]: all padded */
    float *outputs, *states;
    long count, room;
} Sums;

static void flush(const Net *net, Sums *sums) {
    long width = padded(net->width), outputs = GATES[net->cell] * width;
    Ahead nothing = {NULL, NULL};
    for (long at = 0; at < width && sums->count; at += WIDE)
        add_product(outputs, least(WIDE, width - at), sums->count, sums->outputs, 1, outputs, sums->states + at, width,
                    sums->weight + at, width, &nothing);
    sums->count = 0;
}

/* What the halting probability of row i passes on to its state (Graves 2016, equations 14 and 19); N counts as a constant. */
static void halting_gradient(const Net *net, const Step *step, long i, float *const grads[2], float left, float *at_last,
                             float *own, Sums *sums) {
    long width = padded(net->width), place = step->local[i];
    float along = 0;
    for (long s = 0; s < STATES[net->cell]; s++)
        along += dot(grads[s] + place * width, step->after[s] + i * width, width);
    if (!step->runs_on[i]) {
        at_last[place] = along;
        return;
    }
    float of_logit = (along - at_last[place] - left) * step->h[i] * (1.0f - step->h[i]);
    scaled(own, of_logit, net->halting, net->width, 1);
    scaled(sums->halting, of_logit, step->after[0] + i * width, width, 1);
    sums->halting[width] += of_logit;
}

/* From gradients of the mean-field states [rows, width] to those of the states before (in their place). work: zeros. */
static void ponder_backward(const Net *net, const Packed *packed, const Part *part, const Time *time, const Gradients *to,
                            float *const state[2], long t, float *work, Sums *sums) {
    long width = padded(net->width), states = STATES[net->cell], gates = GATES[net->cell], numbers = SAVED[net->cell] * width;
    long outputs = gates * width, size = part->rows * width;
    float *at_last = work, *given = work + part->rows, *grads[2], *own[2], *carried[2];
    for (long s = 0; s < 2; s++) {
        grads[s] = given + part->rows * outputs + 3 * s * size;
        own[s] = grads[s] + size, carried[s] = own[s] + size;
    }
    memset(given, 0, time->count * outputs * sizeof(float));
    for (long s = 0; s < states; s++)
        for (long i = 0; i < time->count; i++)
            memcpy(grads[s] + i * width, state[s] + time->rows[i] * width, width * sizeof(float));
    for (long number = time->num_steps - 1; number >= 0; number--) {
        const Step *step = time->steps + number, *later = number + 1 < time->num_steps ? step + 1 : NULL;
        if (sums->count + step->count > sums->room) flush(net, sums);
        float *out = sums->outputs + sums->count * outputs;
        for (long s = 0; s < states; s++) {
            for (long i = 0; i < step->count; i++)
                scaled(own[s] + i * width, step->weight[i], grads[s] + step->local[i] * width, width, 0);
            for (long i = 0; later && i < later->count; i++)
                scaled(own[s] + (later->from ? later->from[i] : i) * width, 1.0f, carried[s] + i * width, width, 1);
        }
        memcpy(sums->states + sums->count * width, step->before[0], step->count * width * sizeof(float));
        for (long i = 0; i < step->count; i++) {
            long row = time->rows[step->local[i]];
            float left = to->remainder[t * net->batch + part->first + row];
            float *before[2] = {step->before[0] + i * width, step->before[1] + i * width};
            float *of[2] = {own[0] + i * width, own[1] + i * width};
            if (net->halts) halting_gradient(net, step, i, grads, left, at_last, of[0], sums);
            cell_backward(net->cell, width, step->made + i * numbers, before, of, out + i * outputs);
            scaled(given + step->local[i] * outputs, 1.0f, out + i * outputs, outputs, 1);
            if (number == 0) scaled(sums->flag, 1.0f, out + i * outputs, outputs, 1);
        }
        for (long s = 0; s < states; s++) memcpy(carried[s], own[s], step->count * width * sizeof(float));
        multiply(packed, step->count, out, outputs, carried[0], width);
        sums->count += step->count;
    }
    for (long i = 0; i < time->count; i++) {
        for (long s = 0; s < states; s++)
            memcpy(state[s] + time->rows[i] * width, carried[s] + i * width, width * sizeof(float));
        float *place = to->given + (t * net->batch + part->first + time->rows[i]) * gates * net->width;
        for (long gate = 0; gate < gates; gate++)
            memcpy(place + gate * net->width, given + i * outputs + gate * width, net->width * sizeof(float));
    }
}

static void backward_part(const Net *net, const Packed *packed, const Part *part, const Gradients *to, Sums *sums) {
    long width = padded(net->width), outputs = GATES[net->cell] * width;
    float *work = zeros((1 + outputs + 8 * width) * part->rows + 16), *state[2] = {work, work + width * part->rows};
    sums->weight = zeros(outputs * width), sums->flag = zeros(outputs), sums->halting = zeros(width + V);
    sums->room = COLLECTED / (outputs + width) > part->rows ? COLLECTED / (outputs + width) : part->rows;
    sums->outputs = zeros(sums->room * outputs), sums->states = zeros(sums->room * width), sums->count = 0;
    for (long t = net->length - 1; t >= 0; t--) {
        for (long row = 0; row < part->rows; row++)
            scaled(state[0] + row * width, 1.0f, to->outputs + (t * net->batch + part->first + row) * net->width, net->width, 1);
        if (part->times[t].count) ponder_backward(net, packed, part, &part->times[t], to, state, t, work + 2 * width * part->rows, sums);
    }
    flush(net, sums);
    free(work), free(sums->outputs), free(sums->states);
}

/* Gradients of what a forward pass was given; `to->given` is zeros at first. */
void distcond_recurrent_backward(const Net *net, const Tape *tape, const Gradients *to) {
    long threads = tape->threads, width = padded(net->width), gates = GATES[net->cell];
    Packed packed = pack(net, 1, threads);
    Sums *sums = calloc(threads, sizeof(Sums));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long number = 0; number < threads; number++) backward_part(net, &packed, tape->parts + number, to, sums + number);
    for (long gate = 0; gate < gates; gate++)
        for (long i = 0; i < net->width; i++) {
            float *row = to->weight + (gate * net->width + i) * (1 + net->width);
            long from = gate * width + i;
            for (long number = 0; number < threads; number++) {
                row[0] = (number ? row[0] : 0) + sums[number].flag[from];
                scaled(row + 1, 1.0f, sums[number].weight + from * width, net->width, number > 0);
            }
        }
    for (long number = 0; number < threads; number++) {
        for (long j = 0; net->halts && j <= net->width; j++)
            to->halting[j] = (number ? to->halting[j] : 0) + sums[number].halting[j < net->width ? j : width];
        free(sums[number].weight), free(sums[number].flag), free(sums[number].halting);
    }
    free(sums), free(packed.at);
}
