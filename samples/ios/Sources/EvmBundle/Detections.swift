// Decoding of the outputs of a detector, with the arithmetic of Python: float32 in the selection.

/// One detected object of an image. `score`: probability, 0..1. `box`: in pixels of the image.
public struct Detection: Sendable {
    public let label: String
    public let index: Int
    public let score: Double
    public let box: Box
}

/// Settings of the selection, for a detector without non-maximum suppression (NMS): of two boxes of a class that overlap by
/// more than `iou`, the one with the lower score is dropped. `most`: most detections of an image.
public struct Selection: Sendable {
    public let iou: Double
    public let most: Int
}

/// Intersection over union from which two boxes of a class are the same detection.
private let same: Float = 0.5

/// A row of a detector's outputs. `at`: its number in the batch. `box`: x1, y1, x2, y2 in pixels of the model's input.
struct Row {
    let at: Int
    let box: [Float]
    let score: Float
    let label: Int
}

/// Returns the detections of the first image of `outputs`, by falling score. Without labels, a class is named `class 7`.
public func detections(
    _ outputs: [String: [Float]], images: Int, selection: Selection, place: Geometry, labels: [String]
) -> [Detection] {
    let found = clipped(rows(outputs, image: 0, of: images).filter { $0.score > 0 }, place)
    let kept = outputs["count"] == nil ? suppressed(found, selection) : found
    return kept.map { row in
        let side = row.box.map(Double.init)
        let box = place.toImage(Box(x1: side[0], y1: side[1], x2: side[2], y2: side[3]))
        let name = labels.indices.contains(row.label) ? labels[row.label] : "class \(row.label)"
        return Detection(label: name, index: row.label, score: Double(row.score), box: box)
    }
}

/// Returns the rows of `image`, one of `images`, that hold a detection, or a candidate if there is no count.
func rows(_ outputs: [String: [Float]], image: Int, of images: Int) -> [Row] {
    guard let boxes = outputs["boxes"], let scores = outputs["scores"], let labels = outputs["labels"] else { return [] }
    let all = scores.count / images
    let count = outputs["count"].map { min(Int($0[image]), all) } ?? all
    return (image * all..<image * all + count).filter { labels[$0] >= 0 }.map {
        Row(at: $0, box: Array(boxes[4 * $0..<4 * $0 + 4]), score: scores[$0], label: Int(labels[$0]))
    }
}

/// Clips boxes to the part of the input that shows the image, and leaves out those that become empty.
private func clipped(_ rows: [Row], _ place: Geometry) -> [Row] {
    rows.map { row in
        let box = row.box.enumerated().map { side, value in
            let axis = side % 2 == 0 ? place.horizontal : place.vertical
            return min(max(value, Float(axis.first)), Float(axis.end))
        }
        return Row(at: row.at, box: box, score: row.score, label: row.label)
    }
    .filter { $0.box[2] > $0.box[0] && $0.box[3] > $0.box[1] }
}

/// Greedy non-maximum suppression of each class, in float32 as in Python: boxes of different classes are shifted apart.
private func suppressed(_ rows: [Row], _ selection: Selection) -> [Row] {
    let largest = rows.flatMap(\.box).reduce(Float(0), max)
    let step = Float(Double(largest) + 1)
    let limit = Float(selection.iou)
    let apart = rows.map { row in row.box.map { $0 + Float(row.label) * step } }
    let order = rows.indices.sorted { rows[$0].score > rows[$1].score || (rows[$0].score == rows[$1].score && $0 < $1) }
    var kept: [Int] = []
    for index in order {
        if kept.count == selection.most { break }
        if kept.allSatisfy({ !(overlap(apart[$0], apart[index]) > limit) }) { kept.append(index) }
    }
    return kept.map { rows[$0] }
}

/// Returns the intersection over union of two boxes; 0 for empty boxes.
private func overlap(_ a: [Float], _ b: [Float]) -> Float {
    let width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    let height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    let inter = width * height
    let areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    let union = areas - inter
    return inter / (union > 0 ? union : 1)
}

/// Pairs the rows of two runs of a detector that are the same detection: the same label, an overlap of at least `same`, and
/// scores and corners that agree within the tolerance, that of corners relative to the largest. The nearest pairs come first.
/// `share`, 0..1, of the rows are in a pair; rows whose score is within the tolerance of nothing do not count. `pairs` has
/// the rows' numbers.
func align(
    _ expected: [String: [Float]], _ actual: [String: [Float]], images: Int, tolerance: Double
) -> (share: Double, pairs: [(expected: Int, actual: Int)]) {
    var pairs: [(expected: Int, actual: Int)] = []
    var (paired, count) = (0, 0)
    let counts = { (row: Row) in Double(row.score) <= tolerance ? 0 : 1 }  // NaN counts
    for image in 0..<images {
        let (ours, theirs) = (rows(expected, image: image, of: images), rows(actual, image: image, of: images))
        count += (ours + theirs).map(counts).reduce(0, +)
        var (takenA, takenB) = (Set<Int>(), Set<Int>())
        for (a, b) in nearest(ours, theirs, tolerance: tolerance) {
            if takenA.contains(a.at) || takenB.contains(b.at) { continue }
            takenA.insert(a.at)
            takenB.insert(b.at)
            paired += counts(a) + counts(b)
            pairs.append((a.at, b.at))
        }
    }
    return (count > 0 ? Double(paired) / Double(count) : 1, pairs)
}

/// Returns every two rows that may be the same detection, the nearest first.
private func nearest(_ ours: [Row], _ theirs: [Row], tolerance: Double) -> [(Row, Row)] {
    let largest = ours.flatMap(\.box).map { abs(Double($0)) }.reduce(1, max)
    var found: [(far: Double, pair: (Row, Row))] = []
    for a in ours {
        for b in theirs where a.label == b.label {
            let (apart, share) = (abs(Double(a.score) - Double(b.score)), overlap(a.box, b.box))
            let near = zip(a.box, b.box).allSatisfy { abs(Double($0) - Double($1)) <= tolerance * largest }
            if share >= same && apart <= tolerance && near { found.append((apart - Double(share), (a, b))) }
        }
    }
    return found.sorted { $0.far < $1.far }.map(\.pair)
}
