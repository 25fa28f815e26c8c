// NOT RUN BY THIS PROJECT: it has no Android SDK. The evm module is tested; see README.md.
package evm.sample

import android.content.ActivityNotFoundException
import android.graphics.Bitmap
import android.net.Uri
import android.os.Build
import android.os.Bundle
import android.view.Window
import androidx.activity.ComponentActivity
import androidx.activity.result.PickVisualMediaRequest
import androidx.activity.result.contract.ActivityResultContracts.PickVisualMedia
import androidx.activity.result.contract.ActivityResultContracts.TakePicture
import androidx.core.content.FileProvider
import evm.Check
import evm.EvmException
import evm.ImageException
import evm.Model
import evm.RgbImage
import java.io.File
import java.io.IOException
import java.util.concurrent.Executors

private const val RUNS = 20
private const val THREADS = 4 // as in the device profile `android`
private val PLATFORMS = mapOf("arm64-v8a" to "android-aarch64", "x86_64" to "android-x86_64")

/** Activity that shows the five most probable classes of a chosen or taken image. The worker thread does all work. */
class MainActivity : ComponentActivity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var screen: Screen
    private var model: Model? = null // used by the worker thread only

    private val choose = registerForActivityResult(PickVisualMedia()) { image -> image?.let(::classify) }
    private val camera = registerForActivityResult(TakePicture()) { taken -> if (taken) classify(shot()) }

    override fun onCreate(savedInstanceState: Bundle?) {
        requestWindowFeature(Window.FEATURE_NO_TITLE)
        super.onCreate(savedInstanceState)
        screen = Screen(this, ::onChoose, ::onCamera, ::onSelfTest)
        setContentView(screen.view)
        work("opening the bundle", { opened().run { "${bundle.manifest.name}, scans: ${scans(this)}" } }, screen::ready)
    }

    override fun onDestroy() {
        worker.execute { model?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun onChoose() =
        choose.launch(PickVisualMediaRequest.Builder().setMediaType(PickVisualMedia.ImageOnly).build())

    private fun onCamera() = try {
        camera.launch(shot())
    } catch (_: ActivityNotFoundException) {
        screen.ready("this device has no camera app")
    }

    private fun onSelfTest() = work("running the self-test", ::selfTested) { (checks, ms) ->
        screen.tested(checks, "median of $RUNS inferences  %.1f ms".format(ms))
    }

    private fun selfTested(): Pair<List<Check>, Double> = opened().run {
        selfTest { decoded(it.readBytes(), it.name) } to medianMs(RUNS)
    }

    private fun classify(uri: Uri) = work("classifying", { classified(uri) }, screen::found)

    private fun classified(uri: Uri): Found {
        val model = opened()
        val image = decoded(read(uri), uri.lastPathSegment ?: "image")
        val start = System.nanoTime()
        val pixels = model.pixels(image)
        val ready = System.nanoTime()
        val predictions = model.classify(pixels)
        return Found(bitmap(pixels), predictions, (ready - start) / 1e6, (System.nanoTime() - ready) / 1e6)
    }

    /** Runs [task] in the worker thread, then calls [show] with the result, or shows the error, on the main thread. */
    private fun <T> work(doing: String, task: () -> T, show: (T) -> Unit) {
        screen.busy(doing)
        worker.execute {
            try {
                val result = task()
                runOnUiThread { show(result) }
            } catch (error: EvmException) {
                runOnUiThread { screen.failed(error) }
            }
        }
    }

    /** Returns the model and opens it at the first call. Call it in the worker thread only. */
    private fun opened(): Model = model ?: loaded().also { model = it }

    /** Opens the app's own bundle, which it trusts: the native library in it runs the scans, if it has one. */
    private fun loaded() = Model.load(bundleFolder(this), OnnxRuntimes(THREADS), PLATFORMS[Build.SUPPORTED_ABIS.first()])

    /** Returns the URI to which the camera app writes its image. */
    private fun shot(): Uri {
        val folder = File(cacheDir, "camera").apply { mkdirs() }
        return FileProvider.getUriForFile(this, "$packageName.images", File(folder, "shot.jpg"))
    }

    private fun read(uri: Uri): ByteArray = try {
        contentResolver.openInputStream(uri)?.use { it.readBytes() }
            ?: throw ImageException("image $uri does not exist")
    } catch (error: IOException) {
        throw ImageException("image $uri cannot be read: ${error.message}")
    }
}

/** Returns how the scans of [model] run. */
private fun scans(model: Model) = if (model.library == null) "portable" else "native kernel"

/** Converts the pixels that the model reads to a bitmap. */
private fun bitmap(pixels: RgbImage): Bitmap {
    val colours = IntArray(pixels.width * pixels.height) { i ->
        (0..2).fold(0xFF) { colour, channel -> (colour shl 8) or (pixels.rgb[3 * i + channel].toInt() and 0xFF) }
    }
    return Bitmap.createBitmap(colours, pixels.width, pixels.height, Bitmap.Config.ARGB_8888)
}
