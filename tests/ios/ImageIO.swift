// Stand-in for Apple's ImageIO and Core Graphics: the declarations that samples/ios uses, without their function.
import Foundation

public typealias CFData = Data
public typealias CFString = String
public typealias CFDictionary = NSDictionary
public typealias CGFloat = Double
public final class CGImageSource {}
public enum CGColorSpaceModel: Int32 { case unknown = -1, monochrome, rgb, cmyk, lab, deviceN, indexed, pattern, XYZ }
public enum CGImageAlphaInfo: UInt32 { case none, premultipliedLast, premultipliedFirst, last, first, noneSkipLast }
public enum CGColorRenderingIntent: Int32 { case defaultIntent }
public struct CGBitmapInfo: OptionSet {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
}
public final class CGColorSpace {
    public static let sRGB: CFString = ""
    public init?(name: CFString) { return nil }
    public var model: CGColorSpaceModel { fatalError() }
    public var baseColorSpace: CGColorSpace? { fatalError() }
}
public final class CGDataProvider {
    public init?(data: CFData) { return nil }
}
public final class CGImage {
    public init?(
        width: Int, height: Int, bitsPerComponent: Int, bitsPerPixel: Int, bytesPerRow: Int, space: CGColorSpace,
        bitmapInfo: CGBitmapInfo, provider: CGDataProvider, decode: UnsafePointer<CGFloat>?, shouldInterpolate: Bool,
        intent: CGColorRenderingIntent
    ) { return nil }
    public var width: Int { fatalError() }
    public var height: Int { fatalError() }
    public var colorSpace: CGColorSpace? { fatalError() }
}
public let kCGImagePropertyOrientation: CFString = ""
public func CGColorSpaceCreateDeviceRGB() -> CGColorSpace { fatalError() }
public func CGImageSourceCreateWithData(_ data: CFData, _ options: CFDictionary?) -> CGImageSource? { fatalError() }
public func CGImageSourceCreateImageAtIndex(_ source: CGImageSource, _ index: Int, _ options: CFDictionary?) -> CGImage? {
    fatalError()
}
public func CGImageSourceCopyPropertiesAtIndex(
    _ source: CGImageSource, _ index: Int, _ options: CFDictionary?
) -> CFDictionary? { fatalError() }
