// C++17 interface to bundles of evm-deploy.
//
//     evm::Model model("evm_tiny-onnx-fp32-224x224");  // a folder or its zip
//     for (const evm::Prediction &p : model.classify(rgb, width, height, 5)) std::cout << p.label << ' ' << p.score << '\n';
//     for (const evm::Detection &d : model.detect(rgb, width, height)) std::cout << d.label << ' ' << d.score << '\n';
//
// Every expected failure is an evm::Error, with the same code and place as in Python (docs/bundle.md). Several threads may use a Model
// at the same time: its const functions change no shared state, or guard the state by a lock (docs/embed/cpp.md states the cost for each
// runtime).
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

// Code of a failure, and the key path in the manifest or the file in the bundle that is wrong. Fields that do not apply are empty.
struct Fault {
    std::string code = {}, where = {};
};

// Base class of all errors. message(): the problem. hint(): the next step for the user. what(): both, on two lines.
class EVM_API Error : public std::runtime_error {
  public:
    Error(const std::string &message, const std::string &hint, const Fault &fault, int exit_code)
        : std::runtime_error(hint.empty() ? message : message + "\n  " + hint), message_(message), hint_(hint), fault_(fault), exit_code_(exit_code) {}
    const std::string &message() const noexcept { return message_; }
    const std::string &hint() const noexcept { return hint_; }
    const std::string &code() const noexcept { return fault_.code; }
    const std::string &where() const noexcept { return fault_.where; }
    int exit_code() const noexcept { return exit_code_; }  // exit status for a program: 3 for ToolchainError, else 2

  private:
    std::string message_, hint_;
    Fault fault_;
    int exit_code_;
};

// An invalid value or combination of values.
struct EVM_API UsageError : Error {
    explicit UsageError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// An image that cannot be read or cropped.
struct EVM_API ImageError : Error {
    explicit ImageError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// A bundle that is missing or damaged.
struct EVM_API BundleError : Error {
    explicit BundleError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 2) {}
};

// A runtime or library that is missing or does not fit.
struct EVM_API ToolchainError : Error {
    explicit ToolchainError(const std::string &message, const std::string &hint = "", const Fault &fault = {}) : Error(message, hint, fault, 3) {}
};

// Options of running a bundle.
struct Options {
    int threads = 0;                // threads of one inference; 0: the runtime chooses
    std::string scan = "auto";      // portable: standard ops; plugin: the native library `plugin`; auto: plugin if one is given, else
                                    // portable; bundled: the native library in the bundle. A native library is a program: use
                                    // `bundled` only for bundles that you trust
    std::filesystem::path plugin;   // path of a native library for the scans
    std::string device;             // OpenVINO: CPU (default), GPU, AUTO, HETERO:GPU,CPU
    std::filesystem::path cache;    // OpenVINO: folder for compiled models; empty: no cache
    int streams = 1;                // number of threads that will run inferences at the same time
    std::filesystem::path require_signature;  // PEM file of the ed25519 public key that must have signed the bundle; empty: not checked
};

// Packed 8-bit RGB image, rows from top to bottom. stride: bytes from row to row, 0 for rows without gaps. name: name of the image in
// error messages.
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

// Corners of a box: x1, y1, x2, y2 in pixels, from the left and the top edge of the image.
using Box = std::array<double, 4>;

// One detected object of one image. score: probability, 0..1. box: in pixels of the image.
struct Detection {
    std::string label;
    int index;
    double score;
    Box box;
};

// Name, dtype and shape of an input or output. dtype: NumPy's name, such as uint8 or float32. shape: a dynamic batch is -1.
struct TensorSpec {
    std::string name, dtype;
    std::vector<std::int64_t> shape;
};

// Tensor whose memory the caller owns; elements in C order.
struct TensorView {
    std::string dtype;
    std::vector<std::int64_t> shape;
    const void *data;
};

// Tensor with its own memory; elements in C order, aligned for any dtype.
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

// Class of each pixel of one image. map: (height, width) of the image, uint8, or int32 for more than 256 classes; from 0.
struct LabelMap {
    Tensor map;

