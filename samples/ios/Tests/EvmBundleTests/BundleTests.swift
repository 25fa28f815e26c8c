// Tests of a bundle on this device. EVM_BUNDLE is the folder of a Core ML bundle.
// NOT COMPILED BY THIS PROJECT.
import XCTest

@testable import EvmBundle

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
        let checks = try Model(folder: bundle()).selfTest()
        XCTAssertGreaterThanOrEqual(checks.count, 2)
        for check in checks { XCTAssertTrue(check.ok, "\(check.name): \(check.error), limit \(check.limit)") }
    }

    func testAnImageHasClasses() throws {
        let model = try Model(folder: bundle())
        let image = try RgbImage(contentsOf: model.folder.appendingPathComponent("selftest/picture.png"))
        let found = try model.classify(model.pixels(image), top: 3)
        XCTAssertEqual(found.count, 3)
        XCTAssertGreaterThanOrEqual(found[0].score, found[1].score)
        XCTAssertLessThanOrEqual(found.map(\.score).reduce(0, +), 1.000001)
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
