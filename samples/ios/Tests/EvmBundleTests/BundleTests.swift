// Tests of a bundle, and of the command, on this device. EVM_BUNDLE is the folder of a Core ML bundle.
import XCTest

@testable import EvmBundle
@testable import EvmRun

final class BundleTests: XCTestCase {
    private func bundle() throws -> URL {
        guard let path = ProcessInfo.processInfo.environment["EVM_BUNDLE"] else {
            throw XCTSkip("set EVM_BUNDLE to the folder of a Core ML bundle")
        }
        return URL(fileURLWithPath: path)
    }

    /// Copies the bundle, damages the copy with `damage`, and returns its folder.
    private func damaged(_ damage: (URL) throws -> Void) throws -> URL {
        let copy = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.copyItem(at: bundle(), to: copy)
        addTeardownBlock { try? FileManager.default.removeItem(at: copy) }
        try damage(copy)
        return copy
    }

    private func fault(_ folder: URL) -> [String] {
        do {
            _ = try Manifest.open(folder)
            return ["opened"]
        } catch { return [(error as? EvmError)?.code ?? "\(error)", (error as? EvmError)?.place ?? ""] }
    }

    func testTheSelfTestPasses() throws {
        let checks = try Model(folder: bundle(), open: opened).selfTest(decode: decoded)
        XCTAssertGreaterThanOrEqual(checks.count, 2)
        for check in checks { XCTAssertTrue(check.ok, "\(check.name): \(check.error), limit \(check.limit)") }
    }

    func testAnImageHasClasses() throws {
        let model = try Model(folder: bundle(), open: opened)
        guard model.manifest.plan.classifies else { throw XCTSkip("the bundle is no classifier") }
        let image = try decoded(model.folder.appendingPathComponent("selftest/picture.png"))
        let found = try model.classify(model.pixels(image), top: 3)
        XCTAssertEqual(found.count, 3)
        XCTAssertGreaterThanOrEqual(found[0].score, found[1].score)
        XCTAssertLessThanOrEqual(found.map(\.score).reduce(0, +), 1.000001)
        XCTAssertThrowsError(try model.classify(image)) { error in
            XCTAssertEqual((error as? EvmError)?.kind, .usage)  // of another size than the model's
        }
    }

    func testTheCommandPasses() throws {
        let folder = try bundle()
        let image = folder.appendingPathComponent("selftest/picture.png").path
        var lines: [String] = []
        XCTAssertEqual(command([folder.path, image], open: opened, decode: decoded) { lines.append($0) }, 0)
        guard let verdict = lines.firstIndex(of: "PASSED") else { return XCTFail("\(lines)") }
        XCTAssertGreaterThanOrEqual(verdict, 2)
        print(lines.map { "evm-run-coreml: \($0)" }.joined(separator: "\n"))
    }

    func testTheCommandFails() throws {
        let folder = try bundle()
        let far = { (artifact: URL, function: String?) in Shifted(runtime: try opened(artifact, function)) as any Runtime }
        XCTAssertEqual(command([folder.path], open: far, decode: decoded) { _ in }, 4)
        XCTAssertEqual(command([folder.path + "-not-there"], open: opened, decode: decoded) { _ in }, 2)
        XCTAssertEqual(command([], open: opened, decode: decoded) { _ in }, 2)
    }

    func testDamageIsNamed() throws {
        let whole = try damaged { _ in }  // outside of XCTAssertEqual, which takes a skip for a failure
        XCTAssertEqual(fault(whole), ["opened"])
        let gone = try damaged { try FileManager.default.removeItem(at: $0) }
        XCTAssertEqual(fault(gone), ["bundle.missing", ""])
        let bare = try damaged { try FileManager.default.removeItem(at: $0.appendingPathComponent("manifest.json")) }
        XCTAssertEqual(fault(bare), ["manifest.missing", ""])
        let list = try damaged { try Data("[]".utf8).write(to: $0.appendingPathComponent("manifest.json")) }
        XCTAssertEqual(fault(list), ["manifest.damaged", ""])
        let other = try damaged { try Data("other".utf8).write(to: $0.appendingPathComponent("README.md")) }
        XCTAssertEqual(fault(other), ["file.damaged", "README.md"])
        let cut = try damaged { try FileManager.default.removeItem(at: $0.appendingPathComponent("README.md")) }
        XCTAssertEqual(fault(cut), ["file.missing", "README.md"])
    }
}

/// Negative control: a runtime whose outputs are wrong by 1.
private struct Shifted: Runtime {
    let runtime: any Runtime

    func run(_ feeds: [String: Tensor]) throws -> [String: Tensor] {
        try runtime.run(feeds).mapValues { Tensor($0.floats.map { $0 + 1 }, shape: $0.shape) }
    }
}
