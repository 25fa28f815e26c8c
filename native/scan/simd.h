// Vectors of EVM_LANES floats and the elementwise functions of the network, for the instruction set of the including file.
//
// The code uses the vector extensions of GCC and Clang. Everything is in the anonymous namespace, and only C headers are
// included: of an inline function with external linkage the linker keeps one copy, which could be the one compiled for AVX-512.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#if !defined(__clang__) && __GNUC__ < 14
// GCC before 14 has vdotq_s32, vfmaq_f16 and vmmlaq_s32 for Armv8.2 alone, which -mcpu=generic+.. is not. Every CPU with these instructions is.
#if defined(__ARM_FEATURE_MATMUL_INT8)
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#elif defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
#pragma GCC target("arch=armv8.2-a+fp16+dotprod")
#elif defined(__ARM_FEATURE_DOTPROD)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#endif
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

namespace {

constexpr int LANES = EVM_LANES;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

inline vec broadcast(float x) { return x - vec{}; }
inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
inline ivec bits_of(vec v) { ivec bits; memcpy(&bits, &v, sizeof bits); return bits; }
inline vec of_bits(ivec bits) { vec v; memcpy(&v, &bits, sizeof v); return v; }

// Elementwise maximum and minimum. A NaN in `a` stays NaN. Compilers make two instructions of the last form.
#if defined(__AVX512F__)
inline vec largest(vec a, vec b) { return _mm512_maskz_max_ps(0xffff, b, a); }
inline vec smallest(vec a, vec b) { return _mm512_maskz_min_ps(0xffff, b, a); }
#elif defined(__AVX__)
inline vec largest(vec a, vec b) { return _mm256_max_ps(b, a); }
inline vec smallest(vec a, vec b) { return _mm256_min_ps(b, a); }
#elif defined(__x86_64__)
inline vec largest(vec a, vec b) { return _mm_max_ps(b, a); }
inline vec smallest(vec a, vec b) { return _mm_min_ps(b, a); }
#elif defined(__aarch64__)
inline vec largest(vec a, vec b) { return vmaxq_f32(a, b); }
inline vec smallest(vec a, vec b) { return vminq_f32(a, b); }
#else
inline vec largest(vec a, vec b) { return b > a ? b : a; }
inline vec smallest(vec a, vec b) { return b < a ? b : a; }
#endif

// Return v, of which the compiler knows nothing more.
inline vec opaque(vec v) {
#if defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
    return v;
}
// Return v, which the compiler cannot use before it has computed `before`. With 32 registers, or without multiply-adds, compilers
// interleave so many computations that they keep values in memory.
inline vec after(vec before, vec v) {
#if defined(__x86_64__) && !defined(__AVX__)
    __asm__("" : "+x"(v) : "x"(before));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v) : "w"(before));
#endif
    (void)before;
    return v;
}
inline vec magnitude(vec x) { return of_bits(bits_of(x) & 0x7fffffff); }

inline vec load_some(const float *p, int64_t count) {  // lanes from `count` on are 0
    if (count >= LANES) return load(p);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    return load(lanes);
}
inline void store_some(float *p, vec v, int64_t count) {
    if (count >= LANES) return store(p, v);
    float lanes[LANES];
    store(lanes, v);
    for (int64_t i = 0; i < count; i++) p[i] = lanes[i];
}

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer and puts the integer into the low mantissa bits

