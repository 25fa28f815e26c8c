// Small matrix products: rows of activations, given by pointers, times packed weights, in float32 or exactly in integers.
//
// Weights (K, columns) are packed into panels of up to three vectors of columns, K rows each, so that the inner loop reads
// them in order; columns are padded with zeros. The micro-kernel keeps EVM_ACCUMULATORS vectors of results in registers.
#pragma once
#include "evm_block.h"
#include "simd.h"

namespace {

inline int panel_width(int64_t vectors_left) { return vectors_left == 4 ? 2 : vectors_left < 3 ? (int)vectors_left : 3; }

// Arithmetic of a product. Element: type of an activation. Weight: type of a packed weight. Partial: vector of partial sums, one per
// column, in registers. Sum: vector of total sums. DEPTH: rows of weights packed together, and elements of a row read at once.
// SQUARES: whether a vector of partial sums has two rows and half of the columns, not one row and all columns. START: whether a
// panel begins with the start values of its sums. piece(): number of rows over which partial sums stay exact. Base: the class itself,
// for classes derived from it. Of integers, store_rounded(): store W vectors of values plus the zero point, rounded to even, as Elements at
// rows[i] + at, from the last row to the first.
// SATURATES: whether it takes any values, not only those whose integers are in the range of uint8.
struct Floats {
    typedef Floats Base;
    typedef float Element, Weight;
    typedef vec Sum, Partial;
    static constexpr int DEPTH = 1;
    static constexpr bool START = false, SQUARES = false;
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *) { return Partial{}; }
    static Partial add(Partial sum, const float *row, vec weights) { return sum + *row * weights; }
    static Sum total(Partial sum) { return sum; }
    static Weight rounded(float value) { return value; }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Sums of eight products of int8 for two rows and two columns at once. The elements are the quantised values minus SHIFT.
struct Squares {
    typedef Squares Base;
    typedef int8_t Element, Weight;
    typedef ivec Sum, Partial;
    static constexpr int DEPTH = 8, SHIFT = 128;
    static constexpr bool START = true, SQUARES = true, SATURATES = true;
    static int64_t piece(int64_t depth) { return depth; }
    // Return the start values of both rows for one half of the columns.
    static Partial start(const float *panel, int half) {
        const int32x2_t columns = vld1_s32(reinterpret_cast<const int32_t *>(panel) + 2 * half);
        return vcombine_s32(columns, columns);
    }
    static Partial add(Partial square, const Element *row, const Element *next, vec weights) {
        return vmmlaq_s32(square, vcombine_s8(vld1_s8(row), vld1_s8(next)), vreinterpretq_s8_s32(bits_of(weights)));
    }
    // Return the sums of one of both rows from the squares of both halves of the columns.
    static Sum total(Partial left, Partial right, int row) {
        const int64x2_t a = vreinterpretq_s64_s32(left), b = vreinterpretq_s64_s32(right);
        return vreinterpretq_s32_s64(row ? vuzp2q_s64(a, b) : vuzp1q_s64(a, b));
    }
    template <int W>
    static void store_rounded(Element *const *rows, int64_t at, const vec (&values)[W], int32_t zero_point) {
        ::store_rounded(rows, at, values, zero_point - SHIFT);
    }
};
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
// Sums of four products of bytes in each lane. x86 multiplies uint8 by int8, Arm int8 by int8: there the elements are the quantised
// values minus SHIFT. AVX2 and AVX-512 without VNNI add pairs of products in 16 bits, exact for weights in -64..64: 2 * 255 * 64 < 2^15.
struct Bytes {
    typedef Bytes Base;
#if defined(__ARM_FEATURE_DOTPROD)
    typedef int8_t Element;
    static constexpr int SHIFT = 128;
    static constexpr bool SATURATES = true;
    static ivec dot(ivec sum, int32_t four, ivec weights) { return vdotq_s32(sum, vreinterpretq_s8_s32(vdupq_n_s32(four)), vreinterpretq_s8_s32(weights)); }
#else
    typedef uint8_t Element;
    static constexpr int SHIFT = 0;
#if defined(__AVX512F__)
    static constexpr bool SATURATES = true;
#else
    static constexpr bool SATURATES = false;
#endif
#if defined(__AVX512VNNI__)
    static ivec dot(ivec sum, int32_t four, ivec weights) { return (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)weights); }
#elif defined(__AVXVNNI__)
    static ivec dot(ivec sum, int32_t four, ivec weights) { return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(four), (__m256i)weights); }
