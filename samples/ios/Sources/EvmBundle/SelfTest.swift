// Self-test of a bundle, as `evm-run --selftest` does it: preprocessing, outputs, and each scan alone.
import Foundation

/// Result of one check of a self-test. The check has passed if `error` <= `limit`.
public struct Check: Sendable {
    public let name: String
    public let error: Double
    public let limit: Double

    public var ok: Bool { error <= limit }
}

private let probesFile = "selftest/probes.safetensors"
private let scansFile = "selftest/scans.safetensors"
private let dtypes = ["float32": "F32", "int32": "I32", "uint8": "U8"]
private let scanTolerance = 2e-5  // error of y - skip * u, relative to its largest value
private let rounding = 4 * 1.1920929e-7  // relative rounding error of y in float32, before skip * u is subtracted
private let scanInputs = ["u", "delta", "A", "B", "C", "skip", "bias"]
private let scanAxes = [
    "u": "bKLD", "delta": "bKLD", "A": "KDN", "B": "bKLN", "C": "bKLN", "skip": "KD", "bias": "KD", "y": "bKLD",
]

extension Model {
    /// Compares preprocessing, outputs and scans, at the bundle's default size, with the expected values in the bundle.
    /// `decode`: PNG file -> upright image. Throws EvmError if the bundle has no readable self-test.
    public func selfTest(decode: (URL) throws -> RgbImage) throws -> [Check] {
        let (tensors, scans) = try (read(probesFile), read(scansFile))
        let image = manifest.preprocessing.readsImages ? [try imageCheck(tensors, decode)] : []
        return try image + outputChecks(tensors) + scanChecks(scans)
    }

    private func read(_ name: String) throws -> [String: Tensor] {
        do {
            return try safetensors(folder.appendingPathComponent(name))
        } catch {
            throw damaged(name, "cannot be read: \(error)")
        }
    }

    private func damaged(_ file: String, _ reason: String) -> EvmError {
        let message = "bundle \(folder.path) has no readable self-test: \(file) \(reason)"
        return EvmError(.bundle, message, hint: "export it again", code: "selftest.damaged", place: file)
    }

    private func like(_ tensors: [String: Tensor], _ name: String, _ dtype: String, _ shape: [Int]) throws -> Tensor {
        guard let tensor = tensors[name], tensor.dtype == dtypes[dtype], tensor.shape == shape else {
            throw damaged(probesFile, "has no \(name) of \(dtype)\(shape)")
        }
        return tensor
    }

    private func imageCheck(_ tensors: [String: Tensor], _ decode: (URL) throws -> RgbImage) throws -> Check {
        let image = try decode(folder.appendingPathComponent("selftest/picture.png"))
        let preprocessing = manifest.preprocessing
        let have = preprocessing.bytes(try preprocessing.pixels(image))
        let shape = [preprocessing.height, preprocessing.width, preprocessing.channels]
        let want = try like(tensors, "picture.pixels", "uint8", shape).bytes
        let off = zip(have, want).map { abs(Int($0) - Int($1)) }.max() ?? 0
        return Check(name: "preprocessing (of 255)", error: Double(off), limit: manifest.selftest?.preprocessing ?? 1)
    }

    private func outputChecks(_ tensors: [String: Tensor]) throws -> [Check] {
        let (height, width) = (manifest.preprocessing.height, manifest.preprocessing.width)
        let channels = manifest.preprocessing.channels
        let pixels = manifest.plan.input == "image"
        let (dtype, one) = pixels ? ("U8", [height, width, channels]) : ("F32", [channels, height, width])
        guard let inputs = tensors[manifest.plan.input], inputs.dtype == dtype, !inputs.bytes.isEmpty,
            inputs.shape.dropFirst().elementsEqual(one)
        else { throw damaged(probesFile, "has no \(manifest.plan.input)") }
        var have: [String: [Float]] = [:]
        for start in stride(from: 0, to: inputs.shape[0], by: batch) {
            let rows = (start..<(start + batch)).map { min($0, inputs.shape[0] - 1) }  // the last batch is filled up
            let feed = Tensor(dtype: dtype, shape: [batch] + one, bytes: rows.flatMap(inputs.row))
            let outputs = try run([manifest.inputs[0].name: feed])
            let share = min(batch, inputs.shape[0] - start)
            for (name, values) in outputs.mapValues(\.floats) { have[name, default: []] += values.prefix(values.count / batch * share) }
        }
        var want: [String: [Float]] = [:]
        for output in manifest.outputs {
            let shape = [inputs.shape[0]] + output.shape.dropFirst().map { $0 ?? 0 }
            want[output.name] = try like(tensors, output.name, output.dtype, shape).floats
        }
        return compared(have, want, images: inputs.shape[0])
    }

