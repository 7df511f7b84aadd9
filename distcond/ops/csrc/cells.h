/* What follows the matrix of a recurrent cell, and its gradient; see distcond/nn/cells.py. One row, padded width. */
enum { TANH, LSTM, GRU };

static const long GATES[] = {1, 4, 4}, STATES[] = {1, 2, 1}, SAVED[] = {1, 5, 4};

/* made: outputs of the matrix [gates, width], replaced by what backward needs [saved, width]. */
static void cell_forward(int cell, long width, float *made, float *const before[2], float *const after[2]) {
    for (long j = 0; j < width; j += V) {
        float *at = made + j;
        if (cell == TANH) {
            vec state = tanh_of(load(at));
            store(at, state), store(after[0] + j, state);
        } else if (cell == LSTM) {
            vec write = sigmoid_of(load(at)), forget = sigmoid_of(load(at + width)), read = sigmoid_of(load(at + 2 * width));
            vec candidate = tanh_of(load(at + 3 * width));
            vec memory = forget * load(before[1] + j) + write * candidate, seen = tanh_of(memory);
            store(at, write), store(at + width, forget), store(at + 2 * width, read), store(at + 3 * width, candidate);
            store(at + 4 * width, seen), store(after[0] + j, read * seen), store(after[1] + j, memory);
        } else {
            vec reset = sigmoid_of(load(at)), keep = sigmoid_of(load(at + width)), of_state = load(at + 3 * width);
            vec candidate = tanh_of(load(at + 2 * width) + reset * of_state);
            store(at, reset), store(at + width, keep), store(at + 2 * width, candidate);
            store(after[0] + j, candidate + keep * (load(before[0] + j) - candidate));
        }
    }
}

INLINE vec of_sigmoid(vec gradient, vec value) { return gradient * value * (all(1.0f) - value); }
INLINE vec of_tanh(vec gradient, vec value) { return gradient * (all(1.0f) - value * value); }

/* grads: of the state after, replaced by those of the state before where the cell reads it beside the matrix (else 0);
 * out [gates, width]: of the outputs of the matrix. */
static void cell_backward(int cell, long width, const float *made, float *const before[2], float *const grads[2], float *out) {
    for (long j = 0; j < width; j += V) {
        const float *at = made + j;
        float *to = out + j;
        vec grad = load(grads[0] + j);
        if (cell == TANH) {
            store(to, of_tanh(grad, load(at))), store(grads[0] + j, (vec){0});
        } else if (cell == LSTM) {
            vec write = load(at), forget = load(at + width), read = load(at + 2 * width), candidate = load(at + 3 * width);
            vec seen = load(at + 4 * width), of_memory = load(grads[1] + j) + of_tanh(grad * read, seen);
            store(to, of_sigmoid(of_memory * candidate, write));
            store(to + width, of_sigmoid(of_memory * load(before[1] + j), forget));
            store(to + 2 * width, of_sigmoid(grad * seen, read));
            store(to + 3 * width, of_tanh(of_memory * write, candidate));
            store(grads[0] + j, (vec){0}), store(grads[1] + j, of_memory * forget);
        } else {
            vec reset = load(at), keep = load(at + width), candidate = load(at + 2 * width), of_state = load(at + 3 * width);
            vec of_candidate = of_tanh(grad * (all(1.0f) - keep), candidate);
            store(to, of_sigmoid(of_candidate * of_state, reset));
            store(to + width, of_sigmoid(grad * (load(before[0] + j) - candidate), keep));
            store(to + 2 * width, of_candidate), store(to + 3 * width, of_candidate * reset);
            store(grads[0] + j, grad * keep);
        }
    }
}
