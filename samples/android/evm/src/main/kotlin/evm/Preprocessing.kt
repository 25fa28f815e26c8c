package evm

import kotlin.math.max
import kotlin.math.round
import kotlinx.serialization.json.JsonObject

private const val MAX_SIDE = 8192

/**
 * From a picture to the pixels that the model reads: resized so that it covers size / crop_pct, antialiased, and the
 * centre cropped. [mean] and [std] are of channels scaled to 0..1.
 */
class Preprocessing private constructor(
    val height: Int,
    val width: Int,
    private val cropPct: Double,
    private val filter: Filter,
    private val mean: List<Float>,
    private val std: List<Float>,
) {
    /** [height] x [width] RGB. [name] is the picture's in errors. Throws [ImageException]. */
    fun pixels(picture: Picture, name: String = "image"): Picture {
        val wantHeight = covered(height)
        val wantWidth = covered(width)
        val heightDecides = wantHeight * picture.width >= wantWidth * picture.height
        val covers =
            if (heightDecides) wantHeight to (wantHeight * picture.width / picture.height)
            else (wantWidth * picture.height / picture.width) to wantWidth
        val newHeight = max(covers.first, height.toLong())
        val newWidth = max(covers.second, width.toLong())
        if (max(newHeight, newWidth) > 100L * max(height, width)) {
            val shape = "${picture.width}x${picture.height}"
            throw ImageException("$name is $shape: too narrow to be cropped to ${width}x$height")
        }
        val crop = Crop(centre(newWidth, width), centre(newHeight, height), width, height)
        return picture.resized(newWidth.toInt(), newHeight.toInt(), crop, filter)
    }

    private fun covered(side: Int): Long = round(side / cropPct).coerceAtMost(1e9).toLong() // nobody resizes to more

    /** Channels first, as a model exported with `--input tensor` reads them; others normalise themselves. */
    fun normalised(pixels: Picture): FloatArray {
        val plane = pixels.width * pixels.height
        return FloatArray(3 * plane) {
            val channel = it / plane
            val value = pixels.rgb[3 * (it % plane) + channel].toInt() and 255
            (value - 255 * mean[channel]) / (255 * std[channel])
        }
    }

    companion object {
        /** As in a manifest. Throws IllegalArgumentException that says what does not fit. */
        internal fun of(json: JsonObject): Preprocessing {
            val size = json.list("size")
            val sides = size.mapNotNull { it.toIntOrNull() }
            require(size.size == 2 && sides.size == 2 && sides.all { it in 1..MAX_SIDE }) {
                "size is ${size.shown()}, it must be [H, W] of 1 to $MAX_SIDE pixels"
            }
            val cropPct = json.number("crop_pct")
            require(cropPct > 0 && cropPct <= 1) {
                "crop_pct is ${json.text("crop_pct")}, it must be over 0 and at most 1"
            }
            val named = json.text("interpolation")
            val filter = requireNotNull(listOf(Filter.BICUBIC, Filter.BILINEAR).find { it.name.lowercase() == named }) {
                "interpolation is '$named', choose from: bicubic, bilinear"
            }
            val (mean, std) = listOf("mean", "std").map { key ->
                val values = json.list(key)
                val numbers = values.mapNotNull { it.toDoubleOrNull()?.takeIf(Double::isFinite) }
                require(values.size == 3 && numbers.size == 3) {
                    "$key is ${values.shown()}, it must be three finite numbers"
                }
                numbers
            }
            require(std.min() > 0) { "std is ${json.list("std").shown()}, it must be positive" }
            return Preprocessing(sides[0], sides[1], cropPct, filter, mean.floats(), std.floats())
        }
    }
}

private fun centre(have: Long, want: Int): Int = round((have - want) / 2.0).toInt()

private fun List<Double>.floats() = map { it.toFloat() }

private fun List<String>.shown() = joinToString(", ", "[", "]")
