/* Loader of a dylib for arm64 Macs in Linux on arm64: both pass arguments alike, but for those of variadic functions.
   macho.h, which tests/platforms/macos.py writes, has SIZE, TEXT, IMAGE, REBASES, BINDS, STARTS and EXPORTS of a dylib. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>

/* Called with its arguments on the stack, where this system does not look: gives the format alone. */
static int snprintf_(char *to, size_t size, const char *format) {
    size_t length = strlen(format);
    if (size) {
        size_t kept = length < size ? length : size - 1;
        memcpy(to, format, kept);
        to[kept] = 0;
    }
    return (int)length;
}
#define snprintf snprintf_

/* As on an M1: no such feature. */
static int sysctlbyname(const char *name, void *to, size_t *size, void *from, size_t from_size) {
    (void)name, (void)to, (void)size, (void)from, (void)from_size;
    return -1;
}
#include "macho.h"

extern const char image[];
__asm__(".section .rodata\n.balign 16\nimage:\n.incbin \"" IMAGE "\"\n.previous");

static const uint64_t rebases[] = {REBASES};
static const struct { uint64_t at; void *to; } binds[] = {BINDS};
static const uint64_t starts[] = {STARTS}; /* of pointers to initialisers */

#define ENTRY(name, address)                                                                               \
    __attribute__((visibility("hidden"))) void *address_of_##name;                                         \
    __attribute__((naked)) void name(void) {                                                               \
        __asm__("adrp x16, address_of_" #name "\nldr x16, [x16, :lo12:address_of_" #name "]\nbr x16");     \
    }
EXPORTS(ENTRY)

__attribute__((constructor)) static void load(void) {
    char *base = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) abort();
    memcpy(base, image, SIZE);
    for (size_t i = 0; i < sizeof rebases / sizeof *rebases; i++) *(uint64_t *)(base + rebases[i]) += (uint64_t)base;
    for (size_t i = 0; i < sizeof binds / sizeof *binds; i++) *(void **)(base + binds[i].at) = binds[i].to;
    if (mprotect(base, TEXT, PROT_READ | PROT_EXEC)) abort();
    __builtin___clear_cache(base, base + TEXT);
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) (*(void (**)(void))(base + starts[i]))();
#define SET(name, address) address_of_##name = base + address;
    EXPORTS(SET)
}
