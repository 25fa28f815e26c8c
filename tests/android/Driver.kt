// What tests/test_android.py runs on the JVM: a JSON request a line on standard input, a JSON answer a line back.
import evm.Detection
import evm.EvmException
import evm.Geometry
import evm.LabelMap
import evm.Manifest
import evm.Model
import evm.RgbImage
import evm.Preprocessing
import evm.Runtime
import evm.Runtimes
import evm.Selection
import evm.Tensor
import evm.Value
import evm.detections
import evm.orientation
import evm.unpack
import java.awt.image.IndexColorModel
import java.io.File
import java.util.Base64
import javax.imageio.ImageIO
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put

fun main() {
    for (line in generateSequence(::readlnOrNull)) {
        val request = Json.parseToJsonElement(line) as JsonObject
        println(answer(request))
        System.out.flush()
    }
}

private fun answer(request: JsonObject): JsonElement = try {
    when (request.string("do")) {
        "pixels" -> pixels(request)
        "orientation" -> JsonPrimitive(orientation(Base64.getDecoder().decode(request.string("file"))))
        "read" -> Manifest.read(File(request.string("bundle"))).let { JsonPrimitive(it.name) }
        "open" -> opened(File(request.string("bundle")), File(request.string("model")))
        "library" -> library(File(request.string("bundle")), request.string("platform"))
        "unpack" -> unpack(File(request.string("zip")), File(request.string("into"))).let { opened(it, it) }
        "classify" -> classified(request)
        "predict" -> predicted(request)
        "predictions" -> predictions(request.getValue("cases") as JsonObject)
        "feed" -> fed(File(request.string("bundle")))
        "selftest" -> selfTested(request)
        else -> error("no such request")
    }
} catch (failure: EvmException) {
    buildJsonObject {
        put("kind", failure.javaClass.simpleName)
        put("code", failure.code)
        put("where", failure.where)
        put("error", failure.message)
    }
}

private fun pixels(request: JsonObject): JsonElement {
    val preprocessing = Preprocessing.of(Value(request["preprocessing"]))
    val rgbImage = decoded(File(request.string("image")))
    val pixels = preprocessing.pixels(rgbImage)
    val shape = listOf(preprocessing.channels, pixels.height, pixels.width)
    return buildJsonObject {
        put("image", numbers(listOf(rgbImage.width, rgbImage.height)))
        put("size", numbers(listOf(pixels.width, pixels.height)))
        put("rgb", Base64.getEncoder().encodeToString(preprocessing.bytes(pixels)))
        put("normalised", Base64.getEncoder().encodeToString(bytes(Tensor.of(shape, preprocessing.normalised(pixels)))))
    }
}

/** `folder` with the model of the bundle `model`. */
private fun opened(folder: File, model: File): JsonElement {
    Model.load(folder, { _, _ -> Computed(model) { emptyMap() } }).use {
        return buildJsonObject { put("opened", it.bundle.manifest.artifact) }
    }
}

/** The name of the library that the runtime of `folder` gets on `platform`. */
private fun library(folder: File, platform: String): JsonElement {
    var given: File? = null
    val runtimes = Runtimes { _, library -> Computed(folder) { emptyMap() }.also { given = library } }
    return Model.load(folder, runtimes, platform).use { model ->
        check(model.library == given)
        JsonPrimitive(given?.relativeTo(folder)?.path)
    }
}

/** Images through the model, whose outputs are those of the file `outputs`, row by row. */
private fun classified(request: JsonObject): JsonElement {
    val scores = Tensor.read(File(request.string("outputs")))
    val count = scores.values.first().shape[0]
    var next = 0
    val bundle = File(request.string("bundle"))
    val runtime = Computed(bundle) { scores.mapValues { (_, tensor) -> tensor.rows(next, next + 1, least = 1) } }
    Model.load(bundle, { _, _ -> runtime }).use { model ->
        val pixels = model.pixels(decoded(File(bundle, "selftest/picture.png")))
        return JsonArray(List(count) {
            next = it
            JsonArray(model.classify(pixels, request.string("top").toInt()).map { found ->
                buildJsonObject {
                    put("label", found.label)
                    put("index", found.index)
                    put("score", found.score)
                }
            })
        })
    }
}

