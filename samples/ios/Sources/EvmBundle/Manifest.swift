// Reading of manifest.json: the parts that an app uses, their checks, and the check of every file's hash.
import Foundation

#if canImport(CryptoKit)
import CryptoKit
#endif

private let schemaVersion = 1
private let maxBytes = 4 << 20
private let maxDetections = 1000
private let heads = ["logits", "probs", "features", "raw", "detections", "label_map"]

/// A manifest of schema version 1. The properties have the names of the keys; `tests/test_ios.py` compares them with those
/// of a bundle.
public struct Manifest: Decodable {
    public struct Plan: Decodable {
        public let head: String
        public let input: String
        public let precision: String
        public let batch: String
        /// Of a detector; null in other bundles, absent in older ones.
        public let iou: Double?
        public let max_det: Int?
        /// Whether the model is a classifier: one output holds a score for each class.
        public var classifies: Bool { head == "logits" || head == "probs" }
        /// Selection of a detector.
        public var selection: Selection { Selection(iou: iou ?? 0.5, most: max_det ?? 100) }
    }
    public struct Preprocess: Decodable {
        public let size: [Int]
        /// crop, stretch or pad; crop in older bundles, which do not say.
        public let resize: String?
        public let crop_pct: Double?
        public let interpolation: String
        public let mean: [Double]
        public let std: [Double]
    }
    public struct Value: Decodable {
        public let name: String
        public let dtype: String
        public let shape: [Int?]
    }
    public struct File: Decodable { public let sha256: String }
    public struct Function: Decodable {
        public let name: String
        public let imgsz: [Int]
    }
    public struct Details: Decodable { public let functions: [Function]? }
    public struct Parity: Decodable {
        public let failures: [String]?
        public let limit: Double
    }
    /// Limits of the self-test by name. Older bundles have none.
    public struct Limits: Decodable {
        public let preprocessing: Double?
        public let apart: Double?
        public let outputs: [String: Double]?
        public let scans: [String: Double]?
    }

    public let schema_version: Int
    public let name: String
    public let target: String
    public let artifact: String
    public let built: Bool?
    public let rejected: Bool?
    public let plan: Plan
    public let preprocessing: Preprocess
    public let inputs: [Value]
    public let outputs: [Value]
    public let files: [String: File]
    public let details: Details
    public let parity: Parity
    public let selftest: Limits?

    /// Reads and checks the manifest of the bundle in `folder`, and checks the hash of every file. Throws EvmError.
    public static func open(_ folder: URL) throws -> Manifest {
        var isFolder: ObjCBool = false
        let exists = FileManager.default.fileExists(atPath: folder.path, isDirectory: &isFolder)
        guard isFolder.boolValue else {
            let file = "bundle \(folder.path) is a file, not a bundle folder"
            let message = exists ? file : "bundle \(folder.path) does not exist"
            throw EvmError(.bundle, message, hint: "make one with evm-export", code: "bundle.missing")
        }
        let manifest = try read(folder)
        if manifest.rejected == true {
            let failures = (manifest.parity.failures ?? []).joined(separator: "; ")
            let message = "bundle \(folder.path) was rejected at export: \(failures)"
            throw EvmError(.bundle, message, code: "bundle.rejected")
        }
        for (name, file) in manifest.files.sorted(by: { $0.key < $1.key }) { try check(folder, name, file) }
        guard manifest.built != false else {
            let hint = "on the device:  evm-export --finish \(folder.path)"
            throw EvmError(.bundle, "bundle \(folder.path) has no engine yet", hint: hint, code: "bundle.unfinished")
        }
        guard manifest.target == "coreml" else {
            let message = "bundle \(folder.path) is for target '\(manifest.target)', this app runs 'coreml'"
            throw EvmError(.bundle, message, hint: "export with evm-export --target coreml")
        }
        return manifest
    }

    private static func read(_ folder: URL) throws -> Manifest {
        let path = folder.appendingPathComponent("manifest.json")
        guard FileManager.default.fileExists(atPath: path.path) else {
            let message = "\(folder.path) is not a bundle: no manifest.json inside"
            throw EvmError(.bundle, message, hint: "make one with evm-export", code: "manifest.missing")
        }
        guard let data = try? Data(contentsOf: path) else {
            throw EvmError(.bundle, "\(path.path) cannot be read", code: "manifest.missing")
        }
        if data.count > maxBytes { throw damaged("\(path.path) is larger than \(maxBytes) bytes: not a manifest") }
        try checkVersion(data, path: path, folder: folder)
        do {
            let manifest = try JSONDecoder().decode(Manifest.self, from: data)
            try manifest.validate()
            return manifest
        } catch let error as Invalid {
            throw invalid(path, error.place, error.what)
        } catch let error as DecodingError {
            throw invalid(path, keyPath(error), "\(error)")
        }
    }

