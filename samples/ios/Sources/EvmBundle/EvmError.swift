// A failure that a user can meet, worded as evm-deploy's own in Python.
// NOT COMPILED BY THIS PROJECT.

/// `hint` is the next thing to do.
public struct EvmError: Error, CustomStringConvertible {
    public enum Kind: Sendable { case bundle, image, usage, toolchain }

    public let kind: Kind
    public let message: String
    public let hint: String

    public init(_ kind: Kind, _ message: String, hint: String = "") {
        self.kind = kind
        self.message = message
        self.hint = hint
    }

    public var description: String { hint.isEmpty ? message : "\(message)\n  \(hint)" }
}
