// Image files and runtimes for the tests: ImageIO and Core ML on Apple's systems. Elsewhere stand-ins, which a process serves
// that has decoders and computes Core ML packages; tests/swift.py is one.
import Foundation
import XCTest

@testable import EvmBundle

#if canImport(CoreML)
func decoded(_ url: URL) throws -> RgbImage { try RgbImage(contentsOf: url) }

func opened(_ artifact: URL, _ function: String?) throws -> any Runtime { try CoreMLRuntime(artifact, function: function) }
#else
/// Reads the pixels of an image file from $EVM_IMAGES: a binary PPM file, named by the SHA-256 of the image file.
func decoded(_ url: URL) throws -> RgbImage {
    let folder = try folder("EVM_IMAGES")
    let file = [UInt8](try Data(contentsOf: folder.appendingPathComponent("\(sha256(url)).ppm")))
    let lines = file.split(separator: 10, maxSplits: 3, omittingEmptySubsequences: false)  // P6, width height, 255, pixels
    let size = String(decoding: lines[1], as: UTF8.self).split(separator: " ").compactMap { Int($0) }
    return RgbImage(width: size[0], height: size[1], rgb: Array(lines[3]))
}

func opened(_ artifact: URL, _ function: String?) throws -> any Runtime {
    Served(folder: try folder("EVM_RUNTIME"), artifact: artifact.path, function: function ?? "")
}

private func folder(_ variable: String) throws -> URL {
    guard let path = ProcessInfo.processInfo.environment[variable] else {
        throw XCTSkip("set \(variable): on this system the tests need tests/swift.py")
    }
    return URL(fileURLWithPath: path)
}

/// A runtime in another process. A request is a line in the pipe `ask`: the artifact, a tab, its function. The tensors are in
/// feeds.safetensors. The answer is a line in the pipe `answer`: ok, and the outputs are in outputs.safetensors; or an error.
private struct Served: Runtime {
    let folder: URL
    let artifact: String
    let function: String

    func run(_ feeds: [String: Tensor]) throws -> [String: Tensor] {
        try written(feeds).write(to: folder.appendingPathComponent("feeds.safetensors"))
        let ask = try FileHandle(forWritingTo: folder.appendingPathComponent("ask"))
        ask.write(Data("\(artifact)\t\(function)\n".utf8))
        let answer = try FileHandle(forReadingFrom: folder.appendingPathComponent("answer"))
        var line = Data()
        while line.last != 10 { line += answer.availableData }
        let text = String(decoding: line.dropLast(), as: UTF8.self)
        guard text == "ok" else { throw EvmError(.toolchain, text) }
        return try safetensors(folder.appendingPathComponent("outputs.safetensors"))
    }
}

private func written(_ tensors: [String: Tensor]) throws -> Data {
    var (header, bytes): ([String: [String: Any]], [UInt8]) = ([:], [])
    for (name, tensor) in tensors.sorted(by: { $0.key < $1.key }) {
        let offsets = [bytes.count, bytes.count + tensor.bytes.count]
        header[name] = ["dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets]
        bytes += tensor.bytes
    }
    var text = try JSONSerialization.data(withJSONObject: header)
    text += Data(repeating: 32, count: (8 - text.count % 8) % 8)
    return withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) } + text + bytes
}
#endif
