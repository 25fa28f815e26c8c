// The self-test of a bundle: the inputs in selftest/probes.safetensors against the outputs expected for them.
// NOT COMPILED BY THIS PROJECT.
import Foundation

extension EvmBundle {
    /// Largest difference of the first output from what is expected, relative to max(1, largest expected value).
    public func selfTest() throws -> Float {
        let file = try Safetensors(folder.appendingPathComponent("selftest/probes.safetensors"))
        let images = try file.bytes(manifest.inputs[0].name)
        let expected = try file.floats(manifest.outputs[0].name)
        let count = file.shape(manifest.inputs[0].name)[0]
        let largest = max(1, expected.map(abs).max() ?? 0)
        var worst: Float = 0
        for i in 0..<count {
            let image = Array(images[(i * images.count / count)..<((i + 1) * images.count / count)])
            let want = expected[(i * expected.count / count)..<((i + 1) * expected.count / count)]
            for (a, b) in zip(try run(rgb: image), want) { worst = max(worst, abs(a - b) / largest) }
        }
        return worst
    }
}

/// Eight bytes of header length, a JSON header, the data.
struct Safetensors {
    private let header: [String: Any]
    private let data: Data

    init(_ url: URL) throws {
        let file = try Data(contentsOf: url)
        let length = file.prefix(8).enumerated().reduce(0) { $0 | Int($1.element) << (8 * $1.offset) }
        header = try JSONSerialization.jsonObject(with: file.subdata(in: 8..<(8 + length))) as? [String: Any] ?? [:]
        data = file.subdata(in: (8 + length)..<file.count)
    }

    func shape(_ name: String) -> [Int] { (header[name] as? [String: Any])?["shape"] as? [Int] ?? [] }

    func bytes(_ name: String) throws -> [UInt8] {
        guard let at = (header[name] as? [String: Any])?["data_offsets"] as? [Int] else { throw BundleError.noOutput(name) }
        return [UInt8](data.subdata(in: at[0]..<at[1]))
    }

    func floats(_ name: String) throws -> [Float] {
        let raw = try bytes(name)
        return raw.withUnsafeBytes { pointer in (0..<(raw.count / 4)).map { pointer.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self) } }
    }
}