#elif defined(__AVX512BW__)
    static ivec dot(ivec sum, int32_t four, ivec weights) {
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(four), (__m512i)weights);
        return sum + (ivec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
#else
    static ivec dot(ivec sum, int32_t four, ivec weights) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), (__m256i)weights);
        return sum + (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#endif
#endif
    typedef ivec Sum, Partial;
    typedef int8_t Weight;
    static constexpr int DEPTH = 4;
    static constexpr bool SQUARES = false;
    static constexpr bool START = true;  // start value: SHIFT minus the zero point, times the sum of the column's weights
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *panel) { return bits_of(load(panel)); }
    static Partial add(Partial sum, const Element *row, vec weights) {
        int32_t four;
        memcpy(&four, row, sizeof four);
        return dot(sum, four, bits_of(weights));
    }
    static Sum total(Partial sum) { return sum; }
    template <int W>
    static void store_rounded(Element *const *rows, int64_t at, const vec (&values)[W], int32_t zero_point) {
        ::store_rounded(rows, at, values, zero_point - SHIFT);
    }
};
#endif

#if defined(__SSE2__) || defined(__wasm_simd128__)
// Sums of two products of 16 bits in each lane. The elements are the quantised values minus the zero point, at most 255.
struct Words {
    typedef Words Base;
    typedef int16_t Element, Weight;
    typedef ivec Sum, Partial;
    static constexpr int DEPTH = 2;
    static constexpr bool START = false, SQUARES = false, SATURATES = false;
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *) { return Partial{}; }
    static Partial add(Partial sum, const int16_t *row, vec weights) {
        int32_t two;
        memcpy(&two, row, sizeof two);
#if defined(__AVX512BW__)
        return sum + (ivec)_mm512_madd_epi16(_mm512_set1_epi32(two), (__m512i)bits_of(weights));
#elif defined(__AVX2__)
        return sum + (ivec)_mm256_madd_epi16(_mm256_set1_epi32(two), (__m256i)bits_of(weights));
#elif defined(__wasm_simd128__)
        return sum + (ivec)wasm_i32x4_dot_i16x8(wasm_i32x4_splat(two), (v128_t)weights);
#else
        return sum + (ivec)_mm_madd_epi16(_mm_set1_epi32(two), (__m128i)bits_of(weights));
#endif
    }
    static Sum total(Partial sum) { return sum; }
    template <int W>
    static void store_rounded(Element *const *rows, int64_t at, const vec (&values)[W], int32_t) {
        for (int i = W - 1; i >= 0; i--) ::store_rounded(rows[i] + at, values[i]);
    }
};
#endif

// Sums of products of any int8 weights, exact in floats by pieces: activations minus the zero point (up to 255) times weights (up to 128).
struct IntegersInFloats : Floats {
    typedef IntegersInFloats Base;
    typedef ivec Sum;
    static constexpr bool SATURATES = false;
    static int64_t piece(int64_t depth) { return depth < 512 ? depth : 512; }  // 512 * 255 * 128 < 2^24
    static Sum total(Partial sum) { return __builtin_convertvector(sum, ivec); }
    template <int W>
    static void store_rounded(float *const *rows, int64_t at, const vec (&values)[W], int32_t) {
        for (int i = W - 1; i >= 0; i--) store(rows[i] + at, values[i] + ROUND - ROUND);
    }
};

// Exact sums of products of uint8 activations and int8 weights. NarrowIntegers: of weights in -64..64.
#if defined(__ARM_FEATURE_MATMUL_INT8)
typedef Squares Integers, NarrowIntegers;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
typedef Bytes Integers, NarrowIntegers;
#elif defined(__AVX2__)
typedef Words Integers;
typedef Bytes NarrowIntegers;
#elif defined(__SSE2__) || defined(__wasm_simd128__)
typedef Words Integers, NarrowIntegers;
#else
typedef IntegersInFloats Integers, NarrowIntegers;
#endif

