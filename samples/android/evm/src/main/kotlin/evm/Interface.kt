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
    if (!manifest.classifies) return
    val scores = runtime.outputs.find { it.name == manifest.head }
        ?: throw unlike(bundle, have.joinToString(), "a classifier must have the output ${manifest.head}")
    checkScores(bundle, labels, scores)
}

/** Checks the scores of a classifier: float32 rows, with as many columns as labels. Throws [BundleException]. */
internal fun checkScores(bundle: Bundle, labels: List<String>, scores: TensorSpec) {
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
