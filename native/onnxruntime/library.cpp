// Custom-op library for ONNX Runtime >= 1.17: the ops of domain evm.
// Register it with SessionOptions.register_custom_ops_library(path), or the equivalent call in C, C++, C# or Java.
#include "op.h"

namespace ort {
Api api;
extern const Op selective_scan, evss_block, evss_block_int8, evss_block_int8_x_proj;
}  // namespace ort

using namespace ort;

namespace {

// Return the custom-op domain, which all sessions share and which must outlive them. There is one domain for each ONNX
// Runtime in the process; a domain per session would never be released.
Status domain_of(const ApiBase *base, Handle *domain) {
    static char lock;
    static const ApiBase *owner;
    static Handle kept;
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {
    }
    Status status = nullptr;
    if (owner != base) {
        Handle made = nullptr;
        status = call<Status>(api, CreateCustomOpDomain, (const char *)"evm", &made);
        const CustomOp *const ops[] = {&selective_scan, &evss_block, &evss_block_int8, &evss_block_int8_x_proj};
        for (const CustomOp *op : ops)
            if (!status) status = call<Status>(api, CustomOpDomain_Add, made, op);
        if (!status) owner = base, kept = made;
    }
    *domain = kept;
    __atomic_clear(&lock, __ATOMIC_RELEASE);
    return status;
}

}  // namespace

ORT_EXPORT Status ORT_CALL RegisterCustomOps(Handle options, const ApiBase *base) {
    api = base->GetApi(API_VERSION);
    if (!api) {  // older than 1.17; CreateStatus has the same index in every version
        api = base->GetApi(1);
        return api ? fail("the operators of domain evm need ONNX Runtime 1.17 or newer") : nullptr;
    }
    if (const char *const error = evm_scan_isa_error()) return fail(error);
    Handle domain = nullptr;
    RETURN_IF(domain_of(base, &domain));
    return call<Status>(api, AddCustomOpDomain, options, domain);
}
