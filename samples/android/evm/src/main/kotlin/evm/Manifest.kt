package evm

import java.io.File
import java.io.IOException
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject

const val MANIFEST = "manifest.json"
private const val SCHEMA_VERSION = 1
private const val MAX_BYTES = 4 shl 20
private const val MAX_DETECTIONS = 1000L

/** The parts of manifest.json that an app uses. [files]: path -> sha256. [plugins]: platform -> native library. */
class Manifest private constructor(json: Value) {
    private val plan = json.at("plan")
    private val scan = json.at("scan")
    val name = json.at("name").text()
    val target = json.at("target").text()
    val artifact = json.at("artifact").text()
    val head = plan.at("head").oneOf("logits", "probs", "features", "raw", "detections", "label_map")

    /** Whether the model is a classifier: one output holds a score for each class. */
    val classifies = head == "logits" || head == "probs"

    /** Selection of a detector. */
    val selection = selection(plan)
    val input = plan.at("input").oneOf("image", "tensor")
    val batch = Batch.of(plan.at("batch"))
    val precision = plan.at("precision").text()
    val preprocessing = Preprocessing.of(json.at("preprocessing"))
    val inputs = specs(json.at("inputs"))
    val outputs = specs(json.at("outputs"))
    val files = json.at("files").members().mapValues { (name, facts) -> checkedHash(name, facts) }
    val scanModes = scan.at("value").text().split("+")
    val plugins = scan.at("plugins").let { if (it.isNull) emptyMap() else it.members().mapValues(::plugin) }
    val built = json.at("built").flag(true)
    val rejected = json.at("rejected").flag(false)
    val failures = json.at("parity").at("failures").let { if (it.isAbsent) emptyList() else it.items().map(Value::text) }
    internal val limits = Limits(json.at("parity"), json.at("selftest"))

    init {
        json.at("artifact").require(files.keys.any { it == artifact || it.startsWith("$artifact/") }, "among the files")
    }

    private fun plugin(entry: Map.Entry<String, Value>): String =
        entry.value.text().also { entry.value.require(it in files, "among the files") }

    companion object {
        /** Reads and checks [bundle]/manifest.json. Throws [BundleException]. */
        fun read(bundle: File): Manifest {
            val path = File(bundle, MANIFEST)
            if (!path.exists()) {
                val message = "$bundle is not a bundle: no $MANIFEST inside"
                throw BundleException(message, "make one with evm-export", "manifest.missing")
            }
            if (path.length() > MAX_BYTES) throw damaged("$path is larger than $MAX_BYTES bytes: not a manifest")
            val json = Value(parsed(path) as? JsonObject ?: throw damaged("$path is not a JSON object"))
            try {
                val version = json.at("schema_version").count()
                if (version > SCHEMA_VERSION) {
                    val message = "$bundle has manifest schema $version; this app reads versions up to $SCHEMA_VERSION"
                    val hint = "use the evm module of a newer evm-deploy"
                    throw BundleException(message, hint, "manifest.version", "schema_version")
                }
                return Manifest(json)
            } catch (error: Invalid) {
                val message = "$path is not a valid manifest: ${error.message}"
                throw BundleException(message, "export the bundle again", "manifest.invalid", error.where)
            }
        }

        private fun parsed(path: File): JsonElement = try {
            parsedJson(path.readText())
        } catch (error: IOException) {
            throw BundleException("$path cannot be read: ${error.message}", code = "manifest.missing")
        } catch (error: IllegalArgumentException) {
            throw damaged("$path is damaged: ${error.message}")
        }

        private fun damaged(message: String) = BundleException(message, "export the bundle again", "manifest.damaged")
    }
}

/** Limits of the self-test. Older bundles state none: the limit is then 1 of 255 for pixels, and the parity's for outputs. */
internal class Limits(parity: Value, selftest: Value) {
    private val told = selftest.takeIf { !it.isAbsent && it.members().isNotEmpty() }
    private val otherwise = parity.at("limit").number(0.0)
    private val outputs = limits("outputs")
    private val scans = limits("scans")
    val preprocessing = told?.at("preprocessing")?.number(0.0) ?: 1.0
    val apart = told?.at("apart")?.takeIf { !it.isAbsent }?.number(0.0) ?: 0.0

    fun output(name: String): Double = outputs[name] ?: otherwise

    fun scan(name: String): Double? = scans[name]

    private fun limits(key: String) = told?.at(key)?.members().orEmpty().mapValues { it.value.number(0.0) }
}

/** Reads the settings of a detector's selection. Other bundles have null, older ones nothing. */
private fun selection(plan: Value): Selection {
    val (iou, most) = plan.at("iou") to plan.at("max_det")
    return Selection(
        if (iou.isNull) 0.5 else iou.positive(1.0),
        if (most.isNull) 100 else most.count(MAX_DETECTIONS).toInt(),
    )
}

/** Number of images in one inference: [min] to [max]; [max] is null for any number. */
class Batch private constructor(val min: Int, val max: Int?) {
    companion object {
        internal fun of(value: Value): Batch {
            val text = value.text()
            if (text == "dynamic") return Batch(1, null)
            val parts = text.split(":").map { if (it.matches(Regex("[0-9]{1,5}"))) it.toInt() else 0 }
            val ordered = parts.size in setOf(1, 3) && parts.first() >= 1 && parts == parts.sorted()
            value.require(ordered, "a number from 1, dynamic, or min:opt:max such as 1:4:8")
            return Batch(parts.first(), parts.last())
        }
    }
}

/** Names that leave the bundle, or are a device, another file or no name on Windows. The JSON schema has the same pattern. */
private val LEAVES = Regex(
    """^$|^/|[\x00-\x1f<>:"|?*\\]|(^|/)(?!\.(/|$))[^/]*[. ](/|$)""" +
        """|(^|/)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.[^/]*)?(/|$)""",
    RegexOption.IGNORE_CASE,
)

/** Tests whether a file name, from a manifest or a zip, is a file inside the bundle on every system. */
internal fun insideBundle(name: String): Boolean = !LEAVES.containsMatchIn(name)

private fun checkedHash(name: String, facts: Value): String {
    if (!insideBundle(name)) throw Invalid(facts.where, "leaves the bundle")
    val hash = facts.at("sha256")
    hash.require(hash.text().matches(Regex("[0-9a-f]{64}")), "a sha256")
    return hash.text()
}

private fun specs(value: Value): List<TensorSpec> = value.items(least = 1).map { each ->
    val shape = each.at("shape").items(least = 1).map { if (it.isNull) null else it.count(Int.MAX_VALUE.toLong()).toInt() }
    TensorSpec(each.at("name").text(), each.at("dtype").text(), shape)
}
