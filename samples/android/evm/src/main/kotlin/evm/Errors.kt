package evm

/**
 * A failure that a user can meet; [hint] is the next thing to do. [code] is its kind, [where] the key path in the
 * manifest or the file in the bundle that is wrong: the same as in Python (docs/bundle.md).
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

/** An image that cannot be read. */
class ImageException(message: String, hint: String = "", code: String = "") : EvmException(message, hint, code)

/** The runtime, or a native library, that does not load or run. */
class ToolchainException(message: String, hint: String = "") : EvmException(message, hint)

/** A value or combination that cannot work. */
class UsageException(message: String, hint: String = "") : EvmException(message, hint)
