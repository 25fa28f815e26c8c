// Test driver that runs scans and blocks without any runtime: problems on stdin, results on stdout, as raw bytes.
//
//   driver < problems > results          exit 0 ok, 2 bad EVM_ISA or input, 3 a kernel wrote out of bounds
//
// A problem is: int64 op (0 scan, 1 block, 2 int8 block, 3 int8 block with an int8 x_proj, 4 block in bfloat16, 5 in float16), int64 number of
// outputs (1, as in an inference, or 6 for a block and what its scan read and wrote), the dimensions as int64 and the input arrays,
// both in the order of evm_scan_args or evm_block_args. In place of in_proj, out_proj and local_proj_weight an int8 block has the
// fields of evm_int8_linear. All arrays are float32 where those structs do not say otherwise. The results are the outputs in the
// order of the struct. Outputs and workspace start as NaN, so that a value that is not written shows, and lie between guard bands.
// Tiles run backwards, because their order must not matter.
#include "evm_block.h"
#include "evm_scan.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace {

void fail(int code, const char *message, const char *what) {
    fprintf(stderr, "driver: %s: %s\n", message, what);
    exit(code);
}

void *allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) fail(2, "out of memory", "malloc");
    return memory;
}

bool read_bytes(void *to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

// Read an array into an allocation of exactly its size, so that AddressSanitizer sees reads beyond the end.
template <class T = float>
T *read_array(int64_t count, const char *name) {
    T *data = (T *)allocate((size_t)count * sizeof(T));
    if (!read_bytes(data, (size_t)count * sizeof(T))) fail(2, "stdin ends inside", name);
    return data;
}

constexpr int64_t GUARD = 64;  // floats; keeps the alignment
constexpr float CANARY = 12345.f;

struct Guarded {  // array of `count` floats, all NaN, aligned to 64 bytes, between two guard bands
    const char *name;
    void *memory;
    float *data;
    int64_t count;

    Guarded(const char *label, int64_t floats) : name(label), count(floats) {
        memory = allocate((size_t)(count + 2 * GUARD) * sizeof(float) + 64);
        float *const start = (float *)(((uintptr_t)memory + 63) / 64 * 64);
        data = start + GUARD;
        for (int64_t i = 0; i < GUARD; i++) start[i] = data[count + i] = CANARY;
        for (int64_t i = 0; i < count; i++) data[i] = NAN;
        ASAN_POISON_MEMORY_REGION(start, GUARD * sizeof(float));
        ASAN_POISON_MEMORY_REGION(data + count, GUARD * sizeof(float));
    }

    void finish(bool print) {  // check the guard bands, write the array to stdout if `print`, free the memory
        const float *const start = data - GUARD;
        ASAN_UNPOISON_MEMORY_REGION(start, GUARD * sizeof(float));
        ASAN_UNPOISON_MEMORY_REGION(data + count, GUARD * sizeof(float));
        for (int64_t i = 0; i < GUARD; i++)
            if (start[i] != CANARY || data[count + i] != CANARY) fail(3, "written out of bounds", name);
        if (print && fwrite(data, sizeof(float), (size_t)count, stdout) != (size_t)count) fail(2, "cannot write", name);
        free(memory);
    }
};

void run_scan() {
    int64_t size[5];
    if (!read_bytes(size, sizeof size)) fail(2, "stdin ends inside", "the dimensions of a scan");
    const int64_t b = size[0], K = size[1], L = size[2], D = size[3], N = size[4];
    const int64_t counts[] = {b * K * L * D, b * K * L * D, K * D * N, b * K * L * N, b * K * L * N, K * D, K * D};
    const char *const names[] = {"u", "delta", "A", "B", "C", "skip", "bias"};
    float *in[7];
    for (int i = 0; i < 7; i++) in[i] = read_array(counts[i], names[i]);
    Guarded y("y", b * K * L * D);
    evm_scan_args args = {in[0], in[1], in[2], in[3], in[4], in[5], in[6], y.data, b, K, L, D, N, 0};
    for (int64_t tile = evm_scan_num_tiles(&args); tile--;) evm_scan_run_tile(&args, tile);
    y.finish(true);
    for (float *array : in) free(array);
}

evm_int8_linear read_linear(int64_t depth, int64_t columns, int64_t matrices = 1) {
    evm_int8_linear layer = {read_array<int8_t>(matrices * depth * columns, "int8 weights"), read_array(matrices * columns, "scales"), 0, 0};
    if (!read_bytes(&layer.input_scale, sizeof layer.input_scale)) fail(2, "stdin ends inside", "an input's scale");
    if (!read_bytes(&layer.input_zero_point, sizeof layer.input_zero_point)) fail(2, "stdin ends inside", "an input's zero point");
    return layer;
}

constexpr int OUTPUTS = 6;  // of a block: the map, and for verification the scan's inputs and output

void run_block(int64_t num_outputs, bool int8, bool int8_x_proj, int32_t half) {
    int64_t size[8];
    if (!read_bytes(size, sizeof size)) fail(2, "stdin ends inside", "the dimensions of a block");
    const int64_t b = size[0], H = size[1], W = size[2], C = size[3], d = size[4], N = size[5], R = size[6], G = size[7];
    const int64_t tokens = b * EVM_BLOCK_DIRECTIONS * ((H + 1) / 2) * ((W + 1) / 2);
    const int64_t counts[] = {b * H * W * C, C, C, C * 2 * d, d * 9, d, 4 * d * (R + 2 * N), 4 * R * d, 4 * d * N, 4 * d, 4 * d,
                              d, d, d * C, C * 9, C, C * C, C, C, C, C * G, G, G * C, C};
    constexpr int INPUTS = sizeof counts / sizeof *counts;
    evm_block_args args = {};
    const float **const fields = &args.x;  // the inputs, in the same order
    static_assert(offsetof(evm_block_args, out) == INPUTS * sizeof(float *), "inputs of the block");
    float *in[INPUTS];
    constexpr int IN_PROJ = 3, X_PROJ = 6, OUT_PROJ = 13, LOCAL_PROJ = 16;
    for (int i = 0; i < INPUTS; i++) {
        in[i] = nullptr;
        if (int8 && i == IN_PROJ) args.in_proj_int8 = read_linear(C, 2 * d);
        else if (int8_x_proj && i == X_PROJ) args.x_proj_int8 = read_linear(d, R + 2 * N, EVM_BLOCK_DIRECTIONS);
        else if (int8 && i == OUT_PROJ) args.out_proj_int8 = read_linear(d, C);
        else if (int8 && i == LOCAL_PROJ) args.local_proj_int8 = read_linear(C, C);
        else fields[i] = in[i] = read_array(counts[i], "an array of a block");
    }
    args.b = b, args.H = H, args.W = W, args.C = C, args.d = d, args.N = N, args.R = R, args.G = G, args.half = half;
    Guarded outputs[OUTPUTS] = {{"out", b * H * W * C}, {"scan_u", tokens * d}, {"scan_delta", tokens * d},
                                {"scan_B", tokens * N}, {"scan_C", tokens * N}, {"scan_y", tokens * d}};
    Guarded workspace("workspace", evm_block_workspace_bytes(&args) / (int64_t)sizeof(float));
    float **const output_fields[OUTPUTS] = {&args.out, &args.scan_u, &args.scan_delta, &args.scan_B, &args.scan_C, &args.scan_y};
    for (int i = 0; i < num_outputs; i++) *output_fields[i] = outputs[i].data;
    args.workspace = workspace.data;
    for (int64_t image = 0; image < b; image++)
        for (int64_t step = 0; step < evm_block_num_steps(&args); step++)
            for (int64_t tile = evm_block_num_tiles(&args, image, step); tile--;) evm_block_run_tile(&args, image, step, tile);
    for (int i = 0; i < OUTPUTS; i++) outputs[i].finish(i < num_outputs);
    workspace.finish(false);
    for (float *array : in) free(array);
    const evm_int8_linear layers[] = {args.in_proj_int8, args.x_proj_int8, args.out_proj_int8, args.local_proj_int8};
    for (const evm_int8_linear &layer : layers) {
        free((void *)layer.weight);
        free((void *)layer.scale);
    }
}

}  // namespace

int main() {
    if (const char *const error = evm_scan_isa_error()) fail(2, "instruction set", error);
    for (int64_t op; read_bytes(&op, sizeof op);) {
        int64_t num_outputs;
        if (!read_bytes(&num_outputs, sizeof num_outputs)) fail(2, "stdin ends inside", "a problem");
        if (num_outputs != 1 && (op == 0 || num_outputs != OUTPUTS)) fail(2, "number of outputs", "not 1 or, of a block, 6");
        if (op == 0) run_scan();
        else if (op >= 1 && op <= 5) run_block(num_outputs, op == 2 || op == 3, op == 3, op == 4 ? EVM_BFLOAT16 : op == 5 ? EVM_FLOAT16 : 0);
        else fail(2, "unknown op", "not 0 (scan), 1 (block), 2 (int8 block), 3 (int8 block with an int8 x_proj), 4 or 5 (block in bfloat16, float16)");
    }
    return 0;
}
