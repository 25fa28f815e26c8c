package evm.sample

import android.graphics.Bitmap
import android.graphics.BitmapFactory
import evm.ImageException
import evm.RgbImage
import evm.orientation
import java.nio.ByteBuffer

/**
 * The RGB bytes of an image file, upright: alpha dropped, not multiplied in, and values as the file has them, whatever
 * its colour profile, as evm-deploy reads them in Python. [name] is for errors. Throws [ImageException].
 */
fun decoded(file: ByteArray, name: String): RgbImage = try {
    val options = BitmapFactory.Options().apply {
        inPreferredConfig = Bitmap.Config.ARGB_8888
        inPremultiplied = false
        inScaled = false
    }
    val bitmap = BitmapFactory.decodeByteArray(file, 0, file.size, options)
        ?: throw ImageException("image $name is not an image that Android can read")
    image(bitmap, name).upright(orientation(file)) // BitmapFactory does not turn images
} catch (_: OutOfMemoryError) {
    throw ImageException("image $name is too large: out of memory")
}

private fun image(bitmap: Bitmap, name: String): RgbImage {
    if (bitmap.config != Bitmap.Config.ARGB_8888) {
        throw ImageException("image $name cannot be read: it is ${bitmap.config}")
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
