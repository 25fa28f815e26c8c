package evm

import java.io.File
import java.io.IOException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.int
import kotlinx.serialization.json.intOrNull
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive

const val MANIFEST = "manifest.json"
private const val SCHEMA_VERSION = 1
private const val MAX_BYTES = 4 shl 20
private val HEADS = listOf("logits", "probs", "features")
private val INPUTS = listOf("image", "tensor")

/** What an app needs of manifest.json. [files]: path -> sha256. [plugins]: platform -> native library in the bundle. */
class Manifest private constructor(json: JsonObject) {
    private val plan = json.child("plan")
    private val scan = json.child("scan")
    val name = json.text("name")
    val target = json.text("target")
    val artifact = json.text("artifact")
    val head = oneOf("--head", plan.text("head"), HEADS)
    val input = oneOf("--input", plan.text("input"), INPUTS)
    val batch = Batch.parse(plan.text("batch"))
    val precision = plan.text("precision")
    val preprocessing = Preprocessing.of(json.child("preprocessing"))
    val inputs = json.specs("inputs")
    val outputs = json.specs("outputs")
    val files = json.child("files").let { files -> files.keys.associateWith { checkedHash(it, files.child(it)) } }
    val scanModes = scan.text("value").split("+")
    val plugins = scan["plugins"]?.jsonObject.orEmpty().mapValues { it.value.jsonPrimitive.content }
    val built = json["built"] != JsonPrimitive(false)
    val rejected = json["rejected"] == JsonPrimitive(true)
    val failures = json.child("parity").let { if ("failures" in it) it.list("failures") else emptyList() }
    internal val limits = Limits(json.child("parity"), json["selftest"] ?: JsonObject(emptyMap()))

    init {
        require(files.keys.any { it == artifact || it.startsWith("$artifact/") }) {
            "the artifact '$artifact' is not among the files"
        }
        for (library in plugins.values) require(library in files) {
            "the native library '$library' is not among the files"
        }
    }

    companion object {
        /** Reads and validates [bundle]/manifest.json. Throws [BundleException]. */
        fun read(bundle: File): Manifest {
            val path = File(bundle, MANIFEST)
            if (!path.exists()) {
                throw BundleException("$bundle is not a bundle: it has no $MANIFEST", "make one with evm-export")
            }
            if (path.length() > MAX_BYTES) {
                throw BundleException("$path is larger than $MAX_BYTES bytes: not a manifest")
            }
            val json = parsed(path) as? JsonObject ?: throw BundleException("$path is not a JSON object")
            val version = (json["schema_version"] as? JsonPrimitive)?.takeIf { !it.isString }?.intOrNull ?: 0
            if (version < 1) throw BundleException("$path has no schema_version")
            if (version > SCHEMA_VERSION) {
                val message = "$bundle has manifest schema $version, this evm-deploy reads up to $SCHEMA_VERSION"
                throw BundleException(message, "upgrade: take the evm module of a newer evm-deploy")
            }
            try {
                return Manifest(json)
            } catch (error: Exception) { // an untrusted file: whatever is wrong in it, it is the manifest's fault
                throw BundleException("$path is not a valid manifest: ${said(error)}", "export the bundle again")
            }
        }

        private fun parsed(path: File): JsonElement = try {
            parsedJson(path.readText())
        } catch (error: IOException) {
            throw BundleException("$path cannot be read: ${error.message}")
        } catch (error: IllegalArgumentException) {
            throw BundleException("$path is damaged: ${error.message}", "export the bundle again")
        }

        private fun said(error: Exception) = if (error is EvmException) error.toString() else error.message
    }
}

/** Limits of the self-test; in bundles from before limits were data, 1 of 255 for pixels, and that of the parity. */
internal class Limits(parity: JsonObject, selftest: JsonElement) {
    private val told = selftest.jsonObject.takeIf { it.isNotEmpty() }
    private val otherwise = parity.limit("limit")
    private val outputs = told?.limits("outputs").orEmpty()
    private val scans = told?.limits("scans").orEmpty()
    val preprocessing = told?.limit("preprocessing") ?: 1.0

    fun output(name: String): Double = outputs[name] ?: otherwise

    fun scan(name: String): Double? = scans[name]

    private fun JsonObject.limits(key: String) = child(key).let { by -> by.keys.associateWith { by.limit(it) } }

    private fun JsonObject.limit(key: String): Double = number(key).also {
        require(it >= 0 && it.isFinite()) { "$key must be a finite number from 0, is ${text(key)}" }
    }
}

/** Pictures per inference: [min] to [max], null for any number. */
class Batch private constructor(val min: Int, val max: Int?) {
    companion object {
        fun parse(text: String): Batch {
            if (text == "dynamic") return Batch(1, null)
            val parts = text.split(":").map { it.toIntOrNull() ?: 0 }
            val ordered = parts.size in setOf(1, 3) && parts.first() >= 1 && parts == parts.sorted()
            if (ordered) return Batch(parts.first(), parts.last())
            throw UsageException("--batch '$text': use a number from 1, 'dynamic', or min:opt:max such as 1:4:8")
        }
    }
}

/** Whether a file's name, in a manifest or a zip, stays inside the bundle on every system. */
internal fun insideBundle(name: String): Boolean =
    name.isNotEmpty() && !name.startsWith("/") && ".." !in name.split("/") && name.none { it in "\\:\u0000" }

private fun checkedHash(name: String, facts: JsonObject): String {
    require(insideBundle(name)) { "file name '$name' leaves the bundle" }
    return requireNotNull(facts.text("sha256").takeIf(Regex("[0-9a-f]{64}")::matches)) { "$name has no sha256" }
}

private fun oneOf(what: String, value: String, choices: List<String>): String {
    if (value in choices) return value
    throw UsageException("$what '$value' is unknown; choose from: ${choices.joinToString()}")
}

/** Throws IllegalArgumentException for what is no JSON. */
internal fun parsedJson(text: String): JsonElement = try {
    Json.parseToJsonElement(text)
} catch (_: StackOverflowError) { // the parser's, in a file made for that
    throw IllegalArgumentException("nested too deeply")
}

private inline fun <reified T : JsonElement> JsonObject.get(key: String, what: String): T =
    requireNotNull(this[key] as? T) { "it has no $what '$key'" }

internal fun JsonObject.child(key: String): JsonObject = get(key, "object")

/** A string, or a number as it stands there. */
internal fun JsonObject.text(key: String): String = get<JsonPrimitive>(key, "value").content

internal fun JsonObject.number(key: String): Double = text(key).toDouble()

internal fun JsonObject.list(key: String): List<String> =
    get<JsonArray>(key, "list").map { it.jsonPrimitive.content }

private fun JsonObject.specs(key: String): List<TensorSpec> = get<JsonArray>(key, "list").map { each ->
    val sizes = each.jsonObject.get<JsonArray>("shape", "list")
    val shape = sizes.map { if (it is JsonNull) null else it.jsonPrimitive.int }
    require(shape.all { it == null || it > 0 }) { "$key has a shape $shape" }
    TensorSpec(each.jsonObject.text("name"), each.jsonObject.text("dtype"), shape)
}.also { require(it.isNotEmpty()) { "it has no $key" } }
