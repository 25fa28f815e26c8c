// RGB images: the type that the package reads and makes, its turns, and its luminance. ImageDecoding.swift reads files.

/// An RGB image: `rgb` has `width` * `height` * 3 bytes, row by row.
public struct RgbImage: Sendable {
    public let width: Int
    public let height: Int
    public let rgb: [UInt8]

    public init(width: Int, height: Int, rgb: [UInt8]) {
        precondition(width > 0 && height > 0 && rgb.count == 3 * width * height)
        (self.width, self.height, self.rgb) = (width, height, rgb)
    }

    /// Rotates and mirrors the image from the Exif `orientation`, 1 to 8, to upright.
    public func upright(_ orientation: Int) -> RgbImage {
        let (right, bottom) = (width - 1, height - 1)
        switch orientation {
        case 2: return turned(width, height) { x, y in (right - x, y) }
        case 3: return turned(width, height) { x, y in (right - x, bottom - y) }
        case 4: return turned(width, height) { x, y in (x, bottom - y) }
        case 5: return turned(height, width) { x, y in (y, x) }
        case 6: return turned(height, width) { x, y in (y, bottom - x) }
        case 7: return turned(height, width) { x, y in (right - y, bottom - x) }
        case 8: return turned(height, width) { x, y in (right - y, x) }
        default: return self
        }
    }

    /// Returns the luminance, as Pillow computes it, in all three channels.
    func grey() -> RgbImage {
        var out = [UInt8]()
        out.reserveCapacity(rgb.count)
        for at in stride(from: 0, to: rgb.count, by: 3) {
            let sum = Int(rgb[at]) * 19595 + Int(rgb[at + 1]) * 38470 + Int(rgb[at + 2]) * 7471
            let value = UInt8((sum + 0x8000) >> 16)
            out.append(contentsOf: [value, value, value])
        }
        return RgbImage(width: width, height: height, rgb: out)
    }

    private func turned(_ newWidth: Int, _ newHeight: Int, _ source: (Int, Int) -> (Int, Int)) -> RgbImage {
        var out = [UInt8]()
        out.reserveCapacity(rgb.count)
        for y in 0..<newHeight {
            for x in 0..<newWidth {
                let (fromX, fromY) = source(x, y)
                let at = 3 * (fromY * width + fromX)
                out.append(contentsOf: rgb[at..<(at + 3)])
            }
        }
        return RgbImage(width: newWidth, height: newHeight, rgb: out)
    }
}
