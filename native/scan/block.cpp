// The stages of an EVSS block (evm_block.h), compiled once per instruction set like scan.cpp. EVM_SCAN: kernel whose scan is called.
// EVM_BLOCK: kernel that is called for blocks that this one does not compute itself: it has int8 blocks alone or, with EVM_HALF, blocks in
// half precision alone.
//
// All work between two matrix products is done on rows that are still in cache. Norms and activations are computed where the
// product stores its result, the atrous split where the convolution writes, dt_proj inside the scan, and the merge where
// out_proj reads. Rows of the workspace are padded with zeros to whole vectors, so that only x and out need partial loads and
// stores.
#include "block_layout.h"
#include "gemm.h"

#if !defined(EVM_SCAN)
#define EVM_SCAN EVM_ISA
#endif

namespace {

constexpr float EPSILON = 1e-5f;

// Padded vectors in the workspace: first those of C floats, from OUT_WEIGHT on those of d floats. The SCALE vectors are used by
// int8 layers only.
enum Vector {
    NORM_WEIGHT, NORM_BIAS, GATE_WEIGHT, GATE_BIAS, LOCAL_BIAS, OUT_PROJ_SCALE, LOCAL_SCALE,
    OUT_WEIGHT, OUT_BIAS, IN_X_SCALE, IN_Z_SCALE,
};

struct Job {
    const evm_block_args &a;
    const Layout l;
    float *const packed, *const ws;  // packed weights; the rest of the workspace
    const int64_t image;

    Job(const evm_block_args &args, float *weights, float *workspace, int64_t image)
        : a(args), l(args), packed(weights), ws(workspace), image(image) {}

    float *vector(int index) const {
        return packed + l.vectors + (index < OUT_WEIGHT ? index * l.C : OUT_WEIGHT * l.C + (index - OUT_WEIGHT) * l.d);
    }
    float *sums(int branch, int64_t tile) const { return ws + l.sums + (branch ? l.chunks + tile : tile) * l.C; }
    template <class Numbers>
    typename Numbers::Element *rows(int64_t offset) const { return reinterpret_cast<typename Numbers::Element *>(ws + offset); }
    const float *x(int64_t token) const { return a.x + (image * l.tokens + token) * a.C; }
    float *out(int64_t token) const { return a.out + (image * l.tokens + token) * a.C; }
    float *s(int64_t token) const { return l.C == a.C ? out(token) : ws + l.s + token * l.C; }
};

// Arithmetic of in_proj, x_proj, out_proj and local_proj. put(): store vectors of W rows of the layer's input, from the last row to the first.
// result(): make the layer's output from a vector of sums.
struct FloatLayer : Floats {
    static constexpr bool INT8 = false;
    FloatLayer(const evm_int8_linear &, const float *) {}
    template <int W>
    void put(float *const *rows, int64_t at, const vec (&values)[W]) const {
        for (int i = W - 1; i >= 0; i--) store(rows[i] + at, values[i]);
    }
    vec result(vec sum, int64_t) const { return sum; }
};

#if defined(EVM_HALF)
struct HalfLayer : Halves {
    static constexpr bool INT8 = false;
    HalfLayer(const evm_int8_linear &, const float *) {}
    template <int W>
    void put(Element *const *rows, int64_t at, const vec (&values)[W]) const {
        for (int i = W - 1; i >= 0; i--) store_rounded(rows[i] + at, values[i]);
    }
    vec result(vec sum, int64_t) const { return sum; }
};
#endif

// Multiply by the inverse of the scale, where ONNX divides by the scale: a value within one rounding error of half a step may
// round to the other integer. NaN becomes the integer 0.
template <class Numbers>
struct Int8Layer : Numbers {
    typedef typename Numbers::Element Element;
    static constexpr bool INT8 = true;
    const float inverse, low, high;  // inverse of the input's scale; range of the input's integers minus the zero point
    const float *const scales;       // scale of the input times the scales of the weights, padded

