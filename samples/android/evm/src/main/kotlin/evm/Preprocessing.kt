package evm

import kotlin.math.max
import kotlin.math.round

private const val MAX_SIDE = 8192L

/**
 * Preprocessing of a bundle: resizes an image, with antialiasing, until it covers size / crop_pct, and crops the centre.
 * [mean] and [std] apply to channels scaled to 0..1.
 */
class Preprocessing private constructor(
    val height: Int,
    val width: Int,
    private val cropPct: Double,
    private val filter: Filter,
    private val mean: List<Float>,
    private val std: List<Float>,
) {
    /**
     * Resizes and crops [image] to [height] x [width] RGB. [name] names the image in errors. Throws [ImageException] if the
     * image is too narrow to be cropped.
     */
    fun pixels(image: RgbImage, name: String = "image"): RgbImage {
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
        val crop = Crop(centre(newWidth, width), centre(newHeight, height), width, height)
        return image.resized(newWidth.toInt(), newHeight.toInt(), crop, filter)
    }

    private fun covered(side: Int): Long =
        round(side / cropPct).coerceAtMost(1e9).toLong() // avoids overflow; pixels() refuses such sizes

    /**
     * Normalises pixels to channels-first floats, for a model exported with `--input tensor`. Other models normalise the
     * pixels themselves.
     */
    fun normalised(pixels: RgbImage): FloatArray {
        val plane = pixels.width * pixels.height
        return FloatArray(3 * plane) {
            val channel = it / plane
            val value = pixels.rgb[3 * (it % plane) + channel].toInt() and 255
            (value - 255 * mean[channel]) / (255 * std[channel])
        }
    }

    companion object {
        /** Reads the preprocessing from a manifest. Throws [Invalid]. */
        internal fun of(value: Value): Preprocessing {
            val (height, width) = value.at("size").items(2, 2).map { it.count(MAX_SIDE).toInt() }
            val filter = Filter.valueOf(value.at("interpolation").oneOf("bicubic", "bilinear").uppercase())
            val mean = value.at("mean").items(3, 3).map { it.number() }
            val std = value.at("std").items(3, 3).map { it.positive() }
            return Preprocessing(height, width, value.at("crop_pct").positive(1.0), filter, mean.floats(), std.floats())
        }
    }
}

private fun centre(have: Long, want: Int): Int = round((have - want) / 2.0).toInt()

private fun List<Double>.floats() = map { it.toFloat() }
