// Reading of images as upright RGB bytes, as evm-deploy does in Python: alpha is dropped without multiplication, and the
// values are those in the file, without conversion of the colour profile.
// NOT RUN BY THIS PROJECT: it has no Mac. Compiled against stand-ins for Apple's modules.
#if canImport(ImageIO)
import Accelerate
import Foundation
import ImageIO

extension RgbImage {
    /// Decodes an image file and makes it upright. `name` names the image in errors. Throws EvmError.
    public init(data: Data, name: String) throws {
        guard let source = CGImageSourceCreateWithData(data as CFData, nil),
            let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else { throw EvmError(.image, "image \(name) is not an image that ImageIO can read") }
        let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
        let orientation = properties?[kCGImagePropertyOrientation] as? Int ?? 1
        self = try RgbImage(image, name: name).upright(orientation)
    }

    /// Reads an image file and makes it upright. Throws EvmError.
    public init(contentsOf url: URL) throws {
        guard let data = try? Data(contentsOf: url) else {
            throw EvmError(.image, "image \(url.path) does not exist")
        }
        try self.init(data: data, name: url.path)
    }

    /// Copies the pixels of an image as they are in memory, without rotation. Throws EvmError.
    public init(_ image: CGImage, name: String = "image") throws {
        let grey = image.colorSpace?.model == .monochrome
        let channels = grey ? 2 : 4  // the format has an alpha channel, which is dropped; without it alpha is multiplied in
        guard let space = grey ? image.colorSpace : rgbSpace(of: image),
            let format = vImage_CGImageFormat(
                bitsPerComponent: 8, bitsPerPixel: 8 * channels, colorSpace: space,
                bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.last.rawValue)),
            let buffer = try? vImage_Buffer(cgImage: image, format: format)
        else { throw EvmError(.image, "image \(name) cannot be read: unknown pixel format") }
        defer { buffer.free() }
        let bytes = buffer.data.assumingMemoryBound(to: UInt8.self)
        var rgb = [UInt8]()
        rgb.reserveCapacity(3 * image.width * image.height)
        for y in 0..<image.height {
            for x in 0..<image.width {
                let at = y * buffer.rowBytes + channels * x
                for channel in 0..<3 { rgb.append(bytes[at + (grey ? 0 : channel)]) }
            }
        }
        self.init(width: image.width, height: image.height, rgb: rgb)
    }

    /// The image as a CGImage, for display.
    public var cgImage: CGImage? {
        guard let provider = CGDataProvider(data: Data(rgb) as CFData) else { return nil }
        return CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 24, bytesPerRow: 3 * width,
            space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue),
            provider: provider, decode: nil, shouldInterpolate: true, intent: .defaultIntent)
    }
}

/// Returns the image's own RGB colour space, so that no value is converted. Images in other spaces, such as CMYK, get sRGB.
private func rgbSpace(of image: CGImage) -> CGColorSpace? {
    let own = image.colorSpace?.model == .indexed ? image.colorSpace?.baseColorSpace : image.colorSpace
    return own?.model == .rgb ? own : CGColorSpace(name: CGColorSpace.sRGB)
}
#endif
