package evm

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

private val BYTES = mapOf("uint8" to 1, "int32" to 4, "float32" to 4)
private val SAFETENSORS = mapOf("U8" to "uint8", "I32" to "int32", "F32" to "float32")

/** Name, dtype and shape of an input or output; a dynamic batch is null in [shape]. */
data class TensorSpec(val name: String, val dtype: String, val shape: List<Int?>) {
    override fun toString() = "$name $dtype[${shape.joinToString { it?.toString() ?: "batch" }}]"
}

/** A tensor: [dtype] `uint8`, `int32` or `float32`, [shape], and the values in little-endian order. */
class Tensor(val dtype: String, val shape: List<Int>, private val bytes: ByteBuffer) {
    init {
        val size = shape.fold(BYTES.getValue(dtype).toLong()) { size, side -> size * side }
        require(bytes.remaining().toLong() == size) { "${bytes.remaining()} bytes for $dtype$shape" }
    }

    /** Returns a view of the bytes, with its own position. */
    fun bytes(): ByteBuffer = bytes.duplicate().order(ByteOrder.LITTLE_ENDIAN)

    /** Returns a copy of the values of a float32 tensor. */
    fun floats(): FloatArray = bytes().asFloatBuffer().let { FloatArray(it.remaining()).also(it::get) }

    /** Returns a copy of the values of an int32 or uint8 tensor. */
    fun ints(): IntArray =
        if (dtype == "uint8") bytes().let { IntArray(it.remaining()) { i -> it.get(it.position() + i).toInt() and 255 } }
        else bytes().asIntBuffer().let { IntArray(it.remaining()).also(it::get) }

    /** Returns the spec of the tensor under a name. */
    fun spec(name: String) = TensorSpec(name, dtype, shape)

    /** Returns rows [from] until [until] of the first axis; the last row is repeated until there are [least] rows. */
    fun rows(from: Int, until: Int, least: Int): Tensor {
        val row = bytes.remaining() / shape[0]
        val count = maxOf(until - from, least)
        val out = buffer(count * row)
        for (i in 0 until count) {
            val at = bytes.position() + minOf(from + i, until - 1) * row
            out.put(bytes().apply { position(at).limit(at + row) })
        }
        return Tensor(dtype, listOf(count) + shape.drop(1), out.flip())
    }

    companion object {
        /** Makes a uint8 tensor. */
        fun of(shape: List<Int>, values: ByteArray) = Tensor("uint8", shape, buffer(values.size).put(values).flip())

        /** Makes a float32 tensor. */
        fun of(shape: List<Int>, values: FloatArray): Tensor {
            val bytes = buffer(4 * values.size)
            bytes.asFloatBuffer().put(values)
            return Tensor("float32", shape, bytes)
        }

        /** Makes an int32 tensor. */
        fun of(shape: List<Int>, values: IntArray): Tensor {
            val bytes = buffer(4 * values.size)
            bytes.asIntBuffer().put(values)
            return Tensor("int32", shape, bytes)
        }

        /** Concatenates tensors along the first axis. The parts have the same dtype and the same other axes. */
        internal fun joined(parts: List<Tensor>): Tensor {
            val out = buffer(parts.sumOf { it.bytes.remaining() })
            for (part in parts) out.put(part.bytes())
            return Tensor(parts[0].dtype, listOf(parts.sumOf { it.shape[0] }) + parts[0].shape.drop(1), out.flip())
        }

        /** Allocates a direct buffer, which runtimes read without a copy. */
        private fun buffer(size: Int) = ByteBuffer.allocateDirect(size).order(ByteOrder.LITTLE_ENDIAN)

        /** Reads all tensors of a safetensors file. Throws an IOException or a RuntimeException if the file is damaged. */
        fun read(file: File): Map<String, Tensor> {
            val content = ByteBuffer.wrap(file.readBytes()).order(ByteOrder.LITTLE_ENDIAN)
            val length = content.getLong(0)
            require(length in 0..content.limit() - 8L) { "$file has a header of $length bytes" }
            val data = 8 + length.toInt()
            val header = Value(parsedJson(String(content.array(), 8, length.toInt())))
            return (header.members() - "__metadata__").mapValues { (_, facts) ->
                val dtype = SAFETENSORS[facts.at("dtype").text()]
                facts.at("dtype").require(dtype != null, "one of ${SAFETENSORS.keys.joinToString()}")
                val (from, until) = facts.at("data_offsets").items(2, 2).map { Math.addExact(data, it.number(0.0).toInt()) }
                val bytes = content.duplicate().apply { limit(until).position(from) }.slice()
                Tensor(dtype.orEmpty(), facts.at("shape").items().map { it.number(0.0).toInt() }, bytes)
            }
        }
    }
}