    Int8Layer(const evm_int8_linear &layer, const float *of_columns)
        : inverse(1 / layer.input_scale), low(-(float)layer.input_zero_point), high(255 + low), scales(of_columns) {}
    template <int W>
    void put(Element *const *rows, int64_t at, const vec (&values)[W]) const {
        vec scaled[W];
        for (int i = 0; i < W; i++) {
            scaled[i] = values[i] * inverse;
            if (!Numbers::SATURATES) scaled[i] = smallest(broadcast(high), largest(broadcast(low), scaled[i]));
        }
        Numbers::store_rounded(rows, at, scaled, -(int32_t)low);
    }
    vec result(ivec sum, int64_t column) const { return __builtin_convertvector(sum, vec) * load(scales + column); }
};

// Mean and 1 / standard deviation of a few rows of `channels` floats. One row alone is a chain of dependent operations.
constexpr int ROWS_AT_ONCE = 4;
struct Moments {
    float mean[ROWS_AT_ONCE], scale[ROWS_AT_ONCE];

    Moments(const float *const *rows, int64_t channels) {
        sum_into(mean, rows, channels, [](auto value, int) { return value; });
        for (int i = 0; i < ROWS_AT_ONCE; i++) mean[i] /= channels;
        sum_into(scale, rows, channels, [&](auto value, int i) { return (value - mean[i]) * (value - mean[i]); });
        for (int i = 0; i < ROWS_AT_ONCE; i++) scale[i] = 1 / sqrtf(scale[i] / channels + EPSILON);
    }

  private:
    // Write the sum of of(value, row) over each row to `sums`.
    template <class Of>
    static void sum_into(float (&sums)[ROWS_AT_ONCE], const float *const *rows, int64_t channels, Of of) {
        const int64_t whole = channels / LANES * LANES;
        vec total[ROWS_AT_ONCE] = {};
        for (int64_t c = 0; c < whole; c += LANES)
            for (int i = 0; i < ROWS_AT_ONCE; i++) total[i] += of(load(rows[i] + c), i);
        const quad each = sum_each(total);
        memcpy(sums, &each, sizeof sums);
        for (int64_t c = whole; c < channels; c++)
            for (int i = 0; i < ROWS_AT_ONCE; i++) sums[i] += of(rows[i][c], i);
    }
};

void pack_vector(float *to, const float *from, int64_t channels, int64_t padded) {
    memcpy(to, from, channels * sizeof(float));
    memset(to + channels, 0, (padded - channels) * sizeof(float));
}

// Pack a depthwise convolution, weight (channels, 3, 3) and bias (channels), as ten rows: nine taps and the bias.
void pack_convolution(float *to, const float *weight, const float *bias, int64_t channels, int64_t padded) {
    for (int tap = 0; tap < 10; tap++)
        for (int64_t c = 0; c < padded; c++)
            to[tap * padded + c] = c >= channels ? 0.f : tap == 9 ? bias[c] : weight[c * 9 + tap];
}

// Layout of a linear layer: element (k, c) is weight[k * row + column(c) * stride], and column(c) the index of its scale.
struct Matrix {
    int64_t depth, columns, row, stride, first, rotated;

