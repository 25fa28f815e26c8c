// Recurrence of the scan for some channels of one direction, shared by the scan op and the fused block.
//
// A lane of a vector is a channel, so there is no sum across a vector, and a row of u, delta or y is one load. The states of one
// vector of channels stay in registers, or in the L1 cache, for a block of steps. B and C are scalars that are broadcast. Softplus, dt * u and
// skip * u are computed once per block into small buffers that stay in the L1 cache.
#pragma once
#include "isa.h"
#include "simd.h"

namespace {

constexpr int STATES = EVM_STATES;  // states advanced at once
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int HELD = STATES;        // with up to HELD states at once, states stay in registers
#else
constexpr int HELD = 4;             // 16 registers: constants in registers save more than states
#endif
constexpr int STEPS = 32, GROUP = EVM_GROUP;
constexpr int TOGETHER = 4;         // steps whose softplus is computed side by side
constexpr int VECTORS = EVM_TILE / LANES;
static_assert(GROUP % STATES == 0 && STATES % 2 == 0, "STATES does not divide a group");
static_assert(STEPS % TOGETHER == 0, "TOGETHER does not divide a block");
static_assert(EVM_TILE % EVM_PAD == 0 && EVM_PAD % EVM_LANES == 0, "vectors do not divide a tile");

struct Block {  // one vector of channels, up to STEPS steps
    alignas(64) float dt[STEPS * LANES], inflow[STEPS * LANES], y[STEPS * LANES];
    alignas(64) float B[STEPS * GROUP], C[STEPS * GROUP];
    int steps;
};

// Return a * b. Compilers must not fuse the multiplication with both additions that follow: on AVX2 the multipliers have more to do
// than the adders. AVX-512 adds with the multipliers.
inline vec product(vec a, vec b) {
#if defined(__AVX512F__)
    return a * b;
#else
    return opaque(a * b);
#endif
}

// Advance COUNT states, an even number, through a block. A2: A * log2(e). stride: floats between two steps of B and C. CLAMP: dt * A2
// may be below -100.
template <int COUNT, bool CLAMP>
inline void advance(Block &block, const vec *A2, vec *states, const float *B, const float *C, int64_t stride) {
    const Exp2 exp2;
    vec held[COUNT];
    vec *const h = COUNT <= HELD ? held : states;
    for (int n = 0; n < COUNT; n++) held[n] = states[n];
    for (int t = 0; t < block.steps; t++, B += stride, C += stride) {
        const vec dt = load(block.dt + t * LANES), x = load(block.inflow + t * LANES);
        vec y[] = {load(block.y + t * LANES), broadcast(0.f)};  // two accumulators: half the latency
#pragma GCC unroll 16
        for (int n = 0; n < COUNT; n += 2) {
            vec decay[] = {product(dt, A2[n]), product(dt, A2[n + 1])};
            if (CLAMP) exp2.above_floor(decay);
            else exp2.within_100(decay);
            for (int i = 0; i < 2; i++) {
                vec state = decay[i] * h[n + i];
                state += x * B[n + i];
                y[i] += state * C[n + i];
                h[n + i] = state;
            }
        }
        store(block.y + t * LANES, y[0] + y[1]);
    }
    if (COUNT <= HELD)
        for (int n = 0; n < COUNT; n++) states[n] = held[n];
}

// Number of states that are advanced at once for a scan of `used` states: 2, 4, 8 or STATES. VMamba has one state.
inline int states_at_once(int used) {
    int count = STATES;
    while (count > 2 && count / 2 >= used) count /= 2;
    return count;
}

// Advance `padded` states through a block, `at_once` at a time.
template <bool CLAMP>
inline void advance_all(Block &block, int padded, int at_once, const vec *A2, vec *states, const float *B, const float *C, int64_t stride) {
    if (!padded) return;  // no states: y is skip * u
    if (at_once == 2) return advance<2, CLAMP>(block, A2, states, B, C, stride);
    if (at_once == 4) return advance<4, CLAMP>(block, A2, states, B, C, stride);
    if (STATES > 8 && at_once == 8) return advance<8, CLAMP>(block, A2, states, B, C, stride);
    for (int n = 0; n < padded; n += STATES) advance<STATES, CLAMP>(block, A2 + n, states + n, B + n, C + n, stride);
}

inline vec delta_of(const ScanRows &rows, int64_t t, int64_t channel, int64_t count) {
    if (rows.delta) return load_some(rows.delta + t * rows.stride + channel, count);
    vec delta = broadcast(0.f);
    const float *dt = rows.dt + t * rows.state_stride;
    for (int64_t r = 0; r < rows.R; r++) delta += dt[r] * load(rows.dt_weight + r * rows.stride + channel);
    return delta;
}

// Read u and delta + bias of one vector of channels for a block; steps from block.steps up to a multiple of TOGETHER are 0. WHOLE:
// there are LANES channels. The rows that the next block reads and writes are prefetched, because their cache lines are too far
// apart for the hardware prefetcher.
template <bool WHOLE>
inline void read_block(Block &block, const ScanRows &rows, int64_t start, int64_t channel, int64_t count) {
    const auto read = [=](const float *p) { return WHOLE ? load(p) : load_some(p, count); };
    const int64_t at = start * rows.stride + channel, stride = rows.stride, ahead = STEPS * stride;
    const vec bias = read(rows.bias + channel);
    const bool plain = rows.delta && !rows.delta_out;
    const float *u = rows.u + at, *y = rows.y + at, *delta = plain ? rows.delta + at : u;
    for (int t = 0; t < block.steps; t++, u += stride, y += stride, delta += stride) {
        __builtin_prefetch(u + ahead);
        __builtin_prefetch(delta + ahead);
        __builtin_prefetch(y + ahead, 1);
        store(block.inflow + t * LANES, read(u));
        store(block.dt + t * LANES, read(delta) + bias);
    }
    for (int t = 0; t < block.steps && !plain; t++) {
        const vec computed = delta_of(rows, start + t, channel, count);
        if (rows.delta_out) store_some(rows.delta_out + (start + t) * rows.delta_out_stride + channel, computed, count);
        store(block.dt + t * LANES, computed + bias);
    }
    for (int t = block.steps; t % TOGETHER; t++) {
        store(block.inflow + t * LANES, broadcast(0.f));
        store(block.dt + t * LANES, broadcast(0.f));
    }
}

// Compute dt, dt * u and skip * u for a block. Return the largest dt of each channel.
inline vec prepare(Block &block, const ScanRows &rows, int64_t channel, int64_t count) {
    const Softplus softplus;
    const vec skip = load_some(rows.skip + channel, count);
    const bool no_softplus = rows.no_softplus;
    vec longest = broadcast(0.f);
    for (int t = 0; t < block.steps; t += TOGETHER) {
        vec dt[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) dt[i] = load(block.dt + (t + i) * LANES);
        if (!no_softplus) softplus.replace(dt);
        for (int i = 0; i < TOGETHER; i++) {
            const int at = (t + i) * LANES;
            const vec x = load(block.inflow + at);
            store(block.dt + at, dt[i]);
            store(block.inflow + at, dt[i] * x);
            store(block.y + at, skip * x);
            longest = largest(longest, dt[i]);
        }
    }
    return longest;
}

// Write y of a block to its rows. WHOLE: as in read_block.
template <bool WHOLE>
inline void write_block(const Block &block, const ScanRows &rows, int64_t start, int64_t channel, int64_t count) {
    float *y = rows.y + start * rows.stride + channel;
    const float *const end = block.y + block.steps * LANES;
    for (const float *from = block.y; from < end; from += LANES, y += rows.stride) store_some(y, load(from), WHOLE ? LANES : count);
}

// Whether all lanes of v are at most `limit`. NaN is not.
inline bool at_most(float limit, vec v) {
    bool all = true;
    for (int i = 0; i < LANES; i++) all &= v[i] <= limit;
    return all;
}

// Return column n of A * log2(e) for one vector of channels.
inline vec decay_rates(const ScanRows &rows, int64_t channel, int64_t count, int64_t n) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < LANES && i < count; i++) lanes[i] = rows.A[(channel + i) * rows.N + n] * LOG2_E;
    return load(lanes);
}

