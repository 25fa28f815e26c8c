package evm

import java.io.File
import kotlin.math.exp

private const val TARGET = "onnx"

/** An artifact loaded in a runtime. Several threads may use it at the same time. */
interface Runtime : AutoCloseable {
    val inputs: List<TensorSpec>
    val outputs: List<TensorSpec>

    /** Runs one inference: inputs by name -> outputs by name. Throws [ToolchainException]. */
    fun run(feeds: Map<String, Tensor>): Map<String, Tensor>
}

/** Loader of artifacts. */
fun interface Runtimes {
    /** Opens an artifact. Scans run on the native [library], or in their portable form if [library] is null. */
    fun open(artifact: File, library: File?): Runtime
}

/** One class of an image. [score]: probability, 0..1. */
data class Prediction(val label: String, val index: Int, val score: Double)

/**
 * An opened bundle. Call [pixels], then [classify], or [detect] or [segment]; [selfTest] tests the bundle on this device. Several threads may use
 * a model at the same time.
 */
class Model private constructor(
    val bundle: Bundle,
    private val runtimes: Runtimes,
    /** Native library that runs the scans; null: they run in their portable form. */
    val library: File?,
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

    /** Makes the pixels that the model reads of [image]. Throws [ImageException]. */
    fun pixels(image: RgbImage, name: String = "image"): RgbImage = manifest.preprocessing.pixels(image, name)

    /**
     * Returns the [top] most probable classes of [pixels], most probable first. Throws [UsageException] if the model is
     * not a classifier or [pixels] has another size, and [BundleException] if the network gives NaN or Inf.
     */
    fun classify(pixels: RgbImage, top: Int = 5): List<Prediction> {
        require(manifest.classifies, "classes")
        if (top < 1) throw UsageException("top is $top, it must be at least 1")
        val (height, width) = manifest.preprocessing.run { height to width }
        if (pixels.height != height || pixels.width != width) {
            val got = "[1, ${pixels.height}, ${pixels.width}, 3]"
            throw UsageException("pixels must be uint8 [n, $height, $width, 3], got uint8 $got")
        }
        val scores = outputs(pixels).getValue(manifest.head).floats().map { it.toDouble() }
        return best(if (manifest.head == "probs") scores else softmax(scores), top)
    }

    /**
     * Returns the detections of an upright [image], by falling score. [name] names the image in errors. Throws
     * [UsageException] if the model is not a detector, [ImageException], and [BundleException] if the network gives NaN or
     * Inf.
     */
    fun detect(image: RgbImage, name: String = "image"): List<Detection> {
        require(manifest.head == "detections", "boxes")
        val outputs = outputs(pixels(image, name))
        return detections(outputs, manifest.selection, manifest.preprocessing.geometry(image, name), labels)
    }

    /** Returns the class of each pixel of an upright [image]. Throws as [detect] does, if the model is not a segmenter. */
    fun segment(image: RgbImage, name: String = "image"): LabelMap {
        require(manifest.head == "label_map", "label maps")
        val map = outputs(pixels(image, name)).getValue(manifest.head)
        return manifest.preprocessing.geometry(image, name).toImage(map.ints())
    }

    private fun require(can: Boolean, what: String) {
        if (!can) throw UsageException("no $what to predict: the bundle gives ${manifest.head}", "use run(feeds)")
    }

    /** Runs the model on one image and returns its outputs, checked. */
    private fun outputs(pixels: RgbImage): Map<String, Tensor> {
        val found = runBatched(manifest, runtime, input(pixels))
        checkOutputs(bundle, labels, found.map { (name, tensor) -> tensor.spec(name) })
        if (found.values.any { tensor -> tensor.dtype == "float32" && !tensor.floats().all { it.isFinite() } }) {
            val hint = "run the self-test on this device"
            throw BundleException("bundle ${bundle.folder}: the network gives NaN or Inf on this device", hint)
        }
        return found
    }

    /**
     * Returns the median latency of [runs] inferences on a grey image, in milliseconds, after one warm-up run. Throws
     * [ImageException] if the network reads no images.
     */
    fun medianMs(runs: Int): Double {
        val grey = input(manifest.preprocessing.pixels(RgbImage(1, 1, ByteArray(3) { 127 })))
        val feeds = mapOf(manifest.inputs[0].name to grey.rows(0, 1, least = manifest.batch.min))
        val times = List(runs + 1) {
            val start = System.nanoTime()
            run(feeds)
            (System.nanoTime() - start) / 1e6
        }
        return times.drop(1).sorted()[runs / 2]
    }

    /** Runs one inference on tensors with the names of the manifest. Throws [ToolchainException]. */
    fun run(feeds: Map<String, Tensor>): Map<String, Tensor> = runtime.run(feeds)

    /**
     * Compares preprocessing, outputs and scans with the expected values in the bundle. [decode]: PNG file -> upright
     * image. Throws [BundleException] if the bundle has no readable self-test.
     */
    fun selfTest(decode: (File) -> RgbImage): List<Check> =
        selfTest(bundle, runtime, decode) { runtimes.open(it, library) }

    override fun close() = runtime.close()

    private fun input(pixels: RgbImage): Tensor =
        manifest.preprocessing.run {
            if (manifest.input == "image") Tensor.of(listOf(1, height, width, channels), bytes(pixels))
            else Tensor.of(listOf(1, channels, height, width), normalised(pixels))
        }

    private fun best(scores: List<Double>, top: Int): List<Prediction> =
        scores.indices.sortedByDescending { scores[it] }.take(top)
            .map { Prediction(labels.getOrNull(it) ?: "class $it", it, scores[it]) }

    companion object {
        /**
         * Opens the bundle in [folder] and checks the hash of every file. By default scans run in their portable form.
         * [bundledFor]: platform of this app, such as `android-aarch64`. If the bundle has a native library for it, the
         * library runs the scans ([library] is not null). A native library is a program: name the platform only for
         * bundles that you trust.
         * Throws [BundleException], [UsageException] or [ToolchainException].
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
                throw BundleException(message, "export with evm-export --target $TARGET")
            }
            return Model(bundle, runtimes, library(bundle, bundledFor))
        }

        private fun library(bundle: Bundle, platform: String?): File? {
            val manifest = bundle.manifest
            manifest.plugins[platform]?.let { return bundle.file(it) }
            if ("portable" in manifest.scanModes) return null
            val has = manifest.plugins.keys.joinToString().ifEmpty { "no platform" }
            val message = "the bundle has native nodes only, and libraries for $has; this app asks for ${platform ?: "no platform"}"
            throw UsageException(message, "export it with --scan portable, or with --platform")
        }
    }
}

/** Returns the probabilities of the logits of one image. The logit of a single class is against 0, that of its absence. */
internal fun softmax(scores: List<Double>): List<Double> {
    if (scores.size == 1) return listOf(1 / (1 + exp(-scores[0])))
    val largest = scores.max()
    val powers = scores.map { exp(it - largest) }
    val sum = powers.sum()
    return powers.map { it / sum }
}
