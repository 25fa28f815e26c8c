package evm

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/** One detected object of an image. [score]: probability, 0..1. [box]: in pixels of the image. */
data class Detection(val label: String, val index: Int, val score: Double, val box: Box)

private const val SAME = 0.5 // intersection over union from which two boxes of a class are the same detection

/**
 * Settings of the selection, for a detector without non-maximum suppression (NMS): of two boxes of a class that overlap by
 * more than [iou], the one with the lower score is dropped. [most]: most detections of an image.
 */
class Selection(val iou: Double, val most: Int)

/** A row of a detector's outputs. [at]: its number in the batch. [box]: x1, y1, x2, y2 in pixels of the network's input. */
internal class Row(val at: Int, val box: FloatArray, val score: Float, val label: Int)

/** Returns the detections of the first image of [outputs], by falling score. Without labels, a class is named `class 7`. */
fun detections(outputs: Map<String, Tensor>, selection: Selection, place: Geometry, labels: List<String>): List<Detection> {
    val rows = clipped(rows(outputs, 0).filter { it.score > 0 }, place)
    val found = if ("count" in outputs) rows else suppressed(rows, selection)
    return found.map {
        val (x1, y1, x2, y2) = it.box.map(Float::toDouble)
        val box = place.toImage(Box(x1, y1, x2, y2))
        Detection(labels.getOrNull(it.label) ?: "class ${it.label}", it.label, it.score.toDouble(), box)
    }
}

/** Returns the rows of [image] that hold a detection, or a candidate if there is no count. */
internal fun rows(outputs: Map<String, Tensor>, image: Int): List<Row> {
    val all = outputs.getValue("boxes").shape[1]
    val boxes = outputs.getValue("boxes").floats()
    val scores = outputs.getValue("scores").floats()
    val labels = outputs.getValue("labels").ints()
    val count = outputs["count"]?.ints()?.get(image) ?: all
    return (image * all until image * all + min(all, count)).filter { labels[it] >= 0 }
        .map { Row(it, boxes.copyOfRange(4 * it, 4 * it + 4), scores[it], labels[it]) }
}

/** Clips boxes to the part of the input that shows the image, and leaves out those that become empty. */
private fun clipped(rows: List<Row>, place: Geometry): List<Row> = rows.map {
    val box = FloatArray(4) { side ->
        val axis = if (side % 2 == 0) place.horizontal else place.vertical
        min(max(it.box[side], axis.first.toFloat()), axis.end.toFloat())
    }
    Row(it.at, box, it.score, it.label)
}.filter { it.box[2] > it.box[0] && it.box[3] > it.box[1] }

/** Greedy non-maximum suppression of each class, in float32 as in Python: boxes of different classes are shifted apart. */
private fun suppressed(rows: List<Row>, selection: Selection): List<Row> {
    val largest = rows.fold(0f) { most, row -> max(most, row.box.max()) }
    val step = (largest.toDouble() + 1).toFloat()
    val limit = selection.iou.toFloat()
    val apart = rows.map { row -> FloatArray(4) { row.box[it] + row.label.toFloat() * step } }
    val kept = mutableListOf<Int>()
    for (index in rows.indices.sortedByDescending { rows[it].score }) {
        if (kept.size == selection.most) break
        if (kept.none { overlap(apart[it], apart[index]) > limit }) kept += index
    }
    return kept.map(rows::get)
}

/** Returns the intersection over union of two boxes; 0 for empty boxes. */
private fun overlap(a: FloatArray, b: FloatArray): Float {
    val width = max(min(a[2], b[2]) - max(a[0], b[0]), 0f)
    val height = max(min(a[3], b[3]) - max(a[1], b[1]), 0f)
    val inter = width * height
    val union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / (if (union > 0) union else 1f)
}

/** Two runs of a detector on the same images: [share], 0..1, of the rows are in a pair; [pairs] has the rows' numbers. */
internal class Aligned(val share: Double, val pairs: List<Pair<Int, Int>>)

/**
 * Pairs the rows of two runs that are the same detection: the same label, an overlap of at least SAME, and scores and
 * corners that agree within the [tolerance], that of corners relative to the largest. The nearest pairs come first. Rows
 * whose score is within the tolerance of nothing do not count.
 */
internal fun align(expected: Map<String, Tensor>, actual: Map<String, Tensor>, tolerance: Double): Aligned {
    val pairs = mutableListOf<Pair<Int, Int>>()
    val counts = { row: Row -> if (row.score <= tolerance) 0 else 1 } // NaN counts
    var paired = 0
    var count = 0
    for (image in 0 until expected.getValue("boxes").shape[0]) {
        val ours = rows(expected, image)
        val theirs = rows(actual, image)
        count += (ours + theirs).sumOf(counts)
        val taken = mutableSetOf<Row>()
        for ((a, b) in nearest(ours, theirs, tolerance)) {
            if (a in taken || b in taken) continue
            taken += listOf(a, b)
            paired += counts(a) + counts(b)
            pairs += a.at to b.at
        }
    }
    return Aligned(if (count > 0) paired.toDouble() / count else 1.0, pairs)
}

/** Returns every two rows that may be the same detection, the nearest first. */
private fun nearest(ours: List<Row>, theirs: List<Row>, tolerance: Double): List<Pair<Row, Row>> {
    val largest = ours.flatMap { it.box.asList() }.fold(1.0) { most, side -> max(most, abs(side.toDouble())) }
    val found = mutableListOf<Pair<Double, Pair<Row, Row>>>()
    for (a in ours) for (b in theirs) {
        val apart = abs(a.score.toDouble() - b.score)
        val share = overlap(a.box, b.box)
        val near = a.box.indices.all { abs(a.box[it].toDouble() - b.box[it]) <= tolerance * largest }
        if (a.label == b.label && share >= SAME && apart <= tolerance && near) found += (apart - share) to (a to b)
    }
    return found.sortedBy { it.first }.map { it.second }
}
