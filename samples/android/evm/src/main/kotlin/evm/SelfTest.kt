package evm

import java.io.File
import java.io.IOException
import kotlin.math.abs
import kotlin.math.max

/** One line of a self-test: [error] against [limit]. */
data class Check(val name: String, val error: Double, val limit: Double) {
    val ok: Boolean get() = error <= limit
}

private val TOLERANCES = mapOf("fp32" to 1e-4, "fp16" to 2e-2)
private val OWN_TOLERANCES = mapOf("int8" to 0.05, "int8-fp16" to 0.05, "w8" to 1e-4) // of the artifact's own outputs
private const val SCAN_TOLERANCE = 2e-5 // of the part that the states give
private const val ROUNDING = 4 * 1.1920929e-7 // of y in float32, before skip * u is taken off

/** As `evm-run --selftest`: [open] loads the scan that is there by itself. */
internal fun selfTest(
    bundle: Bundle,
    runtime: Runtime,
    decode: (File) -> Picture,
    open: (File) -> Runtime,
): List<Check> {
    val manifest = bundle.manifest
    val tensors = read(bundle, "selftest/probes.safetensors")
    val scans = read(bundle, "selftest/scans.safetensors")
    val picture = manifest.preprocessing.pixels(decode(bundle.file("selftest/picture.png")))
    val off = worstByte(picture, tensors.getValue("picture.pixels"))
    val checks = mutableListOf(Check("preprocessing (of 255)", off, 1.0))
    val tolerance = OWN_TOLERANCES[manifest.precision] ?: manifest.tolerance ?: TOLERANCES.getValue(manifest.precision)
    for ((name, have) in outputs(manifest, runtime, tensors.getValue(manifest.input))) {
        val want = tensors.getValue(name).floats()
        checks += Check(name, worst(have, want), tolerance * max(1.0, largest(want)))
    }
    if (scans.isEmpty()) return checks
    open(bundle.file("selftest/scan.onnx")).use { scan ->
        val names = scans.keys.map { it.substringBefore(":") }.distinct().sorted()
        for (name in names) checks += scanCheck(name, scan, scans)
    }
    return checks
}

private fun read(bundle: Bundle, name: String): Map<String, Tensor> = try {
    Tensor.read(bundle.file(name))
} catch (error: IOException) {
    throw BundleException("bundle ${bundle.folder} has no readable self-test: ${error.message}")
} catch (error: RuntimeException) { // whatever is wrong in the file
    throw BundleException("bundle ${bundle.folder} has no readable self-test: ${error.message}")
}

/** Any number of inputs through a runtime whose batch may be fixed: the last batch is filled up and cut. */
private fun outputs(manifest: Manifest, runtime: Runtime, inputs: Tensor): Map<String, FloatArray> {
    val count = inputs.shape[0]
    val size = manifest.batch.max ?: count
    val found = manifest.outputNames.associateWith { mutableListOf<Float>() }
    for (from in 0 until count step size) {
        val until = minOf(from + size, count)
        val outputs = runtime.run(mapOf(manifest.inputName to inputs.rows(from, until, least = manifest.batch.min)))
        for ((name, values) in found) {
            values += outputs.getValue(name).rows(0, until - from, least = 1).floats().asList()
        }
    }
    return found.mapValues { it.value.toFloatArray() }
}

/** The scan's error relative to what its states give, y - skip * u; the limit grows where skip * u dwarfs it. */
private fun scanCheck(name: String, scan: Runtime, scans: Map<String, Tensor>): Check {
    fun tensor(key: String) = scans.getValue("$name:$key")
    val want = tensor("y").floats()
    val u = tensor("u").floats()
    val skip = tensor("skip").floats()
    val (_, directions, steps, channels) = tensor("u").shape
    val skipPart = DoubleArray(u.size) {
        skip[it / (steps * channels) % directions * channels + it % channels].toDouble() * u[it]
    }
    val largest = max(want.indices.maxOf { abs(want[it] - skipPart[it]) }, java.lang.Float.MIN_NORMAL.toDouble())
    val limit = SCAN_TOLERANCE + ROUNDING * skipPart.maxOf(::abs) / largest
    val y = scan.run(INPUTS.associateWith(::tensor)).getValue("y").floats()
    return Check("scan $name", worst(y, want) / largest, limit)
}

private val INPUTS = listOf("u", "delta", "A", "B", "C", "skip", "bias")

/** The largest difference; infinite for another count, and for values that are no numbers. */
private fun worst(have: FloatArray, want: FloatArray): Double =
    if (have.size != want.size || have.any { !it.isFinite() }) Double.POSITIVE_INFINITY
    else have.indices.maxOf { abs(have[it].toDouble() - want[it]) }

private fun worstByte(have: Picture, want: Tensor): Double {
    val bytes = want.bytes()
    if (want.shape != listOf(have.height, have.width, 3)) return Double.POSITIVE_INFINITY
    return have.rgb.indices.maxOf { abs((have.rgb[it].toInt() and 255) - (bytes.get(it).toInt() and 255)) }.toDouble()
}

private fun largest(values: FloatArray): Double = values.maxOf { abs(it.toDouble()) }
