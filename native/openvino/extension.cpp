// OpenVINO extension with the operators of domain evm: types SelectiveScan, EVSSBlock, EVSSBlockInt8 and EVSSBlockInt8XProj of
// opset "evm", which the native kernels evaluate on the CPU, and the conversion of these operators from ONNX. Load it with
// ov::Core::add_extension(path). The library fits only the OpenVINO release that it was built with.
#include "ops.h"
#include "workspaces.h"

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/core/version.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#define EVM_TEXT_(x) #x
#define EVM_TEXT(x) EVM_TEXT_(x)

// Release of OpenVINO that the library was built for, as text that can be found in the file: loading the library into another
// release fails before any code of it could report the mismatch.
extern "C" EVM_API const char evm_openvino_release[];
const char evm_openvino_release[] = "evm extension for OpenVINO " EVM_TEXT(OPENVINO_VERSION_MAJOR) "." EVM_TEXT(OPENVINO_VERSION_MINOR) "." EVM_TEXT(OPENVINO_VERSION_PATCH);

namespace {

evm::Workspaces workspaces;

// Weights of a node, packed at its first inference. Without constant weights they are packed at every inference.
struct Packed {
    std::once_flag once;
    evm::Buffer buffer;
    float *weights = nullptr;
};

void run(const evm::Op &op, const evm::Tensor *in, ov::TensorVector &out, evm_scan_args args, Packed *) {
    evm::Sizes size;
    OPENVINO_ASSERT(fill(args, op, in, size), size.message);
    args.y = out[0].data<float>();
    ov::parallel_for((size_t)evm_scan_num_tiles(&args), [&](size_t tile) { evm_scan_run_tile(&args, (int64_t)tile); });
}

// packed: of a node whose weights are constant, else null.
void run(const evm::Op &op, const evm::Tensor *in, ov::TensorVector &out, evm_block_args args, Packed *packed) {
    evm::Sizes size;
    OPENVINO_ASSERT(fill(args, op, in, size), size.message);
    for (size_t i = 0; i < out.size(); i++) *evm::output_field(args, i) = out[i].data<float>();
    if (evm::empty(args)) return;
    if (packed) {
        std::call_once(packed->once, [&] {
            packed->weights = packed->buffer.aligned((size_t)evm_block_packed_bytes(&args));
            evm_block_pack(&args, packed->weights);
        });
        args.packed = packed->weights;
    }
    workspaces.with((size_t)evm_block_workspace_bytes(&args), [&](float *workspace) {
        args.workspace = workspace;
        const int64_t steps = evm_block_num_steps(&args);
        for (int64_t image = 0; image < args.b; image++) {
            for (int64_t step = 0; step < steps; step++) {
                evm_block_mark(&args, step);
                ov::parallel_for((size_t)evm_block_num_tiles(&args, image, step),
                                 [&](size_t tile) { evm_block_run_tile(&args, image, step, (int64_t)tile); });
            }
            evm_block_mark(&args, steps);
        }
    });
}

ov::element::Type element(evm::Type type) {
    return type == evm::FLOAT ? ov::element::f32 : type == evm::INT8 ? ov::element::i8 : ov::element::u8;
}

// Attributes of a node. Of scans: delta_softplus; if false, dt = delta + bias. Of blocks: scan_outputs; the node also returns the
// inputs and the output of its scan, for verification. Of float blocks: half; bfloat16, float16 or false. IRs that were written before it
// had names have true, for bfloat16.
struct Attributes {
    bool scan_outputs = false, delta_softplus = true;
    std::string half = "false";
};

void set(evm_scan_args &args, const Attributes &attributes) { args.no_softplus = !attributes.delta_softplus; }
void set(evm_block_args &args, const Attributes &attributes) {
    const std::string &half = attributes.half;
    args.half = half == "float16" ? EVM_FLOAT16 : half == "bfloat16" || half == "true" ? EVM_BFLOAT16 : 0;
}

// OpenVINO node of an operator.
template <const evm::Op &OP, class Arguments>
class Node : public ov::op::Op {
    static constexpr bool is_scan = std::is_same<Arguments, evm_scan_args>::value;
    Attributes attributes;
    mutable Packed packed;

  public:
    static constexpr const evm::Op &op = OP;

    Node() = default;
    Node(const ov::OutputVector &inputs, const Attributes &given) : Op(inputs), attributes(given) {
        constructor_validate_and_infer_types();
    }

    static const ov::DiscreteTypeInfo &get_type_info_static() {
        static const ov::DiscreteTypeInfo info = [] {
            ov::DiscreteTypeInfo made(OP.name, "evm", &ov::op::Op::get_type_info_static());
            made.hash();
            return made;
        }();
        return info;
    }
    const ov::DiscreteTypeInfo &get_type_info() const override { return get_type_info_static(); }