    private static func invalid(_ path: URL, _ place: String, _ what: String) -> EvmError {
        let message = "\(path.path) is not a valid manifest: \(place) \(what)"
        return EvmError(.bundle, message, hint: "export the bundle again", code: "manifest.invalid", place: place)
    }

    private static func damaged(_ message: String) -> EvmError {
        EvmError(.bundle, message, hint: "export the bundle again", code: "manifest.damaged")
    }

    private static func checkVersion(_ data: Data, path: URL, folder: URL) throws {
        let json: Any
        do {
            json = try JSONSerialization.jsonObject(with: data)
        } catch {
            throw damaged("\(path.path) is damaged: \(error.localizedDescription)")
        }
        guard let object = json as? [String: Any] else { throw damaged("\(path.path) is not a JSON object") }
        guard let version = object["schema_version"] as? Int, version >= 1 else {
            throw invalid(path, "schema_version", "must be a whole number from 1")
        }
        if version > schemaVersion {
            let message = "\(folder.path) has manifest schema \(version); this app reads versions up to \(schemaVersion)"
            let hint = "use EvmBundle of a newer evm-deploy"
            throw EvmError(.bundle, message, hint: hint, code: "manifest.version", place: "schema_version")
        }
    }

    private func validate() throws {
        try require(heads.contains(plan.head), "plan.head", "is unknown")
        try require(plan.selection.iou > 0 && plan.selection.iou <= 1, "plan.iou", "must be over 0 and at most 1")
        let mostInRange = (1...maxDetections).contains(plan.selection.most)
        try require(mostInRange, "plan.max_det", "must be 1 to \(maxDetections)")
        try require(["image", "tensor"].contains(plan.input), "plan.input", "is unknown")
        try preprocessing.validate()
        for (name, file) in files {
            try require(insideBundle(name), "files.\(name)", "leaves the bundle")
            let hash = file.sha256.utf8
            let isHash = hash.count == 64 && hash.allSatisfy { (48...57).contains($0) || (97...102).contains($0) }
            try require(isHash, "files.\(name).sha256", "is not a sha256")
        }
        let found = files.keys.contains { $0 == artifact || $0.hasPrefix(artifact + "/") }
        try require(found, "artifact", "is not among the files")
        try require(inputs.count == 1, "inputs", "must be one")
        try require(!outputs.isEmpty, "outputs", "must be one or more")
    }
}

/// An error in a manifest, with its key path.
struct Invalid: Error {
    let place: String
    let what: String
}

/// Throws Invalid unless `good` is true.
func require(_ good: Bool, _ place: String, _ what: String) throws {
    if !good { throw Invalid(place: place, what: what) }
}

/// Returns the key path at which a decoder failed, such as `inputs[0].shape`.
private func keyPath(_ error: DecodingError) -> String {
    let path: [CodingKey]
    switch error {
    case .keyNotFound(let key, let context): path = context.codingPath + [key]
    case .typeMismatch(_, let context), .valueNotFound(_, let context), .dataCorrupted(let context):
        path = context.codingPath
    @unknown default: path = []
    }
    return path.reduce("") { place, key in
        if let index = key.intValue { return "\(place)[\(index)]" }
        return place.isEmpty ? key.stringValue : "\(place).\(key.stringValue)"
    }
}

/// Names that leave the bundle, or are a device, another file or no name on Windows. The JSON schema has the same pattern.
private let leaves = #"^$|^/|[\x00-\x1f<>:"|?*\\]|(^|/)(?!\.(/|$))[^/]*[. ](/|$)"#
    + #"|(^|/)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.[^/]*)?(/|$)"#

/// Tests whether a file name is a file inside the bundle on every system.
private func insideBundle(_ name: String) -> Bool {
    name.range(of: leaves, options: [.regularExpression, .caseInsensitive]) == nil && !name.isEmpty
}

private func check(_ folder: URL, _ name: String, _ file: Manifest.File) throws {
    let path = folder.appendingPathComponent(name)
    guard FileManager.default.fileExists(atPath: path.path) else {
        let message = "bundle \(folder.path): \(name) is missing"
        throw EvmError(.bundle, message, hint: "copy the whole bundle again", code: "file.missing", place: name)
    }
    let have: String
    do {
        have = try sha256(path)
    } catch {
        let message = "bundle \(folder.path): \(name) cannot be read: \(error.localizedDescription)"
        throw EvmError(.bundle, message, code: "file.missing", place: name)
    }
    guard have == file.sha256 else {
        let message = "bundle \(folder.path): \(name) is damaged (its sha256 differs)"
        throw EvmError(.bundle, message, hint: "copy the bundle again", code: "file.damaged", place: name)
    }
}

/// Returns the SHA-256 of a file, in hex. Throws the system's error.
func sha256(_ path: URL) throws -> String {
    let file = try FileHandle(forReadingFrom: path)
    defer { try? file.close() }
    var digest = SHA256()
    while let block = try file.read(upToCount: 1 << 20), !block.isEmpty { digest.update(data: block) }
    return digest.finalize().map { String(format: "%02x", $0) }.joined()
}
