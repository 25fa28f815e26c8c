package evm

import kotlin.math.max
import kotlin.math.min

/** Corners of a box in pixels, from the left and the top edge of the image. */
data class Box(val x1: Double, val y1: Double, val x2: Double, val y2: Double)

/** Class of each pixel of an image, row by row, from 0. */
class LabelMap(val width: Int, val height: Int, val classes: IntArray) {
    /** Returns the class of the pixel in column [x] and row [y]. */
    fun at(x: Int, y: Int): Int = classes[y * width + x]
}

/** One axis of a [Geometry]. [offset]: of the resized image in the input, negative where the crop cuts it. In pixels. */
class Axis(val original: Int, val resized: Int, val size: Int, val offset: Int) {
    /** First pixel of the input that shows the image. */
    val first: Int get() = max(0, offset)

    /** The pixel after the last one that shows the image. */
    val end: Int get() = min(size, offset + resized)

    /** Maps a coordinate of the input to the image. */
    fun toImage(at: Double): Double = (at - offset) / (resized.toDouble() / original)

    /** Returns the network pixel of each pixel of the image: the nearest one inside. */
    fun nearest(): IntArray = IntArray(original) {
        ((2L * it + 1) * resized / (2L * original) + offset).coerceIn(first.toLong(), end - 1L).toInt()
    }
}

/**
 * Place of an image in the network's input, after the resize and the crop or the padding. Pixel i of an axis covers i to
 * i + 1.
 */
class Geometry(val vertical: Axis, val horizontal: Axis) {
    /** Maps a box in pixels of the input to pixels of the image. Nothing is clipped. */
    fun toImage(box: Box): Box =
        Box(horizontal.toImage(box.x1), vertical.toImage(box.y1), horizontal.toImage(box.x2), vertical.toImage(box.y2))

    /**
     * Maps labels of the input, row by row, to those of the nearest pixels of the image, with the same result as in Python.
     * A pixel that a crop leaves out gets the label of the nearest pixel inside.
     */
    fun toImage(labels: IntArray): LabelMap {
        val (rows, columns) = vertical.nearest() to horizontal.nearest()
        val classes = IntArray(rows.size * columns.size) {
            labels[rows[it / columns.size] * horizontal.size + columns[it % columns.size]]
        }
        return LabelMap(columns.size, rows.size, classes)
    }
}