    int64_t column(int64_t c) const { return first + (c + rotated) % columns; }
    int64_t at(int64_t k, int64_t c) const { return k * row + column(c) * stride; }
};

// Pack a linear layer: int8 if it has such weights, with the scales of the columns, else `weight`. Once in a session: small code, not fast.
template <class Layer>
__attribute__((noinline, cold)) void pack_layer(float *packed, float *scales, const float *weight, const evm_int8_linear &int8, Matrix m) {
    if constexpr (!Layer::INT8) {
        pack<typename Layer::Base>(packed, m.depth, m.columns, [=](int64_t k, int64_t c) { return Layer::rounded(weight[m.at(k, c)]); });
    } else if (!int8.weight) {
        pack_layer<FloatLayer>(packed, scales, weight, int8, m);
    } else {
        const int8_t *const integers = int8.weight;
        pack<typename Layer::Base>(packed, m.depth, m.columns, [=](int64_t k, int64_t c) { return integers[m.at(k, c)]; }, int8.input_zero_point);
        for (int64_t c = 0; c < m.columns; c++) scales[c] = int8.input_scale * int8.scale[m.column(c)];
        for (int64_t c = m.columns; c < pad(m.columns); c++) scales[c] = 0;
    }
}

template <class Layer>
__attribute__((cold)) void pack_weights(const Job &job) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    float *packed = job.packed;
    pack_layer<Layer>(packed + l.in_x, job.vector(IN_X_SCALE), a.in_proj, a.in_proj_int8, {a.C, a.d, 2 * a.d, 1, 0, 0});
    pack_layer<Layer>(packed + l.in_z, job.vector(IN_Z_SCALE), a.in_proj, a.in_proj_int8, {a.C, a.d, 2 * a.d, 1, a.d, 0});
    pack_layer<Layer>(packed + l.out_proj, job.vector(OUT_PROJ_SCALE), a.out_proj, a.out_proj_int8, {a.d, a.C, a.C, 1, 0, 0});
    pack_layer<Layer>(packed + l.local_proj, job.vector(LOCAL_SCALE), a.local_proj_weight, a.local_proj_int8, {a.C, a.C, 1, a.C, 0, 0});
    const int64_t columns = a.R + 2 * a.N;
    for (int64_t k = 0; k < K; k++) {
        const int64_t first = k * a.d * columns;
        evm_int8_linear int8 = a.x_proj_int8;
        if (int8.weight) int8.weight += first, int8.scale += k * columns;
        pack_layer<Layer>(packed + l.x_proj + k * l.x_panels, packed + l.x_scales + k * l.P, int8.weight ? nullptr : a.x_proj + first, int8,
                   {a.d, columns, columns, 1, 0, a.R});  // dt, B, C become B, C, dt
        for (int64_t r = 0; r < a.R; r++)
            pack_vector(packed + l.dt_proj + (k * a.R + r) * l.d, a.dt_proj + (k * a.R + r) * a.d, a.d, l.d);
    }
    pack_convolution(packed + l.conv, a.conv_weight, a.conv_bias, a.d, l.d);
    pack_convolution(packed + l.local_conv, a.local_conv_weight, a.local_conv_bias, a.C, l.C);
    const float *const of_map[] = {a.norm_weight, a.norm_bias, a.gate_norm_weight, a.gate_norm_bias, a.local_proj_bias};
    for (int i = 0; i < 5; i++) pack_vector(job.vector(i), of_map[i], a.C, l.C);
    pack_vector(job.vector(OUT_WEIGHT), a.out_norm_weight, a.d, l.d);
    pack_vector(job.vector(OUT_BIAS), a.out_norm_bias, a.d, l.d);
    memset(packed + l.zeros, 0, (l.C > l.d ? l.C : l.d) * sizeof(float));
}

constexpr int64_t ROOM = CHUNK + ROWS_AT_ONCE - 1;  // rows of a tile, and those that stand in for rows after the last one

// Let the last row stand in for rows after it, so that ROWS_AT_ONCE rows from any row on can be used.
template <class T>
inline void complete(T **rows, int64_t count) {
    static_assert(ROWS_AT_ONCE == 4, "three rows after the last one");
    rows[count] = rows[count + 1] = rows[count + 2] = rows[count - 1];
}

// Compute use(first row, channel, vectors of (row - mean) / deviation * weight + bias) for each vector of each ROWS_AT_ONCE rows. The rows
// are complete; weight and bias are padded.
template <class Use>
inline void normalise(const float *const *rows, int64_t count, int64_t channels, const float *weight, const float *bias, Use use) {
    const int64_t whole = channels / LANES * LANES;
    for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
        const Moments m(rows + first, channels);
        const auto vectors = [&](int64_t c, auto read) {
            vec values[ROWS_AT_ONCE];
            for (int i = 0; i < ROWS_AT_ONCE; i++)
                values[i] = (read(rows[first + i] + c) - m.mean[i]) * m.scale[i] * load(weight + c) + load(bias + c);
            use(first, c, values);
        };
        for (int64_t c = 0; c < whole; c += LANES) vectors(c, load);
        if (whole < channels) vectors(whole, [=](const float *p) { return load_some(p, channels - whole); });
    }
}