    int height() const { return static_cast<int>(map.shape.at(0)); }
    int width() const { return static_cast<int>(map.shape.at(1)); }
    // Return the class of the pixel in column x and row y.
    int at(int x, int y) const {
        const std::size_t i = static_cast<std::size_t>(y) * static_cast<std::size_t>(map.shape[1]) + static_cast<std::size_t>(x);
        return map.dtype == "uint8" ? map.bytes[i] : map.data<std::int32_t>()[i];
    }
};

// Place of an image in the network's input, after the resize and the crop or the padding. original, resized, size: {height, width} of the
// image, of the resized image and of the input. offset: {top, left} of the resized image in the input, negative where the crop cuts it. All
// in pixels; pixel i covers i to i + 1.
struct EVM_API Geometry {
    std::array<int, 2> original, resized, size, offset;

    // Return the part of the input that shows the image, without padding: {top, left, bottom, right}.
    std::array<int, 4> content() const;
    // Map a box in pixels of the input to pixels of the image. Nothing is clipped.
    Box to_image(const Box &box) const;
    // Map labels (height, width) of the input, uint8 or int32, to those of the nearest pixels of the image, with the same result as in Python.
    // A pixel that a crop leaves out gets the label of the nearest pixel inside.
    Tensor to_image(const Tensor &labels) const;
};

// Preprocessing of a bundle: make the image height x width, then normalise to (x / 255 - mean) / std. resize: `crop` resizes until the
// image covers size / crop_pct and crops the centre; `stretch` resizes to height x width; `pad` resizes to fit, with the aspect ratio kept,
// and fills the right and the bottom with the mean. mean, std_dev: one value for each channel of the network's input.
struct EVM_API Preprocessing {
    int height = 224, width = 224;
    double crop_pct = 0.875;
    std::string interpolation = "bicubic";  // bilinear, or bilinear-opencv: without antialiasing
    std::vector<double> mean{0.485, 0.456, 0.406}, std_dev{0.229, 0.224, 0.225};
    std::string resize = "crop";  // stretch, or pad

    int channels() const { return static_cast<int>(mean.size()); }
    bool reads_images() const { return channels() == 1 || channels() == 3; }
    // Make an image height x width x channels pixels, with the same result as evm-deploy's Python: 8-bit RGB, or grey for 1 channel. Throws
    // ImageError if the image is empty or too narrow to be cropped, and for other numbers of channels.
    std::vector<std::uint8_t> pixels(const Image &image) const;
    // Return the place of an upright image of this size in the network's input. Throws ImageError if the image is too narrow to be cropped.
    Geometry geometry(int image_width, int image_height, const std::string &name = "") const;
    // Normalise n x height x width x channels pixels to n x channels x height x width floats. A model whose input is `image` does this
    // itself.
    std::vector<float> normalise(const std::vector<std::uint8_t> &pixels) const;
};

// A decision about how the scans run, and the reason for it.
struct Choice {
    std::string value, reason;
};

// Limits of the self-test by name. apart: largest share, 0..1, of detections or of pixels of a label map that differ. otherwise: limit of outputs that the manifest does not list. For scans that the manifest does not list,
// the SDK computes the limit from the scan's values.
struct Limits {
    double preprocessing = 1, otherwise = 0, apart = 0;
    std::map<std::string, double> outputs, scans;
};

// Settings of the selection of detections, for a detector without non-maximum suppression (NMS): of two boxes of a class that overlap by more
// than `iou`, the one with the lower score is dropped. max_det: most detections of an image.
struct Selection {
    double iou = 0.5;
    int max_det = 100;
};

// Contents of manifest.json; docs/bundle.md describes the schema.
struct Manifest {
    std::string name, target, artifact, precision;
    std::string input, head;            // image or tensor; logits, probs, detections, label_map, features or raw
    int batch_min = 1, batch_max = 1;   // images in one inference; batch_max 0: any number
    std::vector<TensorSpec> inputs, outputs;
    Limits limits;
    Preprocessing preprocessing;
    Selection selection;
    std::vector<std::array<std::uint8_t, 3>> palette;           // red, green, blue of each class of a segmenter; empty if it has none
    std::vector<std::string> scan_modes;                        // supported ways to run the scans: portable, plugin, aot
    std::map<std::string, std::string> plugins;                 // platform -> native library in the bundle
    std::vector<std::pair<std::string, std::string>> files;     // path -> sha256
    bool built = true, rejected = false;
    std::string json;                   // the whole text
    bool classifies() const { return head == "logits" || head == "probs"; }
};

// Result of one check of a self-test.
struct Check {
    std::string name;
    double error, limit;
    bool ok() const { return error <= limit; }
};

// Settings of a benchmark. batch: images in one inference; 0 for the smallest batch of the bundle. end_to_end: measure from the decoded
// image of the self-test to its five best classes, its boxes or its label map. limit_s: longest time of the measurement in seconds.
struct BenchSettings {
    int batch = 0;
    bool end_to_end = false;
    double limit_s = 60;
};

// Latency of one run in milliseconds. samples: one value per run, in order. warm_up: number of runs before the measurement. stable: whether
// the medians of the last windows agreed.
struct EVM_API Latency {
    std::vector<double> samples;
    int warm_up = 0;
    bool stable = false;

