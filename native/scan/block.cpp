// The stages of an EVSS block (evm_block.h), compiled once per instruction set like scan.cpp.
//
// Everything between two matrix products happens on rows that are still in cache: norms and activations where the product
// is stored, the atrous split where the convolution writes, dt_proj inside the scan, the merge where out_proj reads.
// Rows of the workspace are padded with zeros to whole vectors, so that only x and out need partial loads and stores.
#include "block_layout.h"
#include "gemm.h"
#include "scan.h"

namespace {

constexpr float EPSILON = 1e-5f;
static_assert(GROUP == IN_PLACE_STATES, "y over u needs all states in one group");

struct Job {
    const evm_block_args &a;
    const Layout l;
    float *const ws;
    const int64_t image;

    Job(const evm_block_args &args, int64_t image) : a(args), l(args), ws(args.workspace), image(image) {}

    // norm_weight, norm_bias, gate_norm_weight, gate_norm_bias, local_proj_bias, then out_norm_weight, out_norm_bias
    float *vector(int index) const { return ws + l.vectors + (index < 5 ? index * l.C : 5 * l.C + (index - 5) * l.d); }
    float *sums(int branch, int64_t tile) const { return ws + l.sums + (branch ? l.chunks + tile : tile) * l.C; }
    const float *x(int64_t token) const { return a.x + (image * l.tokens + token) * a.C; }
};

enum Vector { NORM_WEIGHT, NORM_BIAS, GATE_WEIGHT, GATE_BIAS, LOCAL_BIAS, OUT_WEIGHT, OUT_BIAS };

// Mean and 1 / standard deviation of the `channels` floats of a row.
struct Moments {
    float mean, scale;

    Moments(const float *row, int64_t channels) {
        const int64_t whole = channels / LANES * LANES;
        vec total = broadcast(0.f), squares = broadcast(0.f);
        for (int64_t c = 0; c < whole; c += LANES) total += load(row + c);
        mean = sum(total);
        for (int64_t c = whole; c < channels; c++) mean += row[c];
        mean /= channels;
        for (int64_t c = 0; c < whole; c += LANES) { const vec v = load(row + c) - mean; squares += v * v; }
        float variance = sum(squares);
        for (int64_t c = whole; c < channels; c++) variance += (row[c] - mean) * (row[c] - mean);
        scale = 1 / sqrtf(variance / channels + EPSILON);
    }
};

void pack_vector(float *to, const float *from, int64_t channels, int64_t padded) {
    memcpy(to, from, channels * sizeof(float));
    memset(to + channels, 0, (padded - channels) * sizeof(float));
}

// (channels, 3, 3), (channels) -> ten rows: the nine taps, the bias.
void pack_convolution(float *to, const float *weight, const float *bias, int64_t channels, int64_t padded) {
    for (int tap = 0; tap < 10; tap++)
        for (int64_t c = 0; c < padded; c++)
            to[tap * padded + c] = c >= channels ? 0.f : tap == 9 ? bias[c] : weight[c * 9 + tap];
}

void pack_weights(const Job &job) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    float *ws = job.ws;
    pack(ws + l.in_x, a.C, a.d, [&](int64_t k, int64_t c) { return a.in_proj[k * 2 * a.d + c]; });
    pack(ws + l.in_z, a.C, a.d, [&](int64_t k, int64_t c) { return a.in_proj[k * 2 * a.d + a.d + c]; });
    pack(ws + l.out_proj, a.d, a.C, [&](int64_t k, int64_t c) { return a.out_proj[k * a.C + c]; });
    pack(ws + l.local_proj, a.C, a.C, [&](int64_t k, int64_t c) { return a.local_proj_weight[c * a.C + k]; });
    const int64_t columns = a.R + 2 * a.N;
    for (int64_t k = 0; k < K; k++) {  // x_proj gives dt, B, C; rows of p are B, C, dt
        const float *weight = a.x_proj + k * a.d * columns;
        pack(ws + l.x_proj + k * a.d * l.P, a.d, columns, [&](int64_t row, int64_t c) {
            return weight[row * columns + (c < 2 * a.N ? c + a.R : c - 2 * a.N)];
        });
        for (int64_t r = 0; r < a.R; r++)
            pack_vector(ws + l.dt_proj + (k * a.R + r) * l.d, a.dt_proj + (k * a.R + r) * a.d, a.d, l.d);
    }
    pack_convolution(ws + l.conv, a.conv_weight, a.conv_bias, a.d, l.d);
    pack_convolution(ws + l.local_conv, a.local_conv_weight, a.local_conv_bias, a.C, l.C);
    const float *const of_map[] = {a.norm_weight, a.norm_bias, a.gate_norm_weight, a.gate_norm_bias, a.local_proj_bias};
    for (int i = 0; i < 5; i++) pack_vector(job.vector(i), of_map[i], a.C, l.C);
    pack_vector(job.vector(OUT_WEIGHT), a.out_norm_weight, a.d, l.d);
    pack_vector(job.vector(OUT_BIAS), a.out_norm_bias, a.d, l.d);
    memset(ws + l.zeros, 0, (l.C > l.d ? l.C : l.d) * sizeof(float));
}

