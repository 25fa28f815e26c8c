// The scan kernel, compiled once per instruction set: EVM_ISA (name), EVM_LANES (floats per vector), EVM_STATES (states kept
// in registers at once: half of the register file).
//
// Lanes are channels, so nothing is ever summed across a vector, and a row of u, delta or y is one load. The states of one
// vector of channels stay in registers for a block of steps; B and C are scalars that are broadcast. Softplus, dt * u and
// skip * u are computed once per block into small buffers that stay in L1.
//
// GCC and Clang vector extensions, no intrinsics. Everything but the entry point is in the anonymous namespace, and only C
// headers are included: an inline function with external linkage, compiled for AVX-512, could be the copy the linker keeps.
#include "evm_scan.h"
#include "tile.h"

#include <string.h>

namespace {

constexpr int LANES = EVM_LANES, STATES = EVM_STATES, BLOCK = 32, GROUP = 64;
static_assert(EVM_TILE % LANES == 0 && GROUP % STATES == 0 && STATES % 2 == 0, "tile or group does not divide");

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

inline vec broadcast(float x) { return x - vec{}; }
inline vec largest(vec a, vec b) { return a > b ? a : b; }
inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

inline vec load_some(const float *p, int count) {  // the missing lanes are 0
    if (count == LANES) return load(p);
    float lanes[LANES] = {};
    for (int i = 0; i < count; i++) lanes[i] = p[i];
    return load(lanes);
}
inline void store_some(float *p, vec v, int count) {
    if (count == LANES) return store(p, v);
    float lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < count; i++) p[i] = lanes[i];
}

// 2^t for t <= 0. t = n + r with |r| <= 1/2; 2^r = 1 + r q(r), relative error 9e-8 and exact at r = 0: a bias near decay 1
// would add up over a long memory. The floor is 2^-100, because denormal products are slow.
inline vec exp2_of_negative(vec t) {
    t = largest(t, broadcast(-100.f));
    const vec shifted = t + broadcast(12582912.f);  // 1.5 * 2^23 rounds to an integer, which is then in the low mantissa bits
    const vec r = t - (shifted - broadcast(12582912.f));
    vec p = broadcast(0.00132647273f);
    p = p * r + broadcast(0.00967151299f);
    p = p * r + broadcast(0.0555073358f);
    p = p * r + broadcast(0.240222424f);
    p = p * r + broadcast(0.693147004f);
    p = p * r + broadcast(1.f);
    ivec exponent, bits;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &p, sizeof bits);
    bits += (exponent - 0x4b400000) << 23;
    vec result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

constexpr float LOG2_E = 1.44269504f;

// max(x, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|x|): full relative accuracy for very negative x too, and no log.
inline vec softplus(vec x) {
    const vec e = exp2_of_negative((x < 0.f ? x : -x) * LOG2_E), s = e / (e + 2.f), q = s * s;
    vec p = broadcast(1.f / 13);
    p = p * q + 1.f / 11;
    p = p * q + 1.f / 9;
    p = p * q + 1.f / 7;
    p = p * q + 1.f / 5;
    p = p * q + 1.f / 3;
    p = p * q + 1.f;
    return largest(x, broadcast(0.f)) + 2.f * s * p;
}

struct Block {  // one vector of channels, up to BLOCK steps
    alignas(64) float dt[BLOCK * LANES], inflow[BLOCK * LANES], y[BLOCK * LANES];
    alignas(64) float B[BLOCK * GROUP], C[BLOCK * GROUP];
    int steps;
};

