// Running of a Core ML bundle of evm-deploy in an app.
// NOT COMPILED BY THIS PROJECT.
import CoreML
import CoreVideo
import Foundation

/// One class of an image. `score`: probability, 0..1.
public struct Prediction: Sendable {
    public let label: String
    public let index: Int
    public let score: Double
}

/// An opened bundle. Only one thread may use a model at a time.
public final class Model {
    public let folder: URL
    public let manifest: Manifest
    public let preprocessing: Manifest.Preprocess
    private let labels: [String]
    private let model: MLModel
    private let units: MLComputeUnits

    /// Opens the bundle in `folder`, checks the hash of every file, and compiles the package on this device. `function`:
    /// function of a bundle for several sizes, such as `imgsz_224x224`; by default the first. Throws EvmError.
    public init(folder: URL, function: String? = nil, units: MLComputeUnits = .all) throws {
        self.folder = folder
        self.units = units
        manifest = try Manifest.open(folder)
        labels = try manifest.labels(in: folder)
        preprocessing = try manifest.preprocessing(of: function)
        model = try compiled(folder.appendingPathComponent(manifest.artifact), function: function, units: units)
    }

    /// Makes the pixels that the model reads of `image`. `name` names the image in errors. Throws EvmError.
    public func pixels(_ image: RgbImage, name: String = "image") throws -> RgbImage {
        try preprocessing.pixels(image, name: name)
    }

    /// Returns the `top` most probable classes of `pixels`, most probable first. Throws EvmError if the model is not a
    /// classifier, or if the network gives NaN or Inf.
    public func classify(_ pixels: RgbImage, top: Int = 5) throws -> [Prediction] {
        try need(manifest.plan.classifies, "classes")
        guard top >= 1 else { throw EvmError(.usage, "top is \(top), it must be at least 1") }
        let values = try outputs(pixels)[manifest.plan.head] ?? []
        let count = values.count / batch
        let row = values.prefix(count).map(Double.init)
        let scores = manifest.plan.head == "probs" ? row : softmax(row)
        let best = scores.indices.sorted { scores[$0] > scores[$1] || (scores[$0] == scores[$1] && $0 < $1) }
        return best.prefix(top).map {
            Prediction(label: labels.indices.contains($0) ? labels[$0] : "class \($0)", index: $0, score: scores[$0])
        }
    }

    /// Returns the detections of the upright `image`, by falling score. `name` names the image in errors. Throws EvmError if
    /// the model is not a detector, or if the network gives NaN or Inf.
    public func detect(_ image: RgbImage, name: String = "image") throws -> [Detection] {
        try need(manifest.plan.head == "detections", "boxes")
        let found = try outputs(pixels(image, name: name))
        let place = try preprocessing.geometry(image, name: name)
        return detections(found, images: batch, selection: manifest.plan.selection, place: place, labels: labels)
    }

    /// Returns the class of each pixel of the upright `image`. Throws EvmError as `detect` does, if the model is not a
    /// segmenter.
    public func segment(_ image: RgbImage, name: String = "image") throws -> LabelMap {
        try need(manifest.plan.head == "label_map", "label maps")
        let values = try outputs(pixels(image, name: name))[manifest.plan.head] ?? []
        let labels = values.prefix(values.count / batch).map { Int($0) }
        return try preprocessing.geometry(image, name: name).toImage(labels)
    }

    private func need(_ can: Bool, _ what: String) throws {
        if can { return }
        throw EvmError(.usage, "no \(what) to predict: the bundle gives \(manifest.plan.head)", hint: "use run(_:)")
    }

    /// Runs the model on one image and returns its outputs, checked.
    private func outputs(_ pixels: RgbImage) throws -> [String: [Float]] {
        let found = try run(input(pixels))
        guard found.values.allSatisfy({ !$0.isEmpty && $0.allSatisfy(\.isFinite) }) else {
            let hint = "run the self-test on this device"
            throw EvmError(.bundle, "bundle \(folder.path): the network gives NaN or Inf on this device", hint: hint)
        }
        for output in manifest.outputs {
            let one = output.shape.dropFirst().reduce(1) { $0 * ($1 ?? 1) }
            guard found[output.name]?.count == batch * one else {
                let message = "bundle \(folder.path): \(manifest.artifact) has another shape of \(output.name)"
                let place = manifest.artifact
                throw EvmError(.bundle, message, hint: "export it again", code: "model.interface", place: place)
            }
        }
        return found
    }

    /// Runs one inference and returns the values of every output, row by row. The scores of a classifier have the order of
    /// labels.txt. Throws EvmError.
    func run(_ input: MLFeatureValue) throws -> [String: [Float]] {
        let feeds = try MLDictionaryFeatureProvider(dictionary: [manifest.inputs[0].name: input])
        let found: MLFeatureProvider
        do {
            found = try model.prediction(from: feeds)
        } catch {
            throw EvmError(.toolchain, "Core ML failed: \(error.localizedDescription)")
        }
        var outputs: [String: [Float]] = [:]
        for name in manifest.outputs.map(\.name) {
            guard let value = found.featureValue(for: name) else {
                let message = "bundle \(folder.path): \(manifest.artifact) has no output '\(name)'"
                let place = manifest.artifact
                throw EvmError(.bundle, message, hint: "export it again", code: "model.interface", place: place)
            }
            outputs[name] = values(value)
        }
        return outputs
    }

    /// Number of images in one inference.
    var batch: Int { max(1, Int(manifest.plan.batch) ?? 1) }

    /// Makes the model's input from one image.
    func input(_ pixels: RgbImage) throws -> MLFeatureValue {
        if manifest.plan.input == "image" { return MLFeatureValue(pixelBuffer: try pixelBuffer(pixels, channels: preprocessing.channels)) }
        let one = preprocessing.normalised(pixels)
        return try input(tensor: Array(repeating: one, count: batch).flatMap { $0 })
    }