// The products of a kernel in half precision (EVM_HALF). HALF: value of evm_block_args.half that asks for them. The compiler may have the
// instructions in other kernels, too, such as on macOS.
#if defined(EVM_HALF) && defined(__AVX512BF16__)
// Sums of two products of bfloat16 in each lane, in float32.
struct Halves {
    static constexpr int32_t HALF = EVM_BFLOAT16;
    typedef Halves Base;
    typedef uint16_t Element, Weight;
    typedef vec Sum, Partial;
    static constexpr int DEPTH = 2;
    static constexpr bool START = false, SQUARES = false;
    static int64_t piece(int64_t depth) { return depth; }
    static Partial start(const float *) { return Partial{}; }
    static Partial add(Partial sum, const Element *row, vec weights) {
        int32_t two;
        memcpy(&two, row, sizeof two);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)bits_of(weights));
    }
    static Sum total(Partial sum) { return sum; }
    static void store_rounded(Element *to, vec values) {
        const __m256bh rounded = _mm512_cvtneps_pbh(values);
        memcpy(to, &rounded, sizeof rounded);
    }
    static Weight rounded(float value) {
        Element lanes[LANES];
        store_rounded(lanes, broadcast(value));
        return lanes[0];
    }
};
#elif defined(EVM_HALF)
// Sums of products of float16: two in each lane, of even and of odd rows, in float16 over 64 rows, then in float32.
struct Halves {
    static constexpr int32_t HALF = EVM_FLOAT16;
    typedef Halves Base;
    typedef uint16_t Element, Weight;
    typedef vec Sum;
    typedef float16x8_t Partial;
    static constexpr int DEPTH = 2;
    static constexpr bool START = false, SQUARES = false;
    static int64_t piece(int64_t depth) { return depth < 64 ? depth : 64; }
    static Partial start(const float *) { return vreinterpretq_f16_u16(vdupq_n_u16(0)); }
    static Partial add(Partial sum, const Element *row, vec weights) {
        int32_t two;
        memcpy(&two, row, sizeof two);
        return vfmaq_f16(sum, vreinterpretq_f16_s32(vdupq_n_s32(two)), vreinterpretq_f16_s32(bits_of(weights)));
    }
    static Sum total(Partial sum) { return vpaddq_f32(vcvt_f32_f16(vget_low_f16(sum)), vcvt_high_f32_f16(sum)); }
    static void store_rounded(Element *to, vec values) {
        const float16x4_t rounded = vcvt_f16_f32(values);
        memcpy(to, &rounded, sizeof rounded);
    }
    static Weight rounded(float value) {
        Element lanes[LANES];
        store_rounded(lanes, broadcast(value));
        return lanes[0];
    }
};
#endif

// Number of vectors that DEPTH rows of LANES columns take.
template <class Numbers>
constexpr int PARTS = Numbers::DEPTH * sizeof(typename Numbers::Weight) / sizeof(float);

// Pack weight(k, column), column < columns, into `packed`: panels of `depth` rows, rounded up to Numbers::DEPTH, of columns rounded
// up to whole vectors, each with one more row if Numbers::START. zero_point: of the activations.
template <class Numbers, class Weight>
void pack(float *packed, int64_t depth, int64_t columns, Weight weight, int32_t zero_point = 0) {
    typedef typename Numbers::Weight Number;
    constexpr int DEPTH = Numbers::DEPTH;
    const int64_t vectors = (columns + LANES - 1) / LANES;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        const int64_t column = first * LANES, count = width * LANES, used = columns - column < count ? columns - column : count;
        float *const start = packed;
        int32_t sums[3 * LANES] = {};
        packed += Numbers::START * count;
        for (int64_t k = 0; k < depth; k += DEPTH, packed += count * PARTS<Numbers>) {
            Number numbers[3 * LANES * DEPTH] = {};
            for (int64_t row = 0; row < DEPTH && k + row < depth; row++)
                for (int64_t i = 0; i < used; i++) {
                    const Number w = weight(k + row, column + i);
                    numbers[i * DEPTH + row] = w;
                    if constexpr (Numbers::START) sums[i] += (Numbers::SHIFT - zero_point) * w;
                }
            memcpy(packed, numbers, count * DEPTH * sizeof *numbers);
        }
        if constexpr (Numbers::START) memcpy(start, sums, count * sizeof *sums);
    }
}

// Number of rows whose sums fill the registers. Squares need registers for two vectors of weights for each vector of columns, and have pairs
// of rows.
template <class Numbers, int WIDTH>
constexpr int FULL_ROWS = Numbers::SQUARES ? EVM_ACCUMULATORS * 3 / 4 / WIDTH & ~1 : EVM_ACCUMULATORS / WIDTH;

