// SHA-256 (FIPS 180-4) where the system has no CryptoKit, under the names of CryptoKit.
#if !canImport(CryptoKit)
import Foundation

struct SHA256 {
    private var state = fractions(8) { $0.squareRoot() }
    private var rest: [UInt8] = []  // of a block that is not full
    private var length = 0

    mutating func update(data: Data) {
        length += data.count
        let bytes = rest + data
        let whole = bytes.count - bytes.count % 64
        for start in stride(from: 0, to: whole, by: 64) { block(bytes, start) }
        rest = Array(bytes[whole...])
    }

    func finalize() -> [UInt8] {
        var last = self
        let bits = UInt64(length) * 8
        let zeros = [UInt8](repeating: 0, count: (119 - rest.count) % 64)  // until 8 bytes are left in a block
        last.update(data: Data([0x80] + zeros + bigEndian(bits)))
        return last.state.flatMap(bigEndian)
    }

    private mutating func block(_ bytes: [UInt8], _ start: Int) {
        var w = [UInt32](repeating: 0, count: 64)
        for i in 0..<64 { w[i / 4] = i / 4 < 16 ? w[i / 4] << 8 | UInt32(bytes[start + i]) : 0 }
        for i in 16..<64 {
            let (near, far) = (w[i - 2], w[i - 15])
            w[i] = w[i - 16] &+ w[i - 7] &+ (turned(far, 7) ^ turned(far, 18) ^ far >> 3)
            w[i] = w[i] &+ (turned(near, 17) ^ turned(near, 19) ^ near >> 10)
        }
        var (a, b, c, d) = (state[0], state[1], state[2], state[3])
        var (e, f, g, h) = (state[4], state[5], state[6], state[7])
        for i in 0..<64 {
            let one = h &+ constants[i] &+ w[i] &+ (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) &+ (e & f ^ ~e & g)
            let two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) &+ (a & b ^ a & c ^ b & c)
            (h, g, f, e, d, c, b, a) = (g, f, e, d &+ one, c, b, a, one &+ two)
        }
        for (i, value) in [a, b, c, d, e, f, g, h].enumerated() { state[i] = state[i] &+ value }
    }
}

private let primes = (2...311).filter { n in (2..<n).allSatisfy { n % $0 != 0 } }  // 64
private let constants = fractions(64) { cbrt($0) }

/// Returns the first 32 bits of the fractions of the roots of the first `count` primes.
private func fractions(_ count: Int, _ root: (Double) -> Double) -> [UInt32] {
    primes.prefix(count).map { UInt32(truncatingIfNeeded: UInt64(root(Double($0)) * 0x1p32)) }
}

private func turned(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }

private func bigEndian<Word: FixedWidthInteger>(_ word: Word) -> [UInt8] { withUnsafeBytes(of: word.bigEndian) { [UInt8]($0) } }
#endif
