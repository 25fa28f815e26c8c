package evm

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/**
 * Resampling filters. [support]: reach, and [weight]: weight at a distance; both in pixels of the smaller image, and
 * without [antialiasing] in pixels of the input.
 */
enum class Filter(val support: Double, val antialiasing: Boolean, val weight: (Double) -> Double) {
    BILINEAR(1.0, true, { x -> max(0.0, 1 - abs(x)) }),
    BILINEAR_OPENCV(1.0, false, { x -> max(0.0, 1 - abs(x)) }),
    BICUBIC(2.0, true, { x -> cubic(abs(x)) }),
}

/** Keys' cubic with a = -0.5, as in Pillow. */
private fun cubic(x: Double) = when {
    x < 1 -> (1.5 * x - 2.5) * x * x + 1
    x < 2 -> ((-0.5 * x + 2.5) * x - 4) * x + 2
    else -> 0.0
}

/** The part of a resized image from ([left], [top]), of size [width] x [height]. */
class Crop(val left: Int, val top: Int, val width: Int, val height: Int)

/**
 * Resizes the image to [toWidth] x [toHeight] and returns the part [crop]. The result is equal to
 * Pillow's, bit for bit: rows are resampled first, then columns, in fixed point, with rounding to bytes in between.
 */
fun RgbImage.resized(toWidth: Int, toHeight: Int, crop: Crop, filter: Filter): RgbImage {
    val across = windows(width, toWidth, crop.left, crop.width, filter)
    val down = windows(height, toHeight, crop.top, crop.height, filter)
    val first = down.minOf { it.start }
    val rows = down.maxOf { it.start + it.weights.size } - first
    val narrow = ByteArray(rows * crop.width * 3)
    for (y in 0 until rows) alongRow(rgb, 3 * (first + y) * width, across, narrow, 3 * y * crop.width)
    val out = ByteArray(crop.height * crop.width * 3)
    for ((y, window) in down.withIndex()) alongColumns(narrow, window, first, 3 * crop.width, out, 3 * y * crop.width)
    return RgbImage(crop.width, crop.height, out)
}

private const val PRECISION_BITS = 22
private const val HALF = 1 shl (PRECISION_BITS - 1)

/** The weights of the input pixels from [start] on that make one output pixel, in units of 2^-22. */
private class Window(val start: Int, val weights: IntArray)

/** Returns the windows of [count] output pixels from [first] on, for an axis of [from] pixels resized to [to]. */
private fun windows(from: Int, to: Int, first: Int, count: Int, filter: Filter): List<Window> {
    val scale = from.toDouble() / to
    val stretch = if (filter.antialiasing) max(scale, 1.0) else 1.0 // the filter is at least as wide as an output pixel
    val support = filter.support * stretch
    return List(count) { i ->
        val center = (first + i + 0.5) * scale
        val start = max(0, (center - support + 0.5).toInt())
        val end = min(from, (center + support + 0.5).toInt())
        val weights = DoubleArray(end - start) { filter.weight((it + start - center + 0.5) * (1 / stretch)) }
        val sum = weights.sum()
        Window(start, IntArray(weights.size) { fixed(if (sum != 0.0) weights[it] / sum else weights[it]) })
    }
}

/** Converts a weight to fixed point, rounding halves away from zero. */
private fun fixed(weight: Double): Int = (weight * (1 shl PRECISION_BITS) + if (weight < 0) -0.5 else 0.5).toInt()

private fun toByte(sum: Int): Byte = (sum shr PRECISION_BITS).coerceIn(0, 255).toByte()

private fun alongRow(rgb: ByteArray, row: Int, windows: List<Window>, out: ByteArray, to: Int) {
    for ((x, window) in windows.withIndex()) {
        var red = HALF
        var green = HALF
        var blue = HALF
        var at = row + 3 * window.start
        for (weight in window.weights) {
            red += weight * (rgb[at].toInt() and 255)
            green += weight * (rgb[at + 1].toInt() and 255)
            blue += weight * (rgb[at + 2].toInt() and 255)
            at += 3
        }
        out[to + 3 * x] = toByte(red)
        out[to + 3 * x + 1] = toByte(green)
        out[to + 3 * x + 2] = toByte(blue)
    }
}

private fun alongColumns(rgb: ByteArray, window: Window, first: Int, stride: Int, out: ByteArray, to: Int) {
    val sums = IntArray(stride) { HALF }
    for ((i, weight) in window.weights.withIndex()) {
        val row = (window.start - first + i) * stride
        for (x in 0 until stride) sums[x] += weight * (rgb[row + x].toInt() and 255)
    }
    for (x in 0 until stride) out[to + x] = toByte(sums[x])
}