// to = (from - mean) / deviation * weight + bias. All but `from` are padded.
inline void normalise(float *to, const float *from, int64_t channels, const float *weight, const float *bias) {
    const Moments m(from, channels);
    for (int64_t c = 0; c < channels; c += LANES)
        store(to + c, (load_some(from + c, channels - c) - m.mean) * m.scale * load(weight + c) + load(bias + c));
}

// Add a normalised row, before weight and bias, to `total`.
inline void add_normalised(float *total, const float *row, int64_t channels) {
    const Moments m(row, channels);
    for (int64_t c = 0; c < channels; c += LANES)
        store(total + c, load(total + c) + (load(row + c) - m.mean) * m.scale);
}

struct Tokens {  // those of a chunk
    int64_t begin, count;
    Tokens(const Layout &l, int64_t tile) : begin(tile * CHUNK), count(l.tokens - begin < CHUNK ? l.tokens - begin : CHUNK) {}
};

// n = LayerNorm(x); the x half of in_proj.
void project(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Tokens tokens(l, tile);
    const float *rows[CHUNK];
    for (int64_t t = 0; t < tokens.count; t++) {
        float *n = job.ws + l.n + (tokens.begin + t) * l.C;
        normalise(n, job.x(tokens.begin + t), a.C, job.vector(NORM_WEIGHT), job.vector(NORM_BIAS));
        rows[t] = n;
    }
    float *x = job.ws + l.x + tokens.begin * l.d;
    multiply(rows, tokens.count, a.C, job.ws + l.in_x, a.d,
             [&](int64_t t, int64_t column, vec value) { store(x + t * l.d + column, value); });
}

constexpr int COLUMNS = 4;  // tokens of a row that are convolved together: 18 loads for 36 products

// Row i of a depthwise 3x3 convolution of a (H, W, stride) map: use(j, channel, vector). `zeros`: stride zeros.
template <class Use>
void convolve_row(const float *map, int64_t H, int64_t W, int64_t stride, int64_t i, const float *weights, const float *zeros, Use use) {
    for (int64_t first = 0; first < W; first += COLUMNS) {
        const float *in[3][COLUMNS + 2];
        for (int r = 0; r < 3; r++)
            for (int c = 0; c < COLUMNS + 2; c++) {
                const int64_t row = i + r - 1, column = first + c - 1;
                const bool inside = row >= 0 && row < H && column >= 0 && column < W;
                in[r][c] = inside ? map + (row * W + column) * stride : zeros;
            }
        for (int64_t channel = 0; channel < stride; channel += LANES) {
            vec acc[COLUMNS];
            for (int j = 0; j < COLUMNS; j++) acc[j] = load(weights + 9 * stride + channel);
#pragma GCC unroll 3
            for (int r = 0; r < 3; r++) {
                vec w[3], v[COLUMNS + 2];
#pragma GCC unroll 3
                for (int c = 0; c < 3; c++) w[c] = load(weights + (3 * r + c) * stride + channel);
#pragma GCC unroll 6
                for (int c = 0; c < COLUMNS + 2; c++) v[c] = load(in[r][c] + channel);
#pragma GCC unroll 4
                for (int j = 0; j < COLUMNS; j++) acc[j] += w[0] * v[j] + w[1] * v[j + 1] + w[2] * v[j + 2];
            }
            for (int j = 0; j < COLUMNS && first + j < W; j++) use(first + j, channel, acc[j]);
        }
    }
}