// Store the lanes of `values` as integers of 8 or 16 bits, rounded to even, after adding `offset` to the 8-bit ones. They must be in
// the range of the type, but where any values are allowed: there the nearest integer is stored, and 0 for NaN. 8-bit integers are stored at
// rows[i] + at, from the last row to the first. GCC 12 compiles a conversion of vectors to scalar code.
#if defined(__AVX512F__)
template <int W>
inline void store_rounded(uint8_t *const *rows, int64_t at, const vec (&values)[W], int32_t offset) {  // any values, W a multiple of 4
    static_assert(W % 4 == 0, "four rows are packed together");
    const __m512i offsets = _mm512_set1_epi16((short)offset), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = W - 4; i >= 0; i -= 4) {
        __m512i q[4];
        for (int j = 0; j < 4; j++)  // larger values would be converted to the least integer
            q[j] = _mm512_maskz_cvtps_epi32(0xffff, (__m512)smallest(values[i + j], broadcast(65536.f)));
        for (int j = 0; j < 4; j += 2) q[j] = _mm512_adds_epi16(_mm512_packs_epi32(q[j], q[j + 1]), offsets);
        const __m512i fours = _mm512_packus_epi16(q[0], q[2]);  // each quarter has four bytes of each row
        const __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, order, fours);
        _mm_storeu_si128((__m128i *)(rows[i + 3] + at), _mm512_maskz_extracti32x4_epi32(0xf, bytes, 3));
        _mm_storeu_si128((__m128i *)(rows[i + 2] + at), _mm512_maskz_extracti32x4_epi32(0xf, bytes, 2));
        _mm_storeu_si128((__m128i *)(rows[i + 1] + at), _mm512_maskz_extracti32x4_epi32(0xf, bytes, 1));
        _mm_storeu_si128((__m128i *)(rows[i] + at), _mm512_maskz_extracti32x4_epi32(0xf, bytes, 0));
    }
}
inline void store_rounded(int16_t *p, vec values) {
    _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits_of(values + ROUND)));
}
#elif defined(__AVX2__)
inline __m128i rounded_halves(vec values, int32_t offset) {
    const __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)values), _mm256_set1_epi32(offset));
    return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
}
template <int W>
inline void store_rounded(uint8_t *const *rows, int64_t at, const vec (&values)[W], int32_t offset) {
    for (int i = W - 1; i >= 0; i--) {
        const __m128i halves = rounded_halves(values[i], offset);
        _mm_storel_epi64((__m128i *)(rows[i] + at), _mm_packus_epi16(halves, halves));
    }
}
inline void store_rounded(int16_t *p, vec values) { _mm_storeu_si128((__m128i *)p, rounded_halves(values, 0)); }
#elif defined(__SSE2__)
inline void store_rounded(int16_t *p, vec values) {
    const __m128i q = _mm_cvtps_epi32((__m128)values);
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi32(q, q));
}
#elif defined(__wasm_simd128__)
inline void store_rounded(int16_t *p, vec values) {
    const v128_t q = (v128_t)(bits_of(values + ROUND) - bits_of(broadcast(ROUND)));
    wasm_v128_store64_lane(p, wasm_i16x8_narrow_i32x4(q, q), 0);
}
#elif defined(__aarch64__)
template <int W>
inline void store_rounded(int8_t *const *rows, int64_t at, const vec (&values)[W], int32_t offset) {  // any values
    for (int i = W - 1; i >= 0; i--) {
        const int16x4_t halves = vqmovn_s32(vqaddq_s32(vcvtnq_s32_f32((float32x4_t)values[i]), vdupq_n_s32(offset)));
#if defined(__clang__)
        const int8x8_t bytes = vqmovn_s16(__builtin_shufflevector(halves, halves, 0, 1, 2, 3, -1, -1, -1, -1));
#else
        const int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
#endif
        memcpy(rows[i] + at, &bytes, 4);
    }
}
#endif

typedef float quad __attribute__((vector_size(16)));

// Return four of the eight floats of a and b, numbered in this order. Compilers spell it differently.
template <int I, int J, int K, int L>
inline quad shuffled(quad a, quad b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I, J, K, L);
#else
    typedef int32_t order __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, (order){I, J, K, L});
#endif
}

