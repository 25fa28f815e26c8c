// Bundles of evm-deploy in C++17.
//
//     evm::Model model("evm_tiny-onnx-fp32-224x224");  // a folder or its zip
//     for (const evm::Prediction &p : model.classify(rgb, width, height, 5)) std::cout << p.label << ' ' << p.score << '\n';
//
// Every failure that a user can meet is an evm::Error, its code and place as in Python (docs/bundle.md). A Model can be used by several threads at the same
// time: its const functions share nothing that they change, or guard it (docs/embed/cpp.md says what that costs by runtime).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_WIN32) && defined(EVM_SHARED)
#define EVM_API __declspec(dllexport)
#elif defined(_WIN32)
#define EVM_API
#else
#define EVM_API __attribute__((visibility("default")))
#endif

namespace evm {

// The kind of a failure, and the key path in the manifest or the file in the bundle that is wrong; empty where that says nothing.
struct Fault {
    std::string code = {}, where = {};
};

// What is wrong and, as a hint, what to do next. what() is both, on two lines.
class EVM_API Error : public std::runtime_error {
  public:
    Error(const std::string &message, const std::string &hint, const Fault &fault, int exit_code)
        : std::runtime_error(hint.empty() ? message : message + "\n  " + hint), message_(message), hint_(hint), fault_(fault), exit_code_(exit_code) {}
    const std::string &message() const noexcept { return message_; }
    const std::string &hint() const noexcept { return hint_; }
    const std::string &code() const noexcept { return fault_.code; }
    const std::string &where() const noexcept { return fault_.where; }
    int exit_code() const noexcept { return exit_code_; }  // what a program ends with: 2, and 3 for ToolchainError

  private:
    std::string message_, hint_;
    Fault fault_;
    int exit_code_;
};

// A value or combination that cannot work.
struct EVM_API UsageError : Error {
    explicit UsageError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// An image that cannot be read, or not be cropped.
struct EVM_API ImageError : Error {
    explicit ImageError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// A bundle that is missing or damaged.
struct EVM_API BundleError : Error {
    explicit BundleError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// A runtime or library that is not there, or does not fit.
struct EVM_API ToolchainError : Error {
    explicit ToolchainError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 3) {}
};

// How to run a bundle; what is empty or 0 is left to the runtime.
struct Options {
    int threads = 0;                // of one inference
    std::string scan = "auto";      // auto: `plugin` where one is given, else portable; portable; plugin; bundled: the native
                                    // library in the bundle, which is a program: only for bundles that you trust
    std::filesystem::path plugin;   // a native library of your own for the scans
    std::string device;             // OpenVINO: CPU (default), GPU, AUTO, HETERO:GPU,CPU
    std::filesystem::path cache;    // OpenVINO: folder for compiled models
    int streams = 1;                // threads that will run inferences at the same time
};

// Packed 8-bit RGB, rows from top to bottom. stride: bytes from row to row, 0 where they follow each other. name: in errors.
struct Image {
    const std::uint8_t *rgb;
    int width, height;
    std::ptrdiff_t stride = 0;
    std::string name = {};
};

// One class of one image. score: probability, 0..1.
struct Prediction {
    std::string label;
    int index;
    double score;
};

// An input or output. dtype as numpy names it: uint8, float32. shape: -1 is the batch, where it is open.
struct TensorSpec {
    std::string name, dtype;
    std::vector<std::int64_t> shape;
};

// Somebody else's elements, in C order.
struct TensorView {
    std::string dtype;
    std::vector<std::int64_t> shape;
    const void *data;
};

// Elements in C order, aligned for any dtype.
struct Tensor {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::vector<unsigned char> bytes;

    template <class T>
    const T *data() const { return reinterpret_cast<const T *>(bytes.data()); }
    TensorView view() const { return {dtype, shape, bytes.data()}; }
};

using Feeds = std::map<std::string, TensorView>;
using Tensors = std::map<std::string, Tensor>;

// Resize so that the image covers size / crop_pct, antialiased; crop the centre; (x / 255 - mean) / std.
struct EVM_API Preprocessing {
    int height = 224, width = 224;
    double crop_pct = 0.875;
    std::string interpolation = "bicubic";  // or bilinear
    std::array<double, 3> mean{0.485, 0.456, 0.406}, std_dev{0.229, 0.224, 0.225};

