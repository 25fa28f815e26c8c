package evm.sample

import android.graphics.Bitmap
import android.graphics.BitmapFactory
import evm.ImageException
import evm.RgbImage
import evm.orientation
import java.nio.ByteBuffer

/**
 * Decodes an image file to upright RGB bytes, as evm-deploy does in Python: alpha is dropped without multiplication, and
 * the values are those in the file, without conversion of the colour profile. [name] names the image in errors. Throws
 * [ImageException].
 */
fun decoded(file: ByteArray, name: String): RgbImage = try {
    val options = BitmapFactory.Options().apply {
        inPreferredConfig = Bitmap.Config.ARGB_8888
        inPremultiplied = false
        inScaled = false
    }
    val bitmap = BitmapFactory.decodeByteArray(file, 0, file.size, options)
        ?: throw ImageException("image $name is not an image that Android can read")
    image(bitmap, name).upright(orientation(file)) // BitmapFactory does not rotate images
} catch (_: OutOfMemoryError) {
    throw ImageException("image $name is too large: out of memory")
}

private fun image(bitmap: Bitmap, name: String): RgbImage {
    if (bitmap.config != Bitmap.Config.ARGB_8888) {
        throw ImageException("image $name cannot be read: Android decodes it as ${bitmap.config}")
    }
    val (width, height, stride) = listOf(bitmap.width, bitmap.height, bitmap.rowBytes)
    val rgba = ByteArray(stride * height)
    bitmap.copyPixelsToBuffer(ByteBuffer.wrap(rgba)) // R, G, B, A in memory; getPixels would convert to sRGB
    bitmap.recycle()
    val rgb = ByteArray(3 * width * height)
    for (y in 0 until height) for (x in 0 until width) {
        rgba.copyInto(rgb, 3 * (y * width + x), y * stride + 4 * x, y * stride + 4 * x + 3)
    }
    return RgbImage(width, height, rgb)
}