// Return the sums of four vectors.
inline quad sum_each(const vec (&v)[4]) {
    quad q[4];
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)  // GCC 12 compiles the lines below to a store and loads that wait for it
        const __m256 half = _mm512_maskz_extractf32x8_ps(0xff, v[i], 0) + _mm512_maskz_extractf32x8_ps(0xff, v[i], 1);
        q[i] = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
        quad parts[LANES / 4];
        memcpy(parts, &v[i], sizeof parts);
        q[i] = parts[0];
        for (int part = 1; part < LANES / 4; part++) q[i] += parts[part];
#endif
    }
    const quad ab = shuffled<0, 4, 1, 5>(q[0], q[1]) + shuffled<2, 6, 3, 7>(q[0], q[1]);
    const quad cd = shuffled<0, 4, 1, 5>(q[2], q[3]) + shuffled<2, 6, 3, 7>(q[2], q[3]);
    return shuffled<0, 1, 4, 5>(ab, cd) + shuffled<2, 3, 6, 7>(ab, cd);
}

constexpr float LOG2_E = 1.44269504f;

// Return 1 / x, 1 <= x <= 2^101, with a relative error of 1e-7.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)  // an estimate and one Newton step, which are faster than a division
    const vec r = _mm512_maskz_rcp14_ps(0xffff, x);
    return r + r * (1.f - x * r);
#else
    return 1.f / x;
#endif
}

// Functions of an array compute its W vectors side by side: one polynomial is a chain of dependent operations, which alone leaves
// most of a core idle.

// Return a vector of x for use in a loop. From constants that Clang knows it makes a broadcast for every use where it has no register
// left; from others, operands of the instructions that use them. GCC makes operands of both.
inline vec constant(float x) {
#if defined(__clang__)
    return opaque(broadcast(x));
#else
    return broadcast(x);
#endif
}

template <int COUNT>
struct Constants {
    vec each[COUNT];
    explicit Constants(const float (&values)[COUNT]) {
        for (int i = 0; i < COUNT; i++) each[i] = constant(values[i]);
    }
};

// Compute c0 x^n + .. + cn for W vectors, n odd.
template <int W, int TERMS>
inline void polynomial(vec (&p)[W], const vec (&x)[W], const Constants<TERMS> &c) {
    static_assert(TERMS % 2 == 0, "terms come in pairs");
    for (int i = 0; i < W; i++) p[i] = c.each[0] * x[i] + c.each[1];
#if defined(__aarch64__)  // a multiply-add overwrites the addend, so that constants are copied first: pairs of terms have fewer copies
    vec square[W];
    for (int i = 0; i < W; i++) square[i] = x[i] * x[i];
#pragma GCC unroll 16
    for (int n = 2; n < TERMS; n += 2)
        for (int i = 0; i < W; i++) p[i] = p[i] * square[i] + (c.each[n] * x[i] + c.each[n + 1]);
#else
#pragma GCC unroll 16
    for (int n = 2; n < TERMS; n++)
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) p[i] = p[i] * x[i] + c.each[n];
#endif
}

