package evm

/** A failure that a user can meet, worded as evm-deploy's own in Python; [hint] is the next thing to do. */
open class EvmException(override val message: String, val hint: String = "") : Exception(message) {
    override fun toString() = if (hint.isEmpty()) message else "$message\n  $hint"
}

/** A bundle that is missing, damaged, or not for this app. */
class BundleException(message: String, hint: String = "") : EvmException(message, hint)

/** A picture that cannot be read. */
class ImageException(message: String, hint: String = "") : EvmException(message, hint)

/** The runtime, or a native library, that does not load or run. */
class ToolchainException(message: String, hint: String = "") : EvmException(message, hint)

/** A value or combination that cannot work. */
class UsageException(message: String, hint: String = "") : EvmException(message, hint)
