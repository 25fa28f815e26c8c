package evm

import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import kotlin.math.abs
import kotlin.math.max

/** One line of a self-test: [error] against [limit]. */
data class Check(val name: String, val error: Double, val limit: Double) {
    val ok: Boolean get() = error <= limit
}

private const val PROBES = "probes.safetensors"
private const val SCANS = "scans.safetensors"
private val AXES = mapOf(
    "u" to "bKLD", "delta" to "bKLD", "A" to "KDN", "B" to "bKLN", "C" to "bKLN", "skip" to "KD", "bias" to "KD",
    "y" to "bKLD",
)
private const val SCAN_TOLERANCE = 2e-5 // of the part that the states give
private const val ROUNDING = 4 * 1.1920929e-7 // of y in float32, before skip * u is taken off

/** As `evm-run --selftest`: [open] loads the scan that is there by itself. */
internal fun selfTest(
    bundle: Bundle,
    runtime: Runtime,
    decode: (File) -> RgbImage,
    open: (File) -> Runtime,
): List<Check> {
    val manifest = bundle.manifest
    val tensors = read(bundle, PROBES)
    val scans = scans(bundle)
    val rgbImage = manifest.preprocessing.pixels(decode(bundle.file("selftest/picture.png")))
    val pixels = Tensor.of(listOf(rgbImage.height, rgbImage.width, 3), rgbImage.rgb)
    val off = worstByte(pixels.bytes(), like(bundle, tensors, pixels.spec("picture.pixels")).bytes())
    val checks = mutableListOf(Check("preprocessing (of 255)", off, manifest.limits.preprocessing))
    val images = tensors[manifest.input]?.takeIf { it.shape.isNotEmpty() && 0 !in it.shape }
        ?: throw damaged(bundle, PROBES, "has no ${manifest.input}")
    for ((name, have) in runBatched(manifest, runtime, images)) {
        val want = like(bundle, tensors, have.spec(name)).floats()
        checks += Check(name, worst(have.floats(), want), manifest.limits.output(name))
    }
    if (scans.isEmpty()) return checks
    open(bundle.file("selftest/scan.onnx")).use { runtime ->
        for ((name, scan) in scans) checks += scanCheck(bundle, name, runtime, scan)
    }
    return checks
}

private fun damaged(bundle: Bundle, file: String, reason: String): BundleException {
    val message = "bundle ${bundle.folder} has no readable self-test: selftest/$file $reason"
    return BundleException(message, "export it again", "selftest.damaged", "selftest/$file")
}

private fun read(bundle: Bundle, name: String): Map<String, Tensor> = try {
    Tensor.read(bundle.file("selftest/$name"))
} catch (error: IOException) {
    throw damaged(bundle, name, "cannot be read: ${error.message}")
} catch (error: RuntimeException) { // whatever is wrong in the file
    throw damaged(bundle, name, "cannot be read: ${error.message}")
}

/** The tensor that is as [spec] says. */
private fun like(bundle: Bundle, tensors: Map<String, Tensor>, spec: TensorSpec): Tensor =
    tensors[spec.name]?.takeIf { it.spec(spec.name) == spec }
        ?: throw damaged(bundle, PROBES, "has no ${spec.name} of ${spec.dtype}${spec.shape}")

/** Tensors by name, by scan, in the order of their names. */
private fun scans(bundle: Bundle): Map<String, Map<String, Tensor>> {
    val tensors = read(bundle, SCANS).toSortedMap()
    val scans = tensors.entries.groupBy({ it.key.substringBefore(":") }) { it.key.substringAfter(":") to it.value }
    return scans.mapValues { (name, scan) ->
        scan.toMap().also {
            if (!isScan(it)) throw damaged(bundle, SCANS, "has no scan in the tensors of '$name'")
        }
    }
}

/** Whether its tensors have the names, ranks and sizes that belong together. */
private fun isScan(scan: Map<String, Tensor>): Boolean {
    if (scan.mapValues { it.value.shape.size } != AXES.mapValues { it.value.length }) return false
    val sizes = AXES.flatMap { (tensor, axes) -> axes.toList().zip(scan.getValue(tensor).shape) }
    val known = sizes.toMap()
    return sizes.all { (axis, size) -> size > 0 && size == known[axis] } && scan.values.all { it.dtype == "float32" }
}

/**
 * Any number of inputs through a runtime whose batch may be fixed: the last batch is filled up and cut. Throws
 * [BundleException] for a model that gives not as many outputs as it had inputs, or now these and now other sizes.
 */
internal fun runBatched(manifest: Manifest, runtime: Runtime, inputs: Tensor): Map<String, Tensor> {
    val count = inputs.shape[0]
    val size = manifest.batch.max ?: count
    val input = manifest.inputs[0].name
    val parts = manifest.outputs.associate { it.name to mutableListOf<Tensor>() }
    for (from in 0 until count step size) {
        val until = minOf(from + size, count)
        val fed = inputs.rows(from, until, least = manifest.batch.min)
        val outputs = runtime.run(mapOf(input to fed))
        for ((name, found) in parts) {
            val output = outputs.getValue(name)
            val like = found.firstOrNull() ?: output
            if (output.shape != listOf(fed.shape[0]) + like.shape.drop(1)) {
                throw BundleException("the model gives ${output.spec(name)} for ${fed.spec(input)}", "export it again")
            }
            found += output.rows(0, until - from, least = 1)
        }
    }
    return parts.mapValues { (_, found) ->
        val values = found.flatMap { it.floats().asList() }.toFloatArray()
        Tensor.of(listOf(count) + found[0].shape.drop(1), values)
    }
}

/** The scan's error relative to what its states give, y - skip * u; the limit grows where skip * u dwarfs it. */
private fun scanCheck(bundle: Bundle, name: String, runtime: Runtime, scan: Map<String, Tensor>): Check {
    val want = scan.getValue("y").floats()
    val u = scan.getValue("u").floats()
    val skip = scan.getValue("skip").floats()
    val (_, directions, steps, channels) = scan.getValue("u").shape
    val skipPart = DoubleArray(u.size) {
        skip[it / (steps * channels) % directions * channels + it % channels].toDouble() * u[it]
    }
    val largest = max(want.indices.maxOf { abs(want[it] - skipPart[it]) }, java.lang.Float.MIN_NORMAL.toDouble())
    val limit = bundle.manifest.limits.scan(name) ?: (SCAN_TOLERANCE + ROUNDING * skipPart.maxOf(::abs) / largest)
    val y = runtime.run(scan - "y")["y"]?.takeIf { it.shape == scan.getValue("y").shape }
        ?: throw damaged(bundle, "scan.onnx", "gives no y")
    return Check("scan $name", worst(y.floats(), want) / largest, limit)
}

/** The largest difference; infinite for values that are no numbers. */
private fun worst(have: FloatArray, want: FloatArray): Double =
    if (have.any { !it.isFinite() }) Double.POSITIVE_INFINITY
    else have.indices.maxOf { abs(have[it].toDouble() - want[it]) }

private fun worstByte(have: ByteBuffer, want: ByteBuffer): Double =
    (0 until have.limit()).maxOf { abs((have[it].toInt() and 255) - (want[it].toInt() and 255)) }.toDouble()
