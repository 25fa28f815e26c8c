// Small matrix products: rows of activations, given by pointers, times packed weights, in float32 or exactly in integers.
//
// Weights (K, columns) are packed into panels of up to three vectors of columns, K rows each, so that the inner loop reads
// them in order; columns are padded with zeros. The micro-kernel keeps EVM_ACCUMULATORS vectors of results in registers.
#pragma once
#include "simd.h"

namespace {

inline int panel_width(int64_t vectors_left) { return vectors_left == 4 ? 2 : vectors_left < 3 ? (int)vectors_left : 3; }

// Arithmetic of a product. Element: type of an activation. Partial: vector of partial sums, one per column, in registers.
// Sum: vector of total sums. DEPTH: rows of weights in one vector of a panel, and elements of a row read at once. START: whether
// a panel begins with the start values of its sums. piece(): number of rows over which partial sums stay exact. Base: the class
// itself, for classes derived from it.
struct Floats {
    typedef Floats Base;
    typedef float Element;
    typedef vec Sum, Partial;
    static constexpr int DEPTH = 1;
    static constexpr bool START = false;
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *) { return Partial{}; }
    static Partial add(Partial sum, const float *row, vec weights) { return sum + *row * weights; }
    static Sum total(Partial sum) { return sum; }
};

#if defined(__AVX512VNNI__)
// Products of uint8 activations and int8 weights with int32 sums; no intermediate result saturates.
struct Integers {
    typedef Integers Base;
    typedef uint8_t Element;
    typedef ivec Sum, Partial;
    static constexpr int DEPTH = 4;
    static constexpr bool START = true;  // start value: minus the zero point times the sum of the column's weights
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *panel) { return bits_of(load(panel)); }
    static Partial add(Partial sum, const uint8_t *row, vec weights) {
        int32_t four;
        memcpy(&four, row, sizeof four);
        return (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)bits_of(weights));
    }
    static Sum total(Partial sum) { return sum; }
    // Store `values` plus the zero point, rounded to even. The results must be in the range of uint8.
    static void store_rounded(uint8_t *to, vec values, int32_t zero_point) {
        const ivec q = bits_of(values + ROUND) + zero_point;  // the bits of ROUND end in a byte of zeros
        _mm_storeu_si128((__m128i *)to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)q));
    }
};
#else
// The same sums, computed with integers in floats: activations minus the zero point (up to 255) times weights (up to 128).
struct Integers : Floats {
    typedef Integers Base;
    typedef ivec Sum;
    static int64_t piece(int64_t depth) { return depth < 512 ? depth : 512; }  // 512 * 255 * 128 < 2^24
    static Sum total(Partial sum) { return __builtin_convertvector(sum, ivec); }
    static void store_rounded(float *to, vec values, int32_t) { store(to, values + ROUND - ROUND); }
};
#endif

// Pack weight(k, column), column < columns, into `packed`: `depth` rows of `columns` columns rounded up to whole vectors.
template <class Weight>
void pack(float *packed, int64_t depth, int64_t columns, Weight weight) {
    const int64_t vectors = (columns + LANES - 1) / LANES;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        const int64_t column = first * LANES, count = width * LANES, used = columns - column < count ? columns - column : count;
        for (int64_t k = 0; k < depth; k++, packed += count) {
            for (int64_t i = 0; i < used; i++) packed[i] = weight(k, column + i);
            for (int64_t i = used; i < count; i++) packed[i] = 0.f;
        }
    }
}

