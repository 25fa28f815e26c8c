// evm::EVSSBlock and evm::EVSSBlockInt8 for ONNX Runtime: read shapes, check them, fill the struct, call the kernel stage by stage.
#include "evm_block.h"
#include "op.h"

using namespace ort;

namespace {

// Z: 2 d. X: R + 2 N. LINEAR: name, axes, output channels.
#define EVM_BLOCK_INPUTS(LINEAR)                                                                                             \
    {"x", "bHWC"}, {"norm_weight", "C"}, {"norm_bias", "C"}, LINEAR("in_proj", "CZ", "Z"), {"conv_weight", "d133"},          \
    {"conv_bias", "d"}, {"x_proj", "4dX"}, {"dt_proj", "4Rd"}, {"A", "4dN"}, {"skip", "4d"}, {"dt_bias", "4d"},              \
    {"out_norm_weight", "d"}, {"out_norm_bias", "d"}, LINEAR("out_proj", "dC", "C"), {"local_conv_weight", "C133"},          \
    {"local_conv_bias", "C"}, LINEAR("local_proj_weight", "CC11", "C"), {"local_proj_bias", "C"}, {"gate_norm_weight", "C"}, \
    {"gate_norm_bias", "C"}, {"gate_reduce_weight", "CG"}, {"gate_reduce_bias", "G"}, {"gate_select_weight", "GC"},          \
    {"gate_select_bias", "C"},
#define EVM_FLOAT(name, axes, columns) {name, axes}
#define EVM_INT8(name, axes, columns) \
    {name, axes, INT8}, {name "_scale", columns}, {name "_input_scale", ""}, {name "_input_zero_point", "", UINT8}

const char *const NAME = "EVSSBlock", *const INT8_NAME = "EVSSBlockInt8";
const Input INPUTS[] = {EVM_BLOCK_INPUTS(EVM_FLOAT)};
const Input INT8_INPUTS[] = {EVM_BLOCK_INPUTS(EVM_INT8)};
constexpr size_t COUNT = sizeof INPUTS / sizeof *INPUTS;
enum { OUT, U, DELTA, B, C, Y, OUTPUTS };  // all but the first are optional, for verification

struct Stage {
    const evm_block_args *args;
    int64_t image;
    int stage;
};

void run_tile(void *stage, size_t tile) {
    const Stage &s = *(const Stage *)stage;
    evm_block_run_tile(s.args, s.image, s.stage, (int64_t)tile);
}

Status run(Handle context, const evm_block_args &args) {
    for (int64_t image = 0; image < args.b; image++)
        for (int stage = 0; stage < EVM_BLOCK_STAGES; stage++) {
            Stage s = {&args, image, stage};
            const size_t tiles = (size_t)evm_block_num_tiles(&args, image, stage);
            if (tiles) RETURN_IF(call<Status>(api, KernelContext_ParallelFor, context, &run_tile, tiles, (size_t)0, (void *)&s));
        }
    return nullptr;
}

Status scan_outputs(Handle context, evm_block_args &args) {
    size_t outputs = 0;
    RETURN_IF(call<Status>(api, KernelContext_GetOutputCount, context, &outputs));
    const int64_t L = (args.H + 1) / 2 * ((args.W + 1) / 2);
    const int64_t channels[] = {args.b, EVM_BLOCK_DIRECTIONS, L, args.d}, states[] = {args.b, EVM_BLOCK_DIRECTIONS, L, args.N};
    float **const data[] = {nullptr, &args.scan_u, &args.scan_delta, &args.scan_B, &args.scan_C, &args.scan_y};
    for (size_t i = U; i < outputs && i < OUTPUTS; i++) RETURN_IF(write(context, i, i == B || i == C ? states : channels, data[i]));
    return nullptr;
}

// The inputs in their order, which is that of the struct. False, and a message, when a scale is none.
bool fill(evm_block_args &args, const char *name, const Input *inputs, const Tensor *in, Sizes &size) {
    evm_int8_linear *int8 = &args.in_proj_int8;
    for (const float **field = &args.x; field != &args.gate_select_bias + 1; field++, inputs++, in++) {
        if (inputs->type != INT8) {
            *field = in->as<float>();
            continue;
        }
        *int8++ = {in[0].as<int8_t>(), in[1].as<float>(), *in[2].as<float>(), *in[3].as<uint8_t>()};
        if (!size.scale(name, inputs[2].name, *in[2].as<float>())) return false;
        inputs += 3, in += 3;
    }
    return true;
}

template <size_t COUNT>
Status compute(Handle memory, Handle context, const char *name, const Input (&inputs)[COUNT]) {
    Tensor in[COUNT];
    Sizes size;
    RETURN_IF(read_inputs(context, name, inputs, in, &size));
    if (!size.equal(name, "axis 1 of in_proj", size['Z'], 2 * size['d'])) return fail(size.message);
    if (!size.equal(name, "axis 2 of x_proj", size['X'], size['R'] + 2 * size['N'])) return fail(size.message);
    evm_block_args args = {};
    if (!fill(args, name, inputs, in, size)) return fail(size.message);
    args.b = size['b'], args.H = size['H'], args.W = size['W'], args.C = size['C'];
    args.d = size['d'], args.N = size['N'], args.R = size['R'], args.G = size['G'];
    RETURN_IF(write(context, OUT, in[0].dims, &args.out));
    RETURN_IF(scan_outputs(context, args));
    if (!(args.b && args.H && args.W && args.C)) return nullptr;
    Handle allocator = nullptr;
    RETURN_IF(call<Status>(api, KernelContext_GetAllocator, context, memory, &allocator));
    Status status = call<Status>(api, AllocatorAlloc, allocator, (size_t)evm_block_workspace_bytes(&args), (Handle *)&args.workspace);
    if (!status) {
        status = run(context, args);
        const Status freed = call<Status>(api, AllocatorFree, allocator, (Handle)args.workspace);
        if (!status) status = freed;
    }
    call<void>(api, ReleaseAllocator, allocator);
    return status;
}

Status ORT_CALL compute_float(Handle memory, Handle context) { return compute(memory, context, NAME, INPUTS); }
Status ORT_CALL compute_int8(Handle memory, Handle context) { return compute(memory, context, INT8_NAME, INT8_INPUTS); }

static_assert(offsetof(evm_block_args, out) == COUNT * sizeof(float *), "inputs of the op and of the kernel differ");

}  // namespace

namespace ort {
extern const Op evss_block(NAME, INPUTS, OUTPUTS, compute_float), evss_block_int8(INT8_NAME, INT8_INPUTS, OUTPUTS, compute_int8);
}
