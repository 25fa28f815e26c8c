// The self-test of a bundle, as `evm-run --selftest`: preprocessing, outputs, and each scan by itself.
// NOT COMPILED BY THIS PROJECT.
import CoreML
import Foundation

/// One line of a self-test: error against limit.
public struct Check: Sendable {
    public let name: String
    public let error: Double
    public let limit: Double

    public var ok: Bool { error <= limit }
}

private let tolerances = ["fp32": 1e-4, "fp16": 2e-2]
private let ownTolerances = ["int8": 0.05, "int8-fp16": 0.05, "w8": 2e-2]  // their artifacts' own outputs are kept
private let scanTolerance = 2e-5  // of the part that the states give
private let rounding = 4 * 1.1920929e-7  // of y in float32, before skip * u is taken off
private let scanInputs = ["u", "delta", "A", "B", "C", "skip", "bias"]

extension Model {
    /// Of the bundle's default size. Throws EvmError.
    public func selfTest() throws -> [Check] {
        let tensors = try read("selftest/probes.safetensors")
        let scans = try read("selftest/scans.safetensors")
        return try [pictureCheck(tensors)] + outputChecks(tensors) + scanChecks(scans)
    }

    private func read(_ name: String) throws -> [String: Tensor] {
        do {
            return try safetensors(folder.appendingPathComponent(name))
        } catch {
            throw EvmError(.bundle, "bundle \(folder.path) has no readable self-test: \(error)")
        }
    }

    private func pictureCheck(_ tensors: [String: Tensor]) throws -> Check {
        let picture = try Picture(contentsOf: folder.appendingPathComponent("selftest/picture.png"))
        let have = try manifest.preprocessing.pixels(picture).rgb
        let want = tensors["picture.pixels"]?.bytes ?? []
        let off = have.count == want.count ? zip(have, want).map { abs(Int($0) - Int($1)) }.max() : nil
        return Check(name: "preprocessing (of 255)", error: off.map(Double.init) ?? .infinity, limit: 1)
    }

    private func outputChecks(_ tensors: [String: Tensor]) throws -> [Check] {
        guard let inputs = tensors[manifest.plan.input] else {
            throw EvmError(.bundle, "bundle \(folder.path) has no readable self-test: no \(manifest.plan.input)")
        }
        var have: [String: [Float]] = [:]
        for start in stride(from: 0, to: inputs.shape[0], by: batch) {
            let rows = (start..<(start + batch)).map { min($0, inputs.shape[0] - 1) }  // the last batch is filled up
            let outputs = try run(input(rows.map(inputs.row), shape: inputs.shape))
            let share = min(batch, inputs.shape[0] - start)
            for (name, values) in outputs { have[name, default: []] += values.prefix(values.count / batch * share) }
        }
        let precision = manifest.plan.precision
        let tolerance = ownTolerances[precision] ?? manifest.plan.tol ?? tolerances[precision] ?? 0
        return manifest.outputs.map { output in
            let want = tensors[output.name]?.floats ?? []
            let largest = max(1, Double(want.map(abs).max() ?? 0))
            return Check(
                name: output.name, error: worst(have[output.name] ?? [], want), limit: tolerance * largest)
        }
    }

    private func input(_ rows: [[UInt8]], shape: [Int]) throws -> MLFeatureValue {
        if manifest.plan.input == "image" {
            return try input(Picture(width: shape[2], height: shape[1], rgb: rows[0]))
        }
        return try input(tensor: rows.flatMap { Tensor(shape: [1], bytes: $0).floats })
    }

    private func scanChecks(_ scans: [String: Tensor]) throws -> [Check] {
        let names = Set(scans.keys.compactMap { $0.components(separatedBy: ":").first }).sorted()
        return try names.map { name in
            guard let u = scans["\(name):u"], let A = scans["\(name):A"], let skip = scans["\(name):skip"],
                let want = scans["\(name):y"]?.floats
            else { throw EvmError(.bundle, "bundle \(folder.path) has no readable self-test: \(name)") }
            let (K, L, D, N) = (u.shape[1], u.shape[2], u.shape[3], A.shape[2])
            var feeds: [String: MLMultiArray] = [:]
            for key in scanInputs {
                guard let tensor = scans["\(name):\(key)"] else { continue }
                feeds[key] = try array(tensor.floats, shape: tensor.shape)
            }
            let y = try scan("selftest/scan-\(K)x\(L)x\(D)x\(N).mlpackage", feeds)
            return check(name: name, y: y, want: want, skipPart: skipPart(u.floats, skip.floats, L: L, D: D))
        }
    }

    /// The error relative to what the states give, y - skip * u; the limit grows where skip * u dwarfs it.
    private func check(name: String, y: [Float], want: [Float], skipPart: [Double]) -> Check {
        let states = zip(want, skipPart).map { abs(Double($0) - $1) }.max() ?? 0
        let largest = max(states, Double(Float.leastNormalMagnitude))
        let limit = scanTolerance + rounding * (skipPart.map(abs).max() ?? 0) / largest
        return Check(name: "scan \(name)", error: worst(y, want) / largest, limit: limit)
    }
}

/// skip (K, D) times u (1, K, L, D).
private func skipPart(_ u: [Float], _ skip: [Float], L: Int, D: Int) -> [Double] {
    u.indices.map { Double(skip[$0 / (L * D) * D + $0 % D]) * Double(u[$0]) }
}

/// The largest difference; infinite for another count, and for values that are no numbers.
private func worst(_ have: [Float], _ want: [Float]) -> Double {
    guard have.count == want.count, have.allSatisfy(\.isFinite) else { return .infinity }
    return zip(have, want).map { abs(Double($0) - Double($1)) }.max() ?? 0
}
