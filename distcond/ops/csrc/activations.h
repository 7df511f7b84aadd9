/* exp, sigmoid and tanh of vectors, to two units in the last place; NaN stays NaN. */
typedef union {
    vec numbers;
    lanes bits;
} Both;

INLINE vec chosen(lanes is_first, vec first, vec other) {
    Both a = {first}, b = {other}, result;
    result.bits = (is_first & a.bits) | (~is_first & b.bits);
    return result.numbers;
}

/* 2^n e^r with n the nearest whole number to x / ln 2; the polynomial is Cephes' (expf). */
INLINE vec exp_of(vec x) {
    x = chosen(x > all(88.0f), all(88.0f), x);
    x = chosen(x < all(-87.0f), all(-87.0f), x);
    vec n = x * all(1.44269504f) + all(12582912.0f) - all(12582912.0f);
    vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec sum = all(1.9875691500e-4f);
    sum = sum * r + all(1.3981999507e-3f);
    sum = sum * r + all(8.3334519073e-3f);
    sum = sum * r + all(4.1665795894e-2f);
    sum = sum * r + all(1.6666665459e-1f);
    sum = sum * r + all(5.0000001201e-1f);
    sum = sum * r * r + r + all(1.0f);
    Both scale;
    scale.bits = (__builtin_convertvector(n, lanes) + 127) << 23;
    return sum * scale.numbers;
}

INLINE vec sigmoid_of(vec x) { return all(1.0f) / (all(1.0f) + exp_of(-x)); }

/* By a polynomial (Cephes' tanhf) below 0.625, where 1 - 2 / (e^2x + 1) would cancel. */
INLINE vec tanh_of(vec x) {
    vec square = x * x, sum = all(-5.70498872745e-3f);
    sum = sum * square + all(2.06390887954e-2f);
    sum = sum * square + all(-5.37397155531e-2f);
    sum = sum * square + all(1.33314422036e-1f);
    sum = sum * square + all(-3.33332819422e-1f);
    vec small = sum * square * x + x;
    vec large = all(1.0f) - all(2.0f) / (exp_of(x + x) + all(1.0f));
    return chosen((x < all(0.625f)) & (x > all(-0.625f)), small, large);
}