// Advance STATES states through a block, in registers. A2: A * log2(e). stride: states of a row of B and C.
inline void advance(Block &block, const vec *A2, vec *states, const float *B, const float *C, int stride) {
    vec h[STATES];
    for (int n = 0; n < STATES; n++) h[n] = states[n];
    for (int t = 0; t < block.steps; t++) {
        const vec dt = load(block.dt + t * LANES), x = load(block.inflow + t * LANES);
        vec even = load(block.y + t * LANES), odd = broadcast(0.f);  // two accumulators: half the latency
        const float *b = B + t * stride, *c = C + t * stride;
#pragma GCC unroll 16
        for (int n = 0; n < STATES; n += 2) {
            h[n] = exp2_of_negative(dt * A2[n]) * h[n] + x * b[n];
            even += h[n] * c[n];
            h[n + 1] = exp2_of_negative(dt * A2[n + 1]) * h[n + 1] + x * b[n + 1];
            odd += h[n + 1] * c[n + 1];
        }
        store(block.y + t * LANES, even + odd);
    }
    for (int n = 0; n < STATES; n++) states[n] = h[n];
}

// `count` channels from `channel` on, of image and direction `row`, with the states from `first` on (at most GROUP of them).
// The first group writes y, the others add to it: N has no limit.
void run_vector(const evm_scan_args &a, int64_t row, int64_t channel, int count, int64_t first) {
    const int64_t direction = row % a.K, L = a.L, D = a.D, N = a.N;
    const int used = (int)(N - first < GROUP ? N - first : GROUP), padded = (used + STATES - 1) / STATES * STATES;
    const bool in_place = used == padded;  // rows of B and C can be read where they are
    vec A2[GROUP], h[GROUP];
    for (int n = 0; n < padded; n++) {
        float lanes[LANES] = {};
        if (n < used)
            for (int i = 0; i < count; i++) lanes[i] = a.A[(direction * D + channel + i) * N + first + n] * LOG2_E;
        A2[n] = load(lanes);
        h[n] = broadcast(0.f);
    }
    const vec bias = load_some(a.bias + direction * D + channel, count);
    const vec skip = first ? broadcast(0.f) : load_some(a.skip + direction * D + channel, count);
    const float *u = a.u + row * L * D + channel, *delta = a.delta + row * L * D + channel;
    const float *B = a.B + row * L * N + first, *C = a.C + row * L * N + first;
    float *y = a.y + row * L * D + channel;
    Block block;
    for (int64_t start = 0; start < L; start += BLOCK) {
        block.steps = (int)(L - start < BLOCK ? L - start : BLOCK);
        for (int t = 0; t < block.steps; t++) {
            const vec x = load_some(u + (start + t) * D, count);
            const vec dt = softplus(load_some(delta + (start + t) * D, count) + bias);
            store(block.dt + t * LANES, dt);
            store(block.inflow + t * LANES, dt * x);
            store(block.y + t * LANES, first ? load_some(y + (start + t) * D, count) : skip * x);
            if (!in_place) {
                memcpy(block.B + t * padded, B + (start + t) * N, used * sizeof(float));
                memcpy(block.C + t * padded, C + (start + t) * N, used * sizeof(float));
                memset(block.B + t * padded + used, 0, (padded - used) * sizeof(float));
                memset(block.C + t * padded + used, 0, (padded - used) * sizeof(float));
            }
        }
        const float *blockB = in_place ? B + start * N : block.B, *blockC = in_place ? C + start * N : block.C;
        const int stride = in_place ? (int)N : padded;
        for (int n = 0; n < padded; n += STATES) advance(block, A2 + n, h + n, blockB + n, blockC + n, stride);
        for (int t = 0; t < block.steps; t++) store_some(y + (start + t) * D, load(block.y + t * LANES), count);
    }
}

}  // namespace

extern "C" void EVM_TILE_NAME(EVM_ISA)(const evm_scan_args *a, int64_t tile) {
    const int64_t per_row = (a->D + EVM_TILE - 1) / EVM_TILE, row = tile / per_row, begin = tile % per_row * EVM_TILE;
    const int64_t end = begin + EVM_TILE < a->D ? begin + EVM_TILE : a->D;
    for (int64_t channel = begin; channel < end; channel += LANES)
        for (int64_t first = 0; first == 0 || first < a->N; first += GROUP)
            run_vector(*a, row, channel, (int)(end - channel < LANES ? end - channel : LANES), first);
}
