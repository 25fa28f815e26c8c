// Core ML as the runtime of a bundle.
// NOT RUN BY THIS PROJECT: it has no Mac. Compiled against stand-ins for Apple's modules.
#if canImport(CoreML)
import CoreML
import CoreVideo
import Foundation

extension Model {
    /// Opens the bundle in `folder`, checks the hash of every file, and compiles the package on this device. `function`:
    /// function of a bundle for several sizes, such as `imgsz_224x224`; by default the first. Throws EvmError.
    public convenience init(folder: URL, function: String? = nil, units: MLComputeUnits = .all) throws {
        try self.init(folder: folder, function: function) { try CoreMLRuntime($0, function: $1, units: units) }
    }

    /// Compares preprocessing, outputs and scans with the expected values in the bundle. Throws EvmError if the bundle has
    /// no readable self-test.
    public func selfTest() throws -> [Check] { try selfTest { try RgbImage(contentsOf: $0) } }
}

/// A Core ML package, compiled on this device.
public final class CoreMLRuntime: Runtime {
    private let model: MLModel

    /// Compiles the package, and opens `function` of it if it has several. Throws EvmError.
    public init(_ package: URL, function: String? = nil, units: MLComputeUnits = .all) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        if let function {
            guard #available(iOS 18, macOS 15, *) else {
                throw EvmError(.toolchain, "function '\(function)' needs iOS 18 or macOS 15")
            }
            configuration.functionName = function
        }
        do {
            model = try MLModel(contentsOf: MLModel.compileModel(at: package), configuration: configuration)
        } catch {
            throw EvmError(.bundle, "Core ML cannot open \(package.path): \(error.localizedDescription)")
        }
    }

    public func run(_ feeds: [String: Tensor]) throws -> [String: Tensor] {
        let inputs = try MLDictionaryFeatureProvider(dictionary: feeds.mapValues(feature))
        let found: MLFeatureProvider
        do {
            found = try model.prediction(from: inputs)
        } catch {
            throw EvmError(.toolchain, "Core ML failed: \(error.localizedDescription)")
        }
        var outputs: [String: Tensor] = [:]
        for name in found.featureNames { outputs[name] = found.featureValue(for: name).flatMap(tensor) }
        return outputs
    }

    /// Returns an array, or the scores of a classifier in the order of its labels; nil for anything else, such as the name of
    /// the best class.
    private func tensor(_ value: MLFeatureValue) -> Tensor? {
        if let array = value.multiArrayValue {
            return Tensor((0..<array.count).map { array[$0].floatValue }, shape: array.shape.map(\.intValue))
        }
        guard value.type == .dictionary, let labels = model.modelDescription.classLabels as? [String] else { return nil }
        let scores = value.dictionaryValue
        return Tensor(labels.map { scores[AnyHashable($0)]?.floatValue ?? .nan }, shape: [1, labels.count])
    }
}

private func feature(_ tensor: Tensor) throws -> MLFeatureValue {
    if tensor.dtype == "U8" { return MLFeatureValue(pixelBuffer: try pixelBuffer(tensor)) }
    let array = try MLMultiArray(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: .float32)
    for (i, value) in tensor.floats.enumerated() { array[i] = NSNumber(value: value) }
    return MLFeatureValue(multiArray: array)
}

/// Makes a pixel buffer of bytes (1, H, W, C): grey for 1 channel, else BGRA, the format of cameras, which Core ML reads as RGB.
private func pixelBuffer(_ pixels: Tensor) throws -> CVPixelBuffer {
    let (height, width, channels) = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    let format = channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
    let full = EvmError(.toolchain, "no memory for \(width)x\(height) pixels")
    var made: CVPixelBuffer?
    CVPixelBufferCreate(nil, width, height, format, nil, &made)
    guard let made else { throw full }
    CVPixelBufferLockBaseAddress(made, [])
    defer { CVPixelBufferUnlockBaseAddress(made, []) }
    guard let base = CVPixelBufferGetBaseAddress(made) else { throw full }
    let bytes = base.assumingMemoryBound(to: UInt8.self)
    let row = CVPixelBufferGetBytesPerRow(made)
    for y in 0..<height {
        for x in 0..<width {
            let from = channels * (y * width + x)
            if channels == 1 {
                bytes[y * row + x] = pixels.bytes[from]
                continue
            }
            let to = y * row + 4 * x
            bytes[to] = pixels.bytes[from + 2]
            bytes[to + 1] = pixels.bytes[from + 1]
            bytes[to + 2] = pixels.bytes[from]
            bytes[to + 3] = 255
        }
    }
    return made
}
#endif
