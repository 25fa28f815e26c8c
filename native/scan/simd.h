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
#include <arm_neon.h>
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

// Elementwise maximum. A NaN in `a` stays NaN.
inline vec largest(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, b, a);  // GCC 12 compiles the line below to a comparison and a blend
#else
    return b > a ? b : a;
#endif
}
inline vec smallest(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_maskz_min_ps(0xffff, b, a);
#else
    return b < a ? b : a;
#endif
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

// Store the low byte, or the low half, of each lane.
template <class Byte>
inline void store_low_bytes(Byte *p, ivec v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#else
    typedef Byte bytes __attribute__((vector_size(LANES)));
    const bytes low = __builtin_convertvector(v, bytes);
    memcpy(p, &low, sizeof low);
#endif
}
inline void store_low_halves(int16_t *p, ivec v) {
    typedef int16_t halves __attribute__((vector_size(LANES * 2)));
    const halves low = __builtin_convertvector(v, halves);
    memcpy(p, &low, sizeof low);
}

inline float sum(vec v) {
    typedef float half __attribute__((vector_size(LANES * 2)));
    typedef float quad __attribute__((vector_size(16)));
#if defined(__AVX512F__)  // GCC 12 compiles the lines below to a store and loads that wait for it
    half low = _mm512_maskz_extractf32x8_ps(0xff, v, 0) + _mm512_maskz_extractf32x8_ps(0xff, v, 1);
#else
    half low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char *>(&v) + sizeof low, sizeof high);
    low += high;
#endif
    quad total = {};
    for (unsigned i = 0; i < sizeof low; i += sizeof total) {  // runs once or twice; half a SSE or NEON vector leaves two lanes 0
        quad part = {};
        memcpy(&part, reinterpret_cast<const char *>(&low) + i, sizeof low < sizeof part ? sizeof low : sizeof part);
        total += part;
    }
    return (total[0] + total[2]) + (total[1] + total[3]);
}

constexpr float LOG2_E = 1.44269504f;
constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer and puts the integer into the low mantissa bits

// Functions of an array compute its W vectors side by side: one polynomial is a chain of dependent operations, which alone leaves
// most of a core idle.

// Compute c0 x^n + .. + cn for W vectors.
template <int W, int TERMS>
inline void polynomial(vec (&p)[W], const vec (&x)[W], const float (&c)[TERMS]) {
    for (int i = 0; i < W; i++) p[i] = broadcast(c[0]);
#pragma GCC unroll 16
    for (int n = 1; n < TERMS; n++)
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) p[i] = p[i] * x[i] + c[n];
}

// Replace t <= 100 by 2^t: t = n + r with |r| <= 1/2 and 2^r = 1 + r q(r). The relative error is 9e-8, and 0 at r = 0: an error
// of decays near 1 would accumulate over many steps. The smallest result is 2^-100, because products of denormals are slow.
template <int W>
inline void exp2_above_floor(vec (&t)[W]) {
    constexpr float COEFFICIENTS[] = {0.00132647273f, 0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.f};
    vec p[W], shifted[W];
    for (int i = 0; i < W; i++) {
        t[i] = largest(t[i], broadcast(-100.f));
        shifted[i] = t[i] + ROUND;
        t[i] -= shifted[i] - ROUND;
    }
    polynomial(p, t, COEFFICIENTS);
    for (int i = 0; i < W; i++)  // the bits of ROUND itself are shifted out
        t[i] = of_bits((ivec)((uvec)bits_of(p[i]) + ((uvec)bits_of(shifted[i]) << 23)));
}

inline vec exp2_above_floor(vec t) {
    vec one[] = {t};
    exp2_above_floor(one);
    return one[0];
}

// Replace x by softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|): no division, and full relative accuracy for very negative x
// too. log(1 + e) = e + e^2 p(e), with a relative error of 3e-8 before rounding.
template <int W>
inline void softplus(vec (&x)[W]) {
    constexpr float COEFFICIENTS[] = {0.00536482451f, -0.0300657935f, 0.0792045384f, -0.137538026f,
                                      0.191536551f,   -0.248571637f,  0.333213226f,  -0.49999648f};
    vec e[W], p[W];
    for (int i = 0; i < W; i++) e[i] = magnitude(x[i]) * -LOG2_E;
    exp2_above_floor(e);
    polynomial(p, e, COEFFICIENTS);
    for (int i = 0; i < W; i++) x[i] = largest(x[i], broadcast(0.f)) + (e[i] * e[i] * p[i] + e[i]);
}

inline vec sigmoid_denominator(vec x) { return exp2_above_floor(smallest(x * -LOG2_E, broadcast(100.f))) + 1.f; }
inline vec sigmoid(vec x) { return 1.f / sigmoid_denominator(x); }
inline vec silu(vec x) { return x / sigmoid_denominator(x); }

// Compute GELU as max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with a polynomial for log2 of erfc. The absolute error of the second
// term is 1e-8.
inline vec gelu(vec x) {
    const vec size = magnitude(x), a = smallest(size, broadcast(5.6f));
    vec p = broadcast(-1.90098626e-6f);
    p = p * a + 2.80424995e-5f;
    p = p * a - 1.31396009e-4f;
    p = p * a - 2.72287898e-4f;
    p = p * a + 7.24574132e-3f;
    p = p * a - 5.26278726e-2f;
    p = p * a - 4.59162027e-1f;
    p = p * a - 1.15111101f;
    return largest(x, broadcast(0.f)) - 0.5f * size * exp2_above_floor(p * a);
}

}  // namespace
