// Library for web browsers, a WebAssembly module without imports: it computes nodes of domain evm for a page that runs the rest
// of a graph in ONNX Runtime Web, which has no custom ops. A page calls (samples/web/src/evm/kernels.ts):
//
//   _initialize, once; then for each node evm_web_open, evm_web_input for each constant input, and evm_web_pack;
//   then for each inference evm_web_input for each other input, evm_web_run, and evm_web_output.
//
// Functions that can fail return an error message, or null. A node computes in the thread of the page that calls it. Inputs that are
// not constant, outputs and workspace lie in memory that all nodes share: they are valid until the next node runs.
#include "ops.h"

#include <stdlib.h>

namespace {

const evm::Op *const OPS[] = {&evm::SELECTIVE_SCAN, &evm::EVSS_BLOCK, &evm::EVSS_BLOCK_INT8, &evm::EVSS_BLOCK_INT8_X_PROJ};
constexpr int COUNT = sizeof OPS / sizeof *OPS;
constexpr int64_t ALIGNMENT = 64, MOST = INT32_MAX;  // MOST: bytes of an array
const char OUT_OF_MEMORY[] = "out of memory";

// Memory that grows. Growing loses the content.
struct Memory {
    void *at;
    int64_t bytes;

    void *take(int64_t wanted) {
        if (wanted <= bytes && at) return at;
        free(at);
        bytes = (wanted / ALIGNMENT + 1) * ALIGNMENT;
        at = wanted <= MOST ? aligned_alloc(ALIGNMENT, (size_t)bytes) : nullptr;
        if (!at) bytes = 0;
        return at;
    }
};

Memory inputs[evm::MAX_INPUTS], output, workspace;  // of the node that runs

struct Node {
    const evm::Op *op;
    int64_t no_softplus;
    bool packed;  // evm_web_pack was called: inputs from now on are not constant
    evm::Tensor in[evm::MAX_INPUTS];
    Memory constants[evm::MAX_INPUTS], weights;  // weights: packed weights of a block whose weights are all constant
};

evm::Sizes size;  // holds the message that a caller reads

int64_t element_bytes(evm::Type type) { return type == evm::FLOAT ? 4 : 1; }

// Return the number of elements of a tensor, or -1 if it has more than MOST.
int64_t elements(const evm::Tensor &tensor) {
    int64_t count = 1;
    for (size_t i = 0; i < tensor.rank && count <= MOST; i++) count *= tensor.dims[i];
    return count <= MOST ? count : -1;
}

// Fill the arguments of a node's kernel from its inputs.
template <class Args>
const char *read(Args &args, const Node &node) {
    size = {};
    return fill(args, *node.op, node.in, size) ? nullptr : size.message;
}

bool is_block(const Node &node) { return node.op != &evm::SELECTIVE_SCAN; }

const char *run_scan(const Node &node) {
    evm_scan_args args = {};
    if (const char *const error = read(args, node)) return error;
    args.no_softplus = node.no_softplus;
    args.y = (float *)output.at;
    const int64_t tiles = evm_scan_num_tiles(&args);
    for (int64_t tile = 0; tile < tiles; tile++) evm_scan_run_tile(&args, tile);
    return nullptr;
}

const char *run_block(const Node &node) {
    evm_block_args args = {};
    if (const char *const error = read(args, node)) return error;
    args.out = (float *)output.at;
    args.packed = (float *)node.weights.at;
    if (evm::empty(args)) return nullptr;
    args.workspace = (float *)workspace.take(evm_block_workspace_bytes(&args));
    if (!args.workspace) return OUT_OF_MEMORY;
    for (int64_t image = 0; image < args.b; image++)
        for (int64_t step = 0; step < evm_block_num_steps(&args); step++) {
            const int64_t tiles = evm_block_num_tiles(&args, image, step);
            for (int64_t tile = 0; tile < tiles; tile++) evm_block_run_tile(&args, image, step, tile);
        }
    return nullptr;
}

}  // namespace

extern "C" {

// Version of this interface.
EVM_API int evm_web_version() { return 1; }

// Name of operator `op`, or null if there are no more.
EVM_API const char *evm_web_operator(int op) { return op >= 0 && op < COUNT ? OPS[op]->name : nullptr; }

// Element type of an input of operator `op`, numbered as in ONNX, or 0 if there is no such input.
EVM_API int evm_web_type(int op, int input) {
    if (!evm_web_operator(op) || input < 0 || (size_t)input >= OPS[op]->input_count) return 0;
    return OPS[op]->inputs[input].type;
}

// Make a node. no_softplus: as in evm_scan_args. Returns null if there is no such operator or no memory.
EVM_API void *evm_web_open(int op, int no_softplus) {
    if (!evm_web_operator(op)) return nullptr;
    Node *const node = (Node *)calloc(1, sizeof(Node));
    if (node) node->op = OPS[op], node->no_softplus = no_softplus;
    return node;
}

// Set the shape of an input, of which axes from `rank` on do not count, and return memory for its values. Returns null if there is no
// such input, the rank or a size is out of range, or there is no memory.
EVM_API void *evm_web_input(void *handle, int input, int rank, int d0, int d1, int d2, int d3) {
    Node &node = *(Node *)handle;
    if (input < 0 || (size_t)input >= node.op->input_count || rank < 0 || (size_t)rank > evm::MAX_RANK) return nullptr;
    evm::Tensor tensor = {nullptr, {d0, d1, d2, d3}, (size_t)rank};
    for (int i = 0; i < rank; i++)
        if (tensor.dims[i] < 0) return nullptr;
    const int64_t count = elements(tensor);
    if (count < 0) return nullptr;
    Memory &memory = node.packed ? inputs[input] : node.constants[input];
    void *const data = memory.take(count * element_bytes(node.op->inputs[input].type));
    tensor.data = data;
    node.in[input] = tensor;
    return data;
}

// The inputs so far are constant, and filled. Pack the weights of a block, if all are constant.
EVM_API const char *evm_web_pack(void *handle) {
    Node &node = *(Node *)handle;
    node.packed = true;
    if (!is_block(node)) return nullptr;
    for (size_t i = 1; i < node.op->input_count; i++)
        if (!node.in[i].data) return nullptr;
    evm_block_args args = {};
    node.in[0] = {nullptr, {1, 1, 1, node.in[1].dims[0]}, 4};
    if (const char *const error = read(args, node)) return error;
    if (!node.weights.take(evm_block_packed_bytes(&args))) return OUT_OF_MEMORY;
    evm_block_pack(&args, (float *)node.weights.at);
    return nullptr;
}

// Compute the first output, which has the shape of the first input.
EVM_API const char *evm_web_run(void *handle) {
    const Node &node = *(Node *)handle;
    for (size_t i = 0; i < node.op->input_count; i++) {
        if (node.in[i].data) continue;
        snprintf(size.message, sizeof size.message, "evm::%s: %s is missing", node.op->name, node.op->inputs[i].name);
        return size.message;
    }
    if (!output.take(elements(node.in[0]) * (int64_t)sizeof(float))) return OUT_OF_MEMORY;
    return is_block(node) ? run_block(node) : run_scan(node);
}

// Values of the output of the last run.
EVM_API const float *evm_web_output() { return (const float *)output.at; }
}