// Add the normalised rows, before weight and bias, to `total`. The rows are complete; the rows and `total` are padded.
inline void add_normalised(float *total, const float *const *rows, int64_t count, int64_t channels) {
    for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
        const Moments m(rows + first, channels);
        for (int64_t c = 0; c < channels; c += LANES) {
            vec sum = load(total + c);
            for (int64_t i = 0; i < ROWS_AT_ONCE && first + i < count; i++) sum += (load(rows[first + i] + c) - m.mean[i]) * m.scale[i];
            store(total + c, sum);
        }
    }
}

struct Tokens {  // the tokens of one chunk
    int64_t begin, count;
    Tokens(const Layout &l, int64_t tile) : begin(tile * CHUNK), count(smaller(l.tokens - begin, CHUNK)) {}
};

// Stage PROJECT of a group: n = LayerNorm(x), and the x half of in_proj.
template <class Layer>
void project(const Job &job, int64_t group, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Layer in_proj(a.in_proj_int8, job.vector(IN_X_SCALE));
    const int64_t begin = l.projected(group) * a.W + tile * CHUNK, count = smaller(l.projected(group + 1) * a.W - begin, CHUNK);
    const float *of_image[ROOM];
    typename Layer::Element *in[ROOM];
    float *n[ROOM], *x[ROOM];
    int64_t n_row = l.kept(begin, l.n_rows), x_row = l.kept(begin, l.x_rows);
    for (int64_t t = 0; t < count; t++) {
        of_image[t] = job.x(begin + t), in[t] = job.rows<Layer>(l.n_in) + (begin + t) * l.C;
        n[t] = job.ws + l.n + n_row * l.C, x[t] = job.ws + l.x + x_row * l.d;
        if (++n_row == l.n_rows * a.W) n_row = 0;
        if (++x_row == l.x_rows * a.W) x_row = 0;
    }
    complete(of_image, count), complete(in, count), complete(n, count), complete(x, count);
    normalise(of_image, count, a.C, job.vector(NORM_WEIGHT), job.vector(NORM_BIAS),
              [=, apart = l.n_in != l.n, n = &n[0], in = &in[0]](int64_t t, int64_t channel, const auto &values) {
                  for (int i = 0; i < ROWS_AT_ONCE; i++) store(n[t + i] + channel, values[i]);
                  if (apart) in_proj.put(in + t, channel, values);
              });
    multiply<Layer>(in, count, a.C, job.packed + l.in_x, a.d, [=, x = &x[0]](int64_t t, int64_t column, const auto &sums) {
        for (const auto &sum : sums) store(x[t++] + column, in_proj.result(sum, column));
    });
}

// Numbers of rows and columns of a map that are convolved together. Two rows share inputs, and four columns share weights.
#if defined(__AVX512F__)
constexpr int ROWS = 2, COLUMNS = 4;  // the registers hold 8 sums, 6 inputs and 9 weights
#else
constexpr int ROWS = 1, COLUMNS = 4;
#endif

