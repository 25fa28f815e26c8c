// Expected errors of the package. Code and place are the same as in Python (docs/bundle.md).

/// An expected error. `hint`: the next step for the user. `code`: the code of the error. `place`: the key path in the
/// manifest, or the file in the bundle, that is wrong.
public struct EvmError: Error, CustomStringConvertible {
    public enum Kind: Sendable { case bundle, image, usage, toolchain }

    public let kind: Kind
    public let message: String
    public let hint: String
    public let code: String
    public let place: String

    public init(_ kind: Kind, _ message: String, hint: String = "", code: String = "", place: String = "") {
        self.kind = kind
        self.message = message
        self.hint = hint
        self.code = code
        self.place = place
    }

    public var description: String { hint.isEmpty ? message : "\(message)\n  \(hint)" }
}
