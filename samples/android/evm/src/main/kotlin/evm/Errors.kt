package evm

/**
 * Base class of all expected errors. [hint]: the next step for the user. [code]: the code of the error. [where]: the key
 * path in the manifest, or the file in the bundle, that is wrong. Code and place are the same as in Python
 * (docs/bundle.md).
 */
open class EvmException(
    override val message: String,
    val hint: String = "",
    val code: String = "",
    val where: String = "",
) : Exception(message) {
    override fun toString() = if (hint.isEmpty()) message else "$message\n  $hint"
}

/** A bundle that is missing, damaged, or not for this app. */
class BundleException(message: String, hint: String = "", code: String = "", where: String = "") :
    EvmException(message, hint, code, where)

/** An image that cannot be read or cropped. */
class ImageException(message: String, hint: String = "", code: String = "") : EvmException(message, hint, code)

/** A runtime or native library that does not load or run. */
class ToolchainException(message: String, hint: String = "") : EvmException(message, hint)

/** An invalid value or combination of values. */
class UsageException(message: String, hint: String = "") : EvmException(message, hint)
