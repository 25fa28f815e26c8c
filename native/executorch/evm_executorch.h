/* C interface to programs of ExecuTorch (.pte), for hosts that have no C++: Python's ctypes, without torch.
 *
 * A program has the method `forward`, whose inputs and outputs are arrays of fixed sizes, and the method `evm_names`, which returns
 * the names of the inputs and outputs as text. Loading the library registers the operators of domain evm with ExecuTorch.
 *
 * Functions that can fail return null or a number other than 0, and write a message of at most `size` bytes to `message`. No
 * function throws. A model may be used by one thread at a time.
 */
#pragma once
#include "evm_scan.h"
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct evm_program evm_program;

/* An input or output of `forward`. type: ExecuTorch's ScalarType: 0 uint8, 1 int8, 3 int32, 4 int64, 6 float32, 11 bool. */
typedef struct {
    int64_t type, rank, dims[8], bytes;
} evm_program_tensor;

/* Open the program in a file. threads: 1 for the calling thread alone, 0 for the process's pool as it is, else the number of threads
 * of this pool. The pool cannot change while programs that use it are open: a message tells so. */
EVM_API evm_program *evm_program_open(const char *path, int64_t threads, char *message, size_t size);
EVM_API void evm_program_close(evm_program *program);
/* The names of inputs and outputs: lines, an empty line between the two; empty if the program does not tell. */
EVM_API const char *evm_program_names(const evm_program *program);
/* Number of inputs (output = 0) or outputs (output = 1). */
EVM_API int64_t evm_program_count(const evm_program *program, int output);
EVM_API evm_program_tensor evm_program_describe(const evm_program *program, int output, int64_t index);
/* Run `forward` once on contiguous arrays, and copy its outputs to arrays of their sizes. */
EVM_API int evm_program_run(evm_program *program, const void *const *inputs, void *const *outputs, char *message, size_t size);

/* Called after each scan, on its own or inside a block, with the tensors that it read and wrote. */
typedef void (*evm_scan_recorder)(const evm_scan_args *args);
/* Tell every scan of the process to `recorder`, for verification; null for none. No program may run meanwhile. */
EVM_API void evm_executorch_record(evm_scan_recorder recorder);

#ifdef __cplusplus
}
#endif
