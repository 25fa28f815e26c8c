// Small matrix products: rows of activations, wherever they lie, times packed weights.
//
// Weights (K, columns) are packed into panels of up to three vectors of columns, K rows each, so that the inner loop reads
// them in order; columns are padded with zeros. The micro-kernel keeps EVM_ACCUMULATORS vectors of results in registers.
#pragma once
#include "simd.h"

namespace {

inline int panel_width(int64_t vectors_left) { return vectors_left == 4 ? 2 : vectors_left < 3 ? (int)vectors_left : 3; }

// weight(k, column) for column < columns -> packed, K x (columns rounded up to vectors).
template <class Weight>
void pack(float *packed, int64_t depth, int64_t columns, Weight weight) {
    const int64_t vectors = (columns + LANES - 1) / LANES;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        for (int64_t k = 0; k < depth; k++)
            for (int64_t column = first * LANES; column < (first + width) * LANES; column++)
                *packed++ = column < columns ? weight(k, column) : 0.f;
    }
}

template <int WIDTH, class Use>
inline void multiply_panel(const float *const *rows, int64_t count, int64_t depth, const float *panel, int64_t column, Use use) {
    constexpr int ROWS = EVM_ACCUMULATORS / WIDTH;
    for (int64_t first = 0; first < count; first += ROWS) {
        const float *row[ROWS];
        for (int i = 0; i < ROWS; i++) row[i] = rows[first + i < count ? first + i : count - 1];
        vec acc[ROWS][WIDTH] = {};
        for (int64_t k = 0; k < depth; k++) {
            vec b[WIDTH];
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) b[v] = load(panel + (k * WIDTH + v) * LANES);
#pragma GCC unroll 24
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
                for (int v = 0; v < WIDTH; v++) acc[i][v] += row[i][k] * b[v];
        }
        alignas(64) float results[ROWS][WIDTH * LANES];  // so that `use` is compiled once, not for every register
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) store(results[i] + v * LANES, acc[i][v]);
        for (int i = 0; i < ROWS && first + i < count; i++)
            for (int v = 0; v < WIDTH; v++) use(first + i, column + v * LANES, load(results[i] + v * LANES));
    }
}

// For each of `count` rows of `depth` floats and each vector of columns: use(row, first column, vector of the product).
template <class Use>
inline void multiply(const float *const *rows, int64_t count, int64_t depth, const float *packed, int64_t columns, Use use) {
    const int64_t vectors = (columns + LANES - 1) / LANES;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        const int64_t column = first * LANES;
        if (width == 3) multiply_panel<3>(rows, count, depth, packed, column, use);
        else if (width == 2) multiply_panel<2>(rows, count, depth, packed, column, use);
        else multiply_panel<1>(rows, count, depth, packed, column, use);
        packed += depth * width * LANES;
    }
}

}  // namespace
