// TensorRT plugin (IPluginV3) of evm::SelectiveScan, for TensorRT before 10.9 (JetPack 6 has 10.3). Compile it on the machine
// that runs it, with that machine's TensorRT headers. The plugin links with no TensorRT library:
//   nvcc -std=c++17 -shared -Xcompiler -fPIC -arch=sm_87 -I <TensorRT headers> plugin.cu selective_scan.cu -o libevm_tensorrt.so
// The plugin is an adapter without arithmetic. u, delta, B, C and y are all float or all half; A, skip and bias are float. All
// tensors are row-major.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <new>

#include "NvInferRuntime.h"
#include "selective_scan.h"

EVM_SCAN_KERNEL(evm_scan_f32, float);
EVM_SCAN_KERNEL(evm_scan_f16, __half);

namespace {

using namespace nvinfer1;

constexpr char const* kName = "SelectiveScan";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "evm";
enum Position { kU, kDelta, kA, kB, kC, kSkip, kBias, kY };
constexpr int kInputs = kY;

class ScanPlugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            default: return static_cast<IPluginV3OneCore*>(this);
        }
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) ScanPlugin(); }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }
    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs, int32_t) const noexcept override {
        outputs[0] = inputs[kU];
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                            IExprBuilder&) noexcept override {
        outputs[0] = inputs[kU];
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        auto const& tensor = tensors[position].desc;
        if (tensor.format != TensorFormat::kLINEAR) return false;
        if (position == kA || position == kSkip || position == kBias) return tensor.type == DataType::kFLOAT;
        if (position == kU) return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF;
        return tensor.type == tensors[kU].desc.type;
    }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        bool const fits = inputs[kU].dims.nbDims == 4 && inputs[kA].dims.nbDims == 3;
        return fits && inputs[kA].dims.d[2] >= 1 && inputs[kA].dims.d[2] <= kStates ? 0 : 1;
    }
    int32_t enqueue(PluginTensorDesc const* tensors, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        auto const* u = tensors[kU].dims.d;  // b, K, L, D
        int L = static_cast<int>(u[2]), D = static_cast<int>(u[3]), N = static_cast<int>(tensors[kA].dims.d[2]);
        void const* pointers[kInputs];
        void* y = outputs[0];
        void* arguments[kInputs + 4];
        for (int i = 0; i < kInputs; i++) {
            pointers[i] = inputs[i];
            arguments[i] = &pointers[i];
        }
        arguments[kInputs] = &L, arguments[kInputs + 1] = &D, arguments[kInputs + 2] = &N, arguments[kInputs + 3] = &y;
        void const* kernel = tensors[kU].type == DataType::kHALF ? reinterpret_cast<void const*>(&evm_scan_f16)
                                                                 : reinterpret_cast<void const*>(&evm_scan_f32);
        dim3 const grid((D + kChannels - 1) / kChannels, static_cast<unsigned>(u[1]), static_cast<unsigned>(u[0]));
        return cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream) == cudaSuccess ? 0 : 1;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mFields; }

private:
    PluginFieldCollection mFields{0, nullptr};
};

class ScanCreator : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const*, TensorRTPhase) noexcept override {
        return new (std::nothrow) ScanPlugin();
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mFields; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    PluginFieldCollection mFields{0, nullptr};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder*) {}
extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static ScanCreator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