    void validate_and_infer_types() override {
        NODE_VALIDATION_CHECK(this, get_input_size() == OP.input_count, "evm::", OP.name, " has ", OP.input_count, " inputs, got ", get_input_size());
        const std::string &half = attributes.half;
        NODE_VALIDATION_CHECK(this, half == "false" || half == "true" || half == "bfloat16" || half == "float16", "evm::", OP.name, ": half is ",
                              half, ", expected bfloat16, float16 or false");
        evm::Tensor in[evm::MAX_INPUTS];
        bool known = true;
        for (size_t i = 0; i < OP.input_count; i++) {
            const evm::Input &input = OP.inputs[i];
            const ov::element::Type want = element(input.type), have = get_input_element_type(i);
            NODE_VALIDATION_CHECK(this, have.compatible(want), "evm::", OP.name, ": ", input.name, " is ", have, ", expected ", want);
            if (get_input_partial_shape(i).is_static()) in[i] = tensor(nullptr, get_input_shape(i));
            else known = false;
        }
        evm::Sizes size;
        NODE_VALIDATION_CHECK(this, !known || size.fit(OP, in), size.message);
        set_output_type(0, ov::element::f32, get_input_partial_shape(0));
        if (attributes.scan_outputs && OP.output_count > 1) set_scan_outputs(get_input_partial_shape(0), get_input_partial_shape(index_of("A")));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Node>(inputs, attributes);
    }

    bool visit_attributes(ov::AttributeVisitor &visitor) override {
        if (is_scan) {
            visitor.on_attribute("delta_softplus", attributes.delta_softplus);
            return true;
        }
        visitor.on_attribute("scan_outputs", attributes.scan_outputs);
        if (&OP == &evm::EVSS_BLOCK) visitor.on_attribute("half", attributes.half);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        evm::Tensor in[evm::MAX_INPUTS];
        for (size_t i = 0; i < OP.input_count; i++) in[i] = tensor(inputs[i].data(), inputs[i].get_shape());
        Arguments args = {};
        set(args, attributes);
        run(OP, in, outputs, args, has_constant_weights() ? &packed : nullptr);
        return true;
    }

  private:
    bool has_constant_weights() const {
        for (size_t i = 1; i < OP.input_count; i++)
            if (!ov::is_type<ov::op::v0::Constant>(input_value(i).get_node())) return false;
        return true;
    }

    static evm::Tensor tensor(const void *data, const ov::Shape &shape) {
        evm::Tensor made{data, {}, shape.size()};
        for (size_t i = 0; i < shape.size() && i < evm::MAX_RANK; i++) made.dims[i] = (int64_t)shape[i];
        return made;
    }

    static size_t index_of(const char *name) {
        size_t i = 0;
        while (strcmp(OP.inputs[i].name, name)) i++;
        return i;
    }

    void set_scan_outputs(const ov::PartialShape &x, const ov::PartialShape &A) {
        const auto size = [](const ov::Dimension &d) { return d.is_static() ? d.get_length() : -1; };
        for (size_t i = evm::SCAN_U; i < OP.output_count; i++) {
            const evm::Shape shape = evm::scan_shape(i, size(x[0]), size(x[1]), size(x[2]), size(A[1]), size(A[2]));
            set_output_type(i, ov::element::f32, std::vector<ov::Dimension>(shape.dims, shape.dims + evm::MAX_RANK));
        }
    }
};

template <class Type>
ov::OutputVector convert(const ov::frontend::NodeContext &context) {
    ov::OutputVector inputs;
    for (size_t i = 0; i < context.get_input_size(); i++) inputs.push_back(context.get_input((int)i));
    Attributes attributes;
    attributes.delta_softplus = context.get_attribute<int64_t>("delta_softplus", 1) != 0;
    attributes.half = context.get_attribute<std::string>("half", attributes.half);
    return std::make_shared<Type>(inputs, attributes)->outputs();
}

template <class Type>
void add(std::vector<ov::Extension::Ptr> &extensions) {
    extensions.push_back(std::make_shared<ov::OpExtension<Type>>());
    extensions.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(Type::get_type_info_static().name, "evm", convert<Type>));
}

// Return all extensions. OpenVINO calls this function in add_extension, which passes the exception on.
std::vector<ov::Extension::Ptr> extensions() {
    const char *const error = evm_scan_isa_error();
    OPENVINO_ASSERT(!error, error);
    std::vector<ov::Extension::Ptr> all;
    add<Node<evm::SELECTIVE_SCAN, evm_scan_args>>(all);
    add<Node<evm::EVSS_BLOCK, evm_block_args>>(all);
    add<Node<evm::EVSS_BLOCK_INT8, evm_block_args>>(all);
    add<Node<evm::EVSS_BLOCK_INT8_X_PROJ, evm_block_args>>(all);
    return all;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(extensions());