// u = atrous split of SiLU(conv(x)); the local branch, and its sums for the gate.
void convolve(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    float *u = job.ws + l.u, *activated = job.ws + l.s, *local = job.ws + l.local, *sums = job.sums(1, tile);
    const float *zeros = job.ws + l.zeros;
    const int64_t begin = tile * l.map_rows, end = begin + l.map_rows < a.H ? begin + l.map_rows : a.H;
    for (int64_t i = begin; i < end; i++) {
        convolve_row(job.ws + l.x, a.H, a.W, l.d, i, job.ws + l.conv, zeros, [&](int64_t j, int64_t channel, vec value) {
            store(u + l.place(i, j) * l.d + channel, silu(value));
        });
        if (a.W % 2) memset(u + l.place(i, a.W) * l.d, 0, l.d * sizeof(float));
        convolve_row(job.ws + l.n, a.H, a.W, l.C, i, job.ws + l.local_conv, zeros, [&](int64_t j, int64_t channel, vec value) {
            store(activated + (i * a.W + j) * l.C + channel, gelu(value));
        });
    }
    if (end == a.H && a.H % 2)
        for (int64_t j = 0; j < 2 * l.w; j++) memset(u + l.place(a.H, j) * l.d, 0, l.d * sizeof(float));
    memset(sums, 0, l.C * sizeof(float));
    for (int64_t first = begin * a.W; first < end * a.W; first += CHUNK) {
        const int64_t count = end * a.W - first < CHUNK ? end * a.W - first : CHUNK;
        const float *rows[CHUNK];
        for (int64_t t = 0; t < count; t++) rows[t] = activated + (first + t) * l.C;
        float *out = local + first * l.C;
        multiply(rows, count, a.C, job.ws + l.local_proj, a.C, [&](int64_t t, int64_t column, vec value) {
            store(out + t * l.C + column, value + load(job.vector(LOCAL_BIAS) + column));
        });
        for (int64_t t = 0; t < count; t++) add_normalised(sums, out + t * l.C, a.C);
    }
}

// p = B, C, dt of a stretch of one direction.
void parameters(const Job &job, int64_t tile) {
    const Layout &l = job.l;
    const int64_t per_direction = ceil_div(l.L, CHUNK), k = tile / per_direction, begin = tile % per_direction * CHUNK;
    const int64_t count = l.L - begin < CHUNK ? l.L - begin : CHUNK;
    const float *rows[CHUNK];
    for (int64_t t = 0; t < count; t++) rows[t] = job.ws + l.u + (k * l.L + begin + t) * l.d;
    float *p = job.ws + l.p + (k * l.L + begin) * l.P;
    multiply(rows, count, job.a.d, job.ws + l.x_proj + k * job.a.d * l.P, 2 * job.a.N + job.a.R,
             [&](int64_t t, int64_t column, vec value) { store(p + t * l.P + column, value); });
}

void copy_rows(float *to, const float *from, int64_t rows, int64_t stride, int64_t count, int64_t to_stride) {
    for (int64_t t = 0; t < rows; t++) memcpy(to + t * to_stride, from + t * stride, count * sizeof(float));
}

void scan(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const int64_t per_direction = ceil_div(l.d, EVM_TILE), k = tile / per_direction, channel = tile % per_direction * EVM_TILE;
    const int64_t channels = a.d - channel < EVM_TILE ? a.d - channel : (int64_t)EVM_TILE, constant = k * a.d + channel;
    const float *p = job.ws + l.p + k * l.L * l.P;
    ScanRows rows = {};
    rows.u = job.ws + l.u + k * l.L * l.d + channel, rows.y = job.ws + l.y + k * l.L * l.d + channel, rows.stride = l.d;
    rows.B = p, rows.C = p + a.N, rows.state_stride = l.P;
    rows.A = a.A + constant * a.N, rows.skip = a.skip + constant, rows.bias = a.dt_bias + constant;
    rows.dt = p + 2 * a.N, rows.dt_weight = job.ws + l.dt_proj + k * a.R * l.d + channel, rows.R = a.R;
    rows.L = l.L, rows.N = a.N;
    const int64_t row = (job.image * K + k) * l.L;  // of the outputs for verification
    if (channel == 0 && a.scan_B) copy_rows(a.scan_B + row * a.N, p, l.L, l.P, a.N, a.N);
    if (channel == 0 && a.scan_C) copy_rows(a.scan_C + row * a.N, p + a.N, l.L, l.P, a.N, a.N);
    if (a.scan_delta) rows.delta_out = a.scan_delta + row * a.d + channel, rows.delta_out_stride = a.d;
    if (a.scan_u) copy_rows(a.scan_u + row * a.d + channel, rows.u, l.L, l.d, channels, a.d);
    scan_channels(rows, channels);
    if (a.scan_y) copy_rows(a.scan_y + row * a.d + channel, rows.y, l.L, l.d, channels, a.d);
}

