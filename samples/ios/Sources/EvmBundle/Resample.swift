// Resampling equal to Pillow's: rows first, then columns, in fixed point, with rounding to bytes in between.

/// A resampling filter. `support`: reach; `weight`: weight at a distance; both in pixels of the smaller image.
enum Filter: String {
    case bilinear, bicubic
    case bilinearOpenCV = "bilinear-opencv"

    var support: Double { self == .bicubic ? 2 : 1 }
    var antialiasing: Bool { self != .bilinearOpenCV }

    func weight(_ distance: Double) -> Double {
        let x = abs(distance)
        switch self {
        case .bilinear, .bilinearOpenCV: return max(0, 1 - x)
        case .bicubic: return cubic(x)
        }
    }
}

/// Keys' cubic with a = -0.5.
private func cubic(_ x: Double) -> Double {
    if x < 1 { return (1.5 * x - 2.5) * x * x + 1 }
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0
}

/// A part of a resized image.
struct Crop {
    let left, top, width, height: Int
}

extension RgbImage {
    /// Resizes the image to `toWidth` x `toHeight` and returns the part `crop`.
    func resized(toWidth: Int, toHeight: Int, crop: Crop, filter: Filter) -> RgbImage {
        let across = windows(from: width, to: toWidth, first: crop.left, count: crop.width, filter)
        let down = windows(from: height, to: toHeight, first: crop.top, count: crop.height, filter)
        let first = down.map(\.start).min() ?? 0
        let end = down.map { $0.start + $0.weights.count }.max() ?? 0
        let stride = 3 * crop.width
        var narrow = [UInt8](repeating: 0, count: (end - first) * stride)
        for y in first..<end {
            alongRow(rgb, row: 3 * y * width, across, into: &narrow, at: (y - first) * stride)
        }
        var out = [UInt8](repeating: 0, count: crop.height * stride)
        for (y, window) in down.enumerated() {
            alongColumns(narrow, window, first: first, stride: stride, into: &out, at: y * stride)
        }
        return RgbImage(width: crop.width, height: crop.height, rgb: out)
    }
}

private let precisionBits = 22
private let half: Int32 = 1 << (precisionBits - 1)

/// The weights of the input pixels from `start` on that make one output pixel, in units of 2^-22.
private struct Window {
    let start: Int
    let weights: [Int32]
}

/// Returns the windows of `count` output pixels from `first` on, for an axis of `from` pixels resized to `to`.
private func windows(from: Int, to: Int, first: Int, count: Int, _ filter: Filter) -> [Window] {
    let scale = Double(from) / Double(to)
    let stretch = filter.antialiasing ? max(scale, 1) : 1  // the filter is at least as wide as an output pixel
    let support = filter.support * stretch
    return (first..<(first + count)).map { output in
        let center = (Double(output) + 0.5) * scale
        let start = max(0, Int(center - support + 0.5))
        let end = min(from, Int(center + support + 0.5))
        let weights = (start..<end).map { filter.weight((Double($0) - center + 0.5) * (1 / stretch)) }
        let sum = weights.reduce(0, +)
        return Window(start: start, weights: weights.map { fixed(sum == 0 ? $0 : $0 / sum) })
    }
}

/// Converts a weight to fixed point, rounding halves away from zero.
private func fixed(_ weight: Double) -> Int32 {
    Int32(weight * Double(1 << precisionBits) + (weight < 0 ? -0.5 : 0.5))
}

private func byte(_ sum: Int32) -> UInt8 { UInt8(clamping: sum >> Int32(precisionBits)) }

private func alongRow(_ rgb: [UInt8], row: Int, _ windows: [Window], into out: inout [UInt8], at: Int) {
    for (x, window) in windows.enumerated() {
        var (red, green, blue) = (half, half, half)
        var from = row + 3 * window.start
        for weight in window.weights {
            red += weight * Int32(rgb[from])
            green += weight * Int32(rgb[from + 1])
            blue += weight * Int32(rgb[from + 2])
            from += 3
        }
        let to = at + 3 * x
        (out[to], out[to + 1], out[to + 2]) = (byte(red), byte(green), byte(blue))
    }
}

private func alongColumns(
    _ rgb: [UInt8], _ window: Window, first: Int, stride: Int, into out: inout [UInt8], at: Int
) {
    var sums = [Int32](repeating: half, count: stride)
    for (i, weight) in window.weights.enumerated() {
        let row = (window.start - first + i) * stride
        for x in 0..<stride { sums[x] += weight * Int32(rgb[row + x]) }
    }
    for x in 0..<stride { out[at + x] = byte(sums[x]) }
}