    double percentile(double q) const;  // q in 0..100; linear interpolation, as in numpy.percentile
    double mean() const;
    double std_dev() const;
    double min() const;
    double max() const;
};

// An opened bundle.
class EVM_API Model {
  public:
    // Open a bundle, a folder or a zip, and check the hash of every file. Throws BundleError, UsageError or ToolchainError.
    explicit Model(const std::filesystem::path &bundle, const Options &options = {});
    ~Model();
    Model(Model &&) noexcept;
    Model &operator=(Model &&) noexcept;

    // Return the `top` most probable classes of each image, most probable first. Throws ImageError if an image is empty or too narrow,
    // UsageError if the model is not a classifier, and BundleError if the network gives NaN or Inf.
    std::vector<Prediction> classify(const std::uint8_t *rgb, int width, int height, int top = 5) const;
    std::vector<std::vector<Prediction>> classify(const std::vector<Image> &images, int top = 5) const;

    // Return the detections of each image, by falling score. Throws as classify does, UsageError if the model is not a detector.
    std::vector<Detection> detect(const std::uint8_t *rgb, int width, int height) const;
    std::vector<std::vector<Detection>> detect(const std::vector<Image> &images) const;

    // Return the class of each pixel of each image. Throws as classify does, UsageError if the model is not a segmenter.
    LabelMap segment(const std::uint8_t *rgb, int width, int height) const;
    std::vector<LabelMap> segment(const std::vector<Image> &images) const;

    // Resize and crop an image to the pixels that the model reads; see Preprocessing::pixels. Throws ImageError.
    std::vector<std::uint8_t> preprocess(const Image &image) const;

    // Run one inference on tensors with the names, dtypes and shapes of inputs(). Throws UsageError if a tensor does not fit.
    Tensors run(const Feeds &feeds) const;
    const std::vector<TensorSpec> &inputs() const;
    const std::vector<TensorSpec> &outputs() const;

    // Compare preprocessing, outputs and scans with the expected values in the bundle. Throws BundleError if the bundle has no readable
    // self-test.
    std::vector<Check> selftest() const;

    // Measure the latency by the method of evm-bench: after half a second of warm-up, run windows of at least 25 runs until the medians of
    // three windows agree within 5 %. Throws UsageError if the bundle does not support the batch.
    Latency bench(const BenchSettings &settings = {}) const;

    const Manifest &manifest() const;
    const std::vector<std::string> &labels() const;  // class names; empty if the bundle has none
    const Choice &scan() const;

  private:
    struct Impl;
    std::unique_ptr<const Impl> impl_;
};

// Version of the SDK, equal to the version of the Python package.
EVM_API const char *version();
// Targets that this build of the SDK runs: onnx, openvino, trt.
EVM_API std::vector<std::string> targets();

}  // namespace evm
