// Recurrence of the scan for some channels of one direction, shared by the scan op and the fused block.
//
// A lane of a vector is a channel, so there is no sum across a vector, and a row of u, delta or y is one load. The states of one
// vector of channels stay in registers for a block of steps. B and C are scalars that are broadcast. Softplus, dt * u and
// skip * u are computed once per block into small buffers that stay in the L1 cache.
#pragma once
#include "isa.h"
#include "simd.h"

namespace {

constexpr int STATES = EVM_STATES;  // states kept in registers at once: half of the register file
constexpr int STEPS = 32, GROUP = 64;
constexpr int TOGETHER = 4;         // steps whose softplus is computed side by side
constexpr int VECTORS = EVM_TILE / LANES;
static_assert(GROUP % STATES == 0 && STATES % 2 == 0, "STATES does not divide a group");
static_assert(STEPS % TOGETHER == 0, "TOGETHER does not divide a block");
static_assert(EVM_TILE % EVM_PAD == 0 && EVM_PAD % EVM_LANES == 0, "vectors do not divide a tile");

// Rows of one direction of one image, from one channel on. y may be the same array as u if N <= GROUP.
struct ScanRows {
    const float *u;
    float *y;
    int64_t stride;               // floats between two steps of u, delta and y
    const float *B, *C;
    int64_t state_stride;         // floats between two steps of B, C and dt
    const float *A, *skip, *bias; // constants of these channels; A is (channels, N)
    const float *delta;           // delta before softplus; if null, delta = dt times dt_weight (R, stride)
    const float *dt, *dt_weight;
    int64_t R, L, N;
    bool no_softplus;             // if true, dt = delta + bias
    float *delta_out;             // output array of delta for verification, laid out as u without padding, or null
    int64_t delta_out_stride;
};

struct Block {  // one vector of channels, up to STEPS steps
    alignas(64) float dt[STEPS * LANES], inflow[STEPS * LANES], y[STEPS * LANES];
    alignas(64) float B[STEPS * GROUP], C[STEPS * GROUP];
    int steps;
};

struct Rows {
    const float *u, *delta, *y;
    int64_t stride;
};

// Advance COUNT states, an even number, through a block, in registers. A2: A * log2(e). stride: floats between two steps of B and C.
// next: rows that the next block reads and writes in these channels. They are prefetched here because their cache lines are
// too far apart for the hardware prefetcher; the prefetches are spread over the steps, so that memory and arithmetic overlap.
template <int COUNT>
inline void advance(Block &block, const vec *A2, vec *states, const float *B, const float *C, int64_t stride, Rows next) {
    vec h[COUNT];
    for (int n = 0; n < COUNT; n++) h[n] = states[n];
    for (int t = 0; t < block.steps; t++) {
        __builtin_prefetch(next.u + t * next.stride);
        __builtin_prefetch(next.delta + t * next.stride);
        __builtin_prefetch(next.y + t * next.stride, 1);
        const vec dt = load(block.dt + t * LANES), x = load(block.inflow + t * LANES);
        vec even = load(block.y + t * LANES), odd = broadcast(0.f);  // two accumulators: half the latency
        const float *b = B + t * stride, *c = C + t * stride;
#pragma GCC unroll 16
        for (int n = 0; n < COUNT; n += 2) {
            h[n] = exp2_above_floor(dt * A2[n]) * h[n] + x * b[n];
            even += h[n] * c[n];
            h[n + 1] = exp2_above_floor(dt * A2[n + 1]) * h[n + 1] + x * b[n + 1];
            odd += h[n + 1] * c[n + 1];
        }
        store(block.y + t * LANES, even + odd);
    }
    for (int n = 0; n < COUNT; n++) states[n] = h[n];
}

// Number of states that are advanced at once for a scan of `used` states: 2, 4, 8 or STATES. VMamba has one state.
inline int states_at_once(int used) {
    int count = STATES;
    while (count > 2 && count / 2 >= used) count /= 2;
    return count;
}

// Advance `padded` states through a block, `at_once` at a time.
inline void advance_all(Block &block, int padded, int at_once, const vec *A2, vec *states, const float *B, const float *C, int64_t stride, Rows next) {
    if (!padded) return;  // no states: y is skip * u
    if (at_once == 2) return advance<2>(block, A2, states, B, C, stride, next);
    if (at_once == 4) return advance<4>(block, A2, states, B, C, stride, next);
    if (STATES > 8 && at_once == 8) return advance<8>(block, A2, states, B, C, stride, next);
    for (int n = 0; n < padded; n += STATES) advance<STATES>(block, A2 + n, states + n, B + n, C + n, stride, next);
}

inline vec delta_of(const ScanRows &rows, int64_t t, int64_t channel, int64_t count) {
    if (rows.delta) return load_some(rows.delta + t * rows.stride + channel, count);
    vec delta = broadcast(0.f);
    const float *dt = rows.dt + t * rows.state_stride;
    for (int64_t r = 0; r < rows.R; r++) delta += dt[r] * load(rows.dt_weight + r * rows.stride + channel);
    return delta;
}

// Compute dt, dt * u and the start value of y for one vector of channels. y starts from the skip term or, after the first group
// of states, from the sum of the earlier groups.
inline void prepare(Block &block, const ScanRows &rows, int64_t start, int64_t channel, int64_t count, bool first_group) {
    const vec bias = load_some(rows.bias + channel, count), skip = load_some(rows.skip + channel, count);
    for (int t = 0; t < block.steps; t++) {
        const int64_t at = (start + t) * rows.stride + channel;
        const vec x = load_some(rows.u + at, count), delta = delta_of(rows, start + t, channel, count);
        if (rows.delta_out) store_some(rows.delta_out + (start + t) * rows.delta_out_stride + channel, delta, count);
        store(block.dt + t * LANES, delta + bias);
        store(block.inflow + t * LANES, x);
        store(block.y + t * LANES, first_group ? skip * x : load_some(rows.y + at, count));
    }
    for (int t = 0; t < block.steps; t += TOGETHER) {  // steps after the last one compute what nobody reads
        vec dt[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) dt[i] = load(block.dt + (t + i) * LANES);
        if (!rows.no_softplus) softplus(dt);
        for (int i = 0; i < TOGETHER; i++) {
            store(block.dt + (t + i) * LANES, dt[i]);
            store(block.inflow + (t + i) * LANES, dt[i] * load(block.inflow + (t + i) * LANES));
        }
    }
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
    vec A2[VECTORS][GROUP], h[VECTORS][GROUP];
    for (int v = 0; v * LANES < channels; v++)
        for (int n = 0; n < padded; n++) {
            A2[v][n] = n < used ? decay_rates(rows, v * LANES, channels - v * LANES, first + n) : broadcast(0.f);
            h[v][n] = broadcast(0.f);
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
            prepare(block, rows, start, channel, count, first == 0);
            const int64_t at = (start + STEPS) * rows.stride + channel;
            const Rows next = {rows.u + at, (rows.delta ? rows.delta : rows.u) + at, rows.y + at, rows.stride};
            advance_all(block, padded, at_once, A2[v], h[v], blockB, blockC, stride, next);
            for (int t = 0; t < block.steps; t++)
                store_some(rows.y + (start + t) * rows.stride + channel, load(block.y + t * LANES), count);
        }
    }
}

