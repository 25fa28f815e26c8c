// Stand-in for Apple's Accelerate: the declarations that samples/ios uses, without their function.
import ImageIO

public struct vImage_CGImageFormat {
    public init?(
        bitsPerComponent: Int, bitsPerPixel: Int, colorSpace: CGColorSpace, bitmapInfo: CGBitmapInfo,
        renderingIntent: CGColorRenderingIntent = .defaultIntent
    ) { return nil }
}
public struct vImage_Buffer {
    public init(cgImage: CGImage, format: vImage_CGImageFormat) throws { fatalError() }
    public var data: UnsafeMutableRawPointer! { fatalError() }
    public var rowBytes: Int { fatalError() }
    public func free() {}
}
