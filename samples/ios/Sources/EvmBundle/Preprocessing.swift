// Preprocessing of a bundle: make an image the size of the model's input. `crop` resizes the image until it covers
// size / crop_pct and crops the centre; `stretch` resizes it to the size; `pad` resizes it to fit, with the aspect ratio kept,
// and fills the right and the bottom with the mean. The arithmetic is Pillow's, so that an app reads the pixels that the
// export was verified with.

private let maxSide = 8192
private let maxChannels = 1024
private let resizes = ["crop", "stretch", "pad"]

extension Manifest.Preprocess {
    var height: Int { size[0] }
    var width: Int { size[1] }
    /// Number of channels of the model's input: 3 for RGB, 1 for grey. No images can be given for others.
    public var channels: Int { mean.count }
    /// Whether images can be given.
    public var readsImages: Bool { channels == 1 || channels == 3 }
    private var mode: String { resize ?? "crop" }

    func validate() throws {
        try require(size.count == 2, "preprocessing.size", "must be [H, W]")
        for (i, side) in size.enumerated() {
            try require((1...maxSide).contains(side), "preprocessing.size[\(i)]", "must be 1 to \(maxSide)")
        }
        try require(resizes.contains(mode), "preprocessing.resize", "is unknown")
        let share = mode == "crop" ? crop_pct ?? 0 : 1
        try require(share > 0 && share <= 1, "preprocessing.crop_pct", "must be over 0 and at most 1")
        try require(Filter(rawValue: interpolation) != nil, "preprocessing.interpolation", "is unknown")
        try require((1...maxChannels).contains(mean.count), "preprocessing.mean", "must be one number for each channel")
        try require(std.count == mean.count, "preprocessing.std", "must have as many values as mean")
        for (i, value) in std.enumerated() { try require(value > 0, "preprocessing.std[\(i)]", "must be above 0") }
    }

    /// Makes `image` the model's size. The pixels of a grey model have three equal channels. `name` names the image in
    /// errors. Throws EvmError if the image is too narrow to be cropped, or if the model reads no images.
    public func pixels(_ image: RgbImage, name: String = "image") throws -> RgbImage {
        guard readsImages else {
            let message = "the network takes \(channels) channels: images here are grey or RGB"
            throw EvmError(.image, message, hint: "give tensors: run(_:)")
        }
        let source = channels == 1 ? image.grey() : image
        let filter = Filter(rawValue: interpolation) ?? .bicubic  // validated
        let place = try geometry(image, name: name)
        let (down, across) = (place.vertical, place.horizontal)
        let crop = Crop(
            left: across.first - across.offset, top: down.first - down.offset,
            width: across.end - across.first, height: down.end - down.first)
        return padded(source.resized(toWidth: across.resized, toHeight: down.resized, crop: crop, filter: filter))
    }

    /// Returns the place of the upright `image` in the model's input. `name` names the image in errors. Throws EvmError if
    /// the image is too narrow to be cropped.
    public func geometry(_ image: RgbImage, name: String = "image") throws -> Geometry {
        if mode == "crop" { return try cropped(image, name: name) }
        var (newHeight, newWidth) = (height, width)
        if mode == "pad" {
            let scale = min(Double(height) / Double(image.height), Double(width) / Double(image.width))
            (newHeight, newWidth) = (fitted(image.height, scale), fitted(image.width, scale))
        }
        return Geometry(
            vertical: Axis(original: image.height, resized: newHeight, size: height, offset: 0),
            horizontal: Axis(original: image.width, resized: newWidth, size: width, offset: 0))
    }

    private func cropped(_ image: RgbImage, name: String) throws -> Geometry {
        let (wantHeight, wantWidth) = (covered(height), covered(width))
        var (newHeight, newWidth) = (wantHeight, wantWidth)
        if wantHeight * image.width >= wantWidth * image.height {  // the height decides
            newWidth = wantHeight * image.width / image.height
        } else {
            newHeight = wantWidth * image.height / image.width
        }
        (newHeight, newWidth) = (max(newHeight, height), max(newWidth, width))
        guard max(newHeight, newWidth) <= 100 * max(height, width) else {
            let shape = "\(image.width)x\(image.height)"
            let message = "\(name) is \(shape): too narrow to be cropped to \(width)x\(height)"
            throw EvmError(.image, message, code: "image.narrow")
        }
        return Geometry(
            vertical: Axis(original: image.height, resized: newHeight, size: height, offset: -centre(newHeight, height)),
            horizontal: Axis(original: image.width, resized: newWidth, size: width, offset: -centre(newWidth, width)))
    }

    private func padded(_ image: RgbImage) -> RgbImage {
        if image.width == width && image.height == height { return image }
        let fill = (0..<3).map { channel -> UInt8 in
            let value = (255 * mean[channel % channels]).rounded(.toNearestOrEven)
            return UInt8(min(max(value, 0), 255))
        }
        var out = [UInt8]()
        out.reserveCapacity(3 * width * height)
        for y in 0..<height {
            let row = y < image.height ? image.rgb[(3 * y * image.width)..<(3 * (y + 1) * image.width)] : []
            out.append(contentsOf: row)
            for _ in (row.count / 3)..<width { out.append(contentsOf: fill) }
        }
        return RgbImage(width: width, height: height, rgb: out)
    }

    /// Returns the bytes of `pixels` that a model with the input `image` reads: `channels` for each pixel.
    public func bytes(_ pixels: RgbImage) -> [UInt8] {
        channels == 3 ? pixels.rgb : stride(from: 0, to: pixels.rgb.count, by: 3).map { pixels.rgb[$0] }
    }

    /// Normalises pixels to channels-first floats, for a model exported with `--input tensor`. Other models normalise the
    /// pixels themselves.
    public func normalised(_ pixels: RgbImage) -> [Float] {
        (0..<channels).flatMap { channel in
            let (mean, std) = (255 * Float(self.mean[channel]), 255 * Float(self.std[channel]))
            return stride(from: channel, to: pixels.rgb.count, by: 3).map { (Float(pixels.rgb[$0]) - mean) / std }
        }
    }

    private func covered(_ side: Int) -> Int {
        // avoids overflow; cropped(_:name:) refuses such sizes
        Int(min((Double(side) / (crop_pct ?? 1)).rounded(.toNearestOrEven), 1e9))
    }
}

private func fitted(_ side: Int, _ scale: Double) -> Int { max(1, Int(Double(side) * scale + 0.5)) }

private func centre(_ have: Int, _ want: Int) -> Int { Int((Double(have - want) / 2).rounded(.toNearestOrEven)) }
