// Place of an image in the model's input, and the way back from the input's pixels to the image.

/// Corners of a box in pixels, from the left and the top edge of the image.
public struct Box: Sendable {
    public let x1: Double
    public let y1: Double
    public let x2: Double
    public let y2: Double
}

/// Class of each pixel of an image, row by row, from 0.
public struct LabelMap: Sendable {
    public let width: Int
    public let height: Int
    public let classes: [Int]

    /// Returns the class of the pixel in column `x` and row `y`.
    public func at(_ x: Int, _ y: Int) -> Int { classes[y * width + x] }
}

/// One axis of a Geometry. `offset`: of the resized image in the input, negative where the crop cuts it. In pixels.
public struct Axis: Sendable {
    public let original: Int
    public let resized: Int
    public let size: Int
    public let offset: Int

    /// First pixel of the input that shows the image.
    public var first: Int { max(0, offset) }
    /// The pixel after the last one that shows the image.
    public var end: Int { min(size, offset + resized) }

    /// Maps a coordinate of the input to the image.
    public func toImage(_ at: Double) -> Double { (at - Double(offset)) / (Double(resized) / Double(original)) }

    /// Returns the pixel of the input of each pixel of the image: the nearest one inside.
    func nearest() -> [Int] {
        (0..<original).map { min(max((2 * $0 + 1) * resized / (2 * original) + offset, first), end - 1) }
    }
}

/// Place of an image in the model's input, after the resize and the crop or the padding. Pixel i of an axis covers i to
/// i + 1.
public struct Geometry: Sendable {
    public let vertical: Axis
    public let horizontal: Axis

    /// Maps a box in pixels of the input to pixels of the image. Nothing is clipped.
    public func toImage(_ box: Box) -> Box {
        Box(
            x1: horizontal.toImage(box.x1), y1: vertical.toImage(box.y1),
            x2: horizontal.toImage(box.x2), y2: vertical.toImage(box.y2))
    }

    /// Maps labels of the input, row by row, to those of the nearest pixels of the image, with the same result as in
    /// Python. A pixel that a crop leaves out gets the label of the nearest pixel inside.
    public func toImage(_ labels: [Int]) -> LabelMap {
        let (rows, columns) = (vertical.nearest(), horizontal.nearest())
        let classes = rows.flatMap { y in columns.map { labels[y * horizontal.size + $0] } }
        return LabelMap(width: columns.count, height: rows.count, classes: classes)
    }
}
