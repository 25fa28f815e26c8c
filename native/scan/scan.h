// Recurrence of the scan for some channels of one direction, shared by the scan op and the fused block.
//
// A lane of a vector is a channel, so there is no sum across a vector, and a row of u, delta or y is one load. The states of WIDTH
// channels stay in registers, or in the L1 cache, for a block of steps. B and C are scalars that are broadcast. Softplus, dt * u and
// skip * u are computed once per block into small buffers that stay in the L1 cache.
#pragma once
#include "isa.h"
#include "simd.h"

namespace {

constexpr int STATES = EVM_STATES;  // states advanced at once
#if defined(__AVX512F__)  // instructions broadcast an operand in memory
constexpr int SIDE = 1;             // vectors of channels side by side
constexpr int HELD = STATES;        // with up to HELD vectors of states at once, they stay in registers
#else
constexpr int SIDE = 2;             // they share B and C in registers
constexpr int HELD = 4;             // constants in registers save more than states
#endif
constexpr int WIDTH = SIDE * LANES; // channels of a block
constexpr int STEPS = 32, GROUP = EVM_GROUP;
constexpr int TOGETHER = 4;         // steps whose softplus is computed side by side
constexpr int LINE = 16;            // floats in a cache line
static_assert(GROUP % STATES == 0 && STATES % 2 == 0, "STATES does not divide a group");
static_assert(STEPS % TOGETHER == 0, "TOGETHER does not divide a block");
static_assert(EVM_TILE % EVM_PAD == 0 && EVM_PAD % WIDTH == 0, "blocks do not divide a tile");

struct Block {  // WIDTH channels, up to STEPS steps
    alignas(64) float dt[STEPS * WIDTH], inflow[STEPS * WIDTH], y[STEPS * WIDTH];
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

// Advance COUNT states, an even number, through a block. A2: A * log2(e). A2, states: SIDE vectors for each state. stride: floats
// between two steps of B and C. out: y of the first step, out_stride floats before that of the next one. CLAMP: dt * A2 may be below
// -100.
template <int COUNT, bool CLAMP>
inline void advance(const Block &block, const vec *A2, vec *states, const float *__restrict B, const float *__restrict C, int64_t stride,
                    float *out, int64_t out_stride) {
    const Exp2 exp2;
    constexpr int VECTORS = COUNT * SIDE;
    vec held[VECTORS];
    vec *const h = VECTORS <= HELD ? held : states;
    for (int n = 0; n < VECTORS; n++) held[n] = states[n];
    for (int t = 0; t < block.steps; t++, B += stride, C += stride, out += out_stride) {
        vec dt[2], x[2], y[2];  // of two vectors of channels, or twice of one: two sums for y have half the latency
        for (int i = 0; i < 2; i++) {
            const int at = t * WIDTH + i % SIDE * LANES;
            dt[i] = load(block.dt + at), x[i] = load(block.inflow + at);
            y[i] = i < SIDE ? load(block.y + at) : broadcast(0.f);
        }
#pragma GCC unroll 32
        for (int n = 0; n < VECTORS; n += 2) {
            vec decay[] = {product(dt[0], A2[n]), product(dt[1], A2[n + 1])};
            if (CLAMP) exp2.above_floor(decay);
            else exp2.within_100(decay);
            vec state[2];
            for (int i = 0; i < 2; i++) state[i] = decay[i] * h[n + i] + x[i] * B[(n + i) / SIDE];
            for (int i = 0; i < 2; i++) y[i] += state[i] * C[(n + i) / SIDE];
            for (int i = 0; i < 2; i++) h[n + i] = state[i], dt[i] = after(y[i], dt[i]);
        }
        if (SIDE == 1) y[0] += y[1];
        for (int i = 0; i < SIDE; i++) store(out + i * LANES, y[i]);
    }
    if (VECTORS <= HELD)
        for (int n = 0; n < VECTORS; n++) states[n] = held[n];
}

// Number of states that are advanced at once for a scan of `used` states: 2, 4, 8 or STATES. VMamba has one state.
inline int states_at_once(int used) {
    int count = STATES;
    while (count > 2 && count / 2 >= used) count /= 2;
    return count;
}

// Advance `padded` states through a block, `at_once` at a time. out: rows of y; may be block.y.
template <bool CLAMP>
inline void advance_all(Block &block, int padded, int at_once, const vec *A2, vec *states, const float *B, const float *C, int64_t stride,
                        float *out, int64_t out_stride) {
    if (!padded) return;  // no states: y is skip * u
    if (at_once == 2) return advance<2, CLAMP>(block, A2, states, B, C, stride, out, out_stride);
    if (at_once == 4) return advance<4, CLAMP>(block, A2, states, B, C, stride, out, out_stride);
    if (STATES > 8 && at_once == 8) return advance<8, CLAMP>(block, A2, states, B, C, stride, out, out_stride);
    int n = 0;
    for (; n + STATES < padded; n += STATES)
        advance<STATES, CLAMP>(block, A2 + n * SIDE, states + n * SIDE, B + n, C + n, stride, block.y, WIDTH);
    advance<STATES, CLAMP>(block, A2 + n * SIDE, states + n * SIDE, B + n, C + n, stride, out, out_stride);
}

inline vec delta_of(const ScanRows &rows, int64_t t, int64_t channel, int64_t count) {
    if (rows.delta) return load_some(rows.delta + t * rows.stride + channel, count);
    vec delta = broadcast(0.f);
    const float *dt = rows.dt + t * rows.state_stride;
    for (int64_t r = 0; r < rows.R; r++) delta += dt[r] * load(rows.dt_weight + r * rows.stride + channel);
    return delta;
}

// Write delta = dt dt_weight of WIDTH channels to block.dt, for all whole groups of TOGETHER steps.
__attribute__((noinline)) void multiply_dt(Block &block, const ScanRows &rows, int64_t start, int64_t channel) {
    const float *dt = rows.dt + start * rows.state_stride;
    for (int t = 0; t + TOGETHER <= block.steps; t += TOGETHER, dt += TOGETHER * rows.state_stride) {
        vec sum[TOGETHER][SIDE] = {};
        for (int64_t r = 0; r < rows.R; r++) {
            const float *weight = rows.dt_weight + r * rows.stride + channel;
            for (int i = 0; i < TOGETHER; i++)
                for (int side = 0; side < SIDE; side++) sum[i][side] += dt[i * rows.state_stride + r] * load(weight + side * LANES);
        }
        for (int i = 0; i < TOGETHER; i++)
            for (int side = 0; side < SIDE; side++) store(block.dt + (t + i) * WIDTH + side * LANES, sum[i][side]);
    }
}

// Prefetch the rows of the next block from element `at` on: their cache lines are too far apart for the hardware prefetcher.
inline void prefetch(const ScanRows &rows, int64_t at) {
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) {
        const int64_t ahead = at + (STEPS + i) * rows.stride;
        __builtin_prefetch(rows.u + ahead);
        __builtin_prefetch(rows.y + ahead, 1);
        if (rows.delta) __builtin_prefetch(rows.delta + ahead);
    }
}

// Read u and delta + bias of up to TOGETHER steps of up to LANES channels; after the last step the last one again. delta is kept if it is
// asked for.
inline void read_some(const ScanRows &rows, int64_t start, int64_t channel, int64_t count, vec (&u)[TOGETHER], vec (&dt)[TOGETHER]) {
    const vec bias = load_some(rows.bias + channel, count);
    for (int i = 0; i < TOGETHER; i++) {
        const int64_t step = start + i < rows.L ? start + i : rows.L - 1;
        const vec delta = delta_of(rows, step, channel, count);
        if (rows.delta_out) store_some(rows.delta_out + step * rows.delta_out_stride + channel, delta, count);
        u[i] = load_some(rows.u + step * rows.stride + channel, count), dt[i] = delta + bias;
    }
}

// Compute dt, dt * u and skip * u of one vector of channels for a block, from step `start` and column `at` of the block on. multiplied:
// block.dt has delta of whole groups of steps. Return the largest dt of each channel.
inline vec prepare(Block &block, const Softplus &softplus, const ScanRows &rows, bool multiplied, int64_t start, int64_t channel, int64_t count,
                   int at) {
    const bool whole = count >= LANES && !rows.delta_out && (rows.delta || multiplied), new_lines = channel % LINE == 0;
    const int64_t u_stride = rows.stride, first = start * u_stride + channel, delta_stride = rows.delta ? u_stride : WIDTH;
    const float *const u_rows = rows.u + first, *const delta_rows = rows.delta ? rows.delta + first : block.dt + at;
    const vec skip = load_some(rows.skip + channel, count), bias = load_some(rows.bias + channel, count);
    vec longest = broadcast(0.f);
    for (int t = 0; t < block.steps; t += TOGETHER) {
        vec u[TOGETHER], dt[TOGETHER];
        if (whole && t + TOGETHER <= block.steps) {
#pragma GCC unroll 4
            for (int i = 0; i < TOGETHER; i++) u[i] = load(u_rows + (t + i) * u_stride), dt[i] = load(delta_rows + (t + i) * delta_stride) + bias;
            if (new_lines) prefetch(rows, first + t * u_stride);
        } else {
            read_some(rows, start + t, channel, count, u, dt);
        }
        if (!rows.no_softplus) softplus.replace(dt);
#pragma GCC unroll 4
        for (int i = 0; i < TOGETHER; i++) {
            const int to = (t + i) * WIDTH + at;
            store(block.dt + to, dt[i]);
            store(block.inflow + to, dt[i] * u[i]);
            store(block.y + to, skip * u[i]);
            longest = largest(longest, dt[i]);
        }
    }
    return longest;
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
    constexpr int BLOCKS = EVM_TILE / WIDTH;
    const int64_t N = rows.N;
    const int used = (int)(N - first < GROUP ? N - first : GROUP), at_once = states_at_once(used);
    const int padded = (used + at_once - 1) / at_once * at_once;
    const bool in_place = used == padded;  // B and C need no padded copy
    vec A2[BLOCKS][GROUP * SIDE], h[BLOCKS][GROUP * SIDE], fastest[BLOCKS][SIDE] = {};  // fastest: the largest -A2 of each channel
    for (int64_t block = 0; block * WIDTH < channels; block++)
        for (int n = 0; n < padded; n++)
            for (int side = 0; side < SIDE; side++) {
                const int64_t channel = block * WIDTH + side * LANES;
                const vec rates = n < used ? decay_rates(rows, channel, channels - channel, first + n) : broadcast(0.f);
                A2[block][n * SIDE + side] = rates;
                h[block][n * SIDE + side] = broadcast(0.f);
                fastest[block][side] = largest(fastest[block][side], -rates);
            }
    const Softplus softplus;
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
        for (int64_t b = 0; b * WIDTH < channels; b++) {
            const int64_t channel = b * WIDTH, count = channels - channel;
            float *const y = rows.y + start * rows.stride + channel;
            const bool multiplied = !rows.delta && !rows.delta_out && count >= WIDTH;
            if (multiplied) multiply_dt(block, rows, start, channel);
            bool clamp = rows.no_softplus;
            for (int side = 0; side < SIDE; side++) {
                const int at = side * LANES;
                const vec longest = prepare(block, softplus, rows, multiplied, start, channel + at, count - at, at);
                clamp |= !at_most(100.f, longest * fastest[b][side]);
            }
            for (int t = 0; t < block.steps && first; t++)  // later groups add to the sum of the earlier ones
                for (int at = 0; at < WIDTH; at += LANES)
                    store(block.y + t * WIDTH + at, load_some(y + t * rows.stride + at, count - at));
            const bool direct = count >= WIDTH && padded;
            float *const out = direct ? y : block.y;
            const int64_t out_stride = direct ? rows.stride : WIDTH;
            (clamp ? advance_all<true> : advance_all<false>)(block, padded, at_once, A2[b], h[b], blockB, blockC, stride, out, out_stride);
            for (int t = 0; t < block.steps && !direct; t++)
                for (int at = 0; at < WIDTH; at += LANES)
                    store_some(y + t * rows.stride + at, load(block.y + t * WIDTH + at), count - at);
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
    constexpr int VECTORS = EVM_TILE / LANES;
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