// Compute the sums, WIDTH vectors a row, of up to FULL_ROWS rows and one panel; the last row stands in for rows after it. The function is
// not inlined, so that it has all registers and is compiled once.
// Squares: acc[i][v] and acc[i + 1][v], i even, have rows i and i + 1 with the first and the second half of the columns.
template <class Numbers, int WIDTH>
__attribute__((noinline)) void multiply_rows(const typename Numbers::Element *const *rows, int64_t count, int64_t depth, const float *panel,
                                             typename Numbers::Sum *sums) {
    constexpr int ROWS = FULL_ROWS<Numbers, WIDTH>;
    constexpr bool SQUARES = Numbers::SQUARES;
    static_assert(PARTS<Numbers> == (SQUARES ? 2 : 1) && (!SQUARES || ROWS % 2 == 0), "squares of two rows and two columns");
    const typename Numbers::Element *row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = rows[i < count ? i : count - 1];
    const float *weights = panel + Numbers::START * WIDTH * LANES;
    int64_t begin = 0, end;
    do {
        end = begin + Numbers::piece(depth - begin);
        typename Numbers::Partial acc[ROWS][WIDTH];
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) {
                if constexpr (SQUARES) acc[i][v] = Numbers::start(panel + v * LANES, i % 2);
                else acc[i][v] = Numbers::start(panel + v * LANES);
            }
        for (int64_t k = begin; k < end; k += Numbers::DEPTH, weights += WIDTH * PARTS<Numbers> * LANES) {
            vec b[WIDTH][PARTS<Numbers>];
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++)
                for (int part = 0; part < PARTS<Numbers>; part++) b[v][part] = load(weights + (v * PARTS<Numbers> + part) * LANES);
#pragma GCC unroll 24
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
                for (int v = 0; v < WIDTH; v++) {
                    if constexpr (SQUARES) acc[i][v] = Numbers::add(acc[i][v], row[i & ~1] + k, row[i | 1] + k, b[v][i % 2]);
                    else acc[i][v] = Numbers::add(acc[i][v], row[i] + k, b[v][0]);
                }
        }
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) {
                typename Numbers::Sum total;
                if constexpr (SQUARES) total = Numbers::total(acc[i & ~1][v], acc[i | 1][v], i % 2);
                else total = Numbers::total(acc[i][v]);
                sums[i * WIDTH + v] = begin ? sums[i * WIDTH + v] + total : total;
            }
        begin = end;
    } while (begin < depth);
}

// A number that the compiler knows, where a parameter takes numbers of both kinds.
template <int N>
struct Constant {
    constexpr operator int64_t() const { return N; }
};

// Number of rows whose sums are used together: 4, 2 or 1, a divisor of the rows of every micro-kernel.
template <class Numbers>
constexpr int rows_together() {
    int rows = 4;
    while (FULL_ROWS<Numbers, 1> % rows || FULL_ROWS<Numbers, 2> % rows || FULL_ROWS<Numbers, 3> % rows) rows /= 2;
    return rows;
}

// Multiply `count` rows of `depth` elements by the packed weights: call use(first row, first column, sums) for a vector of columns of each
// rows_together() rows. After the last row come sums of the last row again.
template <class Numbers, class Use>
inline void multiply(const typename Numbers::Element *const *rows, int64_t count, int64_t depth, const float *packed,
                     int64_t columns, Use use) {
    typedef typename Numbers::Base Base;
    constexpr int TOGETHER = rows_together<Base>();
    const int64_t vectors = (columns + LANES - 1) / LANES;
    const int64_t steps = (depth + Numbers::DEPTH - 1) / Numbers::DEPTH;
    for (int64_t first = 0, width; first < vectors; first += width) {
        width = panel_width(vectors - first);
        const auto panel = [=](auto width) {
            const auto product = width == 3 ? multiply_rows<Base, 3> : width == 2 ? multiply_rows<Base, 2> : multiply_rows<Base, 1>;
            const int64_t at_once = width == 3 ? FULL_ROWS<Base, 3> : width == 2 ? FULL_ROWS<Base, 2> : FULL_ROWS<Base, 1>;
            for (int64_t row = 0; row < count; row += at_once) {
                typename Numbers::Sum sums[EVM_ACCUMULATORS];
                product(rows + row, count - row, depth, packed, sums);
                for (int64_t i = 0; i < at_once && row + i < count; i += TOGETHER)
                    for (int64_t v = 0; v < width; v++) {
                        typename Numbers::Sum of_rows[TOGETHER];
                        for (int64_t j = 0; j < TOGETHER; j++) of_rows[j] = sums[(i + j) * width + v];
                        use(row + i, (first + v) * LANES, of_rows);
                    }
            }
        };
        // A width that the compiler knows saves instructions, which counts where vectors are short, and makes code larger.
        if (LANES > 4) panel(width);
        else if (width == 3) panel(Constant<3>());
        else if (width == 2) panel(Constant<2>());
        else panel(Constant<1>());
        packed += (steps * PARTS<Numbers> + Numbers::START) * width * LANES;
    }
}

}  // namespace
