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
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long);
#endif

namespace {

struct Kernel {
    const char *name;
    void (*scan_tile)(const evm_scan_args *, int64_t);
    BlockTile (*block_pack)(const evm_block_args *, float *packed);
    unsigned needs;  // features, as cpu_features() returns them
};

// The kernels of an architecture, best first. scan: kernel whose scan is used, as EVM_SCAN in kernels.txt.
#define EVM_KERNEL(isa, scan, needs) {#isa, evm_scan_tile_##scan, evm_block_pack_##isa, needs}

#if defined(__x86_64__)
enum { AVX2 = 1, AVX_VNNI = 2, AVX512 = 4, AVX512_VNNI = 8, AVX512_BF16 = 16 };
const Kernel kernels[] = {EVM_KERNEL(avx512bf16, avx512, AVX512 | AVX512_VNNI | AVX512_BF16),
                          EVM_KERNEL(avx512vnni, avx512, AVX512 | AVX512_VNNI), EVM_KERNEL(avx512, avx512, AVX512),
                          EVM_KERNEL(avxvnni, avx2, AVX2 | AVX_VNNI), EVM_KERNEL(avx2, avx2, AVX2), EVM_KERNEL(base, base, 0)};

unsigned cpu_features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1;
    if (!fma || !osxsave || !avx) return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x06) != 0x06) return 0;  // the system must save XMM and YMM
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0;
    unsigned features = AVX2;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    if ((b & avx512) == avx512 && (low & 0xe6) == 0xe6) features |= c >> 11 & 1 ? AVX512 | AVX512_VNNI : AVX512;  // masks and ZMM saved
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return features;
    return features | (a >> 4 & 1 ? AVX_VNNI : 0) | (a >> 5 & 1 ? AVX512_BF16 : 0);
}
#elif defined(__aarch64__)
enum { DOTPROD = 1, FP16 = 2, I8MM = 4 };
const Kernel kernels[] = {EVM_KERNEL(i8mm, neon, DOTPROD | FP16 | I8MM), EVM_KERNEL(fp16, neon, DOTPROD | FP16),
                          EVM_KERNEL(dotprod, neon, DOTPROD), EVM_KERNEL(neon, neon, 0)};

unsigned cpu_features() {
#if defined(__linux__)  // Android too
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return (first >> 20 & 1 ? DOTPROD : 0) | (first >> 10 & 1 ? FP16 : 0) | (second >> 13 & 1 ? I8MM : 0);
#elif defined(__APPLE__)
    int i8mm = 0;  // from M2 on; every Mac with an Arm CPU has dotprod and fp16
    size_t size = sizeof i8mm;
    return DOTPROD | FP16 | (!sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, nullptr, 0) && i8mm ? I8MM : 0);
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(43) ? DOTPROD : 0;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
    return 0;
#endif
}
#else
#if defined(__wasm__)  // a browser that lacks the instructions does not compile the library
const Kernel kernels[] = {EVM_KERNEL(simd128, simd128, 0)};
#else
const Kernel kernels[] = {EVM_KERNEL(base, base, 0)};
#endif
unsigned cpu_features() { return 0; }
#endif

bool runs(const Kernel &kernel) { return !(kernel.needs & ~cpu_features()); }

const Kernel *find(const char *name) {
    for (const Kernel &kernel : kernels)
        if (runs(kernel) && (!name || !strcmp(name, kernel.name))) return &kernel;
    return nullptr;
}

char isa_error[256];

// Append the names of all kernels that this CPU runs to isa_error.
void list_kernels() {
    const char *between = "";
    for (const Kernel &kernel : kernels) {
        if (!runs(kernel)) continue;
        const size_t length = strlen(isa_error);
        snprintf(isa_error + length, sizeof isa_error - length, "%s%s", between, kernel.name);
        between = ", ";
    }
}

const char *environment() {
#if defined(__wasm__)  // a page has none, and the C library would import functions of WASI
    return nullptr;
#else
    return getenv("EVM_ISA");
#endif
}

// Return the kernel that EVM_ISA names. If there is none, write the reason to isa_error and return the best kernel.
const Kernel *chosen() {
    const char *const name = environment();
    if (!name || !*name) return find(nullptr);
    if (const Kernel *kernel = find(name)) return kernel;
    bool known = false;
    for (const Kernel &kernel : kernels) known |= !strcmp(name, kernel.name);
    snprintf(isa_error, sizeof isa_error, known ? "EVM_ISA=%.32s: this CPU lacks the instruction set; it runs: "
                                                : "EVM_ISA=%.32s: the library has no such instruction set; this CPU runs: ", name);
    for (char *c = isa_error; *c; c++)
        if (*c < ' ' || *c > '~') *c = '?';  // the runtimes expect UTF-8, and EVM_ISA may have any bytes
    list_kernels();
    return find(nullptr);
}

const Kernel *const on_loading = chosen(), *current = on_loading;

uint64_t *next_row, *end_of_trace, last_mark;

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

int64_t evm_block_packed_bytes(const evm_block_args *a) { return Layout(*a).packed * (int64_t)sizeof(float); }

void evm_block_pack(const evm_block_args *a, float *packed) {
    const BlockTile computes = current->block_pack(a, packed);
    memcpy(packed, &computes, sizeof computes);
}

int64_t evm_block_workspace_bytes(const evm_block_args *a) {
    const Layout l(*a);
    return (l.size + (a->packed ? 0 : l.packed)) * (int64_t)sizeof(float);
}

int64_t evm_block_num_steps(const evm_block_args *a) { return Layout(*a).steps(); }

int64_t evm_block_num_tiles(const evm_block_args *a, int64_t image, int64_t step) {
    if (step == PACK) return !a->packed && !image;  // the first image packs the weights for all images
    const Layout l(*a);
    return l.tiles(l.step(step));
}

void evm_block_run_tile(const evm_block_args *a, int64_t image, int64_t step, int64_t tile) {
    float *const packed = a->packed ? a->packed : a->workspace;
    if (step == PACK) return evm_block_pack(a, packed);
    BlockTile compute;
    memcpy(&compute, packed, sizeof compute);
    compute(a, packed, a->packed ? a->workspace : packed + Layout(*a).packed, image, step, tile);
}

void evm_block_mark(const evm_block_args *a, int64_t step) {
    if (next_row == end_of_trace) return;
    const Layout l(*a);
    const uint64_t now = ticks();
    if (step) next_row[l.step(step - 1).stage] += now - last_mark;
    if (step == l.steps()) next_row += EVM_BLOCK_STAGES;
    last_mark = now;
}

void evm_block_trace(uint64_t *to, int64_t rows) {
    next_row = to, end_of_trace = to + rows * EVM_BLOCK_STAGES;
    for (uint64_t *tick = to; tick != end_of_trace; tick++) *tick = 0;
}

const char *evm_scan_isa(void) { return current->name; }

const char *evm_scan_isa_error(void) { return *isa_error ? isa_error : nullptr; }

int evm_scan_force_isa(const char *name) {
    const Kernel *kernel = name ? find(name) : on_loading;
    if (kernel) current = kernel;
    return kernel != nullptr;
}
}