/** The detections or the label map of an image, whose outputs are those of the file `outputs`. */
private fun predicted(request: JsonObject): JsonElement {
    val bundle = File(request.string("bundle"))
    val outputs = Tensor.read(File(request.string("outputs")))
    Model.load(bundle, { _, _ -> Computed(bundle) { outputs } }).use { model ->
        val image = decoded(File(request.string("image")))
        if (model.bundle.manifest.head == "label_map") return labels(model.segment(image))
        return JsonArray(model.detect(image).map(::shown))
    }
}

private fun shown(found: Detection) = buildJsonObject {
    put("label", found.label)
    put("index", found.index)
    put("score", found.score)
    put("box", JsonArray(found.box.run { listOf(x1, y1, x2, y2) }.map { JsonPrimitive(it) }))
}

private fun labels(map: LabelMap) =
    JsonArray(List(map.height) { y -> numbers(List(map.width) { x -> map.at(x, y) }) })

/** The cases of sdk/vectors/predictions.json. */
private fun predictions(cases: JsonObject): JsonElement = buildJsonObject {
    put("detections", JsonArray((cases["detections"] as JsonArray).map { detected(it as JsonObject) }))
    put("label_maps", JsonArray((cases["label_maps"] as JsonArray).map { segmented(it as JsonObject) }))
}

private fun place(case: JsonObject): Geometry {
    val (height, width) = (case["image"] as JsonArray).map { it.toString().toInt() }
    return Preprocessing.of(Value(case["preprocessing"])).geometry(RgbImage(width, height, ByteArray(3 * width * height)))
}

private fun detected(case: JsonObject): JsonElement {
    val outputs = case["outputs"] as JsonObject
    val values = outputs.mapValues { (_, value) -> flat(value) }
    val rows = values.getValue("scores").size
    val tensors = buildMap {
        put("boxes", Tensor.of(listOf(1, rows, 4), floats(values.getValue("boxes"))))
        put("scores", Tensor.of(listOf(1, rows), floats(values.getValue("scores"))))
        put("labels", Tensor.of(listOf(1, rows), ints(values.getValue("labels"))))
        values["count"]?.let { put("count", Tensor.of(listOf(1), ints(it))) }
    }
    val selection = Selection(case.string("iou").toDouble(), case.string("max_det").toInt())
    val place = place(case)
    val found = detections(tensors, selection, place, emptyList())
    return buildJsonObject {
        put("resized", numbers(place.run { listOf(vertical.resized, horizontal.resized) }))
        put("offset", numbers(place.run { listOf(vertical.offset, horizontal.offset) }))
        put("boxes", JsonArray(found.map { shown(it).getValue("box") }))
        put("scores", JsonArray(found.map { JsonPrimitive(it.score) }))
        put("labels", numbers(found.map { it.index }))
    }
}

private fun segmented(case: JsonObject): JsonElement {
    val values = ints(flat(case.getValue("map")))
    val (height, width) = ((case["preprocessing"] as JsonObject)["size"] as JsonArray).map { it.toString().toInt() }
    val shape = listOf(1, height, width)
    val tensor = if (case.string("dtype") == "int32") Tensor.of(shape, values)
    else Tensor.of(shape, ByteArray(values.size) { values[it].toByte() })
    return labels(place(case).toImage(tensor.ints()))
}

private fun flat(value: JsonElement): List<Double> =
    if (value is JsonArray) value.flatMap(::flat) else listOf((value as JsonPrimitive).content.toDouble())

private fun floats(values: List<Double>) = FloatArray(values.size) { values[it].toFloat() }

private fun ints(values: List<Double>) = IntArray(values.size) { values[it].toInt() }

/** What the runtime is given for the self-test's image. */
private fun fed(bundle: File): JsonElement {
    var given: Map.Entry<String, Tensor>? = null
    val runtime = Computed(bundle) { feeds ->
        given = feeds.entries.single()
        val count = feeds.values.single().shape[0]
        mapOf("logits" to Tensor.of(listOf(count, 10), FloatArray(10 * count)))
    }
    Model.load(bundle, { _, _ -> runtime }).use { it.classify(it.pixels(decoded(File(bundle, "selftest/picture.png")))) }
    val (name, tensor) = requireNotNull(given)
    return buildJsonObject {
        put("name", name)
        put("dtype", tensor.dtype)
        put("shape", numbers(tensor.shape))
        put("bytes", Base64.getEncoder().encodeToString(bytes(tensor)))
    }
}