    /// Makes the input of a package exported with `--input tensor`.
    func input(tensor: [Float]) throws -> MLFeatureValue {
        MLFeatureValue(multiArray: try array(tensor, shape: [batch, preprocessing.channels, preprocessing.height, preprocessing.width]))
    }

    /// Runs the package `file`, which contains a single scan, on float32 tensors and returns y.
    func scan(_ file: String, _ feeds: [String: MLMultiArray]) throws -> [Float] {
        let scan = try compiled(folder.appendingPathComponent(file), function: nil, units: units)
        let provider = try MLDictionaryFeatureProvider(dictionary: feeds.mapValues { MLFeatureValue(multiArray: $0) })
        return values(try scan.prediction(from: provider).featureValue(for: "y"))
    }

    private func values(_ value: MLFeatureValue?) -> [Float] {
        if let array = value?.multiArrayValue { return (0..<array.count).map { array[$0].floatValue } }
        guard let scores = value?.dictionaryValue else { return [] }
        return labels.map { scores[AnyHashable($0)]?.floatValue ?? .nan }
    }
}

extension Manifest {
    /// Reads the class names of the bundle in `folder`; empty if the bundle has no labels.txt. Throws EvmError.
    func labels(in folder: URL) throws -> [String] {
        guard files["labels.txt"] != nil else { return [] }
        guard let text = try? String(contentsOf: folder.appendingPathComponent("labels.txt"), encoding: .utf8) else {
            let message = "bundle \(folder.path): labels.txt is not UTF-8 text"
            throw EvmError(.bundle, message, hint: "export it again", code: "file.damaged", place: "labels.txt")
        }
        var names = text.components(separatedBy: "\n")
        if names.last == "" { names.removeLast() }
        for output in outputs where output.name == plan.head && !names.isEmpty {
            if let classes = output.shape.last ?? nil, classes != names.count {
                let message = "bundle \(folder.path): \(artifact) has \(classes) classes; labels.txt has \(names.count)"
                throw EvmError(.bundle, message, hint: "export it again", code: "model.interface", place: artifact)
            }
        }
        return names
    }

    /// Returns the preprocessing for a function of a bundle for several sizes, by default that of the manifest.
    func preprocessing(of function: String?) throws -> Preprocess {
        guard let function else { return preprocessing }
        let functions = details.functions ?? []
        guard let found = functions.first(where: { $0.name == function }) else {
            let has = functions.map(\.name).joined(separator: ", ")
            let available = has.isEmpty ? "none" : has
            throw EvmError(.usage, "no function '\(function)' in the bundle; available: \(available)")
        }
        return Preprocess(
            size: found.imgsz, resize: preprocessing.resize, crop_pct: preprocessing.crop_pct,
            interpolation: preprocessing.interpolation, mean: preprocessing.mean, std: preprocessing.std)
    }
}

private func compiled(_ package: URL, function: String?, units: MLComputeUnits) throws -> MLModel {
    let configuration = MLModelConfiguration()
    configuration.computeUnits = units
    if let function {
        guard #available(iOS 18, macOS 15, *) else {
            throw EvmError(.toolchain, "function '\(function)' needs iOS 18 or macOS 15")
        }
        configuration.functionName = function
    }
    do {
        return try MLModel(contentsOf: MLModel.compileModel(at: package), configuration: configuration)
    } catch {
        throw EvmError(.bundle, "Core ML cannot open \(package.path): \(error.localizedDescription)")
    }
}

/// Makes a Core ML array from values in C order.
func array(_ values: [Float], shape: [Int]) throws -> MLMultiArray {
    let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float32)
    for (i, value) in values.enumerated() { array[i] = NSNumber(value: value) }
    return array
}

/// Makes a pixel buffer: grey bytes for 1 channel, else BGRA bytes, the format of cameras, which Core ML reads as RGB.
private func pixelBuffer(_ pixels: RgbImage, channels: Int) throws -> CVPixelBuffer {
    let format = channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
    var made: CVPixelBuffer?
    CVPixelBufferCreate(nil, pixels.width, pixels.height, format, nil, &made)
    guard let made else { throw EvmError(.toolchain, "no memory for \(pixels.width)x\(pixels.height) pixels") }
    CVPixelBufferLockBaseAddress(made, [])
    defer { CVPixelBufferUnlockBaseAddress(made, []) }
    guard let base = CVPixelBufferGetBaseAddress(made) else {
        throw EvmError(.toolchain, "no memory for \(pixels.width)x\(pixels.height) pixels")
    }
    let bytes = base.assumingMemoryBound(to: UInt8.self)
    let row = CVPixelBufferGetBytesPerRow(made)
    for y in 0..<pixels.height {
        for x in 0..<pixels.width {
            let from = 3 * (y * pixels.width + x)
            if channels == 1 {
                bytes[y * row + x] = pixels.rgb[from]
                continue
            }
            let to = y * row + 4 * x
            bytes[to] = pixels.rgb[from + 2]
            bytes[to + 1] = pixels.rgb[from + 1]
            bytes[to + 2] = pixels.rgb[from]
            bytes[to + 3] = 255
        }
    }
    return made
}

/// Returns the probabilities of the logits of one image. The logit of a single class is against 0, that of its absence.
private func softmax(_ scores: [Double]) -> [Double] {
    if scores.count == 1 { return [1 / (1 + exp(-scores[0]))] }
    let largest = scores.max() ?? 0
    let powers = scores.map { exp($0 - largest) }
    let sum = powers.reduce(0, +)
    return powers.map { $0 / sum }
}