// Pack int8_t weight(k, column) for Integers. The result has at most one row more than that of pack().
template <class Weight>
void pack_integers(float *packed, int64_t depth, int64_t columns, int zero_point, Weight weight) {
#if defined(__AVX512VNNI__)
    const int64_t vectors = (columns + LANES - 1) / LANES;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        int32_t sums[3 * LANES] = {};
        float *const start = packed;
        packed += width * LANES;
        const int64_t column = first * LANES, count = width * LANES, used = columns - column < count ? columns - column : count;
        for (int64_t k = 0; k < depth; k += 4, packed += count) {
            uint32_t fours[3 * LANES] = {};
            for (int64_t row = 0; row < 4 && k + row < depth; row++)
                for (int64_t i = 0; i < used; i++) {
                    const int8_t w = weight(k + row, column + i);
                    fours[i] |= (uint32_t)(uint8_t)w << 8 * row;
                    sums[i] += w;
                }
            memcpy(packed, fours, count * sizeof *fours);
        }
        for (int64_t i = 0; i < width * LANES; i++) sums[i] *= -zero_point;
        memcpy(start, sums, width * LANES * sizeof *sums);
    }
#else
    (void)zero_point;
    pack(packed, depth, columns, weight);
#endif
}

// Compute the sums of a few rows and one panel. The function is not inlined, so that it has all registers and is compiled once.
template <class Numbers, int WIDTH, int ROWS>
__attribute__((noinline)) void multiply_rows(const typename Numbers::Element *const *rows, int64_t depth, const float *panel,
                                             typename Numbers::Sum (*sums)[WIDTH]) {
    const typename Numbers::Element *row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = rows[i];
    const float *weights = panel + Numbers::START * WIDTH * LANES;
    int64_t begin = 0, end;
    do {
        end = begin + Numbers::piece(depth - begin);
        typename Numbers::Partial acc[ROWS][WIDTH];
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) acc[i][v] = Numbers::start(panel + v * LANES);
        for (int64_t k = begin; k < end; k += Numbers::DEPTH) {
            vec b[WIDTH];
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) b[v] = load(weights + (k / Numbers::DEPTH * WIDTH + v) * LANES);
#pragma GCC unroll 24
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
                for (int v = 0; v < WIDTH; v++) acc[i][v] = Numbers::add(acc[i][v], row[i] + k, b[v]);
        }
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) sums[i][v] = begin ? sums[i][v] + Numbers::total(acc[i][v]) : Numbers::total(acc[i][v]);
        begin = end;
    } while (begin < depth);
}

template <class Numbers, int WIDTH, class Use>
inline void multiply_panel(const typename Numbers::Element *const *rows, int64_t count, int64_t depth, const float *panel,
                           int64_t column, Use use) {
    constexpr int ROWS = EVM_ACCUMULATORS / WIDTH;
    for (int64_t first = 0; first < count; first += ROWS) {
        const typename Numbers::Element *row[ROWS];
        for (int i = 0; i < ROWS; i++) row[i] = rows[first + i < count ? first + i : count - 1];
        typename Numbers::Sum sums[ROWS][WIDTH];
        multiply_rows<typename Numbers::Base, WIDTH, ROWS>(row, depth, panel, sums);
        const int64_t used = count - first < ROWS ? count - first : ROWS;
        for (int64_t i = 0; i < used; i++)
            for (int v = 0; v < WIDTH; v++) use(first + i, column + v * LANES, sums[i][v]);
    }
}

// Multiply `count` rows of `depth` elements by the packed weights: call use(row, first column, sums) for each vector of columns.
template <class Numbers, class Use>
inline void multiply(const typename Numbers::Element *const *rows, int64_t count, int64_t depth, const float *packed,
                     int64_t columns, Use use) {
    const int64_t vectors = (columns + LANES - 1) / LANES;
    const int64_t steps = (depth + Numbers::DEPTH - 1) / Numbers::DEPTH + Numbers::START;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        const int64_t column = first * LANES;
        if (width == 3) multiply_panel<Numbers, 3>(rows, count, depth, packed, column, use);
        else if (width == 2) multiply_panel<Numbers, 2>(rows, count, depth, packed, column, use);
        else multiply_panel<Numbers, 1>(rows, count, depth, packed, column, use);
        packed += steps * width * LANES;
    }
}

}  // namespace