// Merge, out_norm, times SiLU(z), out_proj; sums for the gate.
void output(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Tokens tokens(l, tile);
    float *y[CHUNK];
    const float *n[CHUNK];
    for (int64_t t = 0; t < tokens.count; t++) {
        const int64_t token = tokens.begin + t;
        y[t] = job.ws + l.y + l.place(token / a.W, token % a.W) * l.d;
        n[t] = job.ws + l.n + token * l.C;
        normalise(y[t], y[t], a.d, job.vector(OUT_WEIGHT), job.vector(OUT_BIAS));
    }
    multiply(n, tokens.count, a.C, job.ws + l.in_z, a.d, [&](int64_t t, int64_t column, vec z) {
        store(y[t] + column, load(y[t] + column) * silu(z));
    });
    float *s = job.ws + l.s + tokens.begin * l.C, *sums = job.sums(0, tile);
    multiply(y, tokens.count, a.d, job.ws + l.out_proj, a.C,
             [&](int64_t t, int64_t column, vec value) { store(s + t * l.C + column, value); });
    memset(sums, 0, l.C * sizeof(float));
    for (int64_t t = 0; t < tokens.count; t++) add_normalised(sums, s + t * l.C, a.C);
}

// The factors of both branches: sigmoid(select(GELU(reduce(mean of the normalised tokens)))).
void gate(const Job &job) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    for (int branch = 0; branch < 2; branch++) {
        float *gates = job.ws + l.gates + branch * l.C, *mean = job.sums(branch, 0);
        for (int64_t tile = 1; tile < (branch ? l.strips : l.chunks); tile++)
            for (int64_t c = 0; c < l.C; c += LANES) store(mean + c, load(mean + c) + load(job.sums(branch, tile) + c));
        for (int64_t c = 0; c < l.C; c += LANES)
            store(mean + c, load(mean + c) / (float)l.tokens * load(job.vector(GATE_WEIGHT) + c) + load(job.vector(GATE_BIAS) + c));
        for (int64_t c = 0; c < l.C; c += LANES) store(gates + c, load_some(a.gate_select_bias + c, a.C - c));
        for (int64_t g = 0; g < a.G; g++) {
            float reduced = a.gate_reduce_bias[g];
            for (int64_t c = 0; c < a.C; c++) reduced += mean[c] * a.gate_reduce_weight[c * a.G + g];
            const float hidden = gelu(broadcast(reduced))[0];
            for (int64_t c = 0; c < a.C; c++) gates[c] += hidden * a.gate_select_weight[g * a.C + c];
        }
        for (int64_t c = 0; c < l.C; c += LANES) store(gates + c, sigmoid(load(gates + c)));
    }
}

// out = x + (scan branch * its gate + local branch * its gate)
void add_branches(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Tokens tokens(l, tile);
    const float *gates = job.ws + l.gates;
    for (int64_t token = tokens.begin; token < tokens.begin + tokens.count; token++) {
        const float *s = job.ws + l.s + token * l.C, *local = job.ws + l.local + token * l.C, *x = job.x(token);
        float *out = a.out + (job.image * l.tokens + token) * a.C;
        for (int64_t c = 0; c < a.C; c += LANES) {
            const vec both = load(s + c) * load(gates + c) + load(local + c) * load(gates + l.C + c);
            store_some(out + c, load_some(x + c, a.C - c) + both, a.C - c);
        }
    }
}

}  // namespace

extern "C" void EVM_NAME(evm_block_tile, EVM_ISA)(const evm_block_args *a, int64_t image, int stage, int64_t tile) {
    const Job job(*a, image);
    switch (stage) {
        case PACK: return pack_weights(job);
        case PROJECT: return project(job, tile);
        case CONVOLVE: return convolve(job, tile);
        case PARAMETERS: return parameters(job, tile);
        case SCAN: return scan(job, tile);
        case OUTPUT: return output(job, tile);
        case GATE: return gate(job);
        case SUM: return add_branches(job, tile);
    }
}
