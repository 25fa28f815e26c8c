package evm

import java.nio.ByteBuffer
import java.nio.ByteOrder

/** An RGB image: [rgb] has [width] * [height] * 3 bytes, row by row. */
class RgbImage(val width: Int, val height: Int, val rgb: ByteArray) {
    init {
        require(width > 0 && height > 0 && rgb.size == 3 * width * height) { "an image of ${width}x$height" }
    }

    /** Rotates and mirrors the image from the Exif [orientation], 1 to 8, to upright. */
    fun upright(orientation: Int): RgbImage {
        val right = width - 1
        val bottom = height - 1
        return when (orientation) {
            2 -> turned(width, height) { x, y -> at(right - x, y) }
            3 -> turned(width, height) { x, y -> at(right - x, bottom - y) }
            4 -> turned(width, height) { x, y -> at(x, bottom - y) }
            5 -> turned(height, width) { x, y -> at(y, x) }
            6 -> turned(height, width) { x, y -> at(y, bottom - x) }
            7 -> turned(height, width) { x, y -> at(right - y, bottom - x) }
            8 -> turned(height, width) { x, y -> at(right - y, x) }
            else -> this
        }
    }

    /** Returns the luminance, as Pillow computes it, in all three channels. */
    internal fun grey(): RgbImage {
        val out = ByteArray(rgb.size)
        for (i in rgb.indices step 3) {
            val sum = (rgb[i].toInt() and 255) * 19595 + (rgb[i + 1].toInt() and 255) * 38470 +
                (rgb[i + 2].toInt() and 255) * 7471
            out.fill(((sum + 0x8000) shr 16).toByte(), i, i + 3)
        }
        return RgbImage(width, height, out)
    }

    private fun at(x: Int, y: Int) = 3 * (y * width + x)

    private inline fun turned(width: Int, height: Int, source: (Int, Int) -> Int): RgbImage {
        val out = ByteArray(rgb.size)
        var to = 0
        for (y in 0 until height) for (x in 0 until width) {
            rgb.copyInto(out, to, source(x, y), source(x, y) + 3)
            to += 3
        }
        return RgbImage(width, height, out)
    }
}

private const val ORIENTATION = 0x0112
private const val PNG = 0x89504E47.toInt()

/** Returns the Exif orientation, 1 to 8, of a JPEG or PNG file, for decoders that ignore it; 1 if the file has none. */
fun orientation(file: ByteArray): Int = try {
    val data = ByteBuffer.wrap(file)
    val exif = if (data.getInt(0) == PNG) exifOfPng(data) else exifOfJpeg(data)
    exif?.let(::orientationOfTiff) ?: 1
} catch (_: IndexOutOfBoundsException) { // a damaged file, or another format
    1
} catch (_: IllegalArgumentException) {
    1
}

/** Finds the Exif data of a JPEG, in an APP1 segment before the scan. A segment is 0xFF, kind, length, content. */
private fun exifOfJpeg(data: ByteBuffer): ByteBuffer? {
    var at = 2
    while (data.getShort(0) == 0xFFD8.toShort() && data.get(at) == 0xFF.toByte() && data.get(at + 1) != 0xDA.toByte()) {
        val length = data.getShort(at + 2).toInt() and 0xFFFF
        val isExif = data.get(at + 1) == 0xE1.toByte() && data.getInt(at + 4) == 0x45786966 // "Exif", two zeros
        if (isExif) return part(data, at + 10, length - 8)
        at += 2 + length
    }
    return null
}

/** Finds the Exif data of a PNG. A chunk is a big-endian length, a name, the content and a CRC. */
private fun exifOfPng(data: ByteBuffer): ByteBuffer? {
    var at = 8
    while (at < data.limit()) {
        val length = data.getInt(at)
        if (length < 0) return null
        if (data.getInt(at + 4) == 0x65584966) return part(data, at + 8, length) // "eXIf"
        at += 12 + length
    }
    return null
}

private fun part(data: ByteBuffer, from: Int, length: Int): ByteBuffer =
    data.duplicate().apply { position(from).limit(from + length) }.slice()

private fun orientationOfTiff(exif: ByteBuffer): Int {
    exif.order(if (exif.get(0) == 'I'.code.toByte()) ByteOrder.LITTLE_ENDIAN else ByteOrder.BIG_ENDIAN)
    val directory = exif.getInt(4)
    for (i in 0 until (exif.getShort(directory).toInt() and 0xFFFF)) {
        val entry = directory + 2 + 12 * i
        if (exif.getShort(entry).toInt() == ORIENTATION) return exif.getShort(entry + 8).toInt()
    }
    return 1
}