// Compute ROWS rows, from row i on, of a depthwise 3x3 convolution of a (H, W, stride) map and call put(places, channel, vectors) with the
// activated results of COLUMNS columns of a row, the places being place(row, column). `map` holds `rows` rows, row i at i modulo
// `rows`. `zeros`: `stride` zeros, read outside the map. The last row and column stand in for those after them, whose results put() stores
// first.
template <class Activation, class Place, class Put>
void convolve_rows(const float *map, int64_t rows, int64_t H, int64_t W, int64_t stride, int64_t i, const float *weights, const float *zeros,
                   Place place, Put put) {
    const Activation activation;
    const float *lines[ROWS + 2];  // null outside the map
    for (int r = 0; r < ROWS + 2; r++) {
        const int64_t row = i + r - 1;
        lines[r] = row >= 0 && row < H ? map + row % rows * W * stride : nullptr;
    }
    for (int64_t first = 0; first < W; first += COLUMNS) {
        const float *in[ROWS + 2][COLUMNS + 2];
#pragma GCC unroll 1
        for (int r = 0; r < ROWS + 2; r++)
#pragma GCC unroll 1
            for (int c = 0; c < COLUMNS + 2; c++) {
                const int64_t column = first + c - 1;
                in[r][c] = lines[r] && column >= 0 && column < W ? lines[r] + column * stride : zeros;
            }
        decltype(place(i, first)) to[ROWS][COLUMNS];
#pragma GCC unroll 1
        for (int64_t o = 0; o < ROWS; o++)
#pragma GCC unroll 1
            for (int64_t j = 0; j < COLUMNS; j++) to[o][j] = place(smaller(i + o, H - 1), smaller(first + j, W - 1));
        for (int64_t channel = 0; channel < stride; channel += LANES) {
            vec sums[ROWS * COLUMNS], w[3][3];
            for (int j = 0; j < ROWS * COLUMNS; j++) sums[j] = load(weights + 9 * stride + channel);
#pragma GCC unroll 3
            for (int r = 0; r < 3; r++)
#pragma GCC unroll 3
                for (int c = 0; c < 3; c++) w[r][c] = load(weights + (3 * r + c) * stride + channel);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS + 2; r++) {
                vec v[COLUMNS + 2];
#pragma GCC unroll 6
                for (int c = 0; c < COLUMNS + 2; c++) v[c] = load(in[r][c] + channel);
#pragma GCC unroll 3
                for (int c = 0; c < 3; c++)
#pragma GCC unroll 2
                    for (int o = 0; o < ROWS; o++)
#pragma GCC unroll 4
                        for (int j = 0; j < COLUMNS; j++)
                            if (r >= o && r < o + 3) sums[o * COLUMNS + j] += w[r - o][c] * v[j + c];
            }
            activation.replace(sums);
#pragma GCC unroll 2
            for (int o = ROWS - 1; o >= 0; o--) {
                vec of_row[COLUMNS];
                for (int j = 0; j < COLUMNS; j++) of_row[j] = sums[o * COLUMNS + j];
                put(to[o], channel, of_row);
            }
        }
    }
}

// Compute ROWS rows, from row i on, of the map SiLU(conv(x)) and store them, by the atrous split, in u, and in the type that x_proj reads.
template <class Layer>
void convolve_scan_input(const Job &job, int64_t i) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Layer x_proj(a.x_proj_int8, nullptr);
    const auto put = [=, apart = l.u_in != l.u, u = job.ws + l.u, in = job.rows<Layer>(l.u_in)](const int64_t (&places)[COLUMNS], int64_t channel,
                                                                                              const vec (&values)[COLUMNS]) {
        typename Layer::Element *rows[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) rows[j] = in + places[j];
        for (int j = COLUMNS - 1; j >= 0; j--) store(u + places[j] + channel, values[j]);
        if (apart) x_proj.put(rows, channel, values);
    };
    const auto put_zeros = [=, &l](int64_t row) {
        const int64_t places[COLUMNS] = {row * l.d, row * l.d, row * l.d, row * l.d};
        const vec zeros[COLUMNS] = {};
        for (int64_t channel = 0; channel < l.d; channel += LANES) put(places, channel, zeros);
    };
    convolve_rows<Silu>(job.ws + l.x, l.x_rows, a.H, a.W, l.d, i, job.packed + l.conv, job.packed + l.zeros,
                        [&](int64_t row, int64_t column) { return l.place(row, column) * l.d; }, put);
    const int64_t end = smaller(i + ROWS, a.H);
    if (a.W % 2)
        for (int64_t row = i; row < end; row++) put_zeros(l.place(row, a.W));
    if (end == a.H && a.H % 2)
        for (int64_t j = 0; j < 2 * l.w; j++) put_zeros(l.place(a.H, j));
}

