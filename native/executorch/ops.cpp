// Operators of domain evm for ExecuTorch: read tensors, fill the struct, call the kernels. A static initialiser registers them when
// the library is loaded, or when an app's binary starts that has this file in its build. A second registration ends the process.
#include "ops.h"
#include "evm_executorch.h"
#include "workspaces.h"

#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

namespace {

using executorch::aten::ArrayRef;
using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

evm::Workspaces workspaces;
evm_scan_recorder recorder;  // or null

void fail(KernelRuntimeContext &context, const char *message) {
    ET_LOG(Error, "%s", message);
    context.fail(Error::InvalidArgument);
}

ScalarType element(evm::Type type) { return type == evm::FLOAT ? ScalarType::Float : type == evm::INT8 ? ScalarType::Char : ScalarType::Byte; }

// Read a tensor. If it has another type than the operator's input, or is not contiguous, return false.
bool read(const executorch::aten::Tensor &from, const evm::Input &input, evm::Tensor *to) {
    *to = {from.const_data_ptr(), {}, (size_t)from.dim()};
    for (size_t i = 0; i < to->rank && i < evm::MAX_RANK; i++) to->dims[i] = from.size((ssize_t)i);
    return from.scalar_type() == element(input.type) && executorch::runtime::tensor_is_default_dim_order(from);
}

// Give an output its sizes. Returns its data, or null where its memory is too small.
float *write(EValue &value, const int64_t *dims) {
    if (!value.isTensor() || value.toTensor().scalar_type() != ScalarType::Float) return nullptr;
    executorch::aten::SizesType sizes[evm::MAX_RANK];
    for (size_t i = 0; i < evm::MAX_RANK; i++) sizes[i] = (executorch::aten::SizesType)dims[i];
    executorch::aten::Tensor out = value.toTensor();
    if (executorch::runtime::resize_tensor(out, {sizes, evm::MAX_RANK}) != Error::Ok) return nullptr;
    return out.mutable_data_ptr<float>();
}

template <class Tile>
void for_each_tile(int64_t tiles, Tile tile) {
    executorch::extension::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) tile(i);
    });
}

// evm::selective_scan.out(Tensor u, .., Tensor bias, bool delta_softplus, *, Tensor(a!) out)
void scan(KernelRuntimeContext &context, Span<EValue *> stack) {
    const evm::Op &op = evm::SELECTIVE_SCAN;
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_scan_args args = {};
    if (stack.size() < op.input_count + 2) return fail(context, "evm::selective_scan: arguments are missing");
    for (size_t i = 0; i < op.input_count; i++)
        if (!stack[i]->isTensor() || !read(stack[i]->toTensor(), op.inputs[i], &in[i]))
            return fail(context, "evm::selective_scan: an input is not a contiguous float32 tensor");
    if (!fill(args, op, in, size)) return fail(context, size.message);
    args.no_softplus = !stack[op.input_count]->toBool();
    args.y = write(*stack[op.input_count + 1], in[0].dims);
    if (!args.y) return fail(context, "evm::selective_scan: the output does not fit");
    for_each_tile(evm_scan_num_tiles(&args), [&](int64_t tile) { evm_scan_run_tile(&args, tile); });
    if (recorder) recorder(&args);
}

// The tensors that the scan of a block reads and writes, which a block otherwise does not keep.
class Recorded {
    std::vector<float> tensors[evm::BLOCK_OUTPUTS - evm::SCAN_U];

  public:
    explicit Recorded(evm_block_args &args) {
        for (size_t i = evm::SCAN_U; i < evm::BLOCK_OUTPUTS; i++) {
            const evm::Shape shape = evm::scan_shape(i, args.b, args.H, args.W, args.d, args.N);
            tensors[i - evm::SCAN_U].resize((size_t)(shape.dims[0] * shape.dims[1] * shape.dims[2] * shape.dims[3]));
            *evm::output_field(args, i) = tensors[i - evm::SCAN_U].data();
        }
    }

    static void tell(const evm_block_args &args) {
        const int64_t L = evm::scan_shape(evm::SCAN_U, args.b, args.H, args.W, args.d, args.N).dims[2];
        const evm_scan_args scan = {args.scan_u, args.scan_delta, args.A, args.scan_B, args.scan_C, args.skip, args.dt_bias, args.scan_y,
                                    args.b, EVM_BLOCK_DIRECTIONS, L, args.d, args.N, 0};
        recorder(&scan);
    }
};

void run(const evm_block_args &args) {
    const int64_t steps = evm_block_num_steps(&args);
    for (int64_t image = 0; image < args.b; image++) {
        for (int64_t step = 0; step < steps; step++) {
            evm_block_mark(&args, step);
            for_each_tile(evm_block_num_tiles(&args, image, step), [&](int64_t tile) { evm_block_run_tile(&args, image, step, tile); });
        }
        evm_block_mark(&args, steps);
    }
}

// evm::NAME.out(Tensor x, Tensor[] operands, *, Tensor(a!) out). Weights are packed anew in each call: a kernel of ExecuTorch keeps
// nothing between calls.
template <const evm::Op &OP>
void block(KernelRuntimeContext &context, Span<EValue *> stack) {
    evm::Tensor in[evm::MAX_INPUTS];
    evm::Sizes size;
    evm_block_args args = {};
    if (stack.size() < 3 || !stack[0]->isTensor() || !stack[1]->isTensorList())
        return fail(context, "a fused block of domain evm: arguments are missing");
    const ArrayRef<executorch::aten::Tensor> operands = stack[1]->toTensorList();
    if (operands.size() + 1 != OP.input_count) return fail(context, "a fused block of domain evm has another number of operands");
    for (size_t i = 0; i < OP.input_count; i++)
        if (!read(i ? operands[i - 1] : stack[0]->toTensor(), OP.inputs[i], &in[i]))
            return fail(context, "a fused block of domain evm: an input has another type, or is not contiguous");
    if (!fill(args, OP, in, size)) return fail(context, size.message);
    args.out = write(*stack[2], in[0].dims);
    if (!args.out) return fail(context, "a fused block of domain evm: the output does not fit");
    if (evm::empty(args)) return;
    workspaces.with((size_t)evm_block_workspace_bytes(&args), [&](float *workspace) {
        args.workspace = workspace;
        if (!recorder) return run(args);
        const Recorded recorded(args);
        run(args);
        recorded.tell(args);
    });
}

const executorch::runtime::Kernel KERNELS[] = {
    executorch::runtime::Kernel("evm::selective_scan.out", scan),
    executorch::runtime::Kernel("evm::EVSSBlock.out", block<evm::EVSS_BLOCK>),
    executorch::runtime::Kernel("evm::EVSSBlockInt8.out", block<evm::EVSS_BLOCK_INT8>),
    executorch::runtime::Kernel("evm::EVSSBlockInt8XProj.out", block<evm::EVSS_BLOCK_INT8_X_PROJ>),
};
const Error registered = executorch::runtime::register_kernels({KERNELS, sizeof KERNELS / sizeof *KERNELS});

}  // namespace

void evm_executorch_record(evm_scan_recorder told) { recorder = told; }
