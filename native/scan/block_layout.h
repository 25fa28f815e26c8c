// Tiles of a block and layout of its workspace, the same for every instruction set.
#pragma once
#include "isa.h"

namespace {

enum Stage { PACK, PROJECT, CONVOLVE, PARAMETERS, SCAN, OUTPUT, GATE, SUM };
static_assert(SUM + 1 == EVM_BLOCK_STAGES, "stages");

constexpr int64_t K = EVM_BLOCK_DIRECTIONS, CHUNK = 48;  // CHUNK: tokens of a tile, a multiple of the rows of every micro-kernel
constexpr int64_t HEADER = EVM_PAD;                       // floats before packed weights: the BlockTile that reads them
constexpr int64_t CACHED = 512 * 1024 / sizeof(float);    // floats of a group's activations that are to stay in the cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pad(int64_t channels) { return ceil_div(channels, EVM_PAD) * EVM_PAD; }

// One step of an image: a stage or, of PROJECT, CONVOLVE and PARAMETERS, what a stage computes for one group of rows of the map. These
// three run group by group, so that what they hand on stays in the cache.
struct Step {
    int stage;
    int64_t group;
};

struct Layout {
    int64_t H, W, tokens, h, w, L;   // size and tokens of the map; height, width and length of one direction
    int64_t C, d, G, P;              // lengths of padded rows; P: row of B, C and dt side by side
    int64_t chunks, map_rows, strips; // number of token tiles; rows of the map in a convolution tile, number of such tiles
    int64_t group, groups;            // rows of the map in a group, an even number and whole convolution tiles; number of groups
    int64_t x_rows, n_rows;           // rows of the map that x and n hold: row i is at i modulo that
    int64_t in_x, in_z, x_proj, x_scales, out_proj, local_proj, dt_proj, conv, local_conv, vectors, zeros;  // offsets of packed weights, in floats
    int64_t x_panels;                                                                            // floats of x_proj for one direction
    int64_t packed;                                                                              // their size
    // offsets into the workspace behind packed weights, in floats
    // activations of one image; n_in, u_in, local_in: in the type that in_proj, x_proj, local_proj read; s: of padded rows alone, else it is
    // in the output
    int64_t n, n_in, x, u, u_in, y, p, s, local, local_in, sums, gates;
    int64_t size;  // of the workspace without packed weights

    explicit Layout(const evm_block_args &a) {
        H = a.H, W = a.W, tokens = H * W, h = ceil_div(a.H, 2), w = ceil_div(a.W, 2), L = h * w;
        C = pad(a.C), d = pad(a.d), G = pad(a.G), P = pad(2 * a.N + a.R);
        chunks = ceil_div(tokens, CHUNK), map_rows = a.W ? 2 * ceil_div(CHUNK / 4, a.W) : 2, strips = ceil_div(a.H, map_rows);
        const int64_t of_row = a.W * (2 * d + C + P) + 1;
        group = CACHED / of_row < map_rows ? map_rows : CACHED / of_row / map_rows * map_rows, groups = ceil_div(a.H, group);
        x_rows = groups > 1 ? group + 2 : a.H;
        int64_t end = HEADER;
        const auto take = [&end](int64_t floats) { const int64_t at = end; end += pad(floats); return at; };
        const bool int8 = a.in_proj_int8.weight, int8_x = a.x_proj_int8.weight;
        const int64_t more = int8 ? 2 : 0;  // one row of start values, and up to eight rows of bytes; activations may be floats
        in_x = take((a.C + more) * d), in_z = take((a.C + more) * d);
        x_panels = (a.d + (int8_x ? 2 : 0)) * P, x_proj = take(K * x_panels), x_scales = take(int8_x ? K * P : 0);
        out_proj = take((a.d + more) * C), local_proj = take((a.C + more) * C), dt_proj = take(K * a.R * d), conv = take(10 * d), local_conv = take(10 * C);
        vectors = take(7 * C + 4 * d), zeros = take(C > d ? C : d);
        packed = end, end = 0;
        const bool apart = int8 || a.half;
        n_rows = apart ? x_rows : a.H;  // a float block reads n again in stage OUTPUT
        n = take(n_rows * a.W * C), n_in = apart ? take(tokens * C) : n, x = take(x_rows * a.W * d), u = take(K * L * d);
        u_in = int8_x || a.half ? take(K * L * d) : u, y = a.N <= EVM_GROUP ? u : take(K * L * d);
        p = take(K * L * P), s = take(C == a.C ? 0 : tokens * C), local = take(tokens * C), local_in = take(smaller(group, H) * a.W * C);
        sums = take((chunks + strips) * C), gates = take(2 * C);
        size = end;
    }

    int64_t steps() const { return PROJECT + 3 * groups + SUM - PARAMETERS; }
    Step step(int64_t index) const {
        const int64_t of_groups = index - PROJECT, after = of_groups - 3 * groups;
        if (of_groups < 0) return {PACK, 0};
        if (after >= 0) return {SCAN + (int)after, 0};
        return {PROJECT + (int)(of_groups % 3), of_groups / 3};
    }

    // First row of the map that PROJECT computes for a group: it is one row ahead of CONVOLVE, which reads the rows around its own.
    int64_t projected(int64_t of_group) const { return of_group ? smaller(of_group * group + 1, H) : 0; }
    // First row of one phase of the map in a group, and number of them.
    int64_t phase_row(int64_t of_group) const { return smaller(of_group * group / 2, h); }
    int64_t phase_rows(int64_t of_group) const { return phase_row(of_group + 1) - phase_row(of_group); }

    int64_t tiles(Step step) const {
        switch (step.stage) {
            case PACK: return 0;
            case PROJECT: return ceil_div((projected(step.group + 1) - projected(step.group)) * W, CHUNK);
            case CONVOLVE: return smaller(group / map_rows, strips - step.group * (group / map_rows));
            case PARAMETERS: return K * ceil_div(phase_rows(step.group) * w, CHUNK);
            case SCAN: return K * ceil_div(d, EVM_TILE);
            case GATE: return 1;
            default: return chunks;
        }
    }

    // Return the row of a token in x or n, which hold `rows` rows of the map.
    int64_t kept(int64_t token, int64_t rows) const { return token % (rows * W); }

    // Return the row of token (i, j) in u and y. Direction k reads phase (row k % 2, column k / 2). Even k read it row-major, odd k
    // column-major.
    int64_t place(int64_t i, int64_t j) const {
        const int64_t k = (i & 1) + 2 * (j & 1);
        return k * L + (i & 1 ? j / 2 * h + i / 2 : i / 2 * w + j / 2);
    }
};

}  // namespace