// Stage CONVOLVE of a group: u, the local branch, and the local branch's sums for the gate.
template <class Layer>
void convolve(const Job &job, int64_t group, int64_t of_group) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Layer local_proj(a.local_proj_int8, job.vector(LOCAL_SCALE));
    typename Layer::Element *const rows = job.rows<Layer>(l.local_in);
    const int64_t tile = group * (l.group / l.map_rows) + of_group, begin = tile * l.map_rows, end = smaller(begin + l.map_rows, a.H);
    const int64_t before = group * l.group * a.W;  // tokens of the groups before
    float *local = job.ws + l.local, *sums = job.sums(1, tile);
    const float *zeros = job.packed + l.zeros, *bias = job.vector(LOCAL_BIAS);
    for (int64_t i = begin; i < end; i += ROWS) {
        convolve_scan_input<Layer>(job, i);
        convolve_rows<Gelu>(job.ws + l.n, l.n_rows, a.H, a.W, l.C, i, job.packed + l.local_conv, zeros,
                            [=, W = a.W, stride = l.C](int64_t row, int64_t column) { return rows + (row * W + column - before) * stride; },
                            [=](const auto &to, int64_t channel, const auto &values) { local_proj.put(to, channel, values); });
    }
    memset(sums, 0, l.C * sizeof(float));
    for (int64_t first = begin * a.W; first < end * a.W; first += CHUNK) {
        const int64_t count = smaller(end * a.W - first, CHUNK);
        const typename Layer::Element *in[CHUNK];
        float *results[ROOM], *const out = local + first * l.C;
        for (int64_t t = 0; t < count; t++) in[t] = rows + (first + t - before) * l.C, results[t] = out + t * l.C;
        complete(results, count);
        multiply<Layer>(in, count, a.C, job.packed + l.local_proj, a.C, [=, results = &results[0]](int64_t t, int64_t column, const auto &sums) {
            for (const auto &sum : sums) store(results[t++] + column, local_proj.result(sum, column) + load(bias + column));
        });
        add_normalised(sums, results, count, a.C);
    }
}

// Stage PARAMETERS of a group: p = B, C, dt for CHUNK steps of one direction.
template <class Layer>
void parameters(const Job &job, int64_t group, int64_t tile) {
    const Layout &l = job.l;
    const int64_t row = l.phase_row(group), height = l.phase_rows(group), steps = height * l.w, per_direction = ceil_div(steps, CHUNK);
    const int64_t k = tile / per_direction, begin = tile % per_direction * CHUNK, count = smaller(steps - begin, CHUNK);
    const Layer x_proj(job.a.x_proj_int8, job.packed + l.x_scales + k * l.P);
    const typename Layer::Element *rows[CHUNK];
    float *p[ROOM];
    for (int64_t t = 0; t < count; t++) {
        const int64_t step = begin + t, at = k * l.L + (k % 2 ? step / height * l.h + row + step % height : row * l.w + step);
        rows[t] = job.rows<Layer>(l.u_in) + at * l.d, p[t] = job.ws + l.p + at * l.P;
    }
    complete(p, count);
    multiply<Layer>(rows, count, job.a.d, job.packed + l.x_proj + k * l.x_panels, 2 * job.a.N + job.a.R,
                    [=, p = &p[0]](int64_t t, int64_t column, const auto &sums) {
                        for (const auto &sum : sums) store(p[t++] + column, x_proj.result(sum, column));
                    });
}

void copy_rows(float *to, const float *from, int64_t rows, int64_t stride, int64_t count, int64_t to_stride) {
    for (int64_t t = 0; t < rows; t++) memcpy(to + t * to_stride, from + t * stride, count * sizeof(float));
}

