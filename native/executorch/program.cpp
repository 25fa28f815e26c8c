// C interface to programs of ExecuTorch; see evm_executorch.h.
#include "evm_executorch.h"

#include <mutex>
#include <new>
#include <stdio.h>
#include <string.h>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#define EVM_TEXT_(x) #x
#define EVM_TEXT(x) EVM_TEXT_(x)

// Release of ExecuTorch that the library was built for, as text that can be found in the file.
extern "C" EVM_API const char evm_executorch_release[];
const char evm_executorch_release[] = "evm library for ExecuTorch " EVM_TEXT(EVM_EXECUTORCH_RELEASE);

// Declarations of exported functions whose header the wheel does not have.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

namespace pool = executorch::extension::threadpool;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

// The first error that ExecuTorch has logged in this thread since `clear`. ExecuTorch's own functions return a number.
thread_local std::string logged;

void log(et_timestamp_t, et_pal_log_level_t level, const char *, const char *, size_t, const char *text, size_t length) {
    if ((level == kError || level == kFatal) && logged.empty()) logged.assign(text, length);
}

void capture_log() {
    static std::once_flag once;
    std::call_once(once, [] {
        executorch::runtime::runtime_init();
        executorch::runtime::register_pal(executorch::runtime::PalImpl::create(log, __FILE__));
    });
}

int fail(char *message, size_t size, const char *what, Error error) {
    snprintf(message, size, "%s: %s%s%s", what, executorch::runtime::to_string(error), logged.empty() ? "" : ": ", logged.c_str());
    return 1;
}

// Programs that hold the process's pool of threads: it may be replaced while there are none.
std::mutex pool_mutex;
int64_t pool_users;

// Take part in the pool of `threads` threads, 0 for the pool as it is. Return false, with a message, if it has another number.
bool join_pool(int64_t threads, char *message, size_t size) {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    pool::ThreadPool *const threadpool = pool::get_threadpool();
    if (threads && threadpool && (int64_t)threadpool->get_thread_count() != threads) {
        if (pool_users) {
            snprintf(message, size, "ExecuTorch has one pool of threads in a process, and an open program uses its %zu threads",
                     threadpool->get_thread_count());
            return false;
        }
        threadpool->_unsafe_reset_threadpool((uint32_t)threads);
    }
    pool_users++;
    return true;
}

void leave_pool() {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    pool_users--;
}

// Keeps the delegate and the kernels on the calling thread while it exists, if `alone`.
class Alone {
    const bool before = pool::NoThreadPoolGuard::is_enabled();

  public:
    explicit Alone(bool alone) { pool::NoThreadPoolGuard::set_enabled(alone || before); }
    ~Alone() { pool::NoThreadPoolGuard::set_enabled(before); }
};

}  // namespace

struct evm_program {
    Module module;
    bool alone;
    std::string names;
    std::vector<evm_program_tensor> tensors[2];

    evm_program(const char *path, bool single) : module(path, Module::LoadMode::Mmap), alone(single) {}
    ~evm_program() {
        if (!alone) leave_pool();
    }
};

namespace {

evm_program_tensor describe(const executorch::runtime::TensorInfo &info) {
    evm_program_tensor tensor = {(int64_t)info.scalar_type(), (int64_t)info.sizes().size(), {}, (int64_t)info.nbytes()};
    for (size_t i = 0; i < info.sizes().size() && i < 8; i++) tensor.dims[i] = info.sizes()[i];
    return tensor;
}

// Load `forward` and describe its inputs and outputs. Returns 0, or writes a message.
int load(evm_program *program, char *message, size_t size) {
    Module &module = program->module;
    const Error file = module.load(executorch::runtime::Program::Verification::InternalConsistency);
    if (file != Error::Ok) return fail(message, size, "the file is no program", file);
    const Error error = module.load_method("forward");
    if (error != Error::Ok) return fail(message, size, "the program cannot be loaded", error);
    const auto meta = module.method_meta("forward");
    if (!meta.ok()) return fail(message, size, "the program has no forward", meta.error());
    for (int output = 0; output < 2; output++) {
        const size_t count = output ? meta->num_outputs() : meta->num_inputs();
        for (size_t i = 0; i < count; i++) {
            const auto info = output ? meta->output_tensor_meta(i) : meta->input_tensor_meta(i);
            if (!info.ok() || info->sizes().size() > 8) return fail(message, size, "an input or output is no tensor of at most 8 axes", Error::NotSupported);
            program->tensors[output].push_back(describe(*info));
        }
    }
    const auto known = module.method_names();
    if (known.ok() && known->count("evm_names")) {
        const auto names = module.execute("evm_names");
        if (names.ok() && names->size() == 1 && (*names)[0].isString()) program->names = std::string((*names)[0].toString());
    }
    return 0;
}

}  // namespace

extern "C" {

evm_program *evm_program_open(const char *path, int64_t threads, char *message, size_t size) {
    capture_log();
    logged.clear();
    const bool alone = threads == 1;
    if (!alone && !join_pool(threads, message, size)) return nullptr;
    evm_program *const program = new (std::nothrow) evm_program(path, alone);
    if (!program) {
        if (!alone) leave_pool();
        fail(message, size, "out of memory for a program", Error::MemoryAllocationFailed);
        return nullptr;
    }
    const Alone guard(alone);
    if (!load(program, message, size)) return program;
    delete program;
    return nullptr;
}

void evm_program_close(evm_program *program) { delete program; }

const char *evm_program_names(const evm_program *program) { return program->names.c_str(); }

int64_t evm_program_count(const evm_program *program, int output) { return (int64_t)program->tensors[output].size(); }

evm_program_tensor evm_program_describe(const evm_program *program, int output, int64_t index) {
    return program->tensors[output][(size_t)index];
}

int evm_program_run(evm_program *program, const void *const *inputs, void *const *outputs, char *message, size_t size) {
    logged.clear();
    const Alone guard(program->alone);
    std::vector<TensorPtr> tensors;
    std::vector<EValue> values;
    for (size_t i = 0; i < program->tensors[0].size(); i++) {
        const evm_program_tensor &input = program->tensors[0][i];
        std::vector<executorch::aten::SizesType> dims(input.dims, input.dims + input.rank);
        tensors.push_back(executorch::extension::from_blob(const_cast<void *>(inputs[i]), std::move(dims), (executorch::aten::ScalarType)input.type));
        values.emplace_back(tensors.back());
    }
    const auto result = program->module.forward(values);
    if (!result.ok()) return fail(message, size, "the program cannot run", result.error());
    for (size_t i = 0; i < result->size(); i++) {
        const executorch::aten::Tensor &output = (*result)[i].toTensor();
        if ((int64_t)output.nbytes() != program->tensors[1][i].bytes) return fail(message, size, "an output has another size", Error::InvalidState);
        memcpy(outputs[i], output.const_data_ptr(), output.nbytes());
    }
    return 0;
}

}  // extern "C"