// split_exponent(): subtract the nearest integer from t and return it as an Exponent. round: ROUND. scaled(): multiply p by two to the
// power of that integer.
#if defined(__AVX512F__)
typedef vec Exponent;
inline Exponent split_exponent(vec &t, vec) {
    const vec rest = _mm512_maskz_reduce_ps(0xffff, t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = t - rest;
    t = rest;
    return n;
}
inline vec scaled(vec p, Exponent n) { return _mm512_maskz_scalef_ps(0xffff, p, n); }
#else
typedef uvec Exponent;  // n * 2^23
inline Exponent split_exponent(vec &t, vec round) {
#if defined(__aarch64__)
    (void)round;
    const vec n = vrndnq_f32(t);
    t -= n;
    return (uvec)vcvtq_n_s32_f32(n, 23);
#else
    const vec shifted = t + round;
    t -= shifted - round;
    return (uvec)bits_of(shifted) << 23;  // the bits of ROUND itself are shifted out
#endif
}
inline vec scaled(vec p, Exponent n) { return of_bits((ivec)((uvec)bits_of(p) + n)); }
#endif

struct Exp2 {
    vec round = constant(ROUND), floor = constant(-100.f);
    Constants<6> c{{0.00132647273f, 0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.f}};

    // Replace t, -100 <= t <= 100, by 2^t: t = n + r with |r| <= 1/2 and 2^r = 1 + r q(r). The relative error is 9e-8, and 0 at
    // r = 0: an error of decays near 1 would accumulate over many steps.
    template <int W>
    void within_100(vec (&t)[W]) const {
        vec p[W];
        Exponent n[W];
        for (int i = 0; i < W; i++) n[i] = split_exponent(t[i], round);
        polynomial(p, t, c);
        for (int i = 0; i < W; i++) t[i] = scaled(p[i], n[i]);
    }

    // Replace t <= 100 by 2^t, or by 2^-100 if that is larger: products of denormals are slow.
    template <int W>
    void above_floor(vec (&t)[W]) const {
        for (int i = 0; i < W; i++) t[i] = largest(t[i], floor);
        within_100(t);
    }
};

// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|): no division, and full relative accuracy for very negative x too.
// log(1 + e) = e + e^2 p(e), with a relative error of 3e-8 before rounding.
struct Softplus {
    Exp2 exp2;
    vec to_log2 = constant(-LOG2_E);
    Constants<8> c{{0.00536482451f, -0.0300657935f, 0.0792045384f, -0.137538026f,
                    0.191536551f, -0.248571637f, 0.333213226f, -0.49999648f}};

    template <int W>
    void replace(vec (&x)[W]) const {
        vec e[W], p[W];
        for (int i = 0; i < W; i++) e[i] = magnitude(x[i]) * to_log2;
        exp2.above_floor(e);
        polynomial(p, e, c);
        for (int i = 0; i < W; i++) x[i] = largest(x[i], broadcast(0.f)) + (e[i] * e[i] * p[i] + e[i]);
    }
};

// sigmoid(x) = 1 / (1 + exp(-x)), and SiLU, x sigmoid(x).
struct Sigmoid {
    Exp2 exp2;
    vec to_log2 = constant(-LOG2_E), ceiling = constant(100.f), one = constant(1.f);

    template <int W>
    void denominators(vec (&x)[W]) const {
        for (int i = 0; i < W; i++) x[i] = smallest(x[i] * to_log2, ceiling);
        exp2.above_floor(x);
        for (int i = 0; i < W; i++) x[i] += one;
    }
};

struct Silu : Sigmoid {
    template <int W>
    void replace(vec (&x)[W]) const {
        vec below[W];
        for (int i = 0; i < W; i++) below[i] = x[i];
        denominators(below);
        for (int i = 0; i < W; i++) x[i] *= reciprocal(below[i]);
    }
};

// GELU = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with a polynomial for log2 of erfc. The absolute error of the second term is 1e-8.
struct Gelu {
    Exp2 exp2;
    vec end = constant(5.6f), half = constant(0.5f);
    Constants<8> c{{-1.90098626e-6f, 2.80424995e-5f, -1.31396009e-4f, -2.72287898e-4f,
                    7.24574132e-3f, -5.26278726e-2f, -4.59162027e-1f, -1.15111101f}};

    template <int W>
    void replace(vec (&x)[W]) const {
        vec a[W], p[W];
        for (int i = 0; i < W; i++) a[i] = smallest(magnitude(x[i]), end);
        polynomial(p, a, c);
        for (int i = 0; i < W; i++) a[i] *= p[i];
        exp2.within_100(a);
        for (int i = 0; i < W; i++) x[i] = largest(x[i], broadcast(0.f)) - half * magnitude(x[i]) * a[i];
    }
};

inline vec sigmoid(vec x) {
    vec one[] = {x};
    Sigmoid().denominators(one);
    return 1.f / one[0];
}

template <class Activation>
inline vec activated(const Activation &activation, vec x) {
    vec one[] = {x};
    activation.replace(one);
    return one[0];
}

}  // namespace