// Stage SCAN: the selective scan of up to EVM_TILE channels of one direction, and its inputs and output for verification.
__attribute__((cold)) void scan(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const int64_t per_direction = ceil_div(l.d, EVM_TILE), k = tile / per_direction, channel = tile % per_direction * EVM_TILE;
    const int64_t channels = smaller(a.d - channel, EVM_TILE), constant = k * a.d + channel;
    const float *p = job.ws + l.p + k * l.L * l.P;
    ScanRows rows = {};
    rows.u = job.ws + l.u + k * l.L * l.d + channel, rows.y = job.ws + l.y + k * l.L * l.d + channel, rows.stride = l.d;
    rows.B = p, rows.C = p + a.N, rows.state_stride = l.P;
    rows.A = a.A + constant * a.N, rows.skip = a.skip + constant, rows.bias = a.dt_bias + constant;
    rows.dt = p + 2 * a.N, rows.dt_weight = job.packed + l.dt_proj + k * a.R * l.d + channel, rows.R = a.R;
    rows.L = l.L, rows.N = a.N;
    const int64_t row = (job.image * K + k) * l.L;  // first row in the outputs for verification
    if (channel == 0 && a.scan_B) copy_rows(a.scan_B + row * a.N, p, l.L, l.P, a.N, a.N);
    if (channel == 0 && a.scan_C) copy_rows(a.scan_C + row * a.N, p + a.N, l.L, l.P, a.N, a.N);
    if (a.scan_delta) rows.delta_out = a.scan_delta + row * a.d + channel, rows.delta_out_stride = a.d;
    if (a.scan_u) copy_rows(a.scan_u + row * a.d + channel, rows.u, l.L, l.d, channels, a.d);
    EVM_NAME(evm_scan_rows, EVM_SCAN)(&rows, channels);
    if (l.y != l.u && channel + channels == a.d)  // the padding of u is 0; a product in half precision may read one channel of it
        for (int64_t t = 0; t < l.L; t++) memset(job.ws + l.y + (k * l.L + t) * l.d + a.d, 0, (l.d - a.d) * sizeof(float));
    if (a.scan_y) copy_rows(a.scan_y + row * a.d + channel, rows.y, l.L, l.d, channels, a.d);
}

// Stage OUTPUT: merge, out_norm, product with SiLU(z), out_proj, and the scan branch's sums for the gate. The input of out_proj
// overwrites y from the left; this is safe because an element is not longer than the float that it is made from.
template <class Layer>
void output(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    typedef typename Layer::Element Element;
    const Layer in_proj(a.in_proj_int8, job.vector(IN_Z_SCALE)), out_proj(a.out_proj_int8, job.vector(OUT_PROJ_SCALE));
    const Tokens tokens(l, tile);
    float *y[ROOM], *results[ROOM], *const sums = job.sums(0, tile);
    const Element *n[CHUNK];
    Element *gated[ROOM];
    for (int64_t t = 0; t < tokens.count; t++) {
        const int64_t token = tokens.begin + t;
        y[t] = job.ws + l.y + l.place(token / a.W, token % a.W) * l.d;
        gated[t] = reinterpret_cast<Element *>(y[t]);
        n[t] = job.rows<Layer>(l.n_in) + token * l.C;
        results[t] = job.s(token);
    }
    complete(y, tokens.count), complete(gated, tokens.count), complete(results, tokens.count);
    float mean[ROOM], scale[ROOM];
    for (int64_t first = 0; first < tokens.count; first += ROWS_AT_ONCE) {
        const Moments m(y + first, a.d);
        memcpy(mean + first, m.mean, sizeof m.mean);
        memcpy(scale + first, m.scale, sizeof m.scale);
    }
    const float *const weight = job.vector(OUT_WEIGHT), *const bias = job.vector(OUT_BIAS);
    multiply<Layer>(n, tokens.count, a.C, job.packed + l.in_z, a.d,
                    [=, silu = Silu(), y = &y[0], gated = &gated[0], mean = &mean[0], scale = &scale[0]](int64_t t, int64_t column, const auto &sums) {
                        constexpr int W = sizeof sums / sizeof *sums;
                        vec z[W];
                        for (int i = 0; i < W; i++) z[i] = in_proj.result(sums[i], column);
                        silu.replace(z);
                        for (int i = 0; i < W; i++)
                            z[i] *= (load(y[t + i] + column) - mean[t + i]) * scale[t + i] * load(weight + column) + load(bias + column);
                        out_proj.put(gated + t, column, z);
                    });
    multiply<Layer>(gated, tokens.count, a.d, job.packed + l.out_proj, a.C, [=, results = &results[0]](int64_t t, int64_t column, const auto &sums) {
        for (const auto &sum : sums) store(results[t++] + column, out_proj.result(sum, column));
    });
    memset(sums, 0, l.C * sizeof(float));
    add_normalised(sums, results, tokens.count, a.C);
}