// Scan `channels` channels (at most EVM_TILE) with at most GROUP states, from state `first` on. The first group writes y and the
// later groups add to y, so that N has no limit. The loop over steps is outermost, so that memory is accessed row by row.
void scan_group(const ScanRows &rows, int64_t channels, int64_t first) {
    const int64_t N = rows.N;
    const int used = (int)(N - first < GROUP ? N - first : GROUP), at_once = states_at_once(used);
    const int padded = (used + at_once - 1) / at_once * at_once;
    const bool in_place = used == padded;  // B and C need no padded copy
    vec A2[VECTORS][GROUP], h[VECTORS][GROUP], fastest[VECTORS] = {};  // fastest: the largest -A2 of each channel
    for (int v = 0; v * LANES < channels; v++)
        for (int n = 0; n < padded; n++) {
            A2[v][n] = n < used ? decay_rates(rows, v * LANES, channels - v * LANES, first + n) : broadcast(0.f);
            h[v][n] = broadcast(0.f);
            fastest[v] = largest(fastest[v], -A2[v][n]);
        }
    const float *B = rows.B + first, *C = rows.C + first;
    Block block;
    for (int64_t start = 0; start < rows.L; start += STEPS) {
        block.steps = (int)(rows.L - start < STEPS ? rows.L - start : STEPS);
        for (int t = 0; t < block.steps && !in_place; t++) {
            const int64_t from = (start + t) * rows.state_stride;
            memcpy(block.B + t * padded, B + from, used * sizeof(float));
            memcpy(block.C + t * padded, C + from, used * sizeof(float));
            memset(block.B + t * padded + used, 0, (padded - used) * sizeof(float));
            memset(block.C + t * padded + used, 0, (padded - used) * sizeof(float));
        }
        const float *blockB = in_place ? B + start * rows.state_stride : block.B;
        const float *blockC = in_place ? C + start * rows.state_stride : block.C;
        const int64_t stride = in_place ? rows.state_stride : padded;
        for (int v = 0; v * LANES < channels; v++) {
            const int64_t channel = v * LANES, count = channels - channel < LANES ? channels - channel : LANES;
            const bool whole = count == LANES;
            (whole ? read_block<true> : read_block<false>)(block, rows, start, channel, count);
            const vec longest = prepare(block, rows, channel, count);
            for (int t = 0; t < block.steps && first; t++)  // later groups add to the sum of the earlier ones
                store(block.y + t * LANES, load_some(rows.y + (start + t) * rows.stride + channel, count));
            const bool clamp = rows.no_softplus || !at_most(100.f, longest * fastest[v]);
            (clamp ? advance_all<true> : advance_all<false>)(block, padded, at_once, A2[v], h[v], blockB, blockC, stride);
            (whole ? write_block<true> : write_block<false>)(block, rows, start, channel, count);
        }
    }
}

