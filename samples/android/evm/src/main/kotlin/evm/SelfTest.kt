package evm

import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import kotlin.math.abs
import kotlin.math.max

/** Result of one check of a self-test. The check has passed if [error] <= [limit]. */
data class Check(val name: String, val error: Double, val limit: Double) {
    val ok: Boolean get() = error <= limit
}

private const val PROBES = "probes.safetensors"
private const val SCANS = "scans.safetensors"
private val AXES = mapOf(
    "u" to "bKLD", "delta" to "bKLD", "A" to "KDN", "B" to "bKLN", "C" to "bKLN", "skip" to "KD", "bias" to "KD",
    "y" to "bKLD",
)
private const val SCAN_TOLERANCE = 2e-5 // error of y - skip * u, relative to its largest value
private const val ROUNDING = 4 * 1.1920929e-7 // relative rounding error of y in float32, before skip * u is subtracted

/** Runs the self-test, as `evm-run --selftest` does. [open] opens the artifact that contains a single scan. */
internal fun selfTest(
    bundle: Bundle,
    runtime: Runtime,
    decode: (File) -> RgbImage,
    open: (File) -> Runtime,
): List<Check> {
    val manifest = bundle.manifest
    val tensors = read(bundle, PROBES)
    val scans = scans(bundle)
    val checks = mutableListOf<Check>()
    if (manifest.preprocessing.readsImages) checks += imageCheck(bundle, tensors, decode)
    val images = tensors[manifest.input]?.takeIf { it.shape.isNotEmpty() && 0 !in it.shape }
        ?: throw damaged(bundle, PROBES, "has no ${manifest.input}")
    val outputs = runBatched(manifest, runtime, images)
    val wanted = outputs.mapValues { (name, have) -> like(bundle, tensors, have.spec(name)) }
    checks += when (manifest.head) {
        "detections" -> detectionChecks(manifest, outputs, wanted)
        "label_map" -> outputs.flatMap { (name, have) -> labelMapChecks(manifest, name, have, wanted.getValue(name)) }
        else -> outputs.map { (name, have) ->
            Check(name, worst(have.floats(), wanted.getValue(name).floats()), manifest.limits.output(name))
        }
    }
    if (scans.isEmpty()) return checks
    open(bundle.file("selftest/scan.onnx")).use { runtime ->
        for ((name, scan) in scans) checks += scanCheck(bundle, name, runtime, scan)
    }
    return checks
}

private fun imageCheck(bundle: Bundle, tensors: Map<String, Tensor>, decode: (File) -> RgbImage): Check {
    val preprocessing = bundle.manifest.preprocessing
    val rgbImage = preprocessing.pixels(decode(bundle.file("selftest/picture.png")))
    val shape = listOf(rgbImage.height, rgbImage.width, preprocessing.channels)
    val pixels = Tensor.of(shape, preprocessing.bytes(rgbImage))
    val off = worstByte(pixels.bytes(), like(bundle, tensors, pixels.spec("picture.pixels")).bytes())
    return Check("preprocessing (of 255)", off, bundle.manifest.limits.preprocessing)
}

/** Compares the detections of two runs: the share of rows without a pair, and the largest differences of pairs. */
private fun detectionChecks(manifest: Manifest, have: Map<String, Tensor>, want: Map<String, Tensor>): List<Check> {
    val aligned = align(want, have, have.keys.minOf(manifest.limits::output))
    val checks = (have - "count").map { (name, tensor) ->
        val error = if (name == "labels") 0.0 else worstPair(aligned, tensor, want.getValue(name)) // labels of a pair are equal
        Check(name, error, manifest.limits.output(name))
    }
    return listOf(Check("not in common", 1 - aligned.share, manifest.limits.apart)) + checks
}

/** Returns the largest difference of the rows of a pair in a float32 output. */
private fun worstPair(aligned: Aligned, have: Tensor, want: Tensor): Double {
    val (ours, theirs) = want.floats() to have.floats()
    val size = ours.size / (want.shape[0] * want.shape[1])
    val row = { values: FloatArray, at: Int -> values.copyOfRange(at * size, (at + 1) * size) }
    return aligned.pairs.maxOfOrNull { (a, b) -> worst(row(theirs, b), row(ours, a)) } ?: 0.0
}

