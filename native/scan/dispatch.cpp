// Choice of the kernel, made once, when the library is loaded: the kernel that the environment variable EVM_ISA names, else
// the best that this CPU can run.
//
// The code reads CPUID and XGETBV directly: in libraries cross-compiled with ziglang 0.17.1, __builtin_cpu_supports() returns 0
// for every feature, and the scan would run four times slower without an error. The code has no function-local statics,
// because they would need the C++ runtime.
#include "block_layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

struct Kernel {
    const char *name;
    void (*scan_tile)(const evm_scan_args *, int64_t);
    void (*block_tile)(const evm_block_args *, int64_t, int, int64_t);
    int level;
};

#if defined(__x86_64__)
const Kernel kernels[] = {{"avx512vnni", evm_scan_tile_avx512vnni, evm_block_tile_avx512vnni, 3},
                          {"avx512", evm_scan_tile_avx512, evm_block_tile_avx512, 2},
                          {"avx2", evm_scan_tile_avx2, evm_block_tile_avx2, 1},
                          {"base", evm_scan_tile_base, evm_block_tile_base, 0}};

int cpu_level() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1;
    if (!fma || !osxsave || !avx) return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x06) != 0x06) return 0;  // the system must save XMM and YMM
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;   // F, DQ, BW, VL
    if ((b & avx512) != avx512 || (low & 0xe6) != 0xe6) return 1;       // the system must save masks and ZMM
    return c >> 11 & 1 ? 3 : 2;                                         // VNNI
}
#elif defined(__aarch64__)
const Kernel kernels[] = {{"neon", evm_scan_tile_neon, evm_block_tile_neon, 0}};
int cpu_level() { return 0; }
#else
const Kernel kernels[] = {{"base", evm_scan_tile_base, evm_block_tile_base, 0}};
int cpu_level() { return 0; }
#endif

const Kernel *find(const char *name) {
    const int level = cpu_level();
    for (const Kernel &kernel : kernels)
        if (kernel.level <= level && (!name || !strcmp(name, kernel.name))) return &kernel;
    return nullptr;
}

char isa_error[256];

// Append the names of all kernels up to `level` to isa_error.
void list_kernels(int level) {
    const char *between = "";
    for (const Kernel &kernel : kernels) {
        if (kernel.level > level) continue;
        const size_t length = strlen(isa_error);
        snprintf(isa_error + length, sizeof isa_error - length, "%s%s", between, kernel.name);
        between = ", ";
    }
}

// Return the kernel that EVM_ISA names. If there is none, write the reason to isa_error and return the best kernel.
const Kernel *chosen() {
    const char *const name = getenv("EVM_ISA");
    if (!name || !*name) return find(nullptr);
    if (const Kernel *kernel = find(name)) return kernel;
    bool known = false;
    for (const Kernel &kernel : kernels) known |= !strcmp(name, kernel.name);
    snprintf(isa_error, sizeof isa_error, known ? "EVM_ISA=%.32s: this CPU lacks the instruction set; it runs: "
                                                : "EVM_ISA=%.32s: the library has no such instruction set; this CPU runs: ", name);
    for (char *c = isa_error; *c; c++)
        if (*c < ' ' || *c > '~') *c = '?';  // the runtimes expect UTF-8, and EVM_ISA may have any bytes
    list_kernels(cpu_level());
    return find(nullptr);
}

const Kernel *const on_loading = chosen(), *current = on_loading;

uint64_t *next_tick, *end_of_trace, last_mark;

uint64_t ticks() {
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t count;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
    return count;
#else
    return 0;
#endif
}

}  // namespace

extern "C" {

int64_t evm_scan_num_tiles(const evm_scan_args *a) { return a->L ? a->b * a->K * ((a->D + EVM_TILE - 1) / EVM_TILE) : 0; }

void evm_scan_run_tile(const evm_scan_args *a, int64_t tile) { current->scan_tile(a, tile); }

int64_t evm_block_workspace_bytes(const evm_block_args *a) { return Layout(*a).size * (int64_t)sizeof(float); }

int64_t evm_block_num_tiles(const evm_block_args *a, int64_t image, int stage) {
    return image && stage == PACK ? 0 : Layout(*a).tiles(stage);  // the first image packs the weights for all images
}

void evm_block_run_tile(const evm_block_args *a, int64_t image, int stage, int64_t tile) {
    current->block_tile(a, image, stage, tile);
}

void evm_block_mark(int stage) {
    if (next_tick == end_of_trace) return;
    const uint64_t now = ticks();
    if (stage) *next_tick++ = now - last_mark;
    last_mark = now;
}

void evm_block_trace(uint64_t *to, int64_t rows) { next_tick = to, end_of_trace = to + rows * EVM_BLOCK_STAGES; }

const char *evm_scan_isa(void) { return current->name; }

const char *evm_scan_isa_error(void) { return *isa_error ? isa_error : nullptr; }

int evm_scan_force_isa(const char *name) {
    const Kernel *kernel = name ? find(name) : on_loading;
    if (kernel) current = kernel;
    return kernel != nullptr;
}
}