// Scan TOGETHER steps of one vector of channels, from `start` on. WHOLE: there are LANES channels and TOGETHER steps, and delta is
// read and not kept.
template <int N, bool WHOLE>
inline void advance_few_states(const ScanRows &rows, int64_t start, int64_t channel, int64_t count, const vec *A2, vec *states) {
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
    if (!rows.no_softplus) softplus(dt);
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; i++) y[i] = skip * x[i], x[i] *= dt[i];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < TOGETHER; i++) decay[i] = dt[i] * A2[n];
        exp2_above_floor(decay);
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
    vec A2[VECTORS][N], h[VECTORS][N];
    for (int v = 0; v * LANES < channels; v++)
        for (int n = 0; n < N; n++) A2[v][n] = decay_rates(rows, v * LANES, channels - v * LANES, n), h[v][n] = broadcast(0.f);
    for (int64_t start = 0; start < rows.L; start += TOGETHER)
        for (int v = 0; v * LANES < channels; v++) {
            const int64_t channel = v * LANES, count = channels - channel;
            if (count >= LANES && start + TOGETHER <= rows.L && rows.delta && !rows.delta_out)
                advance_few_states<N, true>(rows, start, channel, count, A2[v], h[v]);
            else
                advance_few_states<N, false>(rows, start, channel, count, A2[v], h[v]);
        }
}

inline void scan_channels(const ScanRows &rows, int64_t channels) {
    if (rows.N == 1) return scan_few_states<1>(rows, channels);
    if (rows.N == 2) return scan_few_states<2>(rows, channels);
    for (int64_t first = 0; first == 0 || first < rows.N; first += GROUP) scan_group(rows, channels, first);
}

}  // namespace
