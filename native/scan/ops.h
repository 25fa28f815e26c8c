// Operators of domain evm, described once for all runtimes: inputs, checks of their shapes, and conversion to the kernels'
// arguments. The adapter of a runtime provides tensors, memory and threads.
#pragma once
#include "evm_block.h"
#include "evm_scan.h"

#include <float.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

namespace evm {

enum Type { FLOAT = 1, UINT8 = 2, INT8 = 3 };  // element types, numbered as in ONNX

constexpr size_t MAX_RANK = 4, MAX_INPUTS = 40;

// Largest sizes that are accepted. Tensors without elements can have any size, and the size of a workspace would overflow.
constexpr int64_t LONGEST = INT32_MAX;  // for axes of images, directions, rows, columns and steps
constexpr int64_t WIDEST = 65536;       // for all other axes

inline int64_t limit(char axis) { return strchr("bKLHW", axis) ? LONGEST : strchr("XZ", axis) ? 3 * WIDEST : WIDEST; }

struct Tensor {
    const void *data;
    int64_t dims[MAX_RANK];
    size_t rank;

    template <class T>
    const T *as() const { return static_cast<const T *>(data); }
};

// Description of an input: name, axes (one character each) and element type. A letter stands for a size, which the first input
// with this letter sets. A digit is the size itself.
struct Input {
    const char *name, *axes;
    Type type = FLOAT;
};

// Description of an operator. All outputs are float32. The first output has the shape of the first input; the others are optional.
struct Op {
    const char *name;
    const Input *inputs;
    size_t input_count, output_count;
};

// Sizes of the axes by letter, filled by fit().
class Sizes {
    int64_t size[128];
    const char *owner[128] = {};

  public:
    char message[192];

    int64_t operator[](char axis) const { return size[(int)axis]; }

    // Check that `tensor` fits `input` and the inputs checked before. If not, set `message` and return false.
    bool fit(const Op &op, const Input &input, const Tensor &tensor) {
        if (tensor.rank != strlen(input.axes)) {
            snprintf(message, sizeof message, "evm::%s: %s has rank %zu, expected %zu", op.name, input.name, tensor.rank, strlen(input.axes));
            return false;
        }
        for (size_t i = 0; i < tensor.rank; i++) {
            const char axis = input.axes[i];
            const bool literal = axis >= '0' && axis <= '9';
            if (literal) size[(int)axis] = axis - '0';
            else if (!owner[(int)axis]) owner[(int)axis] = input.name, size[(int)axis] = tensor.dims[i];
            if (tensor.dims[i] > limit(axis)) {
                snprintf(message, sizeof message, "evm::%s: %s has %lld on axis %zu (%c), more than %lld", op.name, input.name,
                         (long long)tensor.dims[i], i, axis, (long long)limit(axis));
                return false;
            }
            if (tensor.dims[i] == size[(int)axis]) continue;
            snprintf(message, sizeof message, "evm::%s: %s has %lld on axis %zu (%c), %s asks for %lld", op.name, input.name,
                     (long long)tensor.dims[i], i, axis, literal ? "the op" : owner[(int)axis], (long long)size[(int)axis]);
            return false;
        }
        return true;
    }

    // Check all inputs; see above.
    bool fit(const Op &op, const Tensor *tensors) {
        for (size_t i = 0; i < op.input_count; i++)
            if (!fit(op, op.inputs[i], tensors[i])) return false;
        return true;
    }

    // Check a size that other sizes determine. If it is wrong, set `message` and return false.
    bool equal(const Op &op, const char *what, int64_t have, int64_t want) {
        if (have == want) return true;
        snprintf(message, sizeof message, "evm::%s: %s is %lld, expected %lld", op.name, what, (long long)have, (long long)want);
        return false;
    }

