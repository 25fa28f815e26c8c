// Multiply-adds per ns of the kernels' matrix products (native/scan/gemm.h) for 48 rows, in float32 and with int8 weights of 8 and of
// 7 bits. The results are stored as the blocks do it. Prints a line for each size: depth, columns, float, 8 bits, 7 bits.
#include "gemm.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

namespace {

constexpr int64_t ROWS = 48, PADDING = 64;
constexpr int ROUNDS = 3000;

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

float *floats(int64_t count) {
    float *made = (float *)aligned_alloc(64, count * sizeof(float));
    memset(made, 0, count * sizeof(float));
    return made;
}

template <class Numbers>
double rate(int64_t depth, int64_t columns) {
    typedef typename Numbers::Element Element;
    const int64_t stride = columns + PADDING;
    float *const packed = floats((depth + PADDING) * stride), *const in = floats(ROWS * (depth + PADDING)), *const out = floats(ROWS * stride);
    pack<Numbers>(packed, depth, columns, [](int64_t k, int64_t c) { return (int8_t)((k * 7 + c * 3) % 100 - 50); }, 3);
    const Element *rows[ROWS];
    for (int64_t i = 0; i < ROWS; i++) rows[i] = (const Element *)(in + i * (depth + PADDING));
    double least = 1e18;
    for (int round = 0; round < ROUNDS; round++) {
        const double start = now();
        multiply<Numbers>(rows, ROWS, depth, packed, columns, [=](int64_t t, int64_t column, const auto &sums) {
            for (const auto &sum : sums) store(out + t++ * stride + column, __builtin_convertvector(sum, vec));
        });
        const double spent = now() - start;
        if (spent < least) least = spent;
    }
    free(packed), free(in), free(out);
    return ROWS * depth * columns / least;
}

}  // namespace

int main() {
    const int64_t sizes[][2] = {{48, 96}, {96, 48}, {96, 192}, {192, 96}};
    for (const auto &size : sizes)
        printf("%d %d %.1f %.1f %.1f\n", (int)size[0], (int)size[1], rate<Floats>(size[0], size[1]), rate<Integers>(size[0], size[1]),
               rate<NarrowIntegers>(size[0], size[1]));
}