// Stage GATE: the factors of both branches, sigmoid(select(GELU(reduce(mean of the normalised tokens)))).
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
            const float hidden = activated(Gelu(), broadcast(reduced))[0];
            for (int64_t c = 0; c < a.C; c++) gates[c] += hidden * a.gate_select_weight[g * a.C + c];
        }
        for (int64_t c = 0; c < l.C; c += LANES) store(gates + c, sigmoid(load(gates + c)));
    }
}

// Stage SUM: out = x + (scan branch * gate of the scan branch + local branch * gate of the local branch).
void add_branches(const Job &job, int64_t tile) {
    const evm_block_args &a = job.a;
    const Layout &l = job.l;
    const Tokens tokens(l, tile);
    const float *gates = job.ws + l.gates;
    const int64_t whole = a.C / LANES * LANES;
    for (int64_t token = tokens.begin; token < tokens.begin + tokens.count; token++) {
        const float *s = job.s(token), *local = job.ws + l.local + token * l.C, *x = job.x(token);
        float *out = job.out(token);
        const auto both = [=, other = gates + l.C](int64_t c) { return load(s + c) * load(gates + c) + load(local + c) * load(other + c); };
        for (int64_t c = 0; c < whole; c += LANES) store(out + c, load(x + c) + both(c));
        if (whole < a.C) store_some(out + whole, load_some(x + whole, a.C - whole) + both(whole), a.C - whole);
    }
}

// A BlockTile for weights that pack_weights<Layer> has packed.
template <class Layer>
void run_tile(const evm_block_args *a, float *packed, float *workspace, int64_t image, int64_t index, int64_t tile) {
    const Job job(*a, packed, workspace, image);
    const Step step = job.l.step(index);
    switch (step.stage) {
        case PROJECT: return project<Layer>(job, step.group, tile);
        case CONVOLVE: return convolve<Layer>(job, step.group, tile);
        case PARAMETERS:
            if constexpr (Layer::INT8)
                if (!a->x_proj_int8.weight) return parameters<FloatLayer>(job, step.group, tile);
            return parameters<Layer>(job, step.group, tile);
        case SCAN: return scan(job, tile);
        case OUTPUT: return output<Layer>(job, tile);
        case GATE: return gate(job);
        case SUM: return add_branches(job, tile);
    }
}

// Pack the weights for run_tile<Layer>.
template <class Layer>
BlockTile packed_as(const evm_block_args &a, float *packed) {
    pack_weights<Layer>(Job(a, packed, nullptr, 0));
    return run_tile<Layer>;
}

#if !defined(EVM_HALF)
// Whether all int8 weights of a block are in -64..64, as NarrowIntegers needs them.
bool is_narrow(const evm_block_args &a) {
    const auto narrow = [](const int8_t *weights, int64_t count) {
        bool all = true;
        for (int64_t i = 0; weights && i < count; i++) all &= weights[i] >= -64 && weights[i] <= 64;
        return all;
    };
    return narrow(a.in_proj_int8.weight, 2 * a.C * a.d) && narrow(a.x_proj_int8.weight, K * a.d * (a.R + 2 * a.N)) &&
           narrow(a.out_proj_int8.weight, a.d * a.C) && narrow(a.local_proj_int8.weight, a.C * a.C);
}
#endif

}  // namespace

extern "C" BlockTile EVM_NAME(evm_block_pack, EVM_ISA)(const evm_block_args *a, float *packed) {
#if defined(EVM_HALF)
    if (a->half == Halves::HALF) return packed_as<HalfLayer>(*a, packed);
#else
    if (a->in_proj_int8.weight) return is_narrow(*a) ? packed_as<Int8Layer<NarrowIntegers>>(*a, packed) : packed_as<Int8Layer<Integers>>(*a, packed);
#endif
#if defined(EVM_BLOCK)
    return EVM_NAME(evm_block_pack, EVM_BLOCK)(a, packed);
#else
    return packed_as<FloatLayer>(*a, packed);
#endif
}