    /// Compares outputs with the expected ones: detections in pairs, pixels of label maps by equality, else value by value.
    private func compared(_ have: [String: [Float]], _ want: [String: [Float]], images: Int) -> [Check] {
        let apart = manifest.selftest?.apart ?? 0
        var checks: [Check] = []
        var off: [String: Double] = [:]
        if manifest.plan.head == "detections" {
            let aligned = align(want, have, images: images, tolerance: have.keys.map(limit).min() ?? 0)
            checks.append(Check(name: "not in common", error: 1 - aligned.share, limit: apart))
            for output in manifest.outputs where output.name != "count" {
                let (ours, theirs) = (want[output.name] ?? [], have[output.name] ?? [])
                let size = output.shape.dropFirst(2).reduce(1) { $0 * ($1 ?? 1) }
                off[output.name] = aligned.pairs.map {
                    worst(part(theirs, row: $0.actual, size: size), part(ours, row: $0.expected, size: size))
                }.max() ?? 0
            }
        } else if manifest.plan.head == "label_map" {
            let (ours, theirs) = (have["label_map"] ?? [], want["label_map"] ?? [])
            let differ = zip(ours, theirs).filter { $0 != $1 }.count
            let share = ours.count == theirs.count ? Double(differ) / Double(max(1, ours.count)) : 1
            checks.append(Check(name: "not in common", error: share, limit: apart))
            off["label_map"] = 0  // the other pixels are equal
        } else {
            for output in manifest.outputs { off[output.name] = worst(have[output.name] ?? [], want[output.name] ?? []) }
        }
        for output in manifest.outputs {
            guard let error = off[output.name] else { continue }
            checks.append(Check(name: output.name, error: error, limit: limit(output.name)))
        }
        return checks
    }

    private func limit(_ output: String) -> Double { manifest.selftest?.outputs?[output] ?? manifest.parity.limit }

    private func part(_ values: [Float], row: Int, size: Int) -> [Float] {
        Array(values[(row * size)..<((row + 1) * size)])
    }

    private func scanChecks(_ scans: [String: Tensor]) throws -> [Check] {
        let names = Set(scans.keys.compactMap { $0.components(separatedBy: ":").first }).sorted()
        return try names.map { name in
            var tensors: [String: Tensor] = [:]
            for key in scanAxes.keys { tensors[key] = scans["\(name):\(key)"] }
            guard isScan(tensors), let u = tensors["u"], let A = tensors["A"], let skip = tensors["skip"],
                let want = tensors["y"]?.floats
            else { throw damaged(scansFile, "has no scan in the tensors of '\(name)'") }
            let (K, L, D, N) = (u.shape[1], u.shape[2], u.shape[3], A.shape[2])
            let file = folder.appendingPathComponent("selftest/scan-\(K)x\(L)x\(D)x\(N).mlpackage")
            let y = try open(file, nil).run(tensors.filter { scanInputs.contains($0.key) })["y"]?.floats ?? []
            return check(name: name, y: y, want: want, skipPart: skipPart(u.floats, skip.floats, L: L, D: D))
        }
    }

    /// Compares y - skip * u of a scan with the expected values, relative to its largest value. The limit includes the
    /// rounding of y, which dominates where skip * u is much larger.
    private func check(name: String, y: [Float], want: [Float], skipPart: [Double]) -> Check {
        let states = zip(want, skipPart).map { abs(Double($0) - $1) }.max() ?? 0
        let largest = max(states, Double(Float.leastNormalMagnitude))
        let limit = manifest.selftest?.scans?[name] ?? scanTolerance + rounding * (skipPart.map(abs).max() ?? 0) / largest
        return Check(name: "scan \(name)", error: worst(y, want) / largest, limit: limit)
    }
}

/// Tests whether the tensors are float32 and have the ranks and sizes of one scan.
private func isScan(_ tensors: [String: Tensor]) -> Bool {
    var sizes: [Character: Int] = [:]
    for (name, axes) in scanAxes {
        guard let tensor = tensors[name], tensor.dtype == "F32", tensor.shape.count == axes.count else { return false }
        for (axis, size) in zip(axes, tensor.shape) {
            guard size > 0, sizes[axis, default: size] == size else { return false }
            sizes[axis] = size
        }
    }
    return true
}

/// Returns skip (K, D) times u (1, K, L, D).
private func skipPart(_ u: [Float], _ skip: [Float], L: Int, D: Int) -> [Double] {
    u.indices.map { Double(skip[$0 / (L * D) * D + $0 % D]) * Double(u[$0]) }
}

/// Returns the largest difference; infinite if the counts differ or a value is NaN or Inf.
private func worst(_ have: [Float], _ want: [Float]) -> Double {
    guard have.count == want.count, have.allSatisfy(\.isFinite) else { return .infinity }
    return zip(have, want).map { abs(Double($0) - Double($1)) }.max() ?? 0
}
