// Tests with the preprocessing vectors of sdk/vectors, which every SDK must reproduce within 1 of 255.
// NOT COMPILED BY THIS PROJECT.
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
        try RgbImage(contentsOf: folder.appendingPathComponent(name))
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