/** Compares the label maps of a segmenter: the share of pixels that differ. The others are equal. */
private fun labelMapChecks(manifest: Manifest, name: String, have: Tensor, want: Tensor): List<Check> {
    val (ours, theirs) = have.ints() to want.ints()
    val differ = ours.indices.count { ours[it] != theirs[it] }
    val share = Check("not in common", differ.toDouble() / ours.size, manifest.limits.apart)
    return listOf(share, Check(name, 0.0, manifest.limits.output(name)))
}

private fun damaged(bundle: Bundle, file: String, reason: String): BundleException {
    val message = "bundle ${bundle.folder} has no readable self-test: selftest/$file $reason"
    return BundleException(message, "export it again", "selftest.damaged", "selftest/$file")
}

private fun read(bundle: Bundle, name: String): Map<String, Tensor> = try {
    Tensor.read(bundle.file("selftest/$name"))
} catch (error: IOException) {
    throw damaged(bundle, name, "cannot be read: ${error.message}")
} catch (error: RuntimeException) { // any error in the contents of the file
    throw damaged(bundle, name, "cannot be read: ${error.message}")
}

/** Returns the tensor with the name, dtype and shape of [spec]. Throws [BundleException] if there is none. */
private fun like(bundle: Bundle, tensors: Map<String, Tensor>, spec: TensorSpec): Tensor =
    tensors[spec.name]?.takeIf { it.spec(spec.name) == spec }
        ?: throw damaged(bundle, PROBES, "has no ${spec.name} of ${spec.dtype}${spec.shape}")

/** Reads the tensors of each scan: scan -> name -> tensor, in the order of the scans' names. */
private fun scans(bundle: Bundle): Map<String, Map<String, Tensor>> {
    val tensors = read(bundle, SCANS).toSortedMap()
    val scans = tensors.entries.groupBy({ it.key.substringBefore(":") }) { it.key.substringAfter(":") to it.value }
    return scans.mapValues { (name, scan) ->
        scan.toMap().also {
            if (!isScan(it)) throw damaged(bundle, SCANS, "has no scan in the tensors of '$name'")
        }
    }
}

/** Tests whether the tensors have the names, ranks and sizes of one scan. */
private fun isScan(scan: Map<String, Tensor>): Boolean {
    if (scan.mapValues { it.value.shape.size } != AXES.mapValues { it.value.length }) return false
    val sizes = AXES.flatMap { (tensor, axes) -> axes.toList().zip(scan.getValue(tensor).shape) }
    val known = sizes.toMap()
    return sizes.all { (axis, size) -> size > 0 && size == known[axis] } && scan.values.all { it.dtype == "float32" }
}

/**
 * Runs any number of images, batch by batch. For a static batch the last batch is filled up and its outputs are cut.
 * Throws [BundleException] if the outputs have another number of images than the inputs, or sizes that change between
 * batches.
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
    return parts.mapValues { (_, found) -> Tensor.joined(found) }
}

/**
 * Compares y - skip * u of a scan with the expected values, relative to its largest value. The limit includes the rounding
 * of y, which dominates where skip * u is much larger.
 */
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
        ?: throw damaged(bundle, "scan.onnx", "gives no output y of the shape of u")
    return Check("scan $name", worst(y.floats(), want) / largest, limit)
}

/** Returns the largest difference; infinite if a value is NaN or Inf. */
private fun worst(have: FloatArray, want: FloatArray): Double =
    if (have.any { !it.isFinite() }) Double.POSITIVE_INFINITY
    else have.indices.maxOf { abs(have[it].toDouble() - want[it]) }

private fun worstByte(have: ByteBuffer, want: ByteBuffer): Double =
    (0 until have.limit()).maxOf { abs((have[it].toInt() and 255) - (want[it].toInt() and 255)) }.toDouble()
