// Tests with the preprocessing vectors of sdk/vectors, which every SDK must reproduce within 1 of 255.
import XCTest

@testable import EvmBundle

private struct Vectors: Decodable {
    struct Case: Decodable {
        let name: String
        let image: String
        let preprocessing: Manifest.Preprocess
        let width: Int
        let height: Int
        let expected: String?
        let code: String?
        let normalised: [[Double]]?
    }
    let tolerance: Int
    let cases: [Case]
}

private struct Predictions: Decodable {
    struct Outputs: Decodable {
        let boxes: [[Float]]
        let scores: [Float]
        let labels: [Int]
        let count: Int?
    }
    struct Detected: Decodable {
        let name: String
        let preprocessing: Manifest.Preprocess
        let image: [Int]
        let resized: [Int]
        let offset: [Int]
        let iou: Double
        let max_det: Int
        let outputs: Outputs
        let boxes: [[Double]]
        let labels: [Int]
    }
    struct Segmented: Decodable {
        let name: String
        let preprocessing: Manifest.Preprocess
        let image: [Int]
        let map: [[Int]]
        let expected: [[Int]]
    }
    let detections: [Detected]
    let label_maps: [Segmented]
}

private let folder = URL(fileURLWithPath: #filePath)
    .deletingLastPathComponent().appendingPathComponent("../../../../sdk/vectors").standardized

final class VectorTests: XCTestCase {
    private func vectors() throws -> Vectors {
        try JSONDecoder().decode(Vectors.self, from: Data(contentsOf: folder.appendingPathComponent("cases.json")))
    }

    private func rgbImage(_ name: String) throws -> RgbImage {
        try decoded(folder.appendingPathComponent(name))
    }

    private func difference(_ one: RgbImage, _ other: RgbImage) -> Int {
        XCTAssertEqual([one.width, one.height], [other.width, other.height])
        return zip(one.rgb, other.rgb).map { abs(Int($0) - Int($1)) }.max() ?? 0
    }

    func testEveryVector() throws {
        let vectors = try self.vectors()
        XCTAssertGreaterThan(vectors.cases.count, 20)
        for vector in vectors.cases {
            let source = try rgbImage(vector.image)
            XCTAssertEqual([source.width, source.height], [vector.width, vector.height], vector.name)
            guard let expected = vector.expected else {
                XCTAssertThrowsError(try vector.preprocessing.pixels(source)) { error in
                    XCTAssertEqual((error as? EvmError)?.code, vector.code)
                }
                continue
            }
            let want = try rgbImage(expected)
            let have = try vector.preprocessing.pixels(source)
            XCTAssertLessThanOrEqual(difference(have, want), vectors.tolerance, vector.name)
            let tensor = vector.preprocessing.normalised(want)
            for sample in vector.normalised ?? [] {
                let (c, y, x) = (Int(sample[0]), Int(sample[1]), Int(sample[2]))
                let value = tensor[(c * want.height + y) * want.width + x]
                XCTAssertEqual(Double(value), sample[3], accuracy: 1e-5, vector.name)
            }
        }
    }

    /// Boxes within rounding, labels and label maps equal.
    func testEveryPrediction() throws {
        let file = folder.appendingPathComponent("predictions.json")
        let predictions = try JSONDecoder().decode(Predictions.self, from: Data(contentsOf: file))
        for each in predictions.detections {
            let place = try each.preprocessing.geometry(blank(each.image))
            XCTAssertEqual([place.vertical.resized, place.horizontal.resized], each.resized, each.name)
            XCTAssertEqual([place.vertical.offset, place.horizontal.offset], each.offset, each.name)
            var outputs = ["boxes": each.outputs.boxes.flatMap { $0 }, "scores": each.outputs.scores]
            outputs["labels"] = each.outputs.labels.map(Float.init)
            outputs["count"] = each.outputs.count.map { [Float($0)] }
            let selection = Selection(iou: each.iou, most: each.max_det)
            let found = detections(outputs, images: 1, selection: selection, place: place, labels: [])
            XCTAssertEqual(found.map(\.index), each.labels, each.name)
            for (have, want) in zip(found, each.boxes) {
                for (one, other) in zip([have.box.x1, have.box.y1, have.box.x2, have.box.y2], want) {
                    XCTAssertEqual(one, other, accuracy: 1e-9, each.name)
                }
            }
        }
        for each in predictions.label_maps {
            let map = try each.preprocessing.geometry(blank(each.image)).toImage(each.map.flatMap { $0 })
            XCTAssertEqual(map.classes, each.expected.flatMap { $0 }, each.name)
        }
    }

    /// The hashes of bundles: lengths around those at which another block begins.
    func testHashes() throws {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        addTeardownBlock { try? FileManager.default.removeItem(at: file) }
        let known = [
            0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            55: "463eb28e72f82e0a96c0a4cc53690c571281131f672aa229e0d45ae59b598b59",
            56: "da2ae4d6b36748f2a318f23e7ab1dfdf45acdc9d049bd80e59de82a60895f562",
            63: "29af2686fd53374a36b0846694cc342177e428d1647515f078784d69cdb9e488",
            64: "fdeab9acf3710362bd2658cdc9a29e8f9c757fcf9811603a8c447cd1d9151108",
            65: "4bfd2c8b6f1eec7a2afeb48b934ee4b2694182027e6d0fc075074f2fabb31781",
            119: "da18797ed7c3a777f0847f429724a2d8cd5138e6ed2895c3fa1a6d39d18f7ec6",
            120: "f52b23db1fbb6ded89ef42a23ce0c8922c45f25c50b568a93bf1c075420bbb7c",
            1000: "a8af099bf2e878609558dbf69d8f88f4a31040a8cf84b549a0cfa912f12ffc3f",
        ]
        for (length, hash) in known {
            try Data((0..<length).map { UInt8(truncatingIfNeeded: $0) }).write(to: file)
            XCTAssertEqual(try sha256(file), hash, "\(length) bytes")
        }
    }

    private func blank(_ size: [Int]) -> RgbImage {
        RgbImage(width: size[1], height: size[0], rgb: [UInt8](repeating: 0, count: 3 * size[0] * size[1]))
    }

    /// Negative control: another filter and a rotated image exceed the limit.
    func testTheLimitCanFail() throws {
        let square = try rgbImage("square.expected.png")
        XCTAssertGreaterThan(difference(square, try rgbImage("bilinear.expected.png")), 1)
        XCTAssertGreaterThan(difference(square, square.upright(3)), 1)
        XCTAssertEqual(difference(square, square.upright(6).upright(8)), 0)
    }
}
