package evm

import kotlin.math.max
import kotlin.math.min
import kotlin.math.round

private const val MAX_SIDE = 8192L
private const val MAX_CHANNELS = 1024
private val FILTERS = mapOf(
    "bicubic" to Filter.BICUBIC, "bilinear" to Filter.BILINEAR, "bilinear-opencv" to Filter.BILINEAR_OPENCV,
)

/**
 * Preprocessing of a bundle. [resize]: `crop` resizes an image until it covers size / crop_pct and crops the centre;
 * `stretch` resizes it to [height] x [width]; `pad` resizes it to fit, with the aspect ratio kept, and fills the right and
 * the bottom with the mean. [mean] and [std]: one value for each channel of the network's input, for channels scaled to
 * 0..1.
 */
class Preprocessing private constructor(
    val height: Int,
    val width: Int,
    val resize: String,
    private val cropPct: Double,
    private val filter: Filter,
    private val mean: List<Double>,
    private val std: List<Double>,
) {
    /** Number of channels of the network's input: 3 for RGB, 1 for grey. No images can be given for others. */
    val channels: Int get() = mean.size

    /** Tells whether images can be given. */
    val readsImages: Boolean get() = channels == 1 || channels == 3

    /**
     * Makes [image] [height] x [width] pixels. Those of a grey network have three equal channels. [name] names the image in
     * errors. Throws [ImageException] if the image is too narrow to be cropped, or if the network reads no images.
     */
    fun pixels(image: RgbImage, name: String = "image"): RgbImage {
        if (!readsImages) {
            val message = "the network takes $channels channels: images here are grey or RGB"
            throw ImageException(message, "give tensors: run(feeds)")
        }
        val source = if (channels == 1) image.grey() else image
        val (down, across) = geometry(image, name).run { vertical to horizontal }
        val crop = Crop(across.first - across.offset, down.first - down.offset, across.end - across.first, down.end - down.first)
        return padded(source.resized(across.resized, down.resized, crop, filter))
    }

    /**
     * Returns the place of the upright [image] in the network's input. [name] names the image in errors. Throws
     * [ImageException] if the image is too narrow to be cropped.
     */
    fun geometry(image: RgbImage, name: String = "image"): Geometry {
        if (resize == "crop") return cropped(image, name)
        val scale = if (resize == "pad") min(height.toDouble() / image.height, width.toDouble() / image.width) else null
        val newHeight = scale?.let { fitted(image.height, it) } ?: height
        val newWidth = scale?.let { fitted(image.width, it) } ?: width
        return Geometry(Axis(image.height, newHeight, height, 0), Axis(image.width, newWidth, width, 0))
    }

    private fun cropped(image: RgbImage, name: String): Geometry {
        val wantHeight = covered(height)
        val wantWidth = covered(width)
        val heightDecides = wantHeight * image.width >= wantWidth * image.height
        val covers =
            if (heightDecides) wantHeight to (wantHeight * image.width / image.height)
            else (wantWidth * image.height / image.width) to wantWidth
        val newHeight = max(covers.first, height.toLong())
        val newWidth = max(covers.second, width.toLong())
        if (max(newHeight, newWidth) > 100L * max(height, width)) {
            val shape = "${image.width}x${image.height}"
            throw ImageException("$name is $shape: too narrow to be cropped to ${width}x$height", code = "image.narrow")
        }
        return Geometry(
            Axis(image.height, newHeight.toInt(), height, -centre(newHeight, height)),
            Axis(image.width, newWidth.toInt(), width, -centre(newWidth, width)),
        )
    }

    private fun covered(side: Int): Long =
        round(side / cropPct).coerceAtMost(1e9).toLong() // avoids overflow; cropped() refuses such sizes

    private fun padded(image: RgbImage): RgbImage {
        if (image.width == width && image.height == height) return image
        val fill = List(3) { round(255 * mean[it % channels]).coerceIn(0.0, 255.0).toInt().toByte() }
        val out = ByteArray(3 * width * height) { fill[it % 3] }
        val row = 3 * image.width
        for (y in 0 until image.height) image.rgb.copyInto(out, 3 * width * y, row * y, row * (y + 1))
        return RgbImage(width, height, out)
    }

    /** Returns the bytes of [pixels] that a model with the input `image` reads: [channels] for each pixel. */
    fun bytes(pixels: RgbImage): ByteArray =
        if (channels == 3) pixels.rgb else ByteArray(pixels.width * pixels.height) { pixels.rgb[3 * it] }

    /**
     * Normalises pixels to channels-first floats, for a model exported with `--input tensor`. Other models normalise the
     * pixels themselves.
     */
    fun normalised(pixels: RgbImage): FloatArray {
        val plane = pixels.width * pixels.height
        return FloatArray(channels * plane) {
            val channel = it / plane
            val value = pixels.rgb[3 * (it % plane) + channel].toInt() and 255
            (value - 255 * mean[channel].toFloat()) / (255 * std[channel].toFloat())
        }
    }

    companion object {
        /** Reads the preprocessing from a manifest. Throws [Invalid]. */
        internal fun of(value: Value): Preprocessing {
            val (height, width) = value.at("size").items(2, 2).map { it.count(MAX_SIDE).toInt() }
            val given = value.at("resize")
            val resize = if (given.isAbsent) "crop" else given.oneOf("crop", "stretch", "pad") // absent in older bundles
            val cropPct = if (resize == "crop") value.at("crop_pct").positive(1.0) else 1.0
            val filter = FILTERS.getValue(value.at("interpolation").oneOf(*FILTERS.keys.toTypedArray()))
            val mean = value.at("mean").items(1, MAX_CHANNELS).map { it.number() }
            val std = value.at("std").items(1, MAX_CHANNELS).map { it.positive() }
            value.at("std").require(std.size == mean.size, "as many values as mean")
            return Preprocessing(height, width, resize, cropPct, filter, mean, std)
        }
    }
}

private fun fitted(side: Int, scale: Double): Int = max(1, (side * scale + 0.5).toInt())

private fun centre(have: Long, want: Int): Int = round((have - want) / 2.0).toInt()
