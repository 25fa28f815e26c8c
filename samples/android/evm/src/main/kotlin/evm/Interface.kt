package evm

/** Reads the class names; empty if the bundle has no labels.txt. Throws [BundleException] if it is not UTF-8 text. */
internal fun labels(bundle: Bundle): List<String> {
    if ("labels.txt" !in bundle.manifest.files) return emptyList()
    try {
        return bundle.file("labels.txt").readBytes().decodeToString(throwOnInvalidSequence = true).reader().readLines()
    } catch (_: CharacterCodingException) {
        val message = "bundle ${bundle.folder}: labels.txt is not UTF-8 text"
        throw BundleException(message, "export it again", "file.damaged", "labels.txt")
    }
}

/**
 * Checks that the model's inputs and outputs match the manifest and the labels. Hashes only prove that each file is
 * intact. Throws [BundleException].
 */
internal fun checkInterface(bundle: Bundle, labels: List<String>, runtime: Runtime) {
    val manifest = bundle.manifest
    val have = runtime.inputs + runtime.outputs
    val want = manifest.inputs + manifest.outputs
    if (have.size != want.size || !have.zip(want).all { (a, b) -> alike(a, b) }) {
        throw unlike(bundle, have.joinToString(), "the manifest says ${want.joinToString()}")
    }
    if (runtime.inputs.size != 1) throw unlike(bundle, have.joinToString(), "the model of a bundle must have one input")
    checkOutputs(bundle, labels, runtime.outputs)
}

/** Checks the outputs of a classifier, a detector or a segmenter; other outputs need no check. Throws [BundleException]. */
internal fun checkOutputs(bundle: Bundle, labels: List<String>, outputs: List<TensorSpec>) {
    val manifest = bundle.manifest
    if (manifest.head == "detections") return checkDetections(bundle, outputs)
    if (manifest.head == "label_map") return checkLabelMap(bundle, outputs)
    if (!manifest.classifies) return
    val scores = outputs.find { it.name == manifest.head }
        ?: throw unlike(bundle, outputs.joinToString(), "a classifier must have the output ${manifest.head}")
    checkScores(bundle, labels, scores)
}

private val DETECTIONS = mapOf(
    "boxes" to ("float32" to 3), "scores" to ("float32" to 2), "labels" to ("int32" to 2), "count" to ("int32" to 1),
    "masks" to ("float32" to 4),
)
private val NEEDED = setOf("boxes", "scores", "labels")

private fun checkDetections(bundle: Bundle, outputs: List<TensorSpec>) {
    val names = outputs.map { it.name }.toSet()
    val known = names == NEEDED || names == NEEDED + "count" || names == DETECTIONS.keys
    if (names.size != outputs.size || !known) {
        val want = "a detector must have boxes, scores, labels and, after its NMS, count, with or without masks"
        throw unlike(bundle, outputs.joinToString(), want)
    }
    for (spec in outputs) {
        val (dtype, rank) = DETECTIONS.getValue(spec.name)
        val shape = spec.shape
        if (spec.dtype != dtype || shape.size != rank || 0 in shape || (spec.name == "boxes" && shape[2] != 4)) {
            throw unlike(bundle, spec.toString(), "a detector must have ${spec.name} of $dtype with $rank axes")
        }
    }
    if (outputs.filter { it.name != "count" }.mapNotNull { it.shape[1] }.toSet().size > 1) {
        throw unlike(bundle, outputs.joinToString(), "a detector must have as many scores and labels as boxes")
    }
}

private fun checkLabelMap(bundle: Bundle, outputs: List<TensorSpec>) {
    val (height, width) = bundle.manifest.preprocessing.run { height to width }
    val map = outputs.singleOrNull { it.dtype == "uint8" || it.dtype == "int32" }
    if (map == null || outputs.size != 1 || !alike(map, TensorSpec("label_map", map.dtype, listOf(null, height, width)))) {
        val want = "a segmenter must have label_map of uint8 or int32[batch, $height, $width]"
        throw unlike(bundle, outputs.joinToString(), want)
    }
}

/** Checks the scores of a classifier: float32 rows, with as many columns as labels. Throws [BundleException]. */
private fun checkScores(bundle: Bundle, labels: List<String>, scores: TensorSpec) {
    if (scores.dtype != "float32" || scores.shape.size != 2 || 0 in scores.shape) {
        throw unlike(bundle, scores.toString(), "a classifier must give rows of float32 scores")
    }
    val classes = scores.shape[1] ?: return
    if (labels.isNotEmpty() && labels.size != classes) {
        throw unlike(bundle, "$classes classes", "labels.txt has ${labels.size}")
    }
}

/** Tests whether two specs agree. An unknown size agrees with any size. */
private fun alike(have: TensorSpec, want: TensorSpec): Boolean =
    have.name == want.name && have.dtype == want.dtype && have.shape.size == want.shape.size &&
        have.shape.zip(want.shape).all { (a, b) -> a == null || b == null || a == b }

private fun unlike(bundle: Bundle, have: String, want: String): BundleException {
    val artifact = bundle.manifest.artifact
    val message = "bundle ${bundle.folder}: $artifact has $have; $want"
    return BundleException(message, "export it again", "model.interface", artifact)
}
