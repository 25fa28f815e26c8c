// The custom-op library: domain evm, for ONNX Runtime >= 1.17.
// Register with SessionOptions.register_custom_ops_library(path), or the same in C, C++, C#, Java.
#include "op.h"

namespace ort {
Api api;
extern const Op selective_scan, evss_block, evss_block_int8;
}  // namespace ort

using namespace ort;

ORT_EXPORT Status ORT_CALL RegisterCustomOps(Handle options, const ApiBase *base) {
    api = base->GetApi(API_VERSION);
    if (!api) {  // older than 1.17: CreateStatus sits in the same place in every version
        api = base->GetApi(1);
        return api ? fail("the operators of domain evm need ONNX Runtime 1.17 or newer") : nullptr;
    }
    Handle domain = nullptr;
    RETURN_IF(call<Status>(api, CreateCustomOpDomain, (const char *)"evm", &domain));
    const CustomOp *const ops[] = {&selective_scan, &evss_block, &evss_block_int8};
    for (const CustomOp *op : ops) RETURN_IF(call<Status>(api, CustomOpDomain_Add, domain, op));
    return call<Status>(api, AddCustomOpDomain, options, domain);
}
