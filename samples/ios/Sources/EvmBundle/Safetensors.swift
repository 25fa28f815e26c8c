// Tensors, and reading of safetensors files: eight bytes with the length of the header, a JSON header, the data.
import Foundation

/// Values in C order. `dtype`: U8, I32 or F32, as in safetensors. `bytes`: the values, little-endian.
public struct Tensor: Sendable {
    public let dtype: String
    public let shape: [Int]
    public let bytes: [UInt8]

    public init(dtype: String, shape: [Int], bytes: [UInt8]) {
        precondition(bytes.count == shape.reduce(dtype == "U8" ? 1 : 4, *))
        (self.dtype, self.shape, self.bytes) = (dtype, shape, bytes)
    }

    /// Makes a tensor of dtype F32.
    public init(_ floats: [Float], shape: [Int]) {
        self.init(dtype: "F32", shape: shape, bytes: floats.withUnsafeBytes { [UInt8]($0) })
    }

    /// The values as floats, which hold whole numbers up to 2^24 exactly.
    public var floats: [Float] {
        if dtype == "U8" { return bytes.map(Float.init) }
        return bytes.withUnsafeBytes { raw in
            (0..<(raw.count / 4)).map {
                dtype == "I32"
                    ? Float(raw.loadUnaligned(fromByteOffset: 4 * $0, as: Int32.self))
                    : raw.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self)
            }
        }
    }

    /// Returns the bytes of row `i` of the first axis.
    func row(_ i: Int) -> [UInt8] {
        let length = bytes.count / shape[0]
        return Array(bytes[(i * length)..<((i + 1) * length)])
    }
}

/// Reads the tensors of a file by name. Throws an error if the file is damaged.
func safetensors(_ url: URL) throws -> [String: Tensor] {
    struct Entry: Decodable {
        let dtype: String
        let shape: [Int]
        let data_offsets: [Int]
    }
    let file = try Data(contentsOf: url)
    let length = file.prefix(8).reversed().reduce(UInt64(0)) { ($0 << 8) | UInt64($1) }
    guard file.count >= 8, length <= UInt64(file.count - 8) else {
        throw EvmError(.bundle, "\(url.path) has a header of \(length) bytes")
    }
    let data = 8 + Int(length)
    let header = try JSONDecoder().decode([String: Entry].self, from: file.subdata(in: 8..<data))
    return try header.mapValues { entry in
        let size = entry.shape.reduce(entry.dtype == "U8" ? 1.0 : 4.0) { $0 * Double($1) }  // a Double does not overflow
        guard ["U8", "I32", "F32"].contains(entry.dtype), entry.data_offsets.count == 2,
            let from = entry.data_offsets.first, let end = entry.data_offsets.last,
            0 <= from, from <= end, end <= file.count - data,
            entry.shape.allSatisfy({ $0 >= 0 }), Double(end - from) == size
        else { throw EvmError(.bundle, "\(url.path) is damaged: a tensor does not fit the file") }
        let bytes = [UInt8](file.subdata(in: (data + from)..<(data + end)))
        return Tensor(dtype: entry.dtype, shape: entry.shape, bytes: bytes)
    }
}
