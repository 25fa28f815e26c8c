// A safetensors file: eight bytes of header length, a JSON header, the data.
// NOT COMPILED BY THIS PROJECT.
import Foundation

struct Tensor {
    let shape: [Int]
    let bytes: [UInt8]

    /// Of a float32 tensor.
    var floats: [Float] {
        bytes.withUnsafeBytes { raw in
            (0..<(raw.count / 4)).map { raw.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self) }
        }
    }

    /// The bytes of row `i` of `count` of the first axis.
    func row(_ i: Int) -> [UInt8] {
        let length = bytes.count / shape[0]
        return Array(bytes[(i * length)..<((i + 1) * length)])
    }
}

/// The tensors of a file by name. Throws for what is no such file.
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
        let size = entry.shape.reduce(entry.dtype == "F32" ? 4 : 1, *)
        guard ["U8", "F32"].contains(entry.dtype), entry.data_offsets.count == 2,
            let from = entry.data_offsets.first, let end = entry.data_offsets.last,
            from >= 0, end - from == size, data + end <= file.count
        else { throw EvmError(.bundle, "\(url.path) is cut") }
        return Tensor(shape: entry.shape, bytes: [UInt8](file.subdata(in: (data + from)..<(data + end))))
    }
}