/** The self-test with a runtime that answers what the bundle `model` expects, but for what `spoil` names. */
private fun selfTested(request: JsonObject): JsonElement {
    val bundle = File(request.string("bundle"))
    val good = File(request.string("model"))
    val spoil = request.string("spoil")
    val probes = recorded(good, spoil)
    Model.load(bundle, { file, _ -> if (file.name.startsWith("scan")) scans(good, spoil) else probes }).use { model ->
        val turn = if (spoil == "turned") 3 else 1
        return JsonArray(model.selfTest { decoded(it).upright(turn) }.map { check ->
            buildJsonObject {
                put("name", check.name)
                put("error", check.error.toString())
                put("limit", check.limit)
                put("ok", check.ok)
            }
        })
    }
}

/** With the inputs and outputs that the manifest of `bundle` tells. */
private class Computed(bundle: File, private val compute: (Map<String, Tensor>) -> Map<String, Tensor>) : Runtime {
    private val manifest by lazy { Manifest.read(bundle) }
    override val inputs get() = manifest.inputs
    override val outputs get() = manifest.outputs

    override fun run(feeds: Map<String, Tensor>) = compute(feeds)

    override fun close() = Unit
}

/** Answers the rows of the self-test's tensors that belong to the rows it is fed. */
private fun recorded(bundle: File, spoil: String): Runtime {
    val tensors = Tensor.read(File(bundle, "selftest/probes.safetensors"))
    return Computed(bundle) { feeds ->
        val (name, fed) = feeds.entries.single()
        val all = tensors.getValue(name)
        val row = (0 until all.shape[0]).first { all.rows(it, it + 1, 1).bytes() == fed.rows(0, 1, 1).bytes() }
        val until = minOf(row + fed.shape[0], all.shape[0])
        tensors.filterValues { it.shape[0] == all.shape[0] }
            .mapValues { (key, tensor) -> spoilt(tensor.rows(row, until, least = fed.shape[0]), key == spoil) }
    }
}

/** Answers the y of the scan whose u it is fed. */
private fun scans(bundle: File, spoil: String): Runtime {
    val tensors = Tensor.read(File(bundle, "selftest/scans.safetensors"))
    return Computed(bundle) { feeds ->
        val fed = feeds.getValue("u").bytes()
        val name = tensors.keys.first { it.endsWith(":u") && tensors.getValue(it).bytes() == fed }
        val y = name.removeSuffix(":u") + ":y"
        mapOf("y" to spoilt(tensors.getValue(y), y == spoil))
    }
}

/** One value of a float tensor off by five per cent of the largest: more than float16 may be. */
private fun spoilt(tensor: Tensor, really: Boolean): Tensor {
    if (!really) return tensor
    val values = tensor.floats()
    values[values.size / 2] += 0.05f * maxOf(1f, values.max())
    return Tensor.of(tensor.shape, values)
}

/** javax.imageio in the place of Android's decoder: alpha dropped, grey repeated, 16 bits cut to 8. */
private fun decoded(file: File): RgbImage {
    val image = ImageIO.read(file)
    val raster = image.raster
    val bits = raster.sampleModel.getSampleSize(0)
    val grey = raster.numBands < 3 && image.colorModel !is IndexColorModel
    val rgb = ByteArray(3 * image.width * image.height)
    val row = IntArray(image.width)
    for (y in 0 until image.height) {
        if (!grey) image.getRGB(0, y, image.width, 1, row, 0, image.width)
        for (x in row.indices) {
            val value = if (grey) 0x010101 * (raster.getSample(x, y, 0) shr (bits - 8)) else row[x]
            for (channel in 0..2) rgb[3 * (y * image.width + x) + channel] = (value shr (16 - 8 * channel)).toByte()
        }
    }
    return RgbImage(image.width, image.height, rgb).upright(orientation(file.readBytes()))
}

private fun bytes(tensor: Tensor): ByteArray = tensor.bytes().let { ByteArray(it.remaining()).also(it::get) }

private fun numbers(values: List<Int>) = JsonArray(values.map { JsonPrimitive(it) })

private fun JsonObject.string(key: String) = (getValue(key) as JsonPrimitive).content
