// A Core ML bundle of evm-deploy: manifest, model, classification with Vision and with MLModel alone.
// NOT COMPILED BY THIS PROJECT.
import CoreML
import CoreVideo
import Foundation
import Vision

public enum BundleError: Error {
    case notCoreML(String)
    case noImageInput
    case noOutput(String)
    case noClassifier
    case noFunction(String)
}

/// What the sample reads of manifest.json (schema 1).
public struct Manifest: Decodable {
    public struct Tensor: Decodable {
        public let name: String
        public let dtype: String
        public let shape: [Int?]
    }
    public struct Plan: Decodable { public let head: String }
    public struct Function: Decodable {
        public let name: String
        public let imgsz: [Int]
    }
    public struct Details: Decodable { public let functions: [Function]? }
    public let schema_version: Int
    public let target: String
    public let artifact: String
    public let plan: Plan
    public let inputs: [Tensor]
    public let outputs: [Tensor]
    public let details: Details
}

public struct Prediction {
    public let label: String
    public let score: Float
}

public final class EvmBundle {
    public let folder: URL
    public let manifest: Manifest
    public let labels: [String]?
    let model: MLModel
    private let imgsz: [Int?]

    /// Opens the bundle in `folder` and compiles its package on this device. `function`: of a bundle for several sizes,
    /// such as `imgsz_224x224`, by default the first.
    public init(folder: URL, function: String? = nil, units: MLComputeUnits = .all) throws {
        self.folder = folder
        manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: folder.appendingPathComponent("manifest.json")))
        guard manifest.target == "coreml" else { throw BundleError.notCoreML(manifest.target) }
        let names = try? String(contentsOf: folder.appendingPathComponent("labels.txt"), encoding: .utf8)
        labels = names?.split(separator: "\n").map(String.init)
        let compiled = try MLModel.compileModel(at: folder.appendingPathComponent(manifest.artifact))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        if let function {
            guard #available(iOS 18, macOS 15, *),
                let found = manifest.details.functions?.first(where: { $0.name == function })
            else { throw BundleError.noFunction(function) }
            configuration.functionName = function
            imgsz = found.imgsz
        } else {
            imgsz = Array(manifest.inputs[0].shape.dropFirst().prefix(2))
        }
        model = try MLModel(contentsOf: compiled, configuration: configuration)
    }

    /// With Vision, for a classifier (--head probs with labels): Vision scales the picture and crops its centre, which is
    /// close to, not the same as, the preprocessing in the manifest.
    public func classify(_ picture: CGImage, top: Int = 5) throws -> [Prediction] {
        let request = VNCoreMLRequest(model: try VNCoreMLModel(for: model))
        request.imageCropAndScaleOption = .centerCrop
        try VNImageRequestHandler(cgImage: picture).perform([request])
        guard let found = request.results as? [VNClassificationObservation] else { throw BundleError.noClassifier }
        return found.prefix(top).map { Prediction(label: $0.identifier, score: $0.confidence) }
    }

    /// With MLModel alone: RGB bytes of the model's own height and width, row by row, as every target's `image` input.
    /// Values of the first output, probabilities of a classifier in the order of labels.txt.
    public func run(rgb: [UInt8]) throws -> [Float] {
        let input = manifest.inputs[0]
        guard input.dtype == "uint8", let height = imgsz[0], let width = imgsz[1] else { throw BundleError.noImageInput }
        let pixels = try pixelBuffer(rgb: rgb, width: width, height: height)
        let feeds = try MLDictionaryFeatureProvider(dictionary: [input.name: MLFeatureValue(pixelBuffer: pixels)])
        let name = manifest.outputs[0].name
        guard let value = try model.prediction(from: feeds).featureValue(for: name) else { throw BundleError.noOutput(name) }
        if let array = value.multiArrayValue { return (0..<array.count).map { array[$0].floatValue } }
        let scores = value.dictionaryValue
        return (labels ?? []).map { scores[AnyHashable($0)]?.floatValue ?? 0 }
    }

    /// BGRA in memory: what cameras give and Core ML reads as RGB.
    private func pixelBuffer(rgb: [UInt8], width: Int, height: Int) throws -> CVPixelBuffer {
        var buffer: CVPixelBuffer?
        CVPixelBufferCreate(nil, width, height, kCVPixelFormatType_32BGRA, nil, &buffer)
        guard let buffer, rgb.count == 3 * width * height else { throw BundleError.noImageInput }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let row = CVPixelBufferGetBytesPerRow(buffer)
        let bytes = CVPixelBufferGetBaseAddress(buffer)!.assumingMemoryBound(to: UInt8.self)
        for y in 0..<height {
            for x in 0..<width {
                let from = 3 * (y * width + x), to = y * row + 4 * x
                (bytes[to], bytes[to + 1], bytes[to + 2], bytes[to + 3]) = (rgb[from + 2], rgb[from + 1], rgb[from], 255)
            }
        }
        return buffer
    }
}
