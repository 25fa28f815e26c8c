package evm.sample

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import ai.onnxruntime.ValueInfo
import evm.BundleException
import evm.Runtime
import evm.Runtimes
import evm.Tensor
import evm.TensorSpec
import evm.ToolchainException
import java.io.File

private val TYPES = mapOf("uint8" to OnnxJavaType.UINT8, "int32" to OnnxJavaType.INT32, "float32" to OnnxJavaType.FLOAT)

/** Opens artifacts in ONNX Runtime on the CPU. [threads]: threads of one inference, null for the default. */
class OnnxRuntimes(private val threads: Int? = null) : Runtimes {
    override fun open(artifact: File, library: File?): Runtime {
        val options = OrtSession.SessionOptions()
        threads?.let(options::setIntraOpNumThreads)
        try {
            library?.let { options.registerCustomOpLibrary(it.path) }
        } catch (error: OrtException) {
            throw ToolchainException("ONNX Runtime refuses $library: ${error.message}")
        }
        try {
            return Session(OrtEnvironment.getEnvironment(), artifact, options)
        } catch (error: OrtException) {
            throw BundleException("ONNX Runtime cannot open the model: ${error.message}")
        }
    }
}

/** An ONNX Runtime session. It owns [options], which must live as long as the session. */
private class Session(
    private val environment: OrtEnvironment,
    artifact: File,
    private val options: OrtSession.SessionOptions,
) : Runtime {
    private val session = environment.createSession(artifact.path, options)
    override val inputs = session.inputInfo.map { (name, node) -> spec(name, node.info) }
    override val outputs = session.outputInfo.map { (name, node) -> spec(name, node.info) }

    override fun run(feeds: Map<String, Tensor>): Map<String, Tensor> {
        val inputs = mutableMapOf<String, OnnxTensor>()
        try {
            for ((name, tensor) in feeds) inputs[name] = native(tensor)
            session.run(inputs).use { results ->
                return results.associate { (name, value) -> name to ours(value as OnnxTensor) }
            }
        } catch (error: OrtException) {
            throw ToolchainException("ONNX Runtime failed: ${error.message}")
        } finally {
            inputs.values.forEach(OnnxTensor::close)
        }
    }

    override fun close() {
        session.close()
        options.close()
    }

    private fun spec(name: String, info: ValueInfo): TensorSpec {
        if (info !is TensorInfo) return TensorSpec(name, "no tensor", emptyList())
        val dtype = TYPES.entries.find { it.value == info.type }?.key ?: info.type.name.lowercase()
        return TensorSpec(name, dtype, info.shape.map { if (it < 0) null else it.toInt() })
    }

    private fun native(tensor: Tensor): OnnxTensor {
        val shape = LongArray(tensor.shape.size) { tensor.shape[it].toLong() }
        return OnnxTensor.createTensor(environment, tensor.bytes(), shape, TYPES.getValue(tensor.dtype))
    }

    private fun ours(tensor: OnnxTensor): Tensor {
        val dtype = TYPES.entries.find { it.value == tensor.info.type }?.key
            ?: throw BundleException("the model gives ${tensor.info.type}, not ${TYPES.keys.joinToString()}")
        return Tensor(dtype, tensor.info.shape.map { it.toInt() }, tensor.byteBuffer)
    }
}