    // Check the scale of quantised values: the scale and its inverse must be positive and finite. If not, set `message` and return
    // false.
    bool scale(const Op &op, const char *what, float have) {
        if (have >= FLT_MIN && have <= FLT_MAX) return true;
        snprintf(message, sizeof message, "evm::%s: %s is %g, expected a positive number", op.name, what, (double)have);
        return false;
    }
};

constexpr Input SCAN_INPUTS[] = {{"u", "bKLD"}, {"delta", "bKLD"}, {"A", "KDN"}, {"B", "bKLN"}, {"C", "bKLN"}, {"skip", "KD"}, {"bias", "KD"}};

// Inputs of a block. Axis Z has size 2 d, axis X has size R + 2 N. LINEAR(name, axes, axes of the scales) is a linear layer, X_PROJ
// the layer x_proj.
#define EVM_BLOCK_INPUTS(LINEAR, X_PROJ)                                                                                     \
    {"x", "bHWC"}, {"norm_weight", "C"}, {"norm_bias", "C"}, LINEAR("in_proj", "CZ", "Z"), {"conv_weight", "d133"},          \
    {"conv_bias", "d"}, X_PROJ("x_proj", "4dX", "41X"), {"dt_proj", "4Rd"}, {"A", "4dN"}, {"skip", "4d"}, {"dt_bias", "4d"}, \
    {"out_norm_weight", "d"}, {"out_norm_bias", "d"}, LINEAR("out_proj", "dC", "C"), {"local_conv_weight", "C133"},          \
    {"local_conv_bias", "C"}, LINEAR("local_proj_weight", "CC11", "C"), {"local_proj_bias", "C"}, {"gate_norm_weight", "C"}, \
    {"gate_norm_bias", "C"}, {"gate_reduce_weight", "CG"}, {"gate_reduce_bias", "G"}, {"gate_select_weight", "GC"},          \
    {"gate_select_bias", "C"},
#define EVM_FLOAT(name, axes, scales) {name, axes}
#define EVM_INT8(name, axes, scales) \
    {name, axes, INT8}, {name "_scale", scales}, {name "_input_scale", ""}, {name "_input_zero_point", "", UINT8}

constexpr Input BLOCK_INPUTS[] = {EVM_BLOCK_INPUTS(EVM_FLOAT, EVM_FLOAT)};
constexpr Input INT8_BLOCK_INPUTS[] = {EVM_BLOCK_INPUTS(EVM_INT8, EVM_FLOAT)};
constexpr Input INT8_X_PROJ_BLOCK_INPUTS[] = {EVM_BLOCK_INPUTS(EVM_INT8, EVM_INT8)};
enum BlockOutput { OUT, SCAN_U, SCAN_DELTA, SCAN_B, SCAN_C, SCAN_Y, BLOCK_OUTPUTS };

template <size_t COUNT>
constexpr Op operator_of(const char *name, const Input (&inputs)[COUNT], size_t outputs) {
    static_assert(COUNT <= MAX_INPUTS, "inputs");
    return {name, inputs, COUNT, outputs};
}

inline constexpr Op SELECTIVE_SCAN = operator_of("SelectiveScan", SCAN_INPUTS, 1);
inline constexpr Op EVSS_BLOCK = operator_of("EVSSBlock", BLOCK_INPUTS, BLOCK_OUTPUTS);
inline constexpr Op EVSS_BLOCK_INT8 = operator_of("EVSSBlockInt8", INT8_BLOCK_INPUTS, BLOCK_OUTPUTS);
inline constexpr Op EVSS_BLOCK_INT8_X_PROJ = operator_of("EVSSBlockInt8XProj", INT8_X_PROJ_BLOCK_INPUTS, BLOCK_OUTPUTS);

// Fill all fields of the scan's arguments but the outputs. The inputs have the same order as the fields. If an input does not fit,
// set size.message and return false.
inline bool fill(evm_scan_args &args, const Op &op, const Tensor *in, Sizes &size) {
    if (!size.fit(op, in)) return false;
    static_assert(offsetof(evm_scan_args, y) == sizeof SCAN_INPUTS / sizeof *SCAN_INPUTS * sizeof(float *), "inputs");
    for (size_t i = 0; i < op.input_count; i++) (&args.u)[i] = in[i].as<float>();
    args.b = size['b'], args.K = size['K'], args.L = size['L'], args.D = size['D'], args.N = size['N'];
    return true;
}

// Fill all fields of a block's arguments, float or int8, but the outputs and the workspace. If an input does not fit, set
// size.message and return false.
inline bool fill(evm_block_args &args, const Op &op, const Tensor *in, Sizes &size) {
    if (!size.fit(op, in)) return false;
    if (!size.equal(op, "axis 1 of in_proj", size['Z'], 2 * size['d'])) return false;
    if (!size.equal(op, "axis 2 of x_proj", size['X'], size['R'] + 2 * size['N'])) return false;
    static_assert(offsetof(evm_block_args, out) == sizeof BLOCK_INPUTS / sizeof *BLOCK_INPUTS * sizeof(float *), "inputs");
    const Input *input = op.inputs;
    for (const float **field = &args.x; field != &args.gate_select_bias + 1; field++, input++, in++) {
        if (input->type != INT8) {
            *field = in->as<float>();
            continue;
        }
        evm_int8_linear &layer = field == &args.in_proj    ? args.in_proj_int8
                                 : field == &args.x_proj   ? args.x_proj_int8
                                 : field == &args.out_proj ? args.out_proj_int8
                                                           : args.local_proj_int8;
        layer = {in[0].as<int8_t>(), in[1].as<float>(), *in[2].as<float>(), *in[3].as<uint8_t>()};
        if (!size.scale(op, input[2].name, *in[2].as<float>())) return false;
        input += 3, in += 3;
    }
    args.b = size['b'], args.H = size['H'], args.W = size['W'], args.C = size['C'];
    args.d = size['d'], args.N = size['N'], args.R = size['R'], args.G = size['G'];
    return true;
}

// Return the field for output `output` of a block. From scan_u on, the fields have the order of the outputs.
inline float **output_field(evm_block_args &args, size_t output) { return output == OUT ? &args.out : &args.scan_u + (output - SCAN_U); }

inline bool empty(const evm_block_args &args) { return !(args.b && args.H && args.W && args.C); }

// Return the shape of output `output` of a block; not for OUT. H or W of -1 means unknown.
struct Shape { int64_t dims[MAX_RANK]; };
inline Shape scan_shape(size_t output, int64_t b, int64_t H, int64_t W, int64_t d, int64_t N) {
    const int64_t L = H < 0 || W < 0 ? -1 : (H + 1) / 2 * ((W + 1) / 2);
    return {{b, EVM_BLOCK_DIRECTIONS, L, output == SCAN_B || output == SCAN_C ? N : d}};
}

}  // namespace evm
