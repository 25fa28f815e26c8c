// Running of a bundle of evm-deploy in an app, in any runtime: CoreMLRuntime.swift is that of Apple's systems.
import Foundation

/// An artifact loaded in a runtime.
public protocol Runtime {
    /// Runs one inference: inputs by name -> outputs by name, F32 or I32. The input `image` is U8 with the shape (1, H, W, C).
    /// Throws EvmError.
    func run(_ feeds: [String: Tensor]) throws -> [String: Tensor]
}

/// Opens an artifact, or one function of an artifact that has several. Throws EvmError.
public typealias Open = (_ artifact: URL, _ function: String?) throws -> any Runtime

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
    private let runtime: any Runtime
    let open: Open

    /// Opens the bundle in `folder`, checks the hash of every file, and opens its artifact with `open`. `function`: function
    /// of a bundle for several sizes, such as `imgsz_224x224`; by default the first. Throws EvmError.
    public init(folder: URL, function: String? = nil, open: @escaping Open) throws {
        self.folder = folder
        self.open = open
        manifest = try Manifest.open(folder)
        labels = try manifest.labels(in: folder)
        preprocessing = try manifest.preprocessing(of: function)
        runtime = try open(folder.appendingPathComponent(manifest.artifact), function)
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
        let (height, width) = (preprocessing.height, preprocessing.width)
        guard pixels.height == height && pixels.width == width else {
            let got = "[1, \(pixels.height), \(pixels.width), 3]"
            throw EvmError(.usage, "pixels must be uint8 [n, \(height), \(width), 3], got uint8 \(got)")
        }
        let found = try run([manifest.inputs[0].name: input(pixels)]).mapValues(\.floats)
        guard found.values.allSatisfy({ !$0.isEmpty && $0.allSatisfy(\.isFinite) }) else {
            let hint = "run the self-test on this device"
            throw EvmError(.bundle, "bundle \(folder.path): the network gives NaN or Inf on this device", hint: hint)
        }
        for output in manifest.outputs {
            let one = output.shape.dropFirst().reduce(1) { $0 * ($1 ?? 1) }
            guard found[output.name]?.count == batch * one else { throw apart("has another shape of \(output.name)") }
        }
        return found
    }

    /// Runs one inference on tensors with the names of the manifest's inputs, and returns those of its outputs. The scores
    /// of a classifier have the order of labels.txt. Throws EvmError.
    public func run(_ feeds: [String: Tensor]) throws -> [String: Tensor] {
        let found = try runtime.run(feeds)
        var outputs: [String: Tensor] = [:]
        for name in manifest.outputs.map(\.name) {
            guard let tensor = found[name] else { throw apart("has no output '\(name)'") }
            outputs[name] = tensor
        }
        return outputs
    }

    private func apart(_ what: String) -> EvmError {
        let message = "bundle \(folder.path): \(manifest.artifact) \(what)"
        return EvmError(.bundle, message, hint: "export it again", code: "model.interface", place: manifest.artifact)
    }

    /// Number of images in one inference.
    var batch: Int { max(1, Int(manifest.plan.batch) ?? 1) }

    /// Makes the model's input from one image.
    private func input(_ pixels: RgbImage) -> Tensor {
        let (height, width, channels) = (preprocessing.height, preprocessing.width, preprocessing.channels)
        if manifest.plan.input == "image" {
            return Tensor(dtype: "U8", shape: [1, height, width, channels], bytes: preprocessing.bytes(pixels))
        }
        let one = preprocessing.normalised(pixels)
        return Tensor(Array(repeating: one, count: batch).flatMap { $0 }, shape: [batch, channels, height, width])
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

/// Returns the probabilities of the logits of one image. The logit of a single class is against 0, that of its absence.
private func softmax(_ scores: [Double]) -> [Double] {
    if scores.count == 1 { return [1 / (1 + exp(-scores[0]))] }
    let largest = scores.max() ?? 0
    let powers = scores.map { exp($0 - largest) }
    let sum = powers.reduce(0, +)
    return powers.map { $0 / sum }
}
