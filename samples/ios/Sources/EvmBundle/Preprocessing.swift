// Preprocessing of a bundle: resize the image, with antialiasing, until it covers size / crop_pct, and crop the centre. The
// arithmetic is Pillow's, so that an app reads the pixels that the export was verified with.
// NOT COMPILED BY THIS PROJECT.

private let maxSide = 8192

extension Manifest.Preprocess {
    var height: Int { size[0] }
    var width: Int { size[1] }

    func validate() throws {
        try require(size.count == 2, "preprocessing.size", "must be [H, W]")
        for (i, side) in size.enumerated() {
            try require((1...maxSide).contains(side), "preprocessing.size[\(i)]", "must be 1 to \(maxSide)")
        }
        try require(crop_pct > 0 && crop_pct <= 1, "preprocessing.crop_pct", "must be over 0 and at most 1")
        try require(Filter(rawValue: interpolation) != nil, "preprocessing.interpolation", "is unknown")
        try require(mean.count == 3, "preprocessing.mean", "must be three numbers")
        try require(std.count == 3, "preprocessing.std", "must be three numbers")
        for (i, value) in std.enumerated() { try require(value > 0, "preprocessing.std[\(i)]", "must be above 0") }
    }

    /// Resizes and crops `image` to the model's size. `name` names the image in errors. Throws EvmError if the image is too
    /// narrow to be cropped.
    public func pixels(_ image: RgbImage, name: String = "image") throws -> RgbImage {
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
        let crop = Crop(left: centre(newWidth, width), top: centre(newHeight, height), width: width, height: height)
        let filter = Filter(rawValue: interpolation) ?? .bicubic  // validated
        return image.resized(toWidth: newWidth, toHeight: newHeight, crop: crop, filter: filter)
    }

    /// Normalises pixels to channels-first floats, for a model exported with `--input tensor`. Other models normalise the
    /// pixels themselves.
    public func normalised(_ pixels: RgbImage) -> [Float] {
        (0..<3).flatMap { channel in
            let (mean, std) = (255 * Float(self.mean[channel]), 255 * Float(self.std[channel]))
            return stride(from: channel, to: pixels.rgb.count, by: 3).map { (Float(pixels.rgb[$0]) - mean) / std }
        }
    }

    private func covered(_ side: Int) -> Int {
        Int(min((Double(side) / crop_pct).rounded(.toNearestOrEven), 1e9))  // avoids overflow; pixels(_:) refuses such sizes
    }
}

private func centre(_ have: Int, _ want: Int) -> Int { Int((Double(have - want) / 2).rounded(.toNearestOrEven)) }