    // height x width x 3, 8-bit RGB, what Pillow makes of it. Raises ImageError for an image too narrow, or empty.
    std::vector<std::uint8_t> pixels(const Image &image) const;
    // n x height x width x 3 pixels -> n x 3 x height x width: what a model does itself when its input is `image`.
    std::vector<float> normalise(const std::vector<std::uint8_t> &pixels) const;
};

// How the scans run, and why.
struct Choice {
    std::string value, reason;
};

// Limits of the self-test by name. `otherwise`: of outputs not in the manifest; scans not in it have a limit computed from their values.
struct Limits {
    double preprocessing = 1, otherwise = 0;
    std::map<std::string, double> outputs, scans;
};

// What manifest.json says; schema in docs/bundle.md.
struct Manifest {
    std::string name, target, artifact, precision;
    std::string input, head;            // image or tensor; logits, probs, features or raw
    int batch_min = 1, batch_max = 1;   // images in one inference; batch_max 0: any number
    std::vector<TensorSpec> inputs, outputs;
    Limits limits;
    Preprocessing preprocessing;
    std::vector<std::string> scan_modes;                        // portable, plugin, aot: how the scans can run
    std::map<std::string, std::string> plugins;                 // platform -> native library in the bundle
    std::vector<std::pair<std::string, std::string>> files;     // path -> sha256
    bool built = true, rejected = false;
    std::string json;                   // the whole of it
    bool classifies() const { return head == "logits" || head == "probs"; }
};

// One line of a self-test.
struct Check {
    std::string name;
    double error, limit;
    bool ok() const { return error <= limit; }
};

// batch: 0, the smallest that the bundle takes. end_to_end: from the image of the self-test, decoded, to its five best classes.
struct BenchSettings {
    int batch = 0;
    bool end_to_end = false;
    double limit_s = 60;
};

// Milliseconds of one run, in the order measured. stable: whether the medians of the last windows agreed.
struct EVM_API Latency {
    std::vector<double> samples;
    int warm_up = 0;
    bool stable = false;

    double percentile(double q) const;  // linear between neighbours, as numpy's
    double mean() const;
    double std_dev() const;
    double min() const;
    double max() const;
};

class EVM_API Model {
  public:
    // Opens a bundle, a folder or a zip, with every hash checked. Raises BundleError, UsageError, ToolchainError.
    explicit Model(const std::filesystem::path &bundle, const Options &options = {});
    ~Model();
    Model(Model &&) noexcept;
    Model &operator=(Model &&) noexcept;

    // The `top` most probable classes, best first. Raises ImageError; UsageError for a bundle without a classifier.
    std::vector<Prediction> classify(const std::uint8_t *rgb, int width, int height, int top = 5) const;
    std::vector<std::vector<Prediction>> classify(const std::vector<Image> &images, int top = 5) const;

    // The pixels that the model reads, as Preprocessing::pixels.
    std::vector<std::uint8_t> preprocess(const Image &image) const;

    // One inference on tensors named and shaped as inputs(). Raises UsageError naming what does not fit.
    Tensors run(const Feeds &feeds) const;
    const std::vector<TensorSpec> &inputs() const;
    const std::vector<TensorSpec> &outputs() const;

    // Preprocessing, outputs and scans against the expected values in the bundle.
    std::vector<Check> selftest() const;

    // As evm-bench: windows of at least 25 runs, after half a second of warm-up, until the medians of three agree within 5 %.
    Latency bench(const BenchSettings &settings = {}) const;

    const Manifest &manifest() const;
    const std::vector<std::string> &labels() const;  // empty where the bundle has none
    const Choice &scan() const;

  private:
    struct Impl;
    std::unique_ptr<const Impl> impl_;
};

// Of the SDK, the same as the Python package's.
EVM_API const char *version();
// The targets that this build of the SDK runs: onnx, openvino, trt.
EVM_API std::vector<std::string> targets();

}  // namespace evm
