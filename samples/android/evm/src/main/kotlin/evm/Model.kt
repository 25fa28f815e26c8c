package evm

import java.io.File
import kotlin.math.exp

private const val TARGET = "onnx"

/** A loaded artifact. Safe to use from several threads. Throws [ToolchainException]. */
interface Runtime : AutoCloseable {
    val inputs: List<TensorSpec>
    val outputs: List<TensorSpec>

    fun run(feeds: Map<String, Tensor>): Map<String, Tensor>
}

/** What loads artifacts; [Runtime]s run scans on the native [library], or portably for null. */
fun interface Runtimes {
    fun open(artifact: File, library: File?): Runtime
}

/** One class of an image. [score]: probability, 0..1. */
data class Prediction(val label: String, val index: Int, val score: Double)

/** An opened bundle: [pixels], then [classify]; [selfTest] on this device. Safe to use from several threads. */
class Model private constructor(
    val bundle: Bundle,
    private val runtimes: Runtimes,
    private val library: File?,
) : AutoCloseable {
    private val manifest = bundle.manifest
    private val labels = labels(bundle)
    private val runtime = runtimes.open(bundle.file(manifest.artifact), library)

    init {
        try {
            checkInterface(bundle, labels, runtime)
        } catch (error: BundleException) {
            runtime.close()
            throw error
        }
    }

    /** What the model reads of [image]: in any thread. Throws [ImageException]. */
    fun pixels(image: RgbImage, name: String = "image"): RgbImage = manifest.preprocessing.pixels(image, name)

    /** The [top] most probable classes of [pixels], best first. Throws [UsageException], [BundleException]. */
    fun classify(pixels: RgbImage, top: Int = 5): List<Prediction> {
        if (!manifest.classifies) {
            throw UsageException("this bundle gives ${manifest.head}, not classes", "use run(feeds)")
        }
        if (top < 1) throw UsageException("top is $top, it must be at least 1")
        val (height, width) = manifest.preprocessing.run { height to width }
        if (pixels.height != height || pixels.width != width) {
            val got = "[1, ${pixels.height}, ${pixels.width}, 3]"
            throw UsageException("pixels must be uint8 [n, $height, $width, 3], got uint8 $got")
        }
        val found = runBatched(manifest, runtime, input(pixels)).getValue(manifest.head)
        checkScores(bundle, labels, found.spec(manifest.head))
        val scores = found.floats().map { it.toDouble() }
        if (!scores.all { it.isFinite() }) {
            val hint = "does it compute right on this device?  evm-run ${bundle.folder} --selftest"
            throw BundleException("bundle ${bundle.folder}: the network gives NaN or Inf here", hint)
        }
        return best(if (manifest.head == "probs") scores else softmax(scores), top)
    }

    /** The median of [runs] inferences of a grey image, in milliseconds, after one that warms up. */
    fun medianMs(runs: Int): Double {
        val (height, width) = manifest.preprocessing.run { height to width }
        val grey = input(RgbImage(width, height, ByteArray(3 * width * height) { 127 }))
        val feeds = mapOf(manifest.inputs[0].name to grey.rows(0, 1, least = manifest.batch.min))
        val times = List(runs + 1) {
            val start = System.nanoTime()
            run(feeds)
            (System.nanoTime() - start) / 1e6
        }
        return times.drop(1).sorted()[runs / 2]
    }

    /** One inference on tensors as the manifest names them. */
    fun run(feeds: Map<String, Tensor>): Map<String, Tensor> = runtime.run(feeds)

    /** Preprocessing, outputs and scans against the expected values in the bundle. [decode]: PNG -> upright image. */
    fun selfTest(decode: (File) -> RgbImage): List<Check> =
        selfTest(bundle, runtime, decode) { runtimes.open(it, library) }

    override fun close() = runtime.close()

    private fun input(pixels: RgbImage): Tensor =
        if (manifest.input == "image") Tensor.of(listOf(1, pixels.height, pixels.width, 3), pixels.rgb)
        else Tensor.of(listOf(1, 3, pixels.height, pixels.width), manifest.preprocessing.normalised(pixels))

    private fun best(scores: List<Double>, top: Int): List<Prediction> =
        scores.indices.sortedByDescending { scores[it] }.take(top)
            .map { Prediction(labels.getOrNull(it) ?: "class $it", it, scores[it]) }

    companion object {
        /**
         * The bundle in [folder], every hash checked. Scans run portably, or, for bundles that you trust, on the native
         * library that the bundle brings for [bundledFor], such as `android-aarch64`: a library is a program.
         * Throws [BundleException], [UsageException], [ToolchainException].
         */
        fun load(folder: File, runtimes: Runtimes, bundledFor: String? = null): Model {
            val bundle = Bundle.open(folder)
            val manifest = bundle.manifest
            if (!manifest.built) {
                val hint = "on the device:  evm-export --finish $folder"
                throw BundleException("bundle $folder has no engine yet", hint, "bundle.unfinished")
            }
            if (manifest.target != TARGET) {
                val message = "bundle $folder is for target '${manifest.target}', this app runs '$TARGET'"
                throw BundleException(message, "evm-export --target $TARGET")
            }
            return Model(bundle, runtimes, library(bundle, bundledFor))
        }

        private fun library(bundle: Bundle, platform: String?): File? {
            val manifest = bundle.manifest
            if (platform == null) {
                if ("portable" in manifest.scanModes) return null
                val message = "this bundle's model has its scans as native nodes only"
                throw UsageException(message, "export it with --scan portable")
            }
            manifest.plugins[platform]?.let { return bundle.file(it) }
            val has = manifest.plugins.keys.joinToString().ifEmpty { "none" }
            val message = "this bundle has no native library for $platform; it has: $has"
            throw UsageException(message, "export it with --platform")
        }
    }
}

internal fun softmax(scores: List<Double>): List<Double> {
    val largest = scores.max()
    val powers = scores.map { exp(it - largest) }
    val sum = powers.sum()
    return powers.map { it / sum }
}