// Scan TOGETHER steps of one vector of channels, from `start` on. WHOLE: there are LANES channels and TOGETHER steps, and delta is
// read and not kept.
template <int N, bool WHOLE>
__attribute__((always_inline)) inline void advance_few_states(const Softplus &softplus, const ScanRows &rows, int64_t start, int64_t channel, int64_t count, const vec *A2, vec *states) {
    const auto read = [=](const float *p) { return WHOLE ? load(p) : load_some(p, count); };
    const vec bias = read(rows.bias + channel), skip = read(rows.skip + channel);
    vec x[TOGETHER], dt[TOGETHER], y[TOGETHER], decay[TOGETHER];
    int64_t step[TOGETHER];  // after the last step the last one again
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) {
        step[i] = WHOLE || start + i < rows.L ? start + i : rows.L - 1;
        const int64_t at = step[i] * rows.stride + channel, ahead = at + STEPS * rows.stride;
        if (WHOLE) {
            __builtin_prefetch(rows.u + ahead);
            __builtin_prefetch(rows.delta + ahead);
            __builtin_prefetch(rows.y + ahead, 1);
        }
        const vec delta = WHOLE ? load(rows.delta + at) : delta_of(rows, step[i], channel, count);
        if (!WHOLE && rows.delta_out) store_some(rows.delta_out + step[i] * rows.delta_out_stride + channel, delta, count);
        x[i] = read(rows.u + at), dt[i] = delta + bias;
    }
    if (!rows.no_softplus) softplus.replace(dt);
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) y[i] = skip * x[i], x[i] *= dt[i];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < TOGETHER; i++) decay[i] = dt[i] * A2[n];
        softplus.exp2.above_floor(decay);
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++) {
            states[n] = decay[i] * states[n] + x[i] * rows.B[step[i] * rows.state_stride + n];
            y[i] += states[n] * rows.C[step[i] * rows.state_stride + n];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++)
        if (WHOLE || start + i < rows.L) store_some(rows.y + step[i] * rows.stride + channel, y[i], WHOLE ? LANES : count);
}

// Scan `channels` channels (at most EVM_TILE) with N states, one or two. With so few states all values of TOGETHER steps stay in
// registers, from the rows of u and delta to the row of y, and softplus is most of the work.
template <int N>
void scan_few_states(const ScanRows &rows, int64_t channels) {
    const Softplus softplus;
    vec A2[VECTORS][N], h[VECTORS][N];
    for (int v = 0; v * LANES < channels; v++)
        for (int n = 0; n < N; n++) A2[v][n] = decay_rates(rows, v * LANES, channels - v * LANES, n), h[v][n] = broadcast(0.f);
    for (int64_t start = 0; start < rows.L; start += TOGETHER)
        for (int v = 0; v * LANES < channels; v++) {
            const int64_t channel = v * LANES, count = channels - channel;
            if (count >= LANES && start + TOGETHER <= rows.L && rows.delta && !rows.delta_out)
                advance_few_states<N, true>(softplus, rows, start, channel, count, A2[v], h[v]);
            else
                advance_few_states<N, false>(softplus, rows, start, channel, count, A2[v], h[v]);
        }
}

inline void scan_channels(const ScanRows &rows, int64_t channels) {
    if (rows.N == 1) return scan_few_states<1>(rows, channels);
    if (rows.N == 2) return scan_few_states<2>(rows, channels);
    for (int64_t first = 0; first == 0 || first < rows.N; first += GROUP) scan_group(rows, channels, first);
}

}  // namespace
