// The custom-op library: domain evm, for ONNX Runtime >= 1.17.
// Register with SessionOptions.register_custom_ops_library(path), or the same in C, C++, C#, Java.
#include "op.h"

namespace ort {
Api api;
extern const Op selective_scan, evss_block, evss_block_int8;
}  // namespace ort

using namespace ort;

namespace {

// Sessions share a domain, which must outlive them all: one for each ONNX Runtime in the process that asks, not one for each
// session, which nobody would release.
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
        const CustomOp *const ops[] = {&selective_scan, &evss_block, &evss_block_int8};
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
    if (!api) {  // older than 1.17: CreateStatus sits in the same place in every version
        api = base->GetApi(1);
        return api ? fail("the operators of domain evm need ONNX Runtime 1.17 or newer") : nullptr;
    }
    Handle domain = nullptr;
    RETURN_IF(domain_of(base, &domain));
    return call<Status>(api, AddCustomOpDomain, options, domain);
}
