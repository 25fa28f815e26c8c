// Tiles of a block and layout of its workspace, the same for every instruction set.
#pragma once
#include "isa.h"

namespace {

enum Stage { PACK, PROJECT, CONVOLVE, PARAMETERS, SCAN, OUTPUT, GATE, SUM };
static_assert(SUM + 1 == EVM_BLOCK_STAGES, "stages");

constexpr int64_t K = EVM_BLOCK_DIRECTIONS, CHUNK = 48;  // CHUNK: tokens of a tile, a multiple of the rows of every micro-kernel
constexpr int64_t HEADER = EVM_PAD;                       // floats before packed weights: the kernel that packed them

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pad(int64_t channels) { return ceil_div(channels, EVM_PAD) * EVM_PAD; }

struct Layout {
    int64_t tokens, h, w, L;         // tokens of the map; height, width and length of one direction
    int64_t C, d, G, P;              // lengths of padded rows; P: row of B, C and dt side by side
    int64_t chunks, map_rows, strips; // number of token tiles; rows of the map in a convolution tile, number of such tiles
    int64_t in_x, in_z, x_proj, out_proj, local_proj, dt_proj, conv, local_conv, vectors, zeros;  // offsets of packed weights, in floats
    int64_t packed;                                                                              // their size
    // offsets into the workspace behind packed weights, in floats
    int64_t n, n_in, x, u, y, p, s, local, sums, gates;  // activations of one image; n_in: n in the type that in_proj reads
    int64_t size;  // of the workspace without packed weights

    explicit Layout(const evm_block_args &a) {
        tokens = a.H * a.W, h = ceil_div(a.H, 2), w = ceil_div(a.W, 2), L = h * w;
        C = pad(a.C), d = pad(a.d), G = pad(a.G), P = pad(2 * a.N + a.R);
        chunks = ceil_div(tokens, CHUNK), map_rows = a.W ? ceil_div(CHUNK, a.W) : 1, strips = ceil_div(a.H, map_rows);
        int64_t end = HEADER;
        const auto take = [&end](int64_t floats) { const int64_t at = end; end += pad(floats); return at; };
        const bool int8 = a.in_proj_int8.weight;
        const int64_t more = int8 ? 2 : 0;  // one row of start values, and up to eight rows of bytes; activations may be floats
        in_x = take((a.C + more) * d), in_z = take((a.C + more) * d), x_proj = take(K * a.d * P);
        out_proj = take((a.d + more) * C), local_proj = take((a.C + more) * C), dt_proj = take(K * a.R * d), conv = take(10 * d), local_conv = take(10 * C);
        vectors = take(7 * C + 4 * d), zeros = take(C > d ? C : d);
        packed = end, end = 0;
        n = take(tokens * C), n_in = int8 ? take(tokens * C) : n, x = take(tokens * d), u = take(K * L * d);
        y = a.N <= EVM_GROUP ? u : take(K * L * d);
        p = take(K * L * P), s = take(tokens * C), local = take(tokens * C);
        sums = take((chunks + strips) * C), gates = take(2 * C);
        size = end;
    }

    int64_t tiles(int stage) const {
        const int64_t count[] = {0, chunks, strips, K * ceil_div(L, CHUNK), K * ceil_div(d, EVM_TILE), chunks, 1, chunks};
        return count[stage];
    }

    // Return the row of token (i, j) in u and y. Direction k reads phase (row k % 2, column k / 2). Even k read it row-major, odd k
    // column-major.
    int64_t place(int64_t i, int64_t j) const {
        const int64_t k = (i & 1) + 2 * (j & 1);
        return k * L + (i & 1 ? j / 2 * h + i / 2 : i / 2 * w + j / 2);
    }
};

}  // namespace
