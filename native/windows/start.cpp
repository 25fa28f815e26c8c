// Start code of a DLL that is linked without a C runtime (evm_deploy/toolchain/cross_compile.py): it needs ucrtbase.dll
// alone, and the compiler has no runtime to build first.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {

int _fltused;  // code with floating point refers to it

using Constructor = void (*)();
extern Constructor __CTOR_LIST__[];  // made by the linker: a mark, the constructors, null

// Entry point: run the constructors when a process loads the library (reason 1).
int DllMainCRTStartup(void *, unsigned reason, void *) {
    if (reason == 1)
        for (Constructor *each = __CTOR_LIST__ + 1; *each; each++) (*each)();
    return 1;
}

int __stdio_common_vsprintf(uint64_t options, char *to, size_t size, const char *format, void *locale, va_list values);

// The Universal C Runtime exports no snprintf. Option 2: return the length that the whole text would have, as C99 says.
int snprintf(char *to, size_t size, const char *format, ...) {
    va_list values;
    va_start(values, format);
    const int length = __stdio_common_vsprintf(2, to, size, format, nullptr, values);
    va_end(values);
    return length;
}
}

// The compiler calls this for frames of more than a page, with the size in rax: touch every page of the frame, because the
// system makes the stack grow page by page. All registers are kept.
__asm__(R"(
    .globl ___chkstk_ms
___chkstk_ms:
    pushq %rcx
    pushq %rax
    leaq 24(%rsp), %rcx
1:  cmpq $4096, %rax
    jb 2f
    subq $4096, %rcx
    orb $0, (%rcx)
    subq $4096, %rax
    jmp 1b
2:  subq %rax, %rcx
    orb $0, (%rcx)
    popq %rax
    popq %rcx
    ret
)");
